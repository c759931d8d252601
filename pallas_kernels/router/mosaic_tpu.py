"""The choice of experts for the few tokens of a decode step, as one Pallas kernel for TPUs.

The grid is blocks of experts, 128 where that divides them, whose weights are streamed. A block's logits are its weights
times all tokens, so that experts are along the sublanes and tokens along the lanes: the rounds of maximum and mask, one
for each choice, then compare registers with one another, and reduce over lanes nowhere. Results are turned once at the
end.

A sort of 384 scores and the operations around it take XLA many times as long.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.hardware import LANES, SUBLANES, VMEM_LIMIT

# The most tokens, and choices of each: a register's lanes.
MOST = LANES
# The sizes of blocks; the last is a bf16 register's rows.
BLOCKS = (128, 64, 32, 16)
# The most experts that are compared at a time: eight registers each for what is best so far, its number and its score.
PART = 64
LOWEST = float(jnp.finfo(jnp.float32).min)


def block_size(experts: int) -> int:
    """Returns the number of experts whose weights are streamed at a time; 0 where no block divides them."""
    return next((size for size in BLOCKS if experts % size == 0), 0)


def unsupported(x: Array, weight: Array, bias: Array, *, choices: int, groups: int) -> str | None:
    """Says why the kernel cannot take these arguments; None where it can."""
    (tokens, width), experts = x.shape, weight.shape[0]
    if x.dtype not in (jnp.bfloat16, jnp.float32) or weight.dtype != x.dtype:
        return f"x is {x.dtype} and weight {weight.dtype}, expected both bfloat16 or both float32"
    if groups > 1:
        return f"there are {groups} groups of experts, expected one"
    if not 0 < tokens <= MOST or choices > MOST:
        return f"{tokens} tokens choose {choices} experts each, expected 1 to {MOST} and at most {MOST}"
    if not block_size(experts) or width % LANES or not width:
        return f"weight is [{experts}, {width}], expected multiples of {BLOCKS[-1]} and {LANES}"
    return None


def route(
    x: Float[Array, "T D"],
    weight: Float[Array, "E D"],
    bias: Float32[Array, "E"],
    *,
    choices: int,
    normalize: bool,
    scale: float,
    interpret: Any = False,
) -> tuple[Int32[Array, "T J"], Float32[Array, "T J"]]:
    """See `api.route`."""
    (tokens, width), experts = x.shape, weight.shape[0]
    block, padded = block_size(experts), -(-choices // SUBLANES) * SUBLANES
    return pl.pallas_call(
        partial(_route_kernel, choices=choices, normalize=normalize, scale=scale),
        grid=(experts // block,),
        in_specs=[
            pl.BlockSpec((tokens, width), lambda i: (0, 0)),
            pl.BlockSpec((block, width), lambda i: (i, 0)),
            pl.BlockSpec((experts,), lambda i: (0,)),
        ],
        out_specs=[pl.BlockSpec((tokens, choices), lambda i: (0, 0))] * 2,
        out_shape=[jax.ShapeDtypeStruct((tokens, choices), dtype) for dtype in (jnp.int32, jnp.float32)],
        scratch_shapes=[
            *[pltpu.VMEM((experts, LANES), jnp.float32)] * 2,
            *[pltpu.VMEM((padded, LANES), jnp.float32)] * 2,
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_LIMIT),
        cost_estimate=pl.CostEstimate(
            flops=2 * tokens * weight.size,
            transcendentals=tokens * experts,
            bytes_accessed=weight.nbytes + x.nbytes + 8 * tokens * choices,
        ),
        name="route",
        interpret=interpret,
    )(x, weight, bias)


def _route_kernel(
    x_ref: Any,
    weight_ref: Any,
    bias_ref: Any,
    chosen_ref: Any,
    weights_ref: Any,
    scores_ref: Any,
    choice_ref: Any,
    numbers_ref: Any,
    picked_ref: Any,
    *,
    choices: int,
    normalize: bool,
    scale: float,
) -> None:
    block, tokens, size = pl.program_id(0), x_ref.shape[0], weight_ref.shape[0]
    rows = pl.ds(pl.multiple_of(block * size, size), size)
    scores_ref[rows, :tokens] = jax.nn.sigmoid(logits(x_ref[...], weight_ref[...]))

    @pl.when(block == pl.num_programs(0) - 1)
    def _choose() -> None:
        _add_bias(scores_ref, bias_ref, choice_ref, size)
        place = lax.broadcasted_iota(jnp.int32, numbers_ref.shape, 0)

        def pick(i: Array, before: Array) -> Array:
            number, score = _best(choice_ref, scores_ref, before, min(size, PART))
            numbers_ref[...] = jnp.where(place == i, number, numbers_ref[...])
            picked_ref[...] = jnp.where(place == i, score, picked_ref[...])
            return number

        picked_ref[...] = jnp.zeros_like(picked_ref)
        numbers_ref[...] = jnp.zeros_like(numbers_ref)
        lax.fori_loop(0, choices, pick, jnp.full((1, LANES), -1.0, jnp.float32))
        picked = picked_ref[...]
        if normalize:
            picked = picked / (jnp.sum(picked, axis=0, keepdims=True) + 1e-20)
        for ref, found in ((chosen_ref, numbers_ref[...]), (weights_ref, picked * scale)):
            ref[...] = found.T[:tokens, :choices].astype(ref.dtype)


def _add_bias(scores_ref: Any, bias_ref: Any, choice_ref: Any, size: int) -> None:
    """Writes the scores plus each expert's bias, a NaN as the highest, and none as low as what is chosen already."""
    for first in range(0, scores_ref.shape[0], size):
        part = slice(first, first + size)
        column = jnp.broadcast_to(bias_ref[part].reshape(1, size), (LANES, size)).T
        choice = scores_ref[part, :] + column
        choice_ref[part, :] = jnp.maximum(jnp.where(jnp.isnan(choice), jnp.inf, choice), LOWEST)


def _best(choice_ref: Any, scores_ref: Any, before: Float32[Array, "1 lanes"], part: int) -> tuple[Array, Array]:
    """Returns the number and the score of each lane's best expert, float32 [1, lanes], after that of number `before`
    is taken out; `part` experts are compared at a time."""
    own = lax.broadcasted_iota(jnp.int32, (part, LANES), 0).astype(jnp.float32)
    best, number, score = jnp.full_like(own, -jnp.inf), jnp.full_like(own, -1), jnp.zeros_like(own)
    for first in range(0, choice_ref.shape[0], part):
        rows = slice(first, first + part)
        choice = jnp.where(own + first == before, -jnp.inf, choice_ref[rows, :])
        choice_ref[rows, :] = choice
        better = choice > best
        best, number = jnp.where(better, choice, best), jnp.where(better, own + first, number)
        score = jnp.where(better, scores_ref[rows, :], score)
    top = jnp.max(best, axis=0, keepdims=True)
    lowest = jnp.min(jnp.where(best == top, number, jnp.inf), axis=0, keepdims=True)
    return lowest, jnp.sum(jnp.where(number == lowest, score, 0), axis=0, keepdims=True)


def logits(x: Float[Array, "T D"], weight: Float[Array, "E D"]) -> Float32[Array, "E T"]:
    """Multiplies a block of experts' weights by all tokens, in float32."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    contract_last, tokens = (((1,), (1,)), ((), ())), len(x)
    if tokens == 1:  # Mosaic makes sums over lanes of this product, and fails to with bf16 (jax 0.10.2)
        x = jnp.broadcast_to(x, (SUBLANES, x.shape[1]))
    found = lax.dot_general(weight, x, contract_last, precision=precision, preferred_element_type=jnp.float32)
    return found[:, :tokens]
