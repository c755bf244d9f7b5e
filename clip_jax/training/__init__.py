"""A run: its step, its state, its loop, and what it leaves behind."""
