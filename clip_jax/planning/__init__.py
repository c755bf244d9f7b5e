"""Plans of runs: what a step costs, read from its compiled program."""
