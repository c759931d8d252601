"""The blocks of keys that a block of queries takes in the prefill kernel for GPUs, and what the kernel refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import mla_prefill
from pallas_kernels.mla_attention.triton_prefill import Blocks, turns

SIZE = Blocks(4, 2, 1, 1)
TURNS = jax.jit(turns, static_argnums=4)
MARKS = st.lists(st.tuples(st.integers(0, 9), st.integers(-1, 2)), min_size=12, max_size=12)


@settings(max_examples=60, deadline=None)
@given(queries=MARKS, keys=MARKS, causal=st.booleans())
def test_blocks_left_out_are_unseen_and_those_without_a_mask_are_seen_whole(queries, keys, causal):
    # Given tokens in any order, or twelve in one, of which the first are another sequence's
    marks = [np.array(pairs, np.int32).T for pairs in (queries, keys)]
    if causal:
        marks = [np.stack([np.arange(12), np.arange(12) >= 4]).astype(np.int32)] * 2
    (q_positions, q_segments), (kv_positions, kv_segments) = marks
    visible = (kv_positions <= q_positions[:, None]) & (kv_segments == q_segments[:, None]) & (q_segments >= 0)[:, None]
    blocks = visible.reshape(3, 4, 6, 2)
    found = np.asarray(TURNS(*(jnp.asarray(array[None]) for pair in marks for array in pair), SIZE))[0]
    for i, (first, begin, stop, end) in enumerate(found.tolist()):
        seen, whole = blocks[i].any(axis=(0, 2)), blocks[i].all(axis=(0, 2))
        assert not seen[:first].any() and not seen[end:].any()
        if begin < stop:
            assert first <= begin and stop <= end and whole[begin:stop].all()
    if causal:
        assert found.tolist() == [[0, 6, 6, 2], [2, 6, 6, 4], [2, 2, 4, 6]]


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((1, 0, 2, 64), jnp.float32, "it is empty"),
        ((1, 3, 2, 320), jnp.float32, "heads have 320 and 320 values, expected at most 256"),
        ((1, 3, 2, 64), jnp.float16, "operands are float16, expected bfloat16 or float32"),
    ],
)
def test_says_why_it_cannot(shape, dtype, reason):
    q, positions = jnp.zeros(shape, dtype), jnp.zeros(shape[:2], jnp.int32)
    with pytest.raises(ValueError, match=f"the triton kernel cannot serve this call: {reason}"):
        mla_prefill(q, q, q, q_positions=positions, kv_positions=positions, scale=1.0, implementation="triton")
