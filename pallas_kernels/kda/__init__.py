"""Kimi Delta Attention; see `api`."""

from pallas_kernels.kda.api import kda as kda
from pallas_kernels.kda.api import kda_step as kda_step
