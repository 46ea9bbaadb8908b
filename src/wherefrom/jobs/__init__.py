"""What people come for, over a run directory of the command: where it came from, and questions asked of it.

These modules print nothing and know no arguments and no pages, so that the command and others call them alike.
"""
