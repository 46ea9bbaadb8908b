"""Projected gradients: how they are made and stored, the methods on them, and an index of them.

They do not know what else a study computes.
"""
