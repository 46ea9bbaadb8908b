"""What the machine is: errors, memory, numbers, devices, processes, signals and progress.

It knows nothing of results, models or data.
"""
