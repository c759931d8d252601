"""The cases of each op, built from its `shapes`."""
