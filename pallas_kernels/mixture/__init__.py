"""A mixture of experts for few tokens; see `api`."""

from pallas_kernels.mixture.api import mixture as mixture
from pallas_kernels.mixture.mosaic_tpu import fits as fits
