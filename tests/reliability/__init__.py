"""Faults put into runs on purpose: few of each in the tests, many for docs/reliability.md."""
