"""QK-Clip and the router's bias: what follows the optimizer's step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn_models import drawn
from flax import nnx

from checkpoints.toy import toy_config
from kimi_jax.config_json import from_dict
from kimi_jax.model.moe import Router
from kimi_jax.model.param import Init
from kimi_jax.training import Rows, label_logits, load_imbalance, qk_clip, update_router_bias
from kimi_jax.training.leaves import named_leaves

SIZES = {
    "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 32, "num_attention_heads": 4,
    "num_key_value_heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6,
    "initializer_range": 0.3, "num_hidden_layers": 2,
}  # fmt: skip
LAYERS = {"full_attn_layers": [2], "kda_layers": [1], "head_dim": 8, "num_heads": 4, "short_conv_kernel_size": 4}
CONFIGS = {
    "k2": from_dict(toy_config("k2", **SIZES, q_lora_rank=16, n_routed_experts=8, num_experts_per_tok=2)),
    "kimi-linear": from_dict(
        toy_config("kimi-linear", **SIZES, linear_attn_config=LAYERS, num_experts=8, num_experts_per_token=2)
    ),
}
QUERY = {"k2": "q_b_proj", "kimi-linear": "q_proj"}
TOKENS = np.random.RandomState(0).randint(0, 500, (2, 24))


@pytest.fixture(scope="module", params=CONFIGS)
def case(request):
    """Returns a config, parameters in which head 2 of layer 1 has a largest logit of 130, and a function to measure."""
    config = CONFIGS[request.param]
    graph, params = drawn(config)

    @jax.jit
    def measure(params):
        return label_logits(nnx.merge(graph, params), Rows.whole(TOKENS))[1]

    largest = measure(params).max_logits
    assert largest.max() < 100
    name, rows = f"model.layers.1.self_attn.{QUERY[request.param]}.weight", slice(2 * 12, 3 * 12)
    factor = 130 / largest[-1, 2]
    params = change(params, name, lambda weight: weight.at[rows].multiply(factor))
    return config, params, measure, name, rows


def change(params, name, function):
    leaves = {key: function(x) if key == name else x for key, x in named_leaves(params).items()}
    return jax.tree.unflatten(jax.tree.structure(params), list(leaves.values()))


def test_a_head_at_130_comes_down_to_100(case):
    config, params, measure, query, rows = case
    before = measure(params).max_logits
    assert float(before[-1, 2]) == pytest.approx(130, rel=1e-5)
    clipped = qk_clip(params, before, config)
    after = measure(clipped).max_logits
    assert float(after[-1, 2]) == pytest.approx(100, rel=1e-5)
    np.testing.assert_array_equal(np.delete(after[-1], 2), np.delete(before[-1], 2))
    # Rows of the query: eight without rotation, four with; of keys and values: eight keys, six values
    old, new = named_leaves(params), named_leaves(clipped)
    ratio = np.asarray(new[query][rows] / old[query][rows])
    np.testing.assert_allclose(ratio[:8], 0.87706, atol=1e-5)
    np.testing.assert_allclose(ratio[8:], 0.76923, atol=1e-5)
    kv = "model.layers.1.self_attn.kv_b_proj.weight"
    ratio = np.asarray(new[kv] / old[kv]).reshape(4, 14, -1)[2]
    np.testing.assert_allclose(ratio[:8], 0.87706, atol=1e-5)
    np.testing.assert_array_equal(ratio[8:], 1)
    # And everything else is as before, bit for bit
    others = np.delete(np.arange(48), np.arange(24, 36))
    np.testing.assert_array_equal(new[query][others], old[query][others])
    np.testing.assert_array_equal(np.delete(new[kv], np.arange(28, 42), 0), np.delete(old[kv], np.arange(28, 42), 0))
    for name in old.keys() - {query, kv}:
        np.testing.assert_array_equal(new[name], old[name])


def test_heads_below_the_threshold_stay_bit_for_bit(case):
    config, params, measure, *_ = case
    # As do heads whose logits are negative, or who saw nothing
    below = measure(params).max_logits.at[-1].set(jnp.asarray([100.0, -3.0, 0.0, -jnp.inf]))
    for found, expected in zip(jax.tree.leaves(qk_clip(params, below, config)), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(found, expected)
    # A lower threshold takes the largest
    clipped = qk_clip(params, measure(params).max_logits, config, threshold=50.0)
    assert float(measure(clipped).max_logits.max()) == pytest.approx(50, rel=1e-4)


def test_precision_and_refusals(case):
    config, params, measure, query, _ = case
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    clipped = qk_clip(half, measure(params).max_logits, config.text)
    assert {x.dtype for x in jax.tree.leaves(clipped)} == {jnp.dtype(jnp.bfloat16)}
    # A part of the parameters will do, as a dict too
    part = {"model": {"layers": {1: {"self_attn": {query.split(".")[-2]: {"weight": named_leaves(params)[query]}}}}}}
    found = qk_clip(part, measure(params).max_logits, config)
    np.testing.assert_array_equal(
        named_leaves(found)[query], named_leaves(qk_clip(params, measure(params).max_logits, config))[query]
    )
    with pytest.raises(ValueError, match=r"max_logits have shape \(2, 3\), expected \(\d, 4\)"):
        qk_clip(params, jnp.zeros((2, 3)), config)


def test_a_router_s_bias_moves_against_the_load():
    biases = {"layers": {str(i): {"gate": {"e_score_correction_bias": jnp.full(4, 0.5)}} for i in (2, 10)}}
    params = biases | {"weight": jnp.ones(3)}
    counts = jnp.asarray([[4, 4, 4, 4], [0, 5, 7, 9]], jnp.int32)  # means 4 and 5.25
    moved = update_router_bias(params, counts, 0.25)
    assert moved["layers"]["2"]["gate"]["e_score_correction_bias"].tolist() == [0.5] * 4
    assert moved["layers"]["10"]["gate"]["e_score_correction_bias"].tolist() == [0.75, 0.75, 0.25, 0.25]
    assert moved["weight"] is params["weight"]
    np.testing.assert_allclose(load_imbalance(counts), [1, 9 / 5.25])
    # Exactly, with more tokens than float32 counts, and unmoved at the end of training
    many = jnp.asarray([[2**28, 2**28, 2**28, 2**28 + 1]] * 2, jnp.int32)
    moved = update_router_bias(params, many, 0.25)
    assert moved["layers"]["10"]["gate"]["e_score_correction_bias"].tolist() == [0.75, 0.75, 0.75, 0.25]
    still = update_router_bias(params, counts, 0.0)
    assert still["layers"]["10"]["gate"]["e_score_correction_bias"].tolist() == [0.5] * 4
    with pytest.raises(ValueError, match="counts of 3 layers for 2 correction biases"):
        update_router_bias(params, jnp.zeros((3, 4), jnp.int32))


def test_a_collapsed_router_recovers():
    # Given a router that sends every token to experts 0 and 1
    gate = Router(Init(jax.random.key(0), jnp.dtype(jnp.float32), std=0.05), CONFIGS["k2"].text)
    gate.e_score_correction_bias[...] = jnp.asarray([0.1, 0.1, 0, 0, 0, 0, 0, 0], jnp.float32)
    graph, params = nnx.split(gate)

    @jax.jit
    def steps(params):
        def step(params, key):
            tokens = jax.random.normal(key, (512, 32))
            chosen, _ = nnx.merge(graph, params)(tokens)
            counts = jnp.zeros(8, jnp.int32).at[chosen].add(1)[None]
            return update_router_bias(params, counts), load_imbalance(counts)[0]

        return jax.lax.scan(step, params, jax.random.split(jax.random.key(1), 200))[1]

    imbalance = np.asarray(steps(params))
    # Then 200 updates with frozen weights spread the load
    assert imbalance[0] > 2.5 and imbalance[-20:].max() < 1.5
