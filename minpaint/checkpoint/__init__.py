"""Checkpoints: finding files, checking them, and putting every tensor in its place."""
