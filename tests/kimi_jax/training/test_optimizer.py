"""The optimizer of a whole model: what each parameter is updated by, and its learning rate."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from drawn_models import drawn, structure
from flax import nnx

from checkpoints.toy import toy_config
from kimi_jax.config_json import from_dict
from kimi_jax.model.param import weight_shardings
from kimi_jax.training import Recipe, Trainer, muon, optimizer, warmup_stable_decay
from kimi_jax.training.leaves import ROUTER_BIAS, leaf_name, named_leaves, treatment
from sharding import TRAIN, Partition, make_mesh

SIZES = {
    "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 32, "num_attention_heads": 8,
    "num_key_value_heads": 8, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "initializer_range": 0.2, "num_hidden_layers": 2, "n_routed_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip


def shapes(config):
    """Returns a model's parameters as shapes, by name."""
    return named_leaves(structure(from_dict(config))[1])


def test_every_parameter_has_its_treatment():
    found = {}
    for like in ("k2.5", "kimi-linear"):
        for name, leaf in shapes(toy_config(like)).items():
            kind = name.split(".")[-1] if "codes" in name or "scales" in name else ".".join(name.split(".")[-2:])
            found.setdefault(treatment(name, leaf), set()).add(kind)
    assert found["decayed"] == {"embed_tokens.weight", "lm_head.weight"}
    assert found["constant"] == {"codes", "scales", "gate.e_score_correction_bias"}
    assert {name.removesuffix(".weight") for name in found["muon"]} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
        *("f_a_proj", "f_b_proj", "g_a_proj", "g_b_proj", "b_proj", "gate_proj", "up_proj", "down_proj", "gate"),
        *("wqkv", "wo", "fc0", "fc1", "0", "2"),
    }
    assert {"A_log", "dt_bias", "weight"} <= {name.split(".")[-1] for name in found["plain"]}
    assert {"q_conv1d.weight", "proj.weight", "pos_emb.weight", "norm.weight", "0.bias"} <= found["plain"]


@pytest.fixture(scope="module")
def step():
    """Returns parameters, their gradients, and the updates of one step on a single device."""
    _, params = drawn(from_dict(toy_config("k2", **SIZES)))
    random = np.random.RandomState(1)
    gradients = jax.tree.map(lambda x: jnp.asarray(0.001 * random.standard_normal(x.shape), jnp.float32), params)
    update = optimizer(params, 0.01, adamw_schedule=0.005, adamw_weight_decay=0.3)
    return params, gradients, jax.jit(update.update)(gradients, update.init(params), params)[0]


def test_each_is_updated_by_its_own_rule(step):
    params, gradients, updates = map(named_leaves, step)
    norm = np.sqrt(sum(np.sum(np.square(x)) for x in gradients.values()))
    assert norm < 1  # so that nothing is clipped
    # The first step of AdamW is g / (|g| + eps), with and without decay
    for name, decay in (("model.embed_tokens.weight", 0.3), ("model.norm.weight", 0.0)):
        g = gradients[name]
        expected = -0.005 * (g / (np.abs(g) + 1e-8) + decay * params[name])
        np.testing.assert_allclose(updates[name], expected, rtol=0, atol=1e-7)
    assert not np.any(updates["model.layers.1.mlp.gate.e_score_correction_bias"])
    name = "model.layers.1.mlp.experts.up_proj.weight"
    alone = muon(0.01)
    want, _ = jax.jit(alone.update)(gradients[name], alone.init(params[name]), params[name])
    np.testing.assert_allclose(updates[name], want, rtol=0, atol=3e-6 * np.abs(want).max())


def test_gradients_are_clipped_to_their_norm():
    params = {"lm_head": {"weight": jnp.ones((2, 2))}, "bias": jnp.ones(2)}
    update = optimizer(params, 1.0, weight_decay=0.0, clip=1.0)
    large, small = (jax.tree.map(lambda x, by=by: by * x, params) for by in (1e6, 6**-0.5))
    found, expected = (update.update(gradients, update.init(params), params)[1] for gradients in (large, small))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_a_mesh_makes_the_same_updates(step):
    params, gradients, expected = step
    mesh = make_mesh("2x2x2x1")
    shardings = weight_shardings(params, mesh, TRAIN)
    params, gradients = jax.device_put((params, gradients), (shardings, shardings))
    update = optimizer(params, 0.01, adamw_schedule=0.005, adamw_weight_decay=0.3, partition=Partition(mesh, TRAIN))
    found, state = jax.jit(update.update)(gradients, update.init(params), params)
    assert misplaced(state, params) == set()
    for (name, one), other in zip(named_leaves(found).items(), named_leaves(expected).values(), strict=True):
        # A sum in another order grows 485-fold in the smallest singular values
        assert np.sqrt(np.mean(np.square(one - other))) <= 3e-6 * np.sqrt(np.mean(np.square(other))), name
        after = np.asarray(named_leaves(params)[name] + one), np.asarray(named_leaves(step[0])[name] + other)
        np.testing.assert_allclose(*after, rtol=0, atol=1e-6 * np.abs(after[1]).max(), err_msg=name)
    for one, sharding in zip(jax.tree.leaves(found), jax.tree.leaves(shardings), strict=True):
        assert one.sharding.is_equivalent_to(sharding, one.ndim)
    with pytest.raises(ValueError, match=r"on a mesh parameters are an nnx\.State with logical axes, found a dict"):
        optimizer({"a": jnp.ones((2, 2))}, 0.01, partition=Partition(mesh, TRAIN))


def misplaced(state, params):
    """Returns the parameters that a mesh shards, but not their moments in an optimizer's state."""
    params = named_leaves(params)
    moments = [(leaf_name(path), x) for path, x in jax.tree_util.tree_leaves_with_path(state) if x.ndim]
    pairs = [(next(param for param in params if name.endswith(param)), x) for name, x in moments]
    assert {name for name, _ in pairs} == {name for name in params if not name.endswith(ROUTER_BIAS)}
    return {name for name, x in pairs if shard_shape(x) != shard_shape(params[name])}


def shard_shape(x):
    return x.sharding.shard_shape(x.shape)


def test_an_optimizers_first_state_is_sharded_as_the_weights(step):
    # Given weights of which each of eight devices has a part, most an eighth
    mesh, config = make_mesh("2x2x2x1"), from_dict(toy_config("k2", **SIZES))
    params = jax.device_put(step[0], weight_shardings(step[0], mesh, TRAIN))
    parts = [x.size // math.prod(shard_shape(x)) for x in jax.tree.leaves(params)]
    assert parts.count(8) > len(parts) / 2
    # When a trainer makes the first state
    partition, model = Partition(mesh, TRAIN), nnx.merge(structure(config)[0], params)
    trainer = Trainer(model, lambda trained: optimizer(trained, 0.01, partition=partition), Recipe(config), partition)
    # Then a device has the moments of its part alone, and numbers of steps
    assert misplaced(trainer.state.optimizer, params) == set()
    assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(trainer.state))


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_the_schedule_rises_stays_and_falls(shape):
    schedule = warmup_stable_decay(2e-4, 10, 30, 20, end=0.1, shape=shape)
    found = [float(schedule(step)) for step in (0, 5, 10, 39, 40, 50, 60, 1000)]
    middle = 1.1e-4  # of both shapes
    np.testing.assert_allclose(found, [0, 1e-4, 2e-4, 2e-4, 2e-4, middle, 2e-5, 2e-5], rtol=1e-5)
    assert float(schedule(45)) == pytest.approx({"cosine": 1.736396e-4, "linear": 1.55e-4}[shape], rel=1e-4)
    assert isinstance(optax.inject_hyperparams(muon)(schedule), optax.GradientTransformationExtraArgs)
