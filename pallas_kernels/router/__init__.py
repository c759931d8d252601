"""The choice of each token's experts; see `api`."""

from pallas_kernels.router.api import route as route
