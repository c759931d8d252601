"""The prefill kernel's work on one block of keys in VMEM: scores, softmax and weighted values of every head.

Scores are [keys, queries]: maximum and sum then run over rows, and the matrix unit is filled both ways, which holds
the query while keys stream by, and then the weights while v^T does (128 rows; p v would leave half of a 256-wide unit
empty). Rows of ones under v^T sum the weights in that product, rounded like the weights of the values.

Heads and strips of queries follow each other so that the scores of one are multiplied while the softmax of the one
before is computed, through two buffers. A strip has 512 queries: each of two matrix units then holds half of them while
all keys of the block stream by both.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.hardware import LANES

STRIP, ONES = 512, 16
# Below every score, yet finite: the difference to a score of -inf is then no NaN.
LOWEST = -1e37


# A reference to memory, or to a part of it.
Ref = Any
Marks = tuple[Ref, Ref]


class PrefillScratch(NamedTuple):
    """References to a group's queries and running sums; all but q and v_rows are float32."""

    q: Ref  # [heads, queries, lanes], each head with its neighbours' lanes set to zero
    v_rows: Ref  # [heads, values + ONES, keys], the values of the block as rows, ones below
    shown: Ref  # [keys, queries], 1 where the query sees the key, of a part with hidden ones
    used: Ref  # [words of keys, LANES], int32: all bits of the keys that any query sees
    scores: Ref  # [2, keys, strip], in powers of two
    keep: Ref  # [2, 1, strip], factor of the earlier sums under the new maximum
    top: Ref  # [heads, 1, queries], largest score
    acc: Ref  # [heads, values + ONES, queries], sums of weights times values, and of weights


def scratch_shapes(
    heads: int, queries: int, keys: int, part: int, width: int, values: int, dtype: jnp.dtype
) -> PrefillScratch:
    """Returns the scratch shapes of a `PrefillScratch`."""
    strip = min(STRIP, queries)
    spread = max(lanes.stop - lanes.start for lanes, _ in (_place(head, heads, width) for head in range(heads)))
    return PrefillScratch(
        q=pltpu.VMEM((heads, queries, spread), dtype),
        v_rows=pltpu.VMEM((heads, values + ONES, keys), dtype),
        shown=pltpu.VMEM((part, queries), jnp.float32),
        used=pltpu.VMEM((part * jnp.dtype(dtype).itemsize // 4, LANES), jnp.int32),
        scores=pltpu.VMEM((2, keys, strip), jnp.float32),
        keep=pltpu.VMEM((2, 1, strip), jnp.float32),
        top=pltpu.VMEM((heads, 1, queries), jnp.float32),
        acc=pltpu.VMEM((heads, values + ONES, queries), jnp.float32),
    )


def set_ones(work: PrefillScratch) -> None:
    """Sets the rows of ones, which stay for all steps."""
    ones = work.v_rows.at[:, work.acc.shape[1] - ONES :]
    ones[...] = jnp.ones(ones.shape, ones.dtype)


def begin(work: PrefillScratch, q: Ref, width: int) -> None:
    """Loads the queries q [queries, heads * width] and empties the running sums."""
    heads = work.q.shape[0]
    for head in range(heads):
        lanes, first = _place(head, heads, width)
        for at in range(lanes.start, lanes.stop, LANES):
            to = min(at + LANES, lanes.stop)
            lanes_of_q = q[:, at:to]
            if at < lanes.start + first or to > lanes.start + first + width:
                # As words of 32 bits: bf16 has no masks on older chips.
                words = pltpu.bitcast(lanes_of_q, jnp.int32)
                lane = at - lanes.start + lax.broadcasted_iota(jnp.int32, words.shape, 1)
                words = jnp.where((lane >= first) & (lane < first + width), words, 0)
                lanes_of_q = pltpu.bitcast(words, q.dtype)
            work.q[head, :, at - lanes.start : to - lanes.start] = lanes_of_q
    work.top[...] = jnp.full_like(work.top, LOWEST)
    work.acc[...] = jnp.zeros_like(work.acc)


def mark_visible(work: PrefillScratch, q_marks: Marks, k_marks: Marks) -> None:
    """Marks the keys that the queries see, from references to positions and segments of each."""

    parts, words = work.shown.shape[0] // LANES, work.used.shape[0]
    for part in range(parts):
        keys = slice(part * LANES, (part + 1) * LANES)
        position, segment = (jnp.broadcast_to(mark[:, keys], (LANES, LANES)).T for mark in k_marks)
        segment = jnp.where(segment < 0, -2, segment)  # which no query then has
        used = jnp.zeros((LANES, LANES), jnp.float32)
        for at in range(0, work.shown.shape[1], LANES):
            queries = slice(at, at + LANES)
            q_position, q_segment = (mark[:, queries] for mark in q_marks)
            seen = (position <= q_position) & (segment == jnp.maximum(q_segment, -1))
            work.shown[keys, queries] = seen.astype(jnp.float32)
            used = jnp.maximum(used, seen.astype(jnp.float32))
        used = jnp.broadcast_to(jnp.max(used, axis=1, keepdims=True), used.shape)
        work.used[part * words // parts : (part + 1) * words // parts] = _all_bits(used.astype(work.q.dtype))


def _all_bits(flags: Array) -> Array:
    """Returns words of 32 bits, all of those of a flag 1 set and none of those of a flag 0, of float32 or bf16."""
    words = pltpu.bitcast(flags, jnp.int32)
    if flags.dtype == jnp.float32:
        return -(words >> 29)
    ones = (words >> 13) & 0x10001
    return (ones << 16) - ones


def attend(work: PrefillScratch, k: Ref, v: Ref, width: int, scale: float, hidden: bool) -> None:
    """Adds the keys k [keys, heads * width] and values v [keys, heads * values]; with `hidden`, only those that
    `mark_visible` marked."""
    (heads, queries, _), keys, strip = work.q.shape, k.shape[0], work.scores.shape[2]
    values = v.shape[1] // heads
    units = [(head, slice(at, at + strip)) for at in range(0, queries, strip) for head in range(heads)]

    def score(turn: int) -> None:
        head, columns = units[turn]
        lanes, _ = _place(head, heads, width)
        scores = _dot(k[:, lanes], work.q[head, columns, : lanes.stop - lanes.start], 1) * (scale / math.log(2))
        if hidden:
            scores = jnp.where(work.shown[:, columns] > 0, scores, -jnp.inf)
        work.scores[turn % 2, :keys] = scores
        top = work.top[head, :, columns]
        new_top = jnp.maximum(top, jnp.max(scores, axis=0, keepdims=True))
        work.keep[turn % 2] = jnp.exp2(top - new_top)
        work.top[head, :, columns] = new_top

    def weigh(turn: int) -> None:
        head, columns = units[turn]
        if columns.start == 0:
            own = v[:, head * values : (head + 1) * values]
            if hidden:
                words = pltpu.bitcast(own, jnp.int32) & jnp.tile(work.used[...], (1, values // LANES))
                own = pltpu.bitcast(words, own.dtype)
            work.v_rows[head, :values, :keys] = own.T
        weights = jnp.exp2(work.scores[turn % 2, :keys] - work.top[head, :, columns])
        added = _dot(work.v_rows[head, :, :keys], weights.astype(v.dtype), 0)
        work.acc[head, :, columns] = work.keep[turn % 2] * work.acc[head, :, columns] + added

    score(0)
    for turn in range(1, len(units)):
        score(turn)
        weigh(turn - 1)
    weigh(len(units) - 1)


def finish(work: PrefillScratch, out: Ref, lse: Ref, largest: Ref | None = None) -> None:
    """Writes the attention [queries, heads * values], the log-sum-exp [heads, queries], and where asked the largest
    scores [heads, queries]."""
    heads, values = work.q.shape[0], work.acc.shape[1] - ONES
    for head in range(heads):
        weight = work.acc[head, values : values + 1]
        seen = weight > 0
        weight = jnp.where(seen, weight, 1)
        out[:, head * values : (head + 1) * values] = (work.acc[head, :values] / weight).astype(out.dtype).T
        lse[head : head + 1] = jnp.where(seen, math.log(2) * work.top[head] + jnp.log(weight), -jnp.inf)
        if largest is not None:
            largest[head : head + 1] = jnp.where(seen, math.log(2) * work.top[head], -jnp.inf)


def _place(head: int, heads: int, width: int) -> tuple[slice, int]:
    """Returns the whole vectors of lanes that contain a head, and the lane in them where it begins."""
    start = head * width // LANES * LANES
    stop = min(-(-(head + 1) * width // LANES) * LANES, heads * width)
    return slice(start, stop), head * width - start


def _dot(a: Float[Array, "m c"], b: Array, axis: int) -> Float[Array, "m n"]:
    """Multiplies a [m, c] by b, whose `axis` is contracted, to float32: float32 operands in full, bf16 in one pass."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
