"""Compiles kernels for TPUs that this machine does not have, and reads the compiler's own schedule of them."""
