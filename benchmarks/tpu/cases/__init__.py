"""Lists the cases of each op, a module for each."""
