"""Model families that wherefrom is tried on, tiny and with random weights: what is tracked, and whether it is right.

`families` says which there are, a few lines each; `measure` holds one against autograd; `page` writes the table. A new
family is an entry, and `python benchmarks/run_zoo.py --families NAME` says what comes of it.
"""
