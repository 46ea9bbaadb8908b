"""Subcommands for what people come for, over a run of the command. They only turn arguments into calls of `jobs` and
`serve`, and must not know how anything is computed.
"""
