"""Sizes: what fits into memory and on the disk, and what it costs. It computes nothing but numbers about numbers."""
