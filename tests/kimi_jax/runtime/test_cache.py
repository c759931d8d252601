"""Pools: their contents, their sizes, and copies of slots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax import config_json
from kimi_jax.model.context import PAGE, KDAState, MLACache
from kimi_jax.runtime.batch import pages_in_order
from kimi_jax.runtime.pools import pages_within
from kimi_jax.runtime.program import Program
from sharding import AXES


def test_pools_hold_latents_and_never_heads(model):
    text = model("k2.5").config.text
    cache = Program(model("k2.5")).cache(pages=4, slots=2)
    assert [layer.pages.shape for layer in cache.layers] == [(4, text.latent_dim, PAGE)] * text.num_hidden_layers
    assert (cache.pages, cache.slots) == (4, 0)
    linear = model("kimi-linear").config.text
    cache = Program(model("kimi-linear")).cache(pages=3, slots=2)
    kinds = [MLACache if kind == "mla" else KDAState for kind in linear.layer_kinds]
    assert [type(layer) for layer in cache.layers] == kinds
    assert (cache.pages, cache.slots) == (3, 2)


def test_capacity_comes_in_few_sizes():
    widths = {pages_in_order(1, tokens).shape[1] for tokens in range(1, 4097, 16)}
    assert sorted(widths) == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32]
    assert all(pages_in_order(1, tokens).shape[1] * PAGE >= tokens for tokens in range(1, 5000, 7))


def test_pages_in_order_on_a_mesh():
    # Four rows of two pages on each of two devices of `sequence`; each device of `data` numbers its own two rows' pages
    table = pages_in_order(4, 3 * PAGE, data=2, sequence=2)
    np.testing.assert_array_equal(table, [[0, 1, 0, 1], [2, 3, 2, 3]] * 2)


def test_a_size_in_bytes():
    # Kimi Linear 48B: 20 KDA layers (float32 states, bf16 tails) and 7 MLA layers (bf16 latents)
    config = config_json.preset("kimi-linear-48b")
    slot, page = 20 * (32 * 128 * 128 * 4 + 3 * 3 * 4096 * 2), 7 * 576 * PAGE * 2
    whole = 2 * slot + 10 * page
    assert pages_within(config, whole, 2, jnp.bfloat16) == 10
    assert pages_within(config, whole - 1, 2, jnp.bfloat16) == 9
    # of each of eight devices: states split over data and tensor, pages over data and sequence
    mesh = jax.sharding.AbstractMesh((2, 1, 2, 2), AXES)
    assert pages_within(config, 2 * slot // 4 + 10 * page, 2, jnp.bfloat16, mesh) == 10 * 4
    with pytest.raises(ValueError, match="2 slots and one page take"):
        pages_within(config, 2 * slot, 2, jnp.bfloat16)


def test_states_are_copied_from_slot_to_slot(model):
    program = Program(model("kimi-linear"))
    marked = jax.tree.map(lambda x: x + jnp.arange(len(x)).reshape(-1, *(1,) * (x.ndim - 1)), program.cache(2, 4))
    copied = program.copy_slots(marked, jnp.array([3, 1, 2]), jnp.array([0, 2, -1]))
    for layer in copied.layers:
        slots = np.asarray(layer.S[:, 0, 0, 0] if isinstance(layer, KDAState) else layer.pages[:, 0, 0])
        np.testing.assert_array_equal(slots, [3, 1, 1, 3] if isinstance(layer, KDAState) else [0, 1])
