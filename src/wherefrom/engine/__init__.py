"""Tracked layers, what passes them, and the one pass over a dataset. It does not know what is collected or why."""
