"""Reads and writes published folders of safetensors: files, tensors by name, and the numbers in them."""
