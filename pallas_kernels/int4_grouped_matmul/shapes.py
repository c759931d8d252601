"""Argument shapes of the INT4 grouped ops: those of the dense ones."""

from pallas_kernels.grouped_matmul.shapes import AWKWARD as AWKWARD
from pallas_kernels.grouped_matmul.shapes import KIMI as KIMI
