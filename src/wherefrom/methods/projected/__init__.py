"""Projected gradients: how they are made and stored, and the methods on them.

They do not know what else a study computes.
"""
