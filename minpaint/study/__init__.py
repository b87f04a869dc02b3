"""Tools for seeing inside a run; only the command line and Painter.watch open them, and only when asked."""
