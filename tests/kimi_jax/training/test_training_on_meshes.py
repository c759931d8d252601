"""The loss of packed rows and its gradients on meshes are those of one device; states are sharded as weights are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from checkpoints.toy import toy_config
from kimi_jax import Kimi
from kimi_jax.config_json import from_dict
from kimi_jax.model.kimi import abstract
from kimi_jax.model.param import weight_shardings
from kimi_jax.training import Recipe, Rows, Trainer, optimizer, sum_losses
from kimi_jax.training.leaves import named_leaves
from sharding import AXES, REPLICATED, TRAIN, Partition, expert_dispatch, make_mesh

# A loss jumps where a choice of experts changes: one of eight is far from being chosen or not.
CONFIG = from_dict(
    toy_config(
        "k2", hidden_size=32, intermediate_size=32, moe_intermediate_size=32, num_attention_heads=8,
        num_key_value_heads=8, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, q_lora_rank=16,
        initializer_range=0.2, num_hidden_layers=2, n_routed_experts=8, num_experts_per_tok=2,
    )
)  # fmt: skip


@pytest.fixture(scope="module")
def single_device():
    """Returns structure, parameters and rows, and their loss and gradients on one device."""
    graph, params = nnx.split(Kimi(CONFIG.dense(), rngs=nnx.Rngs(0), dtype=jnp.float32))
    rows = Rows.whole(np.random.RandomState(0).randint(0, 500, (8, 32)))
    return graph, params, rows, *gradients(graph, rows, Partition())(params)


def gradients(graph, rows, partition):
    def loss(params):
        losses, seen = sum_losses(nnx.merge(graph, params), rows, partition)
        return losses.loss, seen

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize(
    "shape", ["2x2x2x1", *(pytest.param(shape, marks=pytest.mark.slow) for shape in ("8x1x1x1", "1x4x1x2"))]
)
def test_gradients_of_training_on_a_mesh(monkeypatch, single_device, shape):
    graph, params, rows, (loss, seen), want = single_device
    monkeypatch.setattr(expert_dispatch, "MIN_BYTES_SAVED", -1e9)  # tokens travel to experts
    mesh = make_mesh(shape)
    shardings = weight_shardings(params, mesh, TRAIN)
    run = gradients(graph, rows, Partition(mesh, TRAIN))
    (found_loss, found_seen), found = run(jax.device_put(params, shardings))
    assert float(found_loss) == pytest.approx(float(loss), rel=1e-6)
    np.testing.assert_array_equal(found_seen.expert_counts, seen.expert_counts)
    for (name, one), other in zip(named_leaves(found).items(), named_leaves(want).values(), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        scale = np.sqrt(np.mean(other**2))
        assert np.sqrt(np.mean((one - other) ** 2)) <= 1e-5 * max(scale, 1e-6), name
        # A sum that is missing or made twice is a factor
        assert np.sum(one * other) == pytest.approx(np.sum(other * other), rel=1e-5, abs=1e-10), name


def test_an_optimizers_state_is_sharded_as_the_weights_are():
    mesh = AbstractMesh((2, 2, 2, 1), AXES, axis_types=(AxisType.Auto,) * 4)
    partition = Partition(mesh, TRAIN)
    model = abstract(CONFIG.dense(), jnp.float32, mesh, TRAIN)
    trainer = Trainer(model, lambda params: optimizer(params, 0.1, partition=partition), Recipe(CONFIG), partition)
    weights, states = named_leaves(trainer.state.trained), named_leaves(trainer.state.optimizer)
    assert len(states) > len(weights)
    for name, state in states.items():
        of = next((weight for weight in weights if name.endswith(weight)), None)
        spec = REPLICATED if of is None else weights[of].sharding.spec
        assert state.sharding.spec == spec, name
        assert of is not None or state.size == 1, name
