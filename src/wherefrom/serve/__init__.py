"""The local page that answers questions about a run: who may ask, whose turn it is, and what is shown.

These modules compute nothing themselves: scores are `jobs`', texts and numbers for readers `report`'s. They know no
arguments of the command, and nothing that they send is HTML but the page's own files.
"""
