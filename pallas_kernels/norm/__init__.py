"""RMSNorm, alone and of a sum; see `api`."""

from pallas_kernels.norm.api import add_norm as add_norm
from pallas_kernels.norm.xla import rms_norm as rms_norm
