"""Exercises of READING.md, each with a check that says right or wrong, with a figure."""
