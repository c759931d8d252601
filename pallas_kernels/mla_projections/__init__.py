"""The projections before and after the attention of one token of a sequence; see `api`."""

from pallas_kernels.mla_projections.api import mla_output as mla_output
from pallas_kernels.mla_projections.api import mla_query as mla_query
from pallas_kernels.mla_projections.xla import rotate_pairs as rotate_pairs
