"""Published checkpoints: a reader for each format of file, name tables, loading and exporting."""
