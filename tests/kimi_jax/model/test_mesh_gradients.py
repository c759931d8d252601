"""Loss and gradients on meshes, with weights sharded for serving and for training, are those of a single device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kimi_jax
from checkpoints.toy import toy_config
from kimi_jax import Kimi
from kimi_jax.config_json import from_dict
from kimi_jax.model.param import weight_shardings
from sharding import SERVE, TRAIN, Partition, expert_dispatch, make_mesh

# Eight heads, experts and key channels, so that every mesh divides them. Every expert is chosen, since a loss jumps
# where a choice changes, and has no slope there.
SIZES = {
    "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 32, "num_attention_heads": 8,
    "num_key_value_heads": 8, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "initializer_range": 0.2,
}  # fmt: skip
LAYERS = {"full_attn_layers": [2], "kda_layers": [1], "head_dim": 8, "num_heads": 8, "short_conv_kernel_size": 4}
CONFIGS = {
    "k2": toy_config("k2", **SIZES, q_lora_rank=16, num_hidden_layers=2, n_routed_experts=8, num_experts_per_tok=8),
    "kimi-linear": toy_config(
        "kimi-linear", **SIZES, num_hidden_layers=2, linear_attn_config=LAYERS, num_experts=8, num_experts_per_token=8
    ),
}
ROWS, TOKENS = 2, 32
ATOL = 7e-6  # of the largest gradient of an array; the largest measured is 2.4e-6


def loss_and_gradients(name, partition, params, tokens, targets):
    """Computes next-token cross-entropy and its gradients as a trainer does, outside of the code that runs on each
    device."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: make_model(name)))  # weights come as arguments

    @jax.jit
    def run(params):
        def loss(params):
            logits = nnx.merge(graph, params)(tokens, partition=partition)
            return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, :, None], axis=-1))

        return jax.value_and_grad(loss)(params)

    return run(params)


def make_model(name):
    return Kimi(from_dict(CONFIGS[name]), rngs=nnx.Rngs(0), dtype=jnp.float32)


@pytest.fixture(scope="module")
def batch():
    random = np.random.RandomState(0)
    return tuple(jnp.asarray(random.randint(0, 768, (ROWS, TOKENS)), jnp.int32) for _ in range(2))


@pytest.fixture(scope="module")
def single_device(batch):
    """Returns a function from a name to the parameters, and their loss and gradients on a single device."""
    found = {}

    def compute(name):
        if name not in found:
            _, params = nnx.split(make_model(name))
            found[name] = params, *loss_and_gradients(name, Partition(), params, *batch)
        return found[name]

    return compute


@pytest.mark.parametrize(
    ("name", "shape", "rules", "dispatches"),
    [
        # (quick in test_training_on_meshes.py, packed)
        pytest.param("k2", "2x2x2x1", TRAIN, False, marks=pytest.mark.slow),
        pytest.param("k2", "2x1x2x2", TRAIN, True, marks=pytest.mark.slow),
        pytest.param("kimi-linear", "1x2x2x2", SERVE, False, marks=pytest.mark.slow),
    ],
)
def test_gradients_on_a_mesh(monkeypatch, single_device, batch, name, shape, rules, dispatches):
    # Given a model whose weights are sharded over eight devices
    params, expected_loss, expected = single_device(name)
    if dispatches:  # (a single device has nobody to send tokens to)
        monkeypatch.setattr(expert_dispatch, "MIN_BYTES_SAVED", -1e9)
    mesh = make_mesh(shape)
    shardings = weight_shardings(params, mesh, rules)
    loss, gradients = loss_and_gradients(name, Partition(mesh, rules), jax.device_put(params, shardings), *batch)
    # Then loss and gradients are those of one device
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-6)
    for (path, found), (_, want) in zip(nnx.to_flat_state(gradients), nnx.to_flat_state(expected), strict=True):
        want = np.asarray(want)
        np.testing.assert_allclose(found, want, rtol=0, atol=ATOL * max(np.abs(want).max(), 1e-3), err_msg=str(path))
    # And gradients are sharded as the weights are
    for found, sharding in zip(jax.tree.leaves(gradients), jax.tree.leaves(shardings), strict=True):
        assert found.sharding.is_equivalent_to(sharding, found.ndim)


@pytest.mark.parametrize("name", CONFIGS)
def test_training_keeps_an_eighth_of_attention_on_each_device(name):
    # Given a mesh over which serving replicates attention
    mesh = make_mesh("4x2x1x1")
    shapes = nnx.split(nnx.eval_shape(lambda: make_model(name)))[1]
    shares = {}
    for key, rules in (("serve", SERVE), ("train", TRAIN)):
        shardings = weight_shardings(shapes, mesh, rules)
        shards = jax.tree.map(lambda x, at: np.prod(at.shard_shape(x.shape)) / x.size, shapes, shardings)
        shares[key] = {path: float(shard[...]) for path, shard in nnx.to_flat_state(shards)}
    # Then each device has an eighth of every projection, with the rules for training only
    matrices = [path for path in shares["train"] if "self_attn" in path and path[-2].endswith("_proj")]
    assert len(matrices) >= 8
    assert {shares["train"][path] for path in matrices} == {1 / 8}
    assert {shares["serve"][path] for path in matrices} == {1}


def test_a_checkpoint_is_loaded_as_training_wants_it(checkpoint, model):
    mesh = make_mesh("2x2x2x1")
    loaded = kimi_jax.load(checkpoint("k2"), mesh=mesh, rules=TRAIN, dtype=jnp.float32)
    o_proj = loaded.model.layers[0].self_attn.o_proj.weight
    assert o_proj[...].addressable_shards[0].data.size == o_proj.size // 8
    tokens = np.random.RandomState(0).randint(0, 500, (2, 9))
    logits = loaded(tokens, partition=Partition(mesh, TRAIN))
    np.testing.assert_allclose(logits, model("k2")(tokens), rtol=0, atol=5e-5)
