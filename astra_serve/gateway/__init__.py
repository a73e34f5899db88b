"""One HTTP request: its key, its version, its lease."""
