"""INT4 matmul; see `api`."""

from pallas_kernels.int4_matmul.api import int4_matmul as int4_matmul
