"""Grouped matmul and SwiGLU over a ragged batch; see `api`."""

from pallas_kernels.grouped_matmul.api import grouped_matmul as grouped_matmul
from pallas_kernels.grouped_matmul.api import grouped_swiglu as grouped_swiglu
