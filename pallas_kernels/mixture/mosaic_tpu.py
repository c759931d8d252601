"""A mixture of experts for few tokens (a decode step's) as one Pallas kernel for TPUs.

The local experts that some token chose are visited one after the other, once for every `VISIT_ROWS` of their rows; the
grid is (cores, visits, steps). A visit's first step gathers its tokens' rows out of x, all of which is in vector
memory. The visit's steps take tiles of gate and up, together as many bytes as a tile of down, and then tiles of down.
The values in between, those of the activation, stay in vector memory. Each row of the result is added, with its weight,
to its token's sum, of which every core has its own.

While a step multiplies, the next step's tile is fetched: tiles of down after those of gate and up, and those of the
next expert after the last of down, so that every step fetches alike.

Weights are multiplied as in `int4_grouped_matmul` or `grouped_matmul`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int, Int32

from pallas_kernels.formats import Weight
from pallas_kernels.hardware import chip
from pallas_kernels.mixture import mosaic_visits
from pallas_kernels.mixture.stages import STAGES, WINDOW, DenseStage, Int4Stage
from pallas_kernels.mixture.visits import expert_visits

# With more tokens most experts have more rows than are multiplied at once, and sorting them is worth it.
MOST_TOKENS, MOST_INPUTS = 512, 8192
VISIT_ROWS = 128


def fits(tokens: int, inputs: int) -> bool:
    """Tells whether the kernel takes so many tokens: x and the sums of its shape are in vector memory, in float32."""
    return tokens <= MOST_TOKENS and inputs <= MOST_INPUTS and tokens * inputs * 4 <= chip().vmem // 8


def unsupported(
    x: Array,
    chosen: Array,
    weights: Array,
    gate: Weight,
    up: Weight,
    down: Weight,
    first: Array,
) -> str | None:
    """Says why the kernel cannot take these shapes, dtypes and formats; None where it can."""
    tokens, K = x.shape[0], math.prod(x.shape[1:])
    stage = STAGES.get(type(gate))
    if stage is None:
        return f"weights are {type(gate).__name__}, expected {' or '.join(form.__name__ for form in STAGES)}"
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x is {x.dtype}, expected bfloat16 or float32"
    if tokens == 0:
        return "x has no rows"
    if not fits(tokens, K):
        return (
            f"x is [{tokens}, {K}], expected at most [{MOST_TOKENS}, {MOST_INPUTS}] and {chip().vmem // 32:,} numbers"
        )
    return stage.unsupported(gate) or stage.unsupported(down)


def mixture(
    x: Float[Array, "T *K"],
    chosen: Int32[Array, "T J"],
    weights: Float32[Array, "T J"],
    gate: Weight,
    up: Weight,
    down: Weight,
    first: Int[Array, ""],
    *,
    activation: Callable[[Array, Array], Array],
    interpret: Any = False,
) -> Float32[Array, "T *K"]:
    """See `api.mixture`."""
    shape, x = x.shape, x.reshape(x.shape[0], -1)
    (tokens, K), cores = x.shape, chip().cores
    rows = -(-tokens // WINDOW) * WINDOW
    gathered = min(rows, VISIT_ROWS)
    # The first stage's step has two matrices.
    stage = STAGES[type(gate)]
    into, out_of = stage.choose(gate, x.dtype, 2), stage.choose(down, x.dtype, 1)
    middle, steps = into.outputs, (into.outputs // into.tile, out_of.outputs // out_of.tile)
    if mosaic_visits.serves(tokens, into.num_local, gathered, cores):
        visit, visits_per_core = mosaic_visits.expert_visits(chosen, first, into.num_local, cores, interpret)
    else:
        visit, visits_per_core = expert_visits(chosen, first, into.num_local, gathered, cores)
    if not interpret:
        # Else XLA, which sees no more than an operand, copies all experts' weights to vector memory beforehand.
        gate, up, down = jax.tree.map(
            lambda array: pltpu.with_memory_space_constraint(array, pltpu.HBM), (gate, up, down)
        )

    def expert(c: Array, v: Array, experts: Any) -> Array:
        return jnp.minimum(experts[jnp.maximum(v, 0) * cores + c], into.num_local - 1)

    def gate_tile(c: Array, v: Array, s: Array, experts: Any, *_: Any) -> tuple[Array, Array]:
        return expert(c, v, experts), jnp.minimum(s, steps[0] - 1)

    def down_tile(c: Array, v: Array, s: Array, experts: Any, *_: Any) -> tuple[Array, Array]:
        waits = s < steps[0]
        tile = jnp.where(v > 0, steps[1] - 1, 0)
        return expert(c, v - waits.astype(jnp.int32), experts), jnp.where(waits, tile, s - steps[0])

    out = pl.pallas_call(
        functools.partial(
            _kernel,
            activation=activation,
            into=into,
            out_of=out_of,
            steps=steps,
            cores=cores,
            choices=chosen.shape[1],
            dtype=x.dtype,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=(cores, visits_per_core, sum(steps)),
            in_specs=[
                pl.BlockSpec((rows, K), lambda *_: (0, 0), pipeline_mode=pl.Buffered(1)),
                *into.specs(gate_tile) * 2,
                *out_of.specs(down_tile),
            ],
            out_specs=pl.BlockSpec((None, rows, K), lambda c, *_: (c, 0, 0)),
            scratch_shapes=[
                pltpu.VMEM((gathered, K), jnp.float32),
                pltpu.VMEM((gathered, middle), jnp.float32),
                *[pltpu.VMEM((gathered, into.tile), jnp.float32)] * 2,
                pltpu.VMEM((gathered, out_of.tile), jnp.float32),
                *into.scratch(2),
                *out_of.scratch(1),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((cores, rows, K), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=chip().vmem // 8 * 7
        ),
        cost_estimate=pl.CostEstimate(
            flops=6 * chosen.size * K * middle,
            transcendentals=chosen.size * middle,
            bytes_accessed=gate.nbytes + up.nbytes + down.nbytes + (1 + cores) * rows * K * 4,
        ),
        name="mixture",
        interpret=interpret,
    )(
        *visit,
        weights.reshape(-1).astype(jnp.float32),
        jnp.pad(x.astype(jnp.float32), [(0, rows - tokens), (0, 0)]),
        *jax.tree.leaves((gate, up, down)),
    )
    return jnp.sum(out, axis=0)[:tokens].reshape(shape)


def _kernel(
    expert_ref: Any,
    visit_ref: Any,
    start_ref: Any,
    end_ref: Any,
    pair_ref: Any,
    share_ref: Any,
    x_ref: Any,
    *refs: Any,
    activation: Callable[[Array, Array], Array],
    into: Int4Stage | DenseStage,
    out_of: Int4Stage | DenseStage,
    steps: tuple[int, int],
    cores: int,
    choices: int,
    dtype: Any,
) -> None:
    n = into.arrays
    gate, up, down = refs[:n], refs[n : 2 * n], refs[2 * n : 3 * n]
    out_ref, rows_ref, middle_ref, gate_total, up_total, total, *scratch = refs[3 * n :]
    into_scratch, out_scratch = scratch[: len(into.scratch(2))], scratch[len(into.scratch(2)) :]
    v, s = pl.program_id(1), pl.program_id(2)
    visit, pairs = v * cores + pl.program_id(0), share_ref.shape[0]
    expert = jnp.minimum(expert_ref[visit], into.num_local - 1)
    start = start_ref[expert] + (visit - visit_ref[expert]) * rows_ref.shape[0]
    left = jnp.minimum(end_ref[expert] - start, rows_ref.shape[0])
    count = jnp.where(expert_ref[visit] < into.num_local, left, 0)
    windows = pl.cdiv(count, WINDOW)

    def for_rows(use: Any) -> None:
        """Calls `use` with each row and the number of its pair of a token and an expert."""
        lax.fori_loop(0, count, lambda i, _: use(i, pair_ref[start + i] % pairs), None)

    def for_windows(windows: Array | int, use: Any) -> None:
        def window(i: Array, _: None) -> None:
            use(pl.ds(pl.multiple_of(i * WINDOW, WINDOW), WINDOW))

        lax.fori_loop(0, windows, window, None)

    def zero(ref: Any, windows: Array | int) -> None:
        def window(rows: Any) -> None:
            ref[rows, :] = jnp.zeros((WINDOW, ref.shape[1]), ref.dtype)

        for_windows(windows, window)

    @pl.when((v == 0) & (s == 0))
    def _begin() -> None:
        zero(out_ref, out_ref.shape[0] // WINDOW)

    @pl.when(s == 0)
    def _gather() -> None:
        def copy(row: Array, pair: Array) -> None:
            rows_ref[pl.ds(row, 1), :] = x_ref[pl.ds(pair // choices, 1), :]

        for_rows(copy)

    @pl.when(s < steps[0])
    def _into() -> None:
        zero(gate_total, windows)
        zero(up_total, windows)
        into.add(rows_ref, count, (gate, up), (gate_total, up_total), into_scratch)
        columns = pl.ds(pl.multiple_of(s * into.tile, into.tile), into.tile)

        def write(rows: Any) -> None:
            value = activation(gate_total[rows, :], up_total[rows, :])
            middle_ref[rows, columns] = value.astype(dtype).astype(jnp.float32)

        for_windows(windows, write)

    @pl.when(s >= steps[0])
    def _out_of() -> None:
        zero(total, windows)
        out_of.add(middle_ref, count, (down,), (total,), out_scratch)
        columns = pl.ds(pl.multiple_of((s - steps[0]) * out_of.tile, out_of.tile), out_of.tile)

        def add(row: Array, pair: Array) -> None:
            token = pl.ds(pair // choices, 1)
            out_ref[token, columns] += share_ref[pair] * total[pl.ds(row, 1), :]

        for_rows(add)
