"""Works over whole checkpoints: convert, export, verify, compare, inspect."""
