"""INT4 matmul, packing and quantising; see `api` and `packing`."""

from pallas_kernels.int4_matmul.api import int4_matmul as int4_matmul
from pallas_kernels.int4_matmul.packing import dequantize_int4 as dequantize_int4
from pallas_kernels.int4_matmul.packing import pack_int4 as pack_int4
from pallas_kernels.int4_matmul.packing import quantize_int4 as quantize_int4
from pallas_kernels.int4_matmul.packing import unpack_int4 as unpack_int4
