"""Bases, eigenvalues and filters: how they are fitted, applied and solved with. It does not know what scores are."""
