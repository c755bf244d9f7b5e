"""Training: the step, the state, the host loop, and the files of a run."""
