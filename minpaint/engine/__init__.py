"""Running the networks within a budget, and faster than they are written."""
