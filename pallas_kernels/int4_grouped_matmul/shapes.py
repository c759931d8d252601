"""Argument shapes of the INT4 grouped ops, which are those of the dense ones."""

from pallas_kernels.grouped_matmul.shapes import AWKWARD as AWKWARD
from pallas_kernels.grouped_matmul.shapes import KIMI as KIMI
