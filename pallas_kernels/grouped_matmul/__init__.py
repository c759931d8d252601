"""Grouped matmul and gated linear units over a ragged batch, with weights of any format; see `api`."""

from pallas_kernels.grouped_matmul.api import grouped_glu as grouped_glu
from pallas_kernels.grouped_matmul.api import grouped_matmul as grouped_matmul
from pallas_kernels.grouped_matmul.api import int4_grouped_matmul as int4_grouped_matmul
