"""Lists cases of a decode step's router: 64 tokens of K2.5, and of K3. HBM bytes are those of the weights."""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import route
from pallas_kernels.router import mosaic_tpu
from pallas_kernels.router.shapes import KIMI, RouterShape
from tpu.case import Case


def _case(shape: RouterShape) -> Case:
    def build():
        bf16, bias = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16), jax.ShapeDtypeStruct((shape.E,), jnp.float32)
        run = partial(route, choices=shape.J, scale=2.827, implementation="mosaic_tpu")
        return run, (bf16((shape.T, shape.D)), bf16((shape.E, shape.D)), bias)

    return Case(
        name=f"route {shape.T} tokens to {shape.J} of {shape.E}",
        kernel="route",
        build=build,
        trips=lambda: (shape.E // mosaic_tpu.block_size(shape.E), shape.J),
        units=1.0,
        unit="call",
        hbm_bytes=2.0 * shape.E * shape.D,
        flops=2.0 * shape.T * shape.E * shape.D,
    )


CASES = [_case(shape) for shape in KIMI if shape.T == 64]
