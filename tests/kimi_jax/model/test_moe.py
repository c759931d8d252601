"""The router and the routed experts against plain float64 loops over tokens and experts."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from checkpoints.toy import toy_config
from kimi_jax.config_json import from_dict
from kimi_jax.model.block import mix_experts
from kimi_jax.model.moe import MLP, MoE, Router
from kimi_jax.model.param import Init
from pallas_kernels.mixture import xla
from pallas_kernels.mixture.mosaic_tpu import MOST_TOKENS
from sharding import StreamLayout

HIDDEN, WIDTH, EXPERTS = 64, 32, 8
SIZES = {"hidden_size": HIDDEN, "moe_intermediate_size": WIDTH, "n_routed_experts": EXPERTS, "num_experts_per_tok": 2}


def text(*, int4=False, **overrides):
    config = from_dict(toy_config("k2.5", **SIZES)).text
    return dataclasses.replace(config, quantization=config.quantization if int4 else None, **overrides)


def init(seed=0):
    return Init(jax.random.key(seed), jnp.dtype(jnp.float32), std=0.2)


def rows(count, seed=0):
    return np.random.RandomState(seed).standard_normal((count, HIDDEN)).astype(np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def route(x, weight, bias, config):
    """Routes by DeepSeek-V3's formulas (arXiv 2412.19437, section 2.1.2), one token at a time: {expert: weight} of
    each."""
    routes = []
    for token in x.astype(np.float64):
        scores = sigmoid(weight.astype(np.float64) @ token)
        selection = scores + bias
        size = EXPERTS // config.n_group
        ranking = [np.sort(selection[g * size : (g + 1) * size])[-2:].sum() for g in range(config.n_group)]
        kept = set(np.argsort(ranking)[-config.topk_group :])
        eligible = [e for e in range(EXPERTS) if e // size in kept]
        chosen = sorted(eligible, key=lambda e: -selection[e])[: config.num_experts_per_tok]
        total = sum(scores[e] for e in chosen) + 1e-20 if config.norm_topk_prob else 1.0
        routes.append({e: scores[e] / total * config.routed_scaling_factor for e in chosen})
    return routes


def check_routes(router, x, config, tolerance=2e-6):
    chosen, weights = router(jnp.asarray(x))
    assert chosen.dtype == jnp.int32 and weights.dtype == jnp.float32
    expected = route(x, np.asarray(router.weight[...]), np.asarray(router.e_score_correction_bias[...]), config)
    for experts, values, want in zip(np.asarray(chosen), np.asarray(weights), expected, strict=True):
        assert set(experts.tolist()) == set(want) and len(experts) == len(want)
        np.testing.assert_allclose(values, [want[int(e)] for e in experts], rtol=tolerance)
    return expected


BIAS = np.linspace(0.5, -0.5, EXPERTS, dtype=np.float32)[[3, 0, 6, 1, 7, 4, 2, 5]]


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_experts_per_tok": 3},
        {"n_group": 4, "topk_group": 2},
        {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 4, "norm_topk_prob": False},
        {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 3, "routed_scaling_factor": 1.0},
    ],
)
def test_router_follows_the_formulas_of_deepseek_v3(overrides):
    config = text(**overrides)
    router = Router(init(), config)
    router.e_score_correction_bias[...] = jnp.asarray(BIAS)
    check_routes(router, rows(40), config)


def test_groups_change_what_is_chosen():
    # Given random tokens, masked groups of two experts must exclude, for some token, an expert with one of its best
    # scores
    free, grouped = text(num_experts_per_tok=3), text(num_experts_per_tok=3, n_group=4, topk_group=2)
    router = Router(init(), free)
    weight, bias, x = np.asarray(router.weight[...]), np.zeros(EXPERTS), rows(40)
    sets = [[set(one) for one in route(x, weight, bias, config)] for config in (free, grouped)]
    assert sum(a != b for a, b in zip(*sets, strict=True)) >= 5


def test_the_bias_chooses_and_does_not_weigh():
    config, x = text(num_experts_per_tok=2, norm_topk_prob=False, routed_scaling_factor=1.0), rows(16)
    router = Router(init(), config)
    before, _ = router(jnp.asarray(x))
    router.e_score_correction_bias[...] = jnp.asarray(10 * BIAS)
    chosen, weights = router(jnp.asarray(x))
    # The bias is larger than any difference of scores, so every token chooses the two experts that it favours
    favourites = set(np.argsort(BIAS)[-2:].tolist())
    assert all(set(one) == favourites for one in chosen.tolist())
    assert any(set(one) != favourites for one in before.tolist())
    scores = sigmoid(x.astype(np.float64) @ np.asarray(router.weight[...], np.float64).T)
    np.testing.assert_allclose(weights, np.take_along_axis(scores, np.asarray(chosen), axis=1), rtol=2e-6)


def test_router_scores_bf16_activations_in_float32():
    config = text()
    router = Router(Init(jax.random.key(0), jnp.dtype(jnp.bfloat16), std=0.2), config)
    x = jnp.asarray(rows(20), jnp.bfloat16)
    _, weights = router(x)
    expected = route(np.asarray(x), np.asarray(router.weight[...]), np.zeros(EXPERTS), config)
    np.testing.assert_allclose(weights, [list(one.values()) for one in expected], rtol=2e-6)


def swiglu(x, gate, up, down):
    """Computes SwiGLU in float64; gate, up [width, hidden], down [hidden, width]."""
    g = gate @ x
    return down @ (g * sigmoid(g) * (up @ x))


def matrices(projection):
    """Returns the matrices [experts, out, in] in float64 of dense or INT4 experts: bf16(code * scale), rounded as in
    the reference model."""
    if hasattr(projection, "weight"):
        return np.asarray(projection.weight[...], np.float64)
    codes, scales = (np.asarray(v[...]).astype(np.float32) for v in (projection.codes, projection.scales))
    dequantised = (codes * np.repeat(scales, 32, axis=1)).astype(ml_dtypes.bfloat16)
    return dequantised.astype(np.float64).swapaxes(1, 2)


def dense_routed(moe, x):
    gate, up, down = (matrices(p) for p in (moe.experts.gate_proj, moe.experts.up_proj, moe.experts.down_proj))
    assert gate.shape == up.shape == (EXPERTS, WIDTH, HIDDEN) and down.shape == (EXPERTS, HIDDEN, WIDTH)
    bias = np.asarray(moe.gate.e_score_correction_bias[...])
    routes = route(x, np.asarray(moe.gate.weight[...]), bias, moe.gate.config)
    return np.array(
        [
            sum(weight * swiglu(token, gate[e], up[e], down[e]) for e, weight in one.items())
            for token, one in zip(x.astype(np.float64), routes, strict=True)
        ]
    )


def sum_routed(moe, x):
    return moe.sum_experts(x, *moe.gate(x))


routed = nnx.jit(sum_routed)


def check_routed(moe, x):
    expected = dense_routed(moe, x)
    found = np.asarray(routed(moe, jnp.asarray(x)))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("tokens", [33, MOST_TOKENS + 1])
@pytest.mark.parametrize("int4", [False, True], ids=["dense", "int4"])
def test_routed_experts_are_the_sum_over_the_chosen(int4, tokens):
    check_routed(MoE(init(), text(int4=int4)), rows(tokens))


@pytest.mark.parametrize("int4", [False, True], ids=["dense", "int4"])
def test_every_token_to_one_expert(int4):
    moe = MoE(init(), text(int4=int4, num_experts_per_tok=1))
    moe.gate.e_score_correction_bias[...] = 10 * jnp.eye(EXPERTS)[5]
    chosen, _ = moe.gate(jnp.asarray(rows(33)))
    assert set(chosen.ravel().tolist()) == {5}
    check_routed(moe, rows(33))


@pytest.mark.parametrize("int4", [False, True], ids=["dense", "int4"])
def test_one_token(int4):
    check_routed(MoE(init(), text(int4=int4)), rows(1))


def test_shared_experts_are_added_unscaled():
    config = text(n_shared_experts=2)
    moe, x = MoE(init(), config), rows(6)
    shared = moe.shared_experts
    assert shared is not None
    gate, up, down = (
        np.asarray(p.weight[...], np.float64) for p in (shared.gate_proj, shared.up_proj, shared.down_proj)
    )
    assert gate.shape == (2 * WIDTH, HIDDEN)
    expected = dense_routed(moe, x) + np.array([swiglu(token, gate, up, down) for token in x.astype(np.float64)])
    found = mix_experts(moe, jnp.asarray(x).reshape(2, 3, HIDDEN), StreamLayout())
    assert found.shape == (2, 3, HIDDEN)
    np.testing.assert_allclose(found.reshape(6, HIDDEN), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_without_shared_experts_there_are_only_routed_ones():
    moe, x = MoE(init(), text(n_shared_experts=0)), rows(4)
    assert moe.shared_experts is None
    expected = dense_routed(moe, x)
    found = mix_experts(moe, jnp.asarray(x)[None], StreamLayout())
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_dense_mlp_is_swiglu():
    mlp, x = MLP(init(), HIDDEN, WIDTH), rows(5)
    gate, up, down = (np.asarray(p.weight[...], np.float64) for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    expected = np.array([swiglu(token, gate, up, down) for token in x.astype(np.float64)])
    np.testing.assert_allclose(mlp(jnp.asarray(x)), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("int4", [False, True], ids=["dense", "int4"])
def test_pairs_in_blocks_give_the_same(int4, monkeypatch):
    # Given 66 pairs of a token and an expert, and blocks of 16 pairs, in which groups begin and end anywhere
    layer, x = MoE(init(), text(int4=int4)), rows(33)
    monkeypatch.setattr(xla, "BLOCK", 16)
    expected = dense_routed(layer, x)
    found = jax.jit(lambda x: sum_routed(layer, x))(x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_pairs_in_blocks_have_the_same_gradient(monkeypatch):
    layer, x = MoE(init(), text()), rows(17)
    direct = jax.jit(jax.grad(lambda x: jnp.sum(sum_routed(layer, x) ** 2)))(x)
    monkeypatch.setattr(xla, "BLOCK", 8)
    found = jax.jit(jax.grad(lambda x: jnp.sum(sum_routed(layer, x) ** 2)))(x)
    np.testing.assert_allclose(found, direct, rtol=0, atol=1e-5 * np.abs(direct).max())
