"""Kinds of modules, written out in maps that hooks can see. It knows their formulas, not what is captured or why."""
