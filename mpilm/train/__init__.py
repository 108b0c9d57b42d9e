"""Training: the loop, the run folder, evaluation, what is counted and shown."""
