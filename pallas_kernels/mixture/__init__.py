"""A mixture of experts for few tokens."""

from pallas_kernels.mixture.api import mixture as mixture
