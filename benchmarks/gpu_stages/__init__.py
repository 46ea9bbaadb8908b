"""The stages of a day with a GPU, one file for each group of them; `benchmarks/gpu_day.py` starts each as a process.

A stage is a function of a `Report`, to which it adds what it measures part by part, and a `Setting`. None needs another
stage's figures, git, or a network.
"""
