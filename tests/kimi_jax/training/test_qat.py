"""Quantisation-aware training, and training of parts over frozen INT4 experts, on a model of two layers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from drawn_models import drawn, structure
from flax import nnx

from checkpoints.published.quantization_config import int4
from checkpoints.toy import toy_config
from kimi_jax.config_json import from_dict
from kimi_jax.training import Recipe, as_published, fake_quantize_experts, optimizer, split_trained
from kimi_jax.training.leaves import named_leaves
from pallas_kernels.formats import Int4, fake_quantize_int4

SIZES = {
    "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 32, "num_attention_heads": 4,
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 8, "initializer_range": 0.3, "num_hidden_layers": 2, "n_routed_experts": 4, "num_experts_per_tok": 4,
}  # fmt: skip
CONFIG = from_dict(toy_config("k2", **SIZES, quantization_config=int4(("lm_head",))))
TOKENS = jnp.asarray(np.random.RandomState(0).randint(0, 500, (2, 12)), jnp.int32)
EXPERTS = [f"model.layers.1.mlp.experts.{name}_proj" for name in ("gate", "up", "down")]


def loss_of(logits):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), TOKENS[:, 1:, None], axis=-1))


def published(params):
    """Returns the model of published INT4 experts, and of all else in bf16, that computes in float32."""
    graph, state = structure(CONFIG)
    leaves = {name: x.astype(jnp.bfloat16).astype(jnp.float32) for name, x in named_leaves(params).items()}
    for name in EXPERTS:
        weight = Int4.from_dense(named_leaves(params)[f"{name}.weight"])
        leaves |= {f"{name}.codes": weight.codes, f"{name}.scales": weight.scales}
    return nnx.merge(
        graph, jax.tree.unflatten(jax.tree.structure(state), [leaves[name] for name in named_leaves(state)])
    )


@pytest.fixture(scope="module")
def masters():
    """Returns the model's structure and its masters, with loss, logits and gradients of what is published."""
    graph, params = drawn(CONFIG.dense())

    @jax.jit
    def run(params):
        def loss(params):
            logits = nnx.merge(graph, as_published(params, CONFIG)).forward(TOKENS)
            return loss_of(logits), logits

        return jax.value_and_grad(loss, has_aux=True)(params)

    return graph, params, *run(params)


def test_training_computes_what_the_checkpoint_will(masters):
    graph, params, (_, logits), _ = masters
    expected = published(params)(TOKENS)  # as inference computes it
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    np.testing.assert_array_equal(jnp.argmax(logits, -1), jnp.argmax(expected, -1))
    # And the masters' own numbers would not
    plain = nnx.merge(graph, params)(TOKENS)
    assert np.abs(plain - expected).max() > 1e-3 * np.abs(expected).max()


def test_each_weight_is_rounded_as_it_is_published():
    params = {
        "mlp": {"experts": {"up_proj": {"weight": jax.random.normal(jax.random.key(0), (2, 4, 32))}}},
        "gate": {"weight": jnp.full(2, 1.001), "e_score_correction_bias": jnp.full(2, 1.001)},
        "self_attn": {"A_log": jnp.full(2, 1.001), "dt_bias": jnp.full(2, 1.001)},
        "experts": {"down_proj": {"codes": jnp.ones((32, 4), jnp.int4), "scales": jnp.full((1, 4), 1.001)}},
    }
    found = named_leaves(as_published(params, CONFIG))
    np.testing.assert_array_equal(
        found["mlp.experts.up_proj.weight"], fake_quantize_int4(params["mlp"]["experts"]["up_proj"]["weight"])
    )
    rounded = {name for name, x in found.items() if np.any(x != named_leaves(params)[name])}
    assert rounded == {"mlp.experts.up_proj.weight", "gate.weight"}
    np.testing.assert_array_equal(found["gate.weight"], 1.0)
    # Without INT4 in the configuration, experts are bf16
    found = named_leaves(as_published(params, CONFIG.dense()))["mlp.experts.up_proj.weight"]
    np.testing.assert_array_equal(found, found.astype(jnp.bfloat16).astype(jnp.float32))
    # And gradients pass straight through
    trained = {name: params[name] for name in ("mlp", "gate", "self_attn")}
    gradients = jax.grad(lambda p: sum(jnp.sum(x * x) for x in jax.tree.leaves(as_published(p, CONFIG))))(trained)
    for name, gradient in named_leaves(gradients).items():
        np.testing.assert_array_equal(gradient, 2 * named_leaves(as_published(trained, CONFIG))[name])


def test_layers_that_round_their_own_experts_have_the_same_gradients(masters):
    graph, params, (loss, _), gradients = masters
    # Given a model whose layers round experts, and masters whose other weights are rounded already
    inside, state = nnx.split(fake_quantize_experts(nnx.merge(graph, params)))
    assert jax.tree.structure(state) == jax.tree.structure(params)
    others = as_published(params, CONFIG.dense())
    leaves = [x if ".experts." in name else named_leaves(others)[name] for name, x in named_leaves(params).items()]
    run = jax.jit(jax.value_and_grad(lambda state: loss_of(nnx.merge(inside, state).forward(TOKENS))))
    found_loss, found = run(jax.tree.unflatten(jax.tree.structure(params), leaves))
    assert float(found_loss) == pytest.approx(float(loss), rel=1e-6)
    for name in EXPERTS:
        want = named_leaves(gradients)[f"{name}.weight"]
        np.testing.assert_allclose(named_leaves(found)[f"{name}.weight"], want, rtol=0, atol=1e-6 * np.abs(want).max())
    with pytest.raises(ValueError, match="experts are Int4, expected Dense"):
        fake_quantize_experts(published(params))


def test_parts_are_trained_over_frozen_int4_experts(masters):
    # Given published INT4 experts, of which attention and the router of layer 1 are to be trained
    model = published(masters[1])
    graph, trained, frozen = split_trained(model, lambda name: "layers.1.self_attn" in name or ".mlp.experts." in name)
    names = set(named_leaves(trained))
    assert len(names) == 7 and all("self_attn" in name for name in names)  # no codes and no scales
    update = optimizer(trained, 0.02)
    state = update.init(trained)
    elements = sum(x.size for x in jax.tree.leaves(state) if x.ndim)
    matrices = sum(x.size for x in jax.tree.leaves(trained) if x.ndim == 2)
    assert elements == matrices + 2 * sum(x.size for x in jax.tree.leaves(trained) if x.ndim == 1)

    @jax.jit
    def step(trained, state):
        loss, gradients = jax.value_and_grad(lambda p: loss_of(nnx.merge(graph, p, frozen).forward(TOKENS)))(trained)
        updates, state = update.update(gradients, state, trained)
        return optax.apply_updates(trained, updates), state, loss

    losses = []
    for _ in range(6):
        trained, state, loss = step(trained, state)
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.05
    with pytest.raises(ValueError, match="no parameter is trained"):
        split_trained(model, lambda name: ".mlp.experts." in name)


@pytest.mark.parametrize("quantized", [True, False])
def test_a_model_published_in_other_roundings_is_not_trained_for_them(quantized):
    config = from_dict(toy_config("k3"))
    assert config.text.quantization is not None and config.text.quantization.format == "mxfp4"
    with pytest.raises(ValueError, match=r"a kimi_k3 model, with MXFP4 experts.* cannot be trained"):
        Recipe(config if quantized else config.dense())
