"""Ops of Kimi-shaped models that plain array code computes slowly: INT4 and grouped matmuls, mixtures of experts, the
KDA delta rule, latent attention.

The package stands alone: it needs JAX and nothing of the models. Each op has a folder: `api` (the public functions),
`reference` (their meaning, in numpy), `xla` (plain JAX, fast), `mosaic_tpu` (the Pallas kernel) and `shapes` (arguments
that tests and benchmarks share).
"""

from pallas_kernels.formats import Dense as Dense
from pallas_kernels.formats import Fp8 as Fp8
from pallas_kernels.formats import Int4 as Int4
from pallas_kernels.formats import Mxfp4 as Mxfp4
from pallas_kernels.formats import Weight as Weight
from pallas_kernels.formats.int4 import dequantize_int4 as dequantize_int4
from pallas_kernels.formats.int4 import pack_int4 as pack_int4
from pallas_kernels.formats.int4 import quantize_int4 as quantize_int4
from pallas_kernels.formats.int4 import unpack_int4 as unpack_int4
from pallas_kernels.grouped_matmul import grouped_glu as grouped_glu
from pallas_kernels.grouped_matmul import grouped_matmul as grouped_matmul
from pallas_kernels.grouped_matmul import int4_grouped_matmul as int4_grouped_matmul
from pallas_kernels.kda import kda as kda
from pallas_kernels.kda import kda_step as kda_step
from pallas_kernels.matmul import int4_matmul as int4_matmul
from pallas_kernels.matmul import matmul as matmul
from pallas_kernels.mixture import mixture as mixture
from pallas_kernels.mla_attention import merge_partials as merge_partials
from pallas_kernels.mla_attention import mla_decode as mla_decode
from pallas_kernels.mla_attention import mla_prefill as mla_prefill
from pallas_kernels.mla_attention import mla_write as mla_write
from pallas_kernels.mla_projections import mla_output as mla_output
from pallas_kernels.mla_projections import mla_query as mla_query
from pallas_kernels.mla_projections import rotate_pairs as rotate_pairs
from pallas_kernels.norm import add_norm as add_norm
from pallas_kernels.norm import rms_norm as rms_norm
from pallas_kernels.router import route as route
