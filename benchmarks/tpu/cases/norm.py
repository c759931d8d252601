"""Lists cases of the residual sum and its norm in a decode step: 64 rows, all or a device's 8 of them normed. No byte
has to come from HBM; counted are those of the arguments and results."""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import add_norm
from pallas_kernels.norm import mosaic_tpu
from pallas_kernels.norm.shapes import KIMI, AddNormShape
from tpu.case import Case


def _case(shape: AddNormShape) -> Case:
    def build():
        rows, weight = ((shape.T, shape.D), (shape.D,))
        run = partial(add_norm, eps=1e-6, rows=shape.rows, block=shape.block, implementation="mosaic_tpu")
        return run, tuple(jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in (rows, rows, weight))

    return Case(
        name=f"add_norm {shape.T} rows, {shape.rows} normed",
        kernel="add_norm",
        build=build,
        # Parts of the rows; where not all are normed, the wait for those that are
        trips=lambda: (shape.T // mosaic_tpu.PART, *([1] if shape.rows < shape.T else [])),
        units=1.0,
        unit="call",
        hbm_bytes=2.0 * (3 * shape.T + shape.rows) * shape.D,
        flops=0.0,
    )


CASES = [_case(shape) for shape in KIMI]
