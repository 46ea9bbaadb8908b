"""What of a model can be tracked: modules, or linear maps that stand in for one, and their weights as matrices.

It knows modules and their parameters; it does not know how a pass runs or what is collected.
"""
