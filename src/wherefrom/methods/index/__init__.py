"""The index: gradients of training examples sketched in a few bits, on disk, and searched for those behind a query.

It knows factors, sweeps and the cache; it does not know the methods that need no index.
"""
