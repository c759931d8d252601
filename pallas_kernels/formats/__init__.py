"""Weight formats: pytrees that every op takes in place of an array [..., out, in]; see `format`."""

from pallas_kernels.formats.dense import Dense as Dense
from pallas_kernels.formats.dense import as_weight as as_weight
from pallas_kernels.formats.fake_int4 import FakeInt4 as FakeInt4
from pallas_kernels.formats.fake_int4 import fake_quantize_int4 as fake_quantize_int4
from pallas_kernels.formats.format import Part as Part
from pallas_kernels.formats.format import Weight as Weight
from pallas_kernels.formats.format import array_bytes as array_bytes
from pallas_kernels.formats.fp8 import Fp8 as Fp8
from pallas_kernels.formats.int4 import Int4 as Int4
from pallas_kernels.formats.mxfp4 import Mxfp4 as Mxfp4
from pallas_kernels.formats.straight_through import straight_through as straight_through
