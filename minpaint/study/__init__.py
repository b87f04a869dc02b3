"""Tools to study and check the networks with; nothing that paints needs them."""
