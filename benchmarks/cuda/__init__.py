"""Compiles programs for NVIDIA GPUs that this machine does not have, and reads what the compilers made of them."""
