"""Lists cases of the visits of a decode step's mixture: 64 tokens that choose among 384 experts, of which a device has
6 or 48."""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.hardware import chip
from pallas_kernels.mixture.mosaic_visits import expert_visits
from tpu.case import Case

TOKENS, CHOICES = 64, 8


def _case(num_local: int) -> Case:
    def build():
        run = partial(expert_visits, first=0, num_local=num_local, cores=chip().cores)
        return run, (jax.ShapeDtypeStruct((TOKENS, CHOICES), jnp.int32),)

    return Case(
        name=f"expert_visits, {num_local} experts and {TOKENS} tokens",
        kernel="expert_visits",
        build=build,
        trips=lambda: (),
        units=1.0,
        unit="call",
        hbm_bytes=4.0 * TOKENS * CHOICES,
        flops=2.0 * 128 * 128 * (2 * TOKENS + 128),
    )


CASES = [_case(num_local) for num_local in (6, 48)]
