"""Attribution through a whole training: its steps, the walk back through them, and the scores that come of it."""
