"""Kernels compiled for TPUs that are not here, and what the compiler's own schedule says of them."""
