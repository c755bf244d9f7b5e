"""Checkpoint files of others: one reader a format, each file to a flat dict of arrays."""
