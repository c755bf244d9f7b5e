"""The commands: flags in, a result printed."""
