"""Experts sharded over a mesh give each token the sum that one device gives it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from ragged_messages import ragged_all_to_all

from checkpoints.toy import toy_config
from kimi_jax.config_json import from_dict
from kimi_jax.model.block import mix_experts
from kimi_jax.model.moe import MoE
from kimi_jax.model.param import Init, weight_specs
from sharding import (
    REPLICATED,
    Partition,
    ReplicatedStream,
    StreamLayout,
    choose_layout,
    expert_dispatch,
    make_mesh,
)

HIDDEN, WIDTH, EXPERTS, CHOSEN = 64, 32, 8, 2
TEXT = from_dict(
    toy_config(
        "k2.5", hidden_size=HIDDEN, moe_intermediate_size=WIDTH, n_routed_experts=EXPERTS, num_experts_per_tok=CHOSEN
    )
).text
# The bias that sends tokens to the experts that a test wants
BIAS = {
    "spread": np.zeros(EXPERTS),
    "all to one": 10 * (np.arange(EXPERTS) == 3),
    "none to the first half": 10 * (np.arange(EXPERTS) >= 4),
}


def layer(choice="spread", int4=False):
    config = dataclasses.replace(
        TEXT,
        quantization=TEXT.quantization if int4 else None,
        num_experts_per_tok=1 if choice == "all to one" else CHOSEN,
    )
    moe = MoE(Init(jax.random.key(0), jnp.dtype(jnp.float32), std=0.2), config)
    moe.gate.e_score_correction_bias[...] = jnp.asarray(BIAS[choice], jnp.float32)
    return moe


def on_mesh(moe, x, shape, dispatches):
    """Computes the mixture of x with the experts on a mesh, with x sharded like the residual stream of such a call."""
    graph, params = nnx.split(moe)
    mesh = make_mesh(shape)
    partition = Partition(mesh)
    layout = choose_layout(partition, *x.shape[:2])
    if dispatches:
        layout = StreamLayout(partition, layout.row_axes, layout.token_axes, dispatches=True)

    def on_device(params, x):
        y = mix_experts(nnx.merge(graph, params), layout.slice_rows(x), layout)
        return layout.gather_rows(layout.take_local(y))

    # in a decode step's stream every device has all rows
    spec = REPLICATED if isinstance(layout, ReplicatedStream) else layout.row_spec()
    run = partition.shard_map(on_device, (weight_specs(params, partition), spec), layout.row_spec())
    return jax.jit(run)(*jax.device_put((params, x), NamedSharding(mesh, REPLICATED)))


def on_one_device(moe, x):
    graph, params = nnx.split(moe)
    return np.asarray(jax.jit(lambda params, x: mix_experts(nnx.merge(graph, params), x, StreamLayout()))(params, x))


HOWS = ("replicated", "in rounds", "by ragged messages")
TOKENS = [
    (8, 1, "spread"),
    (1, 1, "spread"),
    (7, 1, "none to the first half"),
    (6, 8, "spread"),
    (2, 8, "all to one"),
    (1, 13, "none to the first half"),
]
# Any two of tokens, mesh and way are together in a quick case
DISPATCHES = [
    pytest.param(*given, shape, how, marks=[] if (i + j + k) % 2 == 0 else [pytest.mark.slow])
    for i, given in enumerate(TOKENS)
    for j, shape in enumerate(("1x8", "2x1x2x2"))
    for k, how in enumerate(HOWS)
]


@functools.cache
def expected_sum(rows, tokens, choice):
    """Returns a layer, its input, and the sum on one device."""
    moe = layer(choice)
    x = jnp.asarray(np.random.RandomState(0).standard_normal((rows, tokens, HIDDEN)), jnp.float32)
    return moe, x, on_one_device(moe, x)


@pytest.mark.parametrize(("rows", "tokens", "choice", "shape", "how"), DISPATCHES)
def test_each_token_gets_the_sum_over_its_experts(monkeypatch, rows, tokens, choice, shape, how):
    moe, x, expected = expected_sum(rows, tokens, choice)
    if how == "by ragged messages":
        monkeypatch.setattr(expert_dispatch, "combine_in_rounds", expert_dispatch.combine_ragged)
        monkeypatch.setattr(expert_dispatch, "LANES", HIDDEN // expert_dispatch.SUBLANES)
        monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
    found = on_mesh(moe, x, shape, dispatches=how != "replicated")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("shape", "dispatches"),
    [
        ("2x4", False),
        ("1x1x4x2", True),
        pytest.param("2x4", True, marks=pytest.mark.slow),
        pytest.param("1x1x4x2", False, marks=pytest.mark.slow),
    ],
)
def test_experts_and_their_width_split_together(shape, dispatches):
    # Given four INT4 experts on eight devices, over which each is sharded in two or four parts
    config = dataclasses.replace(TEXT, n_routed_experts=4, moe_intermediate_size=128)
    moe = MoE(Init(jax.random.key(0), jnp.dtype(jnp.float32), std=0.2), config)
    x = jnp.asarray(np.random.RandomState(0).standard_normal((4, 8, HIDDEN)), jnp.float32)
    expected = on_one_device(moe, x)
    mesh = make_mesh(shape)
    specs = weight_specs(nnx.split(moe)[1], Partition(mesh))
    down = specs["experts"]["down_proj"]
    # Then codes and scales are cut at the same inputs, between groups of 32
    assert down["codes"].get_value() == down["scales"].get_value()
    assert down["codes"].get_value()[1] is not None
    found = on_mesh(moe, x, shape, dispatches)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
