"""Training: packed rows, the loss and its statistics."""
