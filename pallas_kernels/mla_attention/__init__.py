"""Multi-head latent attention, prefill, paged decode and cache writes; see `api`."""

from pallas_kernels.mla_attention.api import mla_decode as mla_decode
from pallas_kernels.mla_attention.api import mla_prefill as mla_prefill
from pallas_kernels.mla_attention.api import mla_write as mla_write
from pallas_kernels.mla_attention.merge import merge_partials as merge_partials
