"""What a run will cost, read from its compiled program."""
