"""A published folder of safetensors: its files, its tensors by name, and the numbers in them."""
