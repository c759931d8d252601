"""The forward pass of training: packed rows are each document alone, and statistics are those of all devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn_models import drawn, structure
from flax import nnx

from checkpoints.toy import toy_config
from kimi_jax.config_json import from_dict
from kimi_jax.model.param import weight_shardings
from sharding import TRAIN, Partition, expert_dispatch, make_mesh

SIZES = {
    "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 32, "num_attention_heads": 8,
    "num_key_value_heads": 8, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "initializer_range": 0.2, "num_hidden_layers": 2,
}  # fmt: skip
LAYERS = {"full_attn_layers": [2], "kda_layers": [1], "head_dim": 8, "num_heads": 8, "short_conv_kernel_size": 4}
CONFIGS = {
    "k2": toy_config("k2", **SIZES, q_lora_rank=16, n_routed_experts=8, num_experts_per_tok=2),
    "kimi-linear": toy_config(
        "kimi-linear", **SIZES, linear_attn_config=LAYERS, num_experts=8, num_experts_per_token=2
    ),
}
# Documents that end at 1, 15, 16, 17, 63, 64 and 65 tokens of the first row; one-token ones; and padding after both.
ROWS = ([1, 14, 1, 1, 46, 1, 1, 20], [1] * 10)
T = 90


def packed_rows():
    """Returns tokens, positions and segments [2, T]."""
    tokens = np.random.RandomState(0).randint(0, 500, (2, T)).astype(np.int32)
    positions, segments = np.full((2, T), -1, np.int32), np.full((2, T), -1, np.int32)
    for row, lengths in enumerate(ROWS):
        start = 0
        for number, length in enumerate(lengths):
            positions[row, start : start + length] = np.arange(length)
            segments[row, start : start + length] = number
            start += length
    return tokens, positions, segments


@pytest.mark.parametrize(
    ("name", "with_gradients"),
    [("k2", True), ("kimi-linear", False), pytest.param("kimi-linear", True, marks=pytest.mark.slow)],
)
def test_packed_documents_are_each_alone(name, with_gradients):
    transform = jax.value_and_grad if with_gradients else lambda function, has_aux: lambda x: (function(x), None)
    graph, params = drawn(from_dict(CONFIGS[name]), std=0.2)
    tokens, positions, segments = packed_rows()
    weights = np.random.RandomState(1).standard_normal((2, T, 768)).astype(np.float32) * (segments >= 0)[..., None]

    @jax.jit
    def packed(params):
        def loss(params):
            logits, statistics = nnx.merge(graph, params).forward_with_statistics(
                jnp.asarray(tokens), positions=jnp.asarray(positions), segments=jnp.asarray(segments), num_segments=10
            )
            return jnp.sum(jnp.where(segments[..., None] >= 0, logits, 0) * weights), (logits, statistics)

        return transform(loss, has_aux=True)(params)

    # Each document in a row of its own
    spans = [
        (row, end - n, end)
        for row, lengths in enumerate(ROWS)
        for n, end in zip(lengths, np.cumsum(lengths), strict=True)
    ]
    apart, where = np.zeros((len(spans), 46), np.int32), np.full((len(spans), 46), -1, np.int32)
    apart_weights = np.zeros((len(spans), 46, 768), np.float32)
    for i, (row, start, end) in enumerate(spans):
        apart[i, : end - start], where[i, : end - start] = tokens[row, start:end], np.arange(end - start)
        apart_weights[i, : end - start] = weights[row, start:end]

    @jax.jit
    def alone(params):
        def loss(params):
            logits, statistics = nnx.merge(graph, params).forward_with_statistics(
                jnp.asarray(apart), positions=jnp.asarray(where)
            )
            return jnp.sum(jnp.where(where[..., None] >= 0, logits, 0) * apart_weights), (logits, statistics)

        return transform(loss, has_aux=True)(params)

    (_, (logits, statistics)), gradients = packed(params)
    (_, (expected, expected_statistics)), expected_gradients = alone(params)
    for i, (row, start, end) in enumerate(spans):
        np.testing.assert_allclose(
            logits[row, start:end], expected[i, : end - start], rtol=0, atol=1e-6 * np.abs(expected).max()
        )
    np.testing.assert_array_equal(statistics.expert_counts, expected_statistics.expert_counts)
    np.testing.assert_allclose(statistics.max_logits, expected_statistics.max_logits, rtol=1e-5)
    # Counts are of tokens that are no padding, each of which chose two
    assert np.asarray(statistics.expert_counts).sum(axis=1).tolist() == [2 * sum(map(sum, ROWS))]
    if not with_gradients:
        return
    for (path, found), (_, want) in zip(
        nnx.to_flat_state(gradients), nnx.to_flat_state(expected_gradients), strict=True
    ):
        assert np.all(np.isfinite(found)), path
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * max(np.abs(want).max(), 1e-3), err_msg=str(path))


def run(name, params, partition=None, packed=True):
    """Returns logits and statistics of the packed rows, or of their tokens as rows of one sequence."""
    graph, _ = structure(from_dict(CONFIGS[name]))
    tokens, positions, segments = map(jnp.asarray, packed_rows())
    options = {"positions": positions, "segments": segments, "num_segments": 10} if packed else {}
    partition = Partition() if partition is None else partition

    @jax.jit
    def forward(params):
        return nnx.merge(graph, params).forward_with_statistics(tokens, partition=partition, **options)

    return forward(params)


@pytest.mark.parametrize(
    ("name", "shape", "dispatches"),
    [("k2", "2x2x2x1", True), pytest.param("kimi-linear", "1x2x2x2", False, marks=pytest.mark.slow)],
)
def test_statistics_on_a_mesh_are_those_of_one_device(monkeypatch, name, shape, dispatches):
    _, params = drawn(from_dict(CONFIGS[name]), std=0.2)
    expected_logits, expected = run(name, params)
    if dispatches:
        monkeypatch.setattr(expert_dispatch, "MIN_BYTES_SAVED", -1e9)
    mesh = make_mesh(shape)
    placed = jax.device_put(params, weight_shardings(params, mesh, TRAIN))
    logits, statistics = run(name, placed, Partition(mesh, TRAIN))
    real = packed_rows()[2] >= 0
    np.testing.assert_allclose(
        np.asarray(logits)[real], np.asarray(expected_logits)[real], rtol=0, atol=1e-5 * np.abs(expected_logits).max()
    )
    np.testing.assert_array_equal(statistics.expert_counts, expected.expert_counts)
    np.testing.assert_allclose(statistics.max_logits, expected.max_logits, rtol=1e-5)
    assert statistics.max_logits.shape == ({"k2": 2, "kimi-linear": 1}[name], 8)


def test_logits_are_those_of_the_forward_pass_for_inference():
    graph, params = drawn(from_dict(CONFIGS["kimi-linear"]), std=0.2)
    logits, _ = run("kimi-linear", params, packed=False)
    np.testing.assert_allclose(
        logits, nnx.merge(graph, params)(packed_rows()[0]), rtol=0, atol=1e-6 * np.abs(logits).max()
    )
