"""A mixture of experts; see `api`."""

from pallas_kernels.mixture.api import mixture as mixture
