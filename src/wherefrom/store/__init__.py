"""What lies on disk, and what makes two runs the same.

It knows bytes, names and fingerprints; it does not know what a tensor means.
"""
