"""The long jobs over whole checkpoints: convert, export, verify, compare, inspect."""
