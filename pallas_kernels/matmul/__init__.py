"""Matrix product with a weight of any format; see `api`."""

from pallas_kernels.matmul.api import int4_matmul as int4_matmul
from pallas_kernels.matmul.api import matmul as matmul
