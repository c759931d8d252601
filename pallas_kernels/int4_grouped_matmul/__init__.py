"""Grouped matmul and SwiGLU with INT4 weights; see `api`."""

from pallas_kernels.int4_grouped_matmul.api import int4_grouped_matmul as int4_grouped_matmul
from pallas_kernels.int4_grouped_matmul.api import int4_grouped_swiglu as int4_grouped_swiglu
