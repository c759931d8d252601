"""A weight format is one file: two toys are declared here and nowhere else, and a model's layers run with them."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from checkpoints.toy import toy_config
from kimi_jax.config_json import from_dict
from kimi_jax.model.block import mix_experts
from kimi_jax.model.moe import Experts, MoE
from kimi_jax.model.param import Init, Linear, weight_specs
from pallas_kernels import grouped_matmul
from pallas_kernels.formats import Dense, Int4, Part, Weight
from pallas_kernels.mixture.mosaic_tpu import MOST_TOKENS
from sharding import Partition, StreamLayout, make_mesh

HIDDEN, GROUP = 64, 16
SIZES = {"hidden_size": HIDDEN, "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 2}
CONFIG = from_dict(toy_config("k2.5", **SIZES)).text


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8(Weight):
    """Bytes [..., out, in], and a float32 scale for each 16 inputs."""

    bytes: Any
    scales: Any

    parts = (Part("bytes", jnp.int8), Part("scales", jnp.float32, (1, GROUP)))
    stored = (Part("weight_int8", jnp.int8), Part("weight_int8_scale", jnp.float32, (1, GROUP)))

    @classmethod
    def from_dense(cls, weight):
        groups = weight.astype(jnp.float32).reshape(*weight.shape[:-1], -1, GROUP)
        scales = jnp.max(jnp.abs(groups), axis=-1) / 127
        return cls(jnp.rint(groups / scales[..., None]).astype(jnp.int8).reshape(weight.shape), scales)

    def dequantize(self, dtype=None):
        scales = jnp.repeat(self.scales, GROUP, axis=-1)
        return (self.bytes.astype(jnp.float32) * scales).astype(dtype or self.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FakeInt4(Weight):
    """A weight that is trained as INT4 will round it: the gradient passes straight through."""

    weight: Any

    parts = stored = (Part("weight"),)
    trained = True

    @classmethod
    def from_dense(cls, weight):
        return cls(weight)

    def dequantize(self, dtype=None):
        rounded = Int4.from_dense(jax.lax.stop_gradient(self.weight)).dequantize(self.weight.dtype)
        return (self.weight + (rounded - jax.lax.stop_gradient(self.weight))).astype(dtype or self.weight.dtype)

    def operand(self, dtype):
        return Dense(self.dequantize(dtype))


TOYS = pytest.mark.parametrize("toy", [Int8, FakeInt4])


def init():
    return Init(jax.random.key(0), jnp.dtype(jnp.float32), std=0.2)


def rows(count):
    return jnp.asarray(np.random.RandomState(0).standard_normal((count, HIDDEN)), jnp.float32)


def make_pair(toy):
    """Makes a mixture whose experts are in the toy format, and one with the same numbers in float32."""
    pair = MoE(init(), CONFIG), MoE(init(), CONFIG)
    pair[0].experts, pair[1].experts = Experts(init(), CONFIG, toy), Experts(init(), CONFIG, Dense)
    for name in ("gate_proj", "up_proj", "down_proj"):
        quantised = getattr(pair[0].experts, name).read()
        assert isinstance(quantised, toy)
        getattr(pair[1].experts, name).weight[...] = quantised.dequantize(jnp.float32)
    return pair


@nnx.jit
def mix(layer, x):
    return mix_experts(layer, x[None], StreamLayout())[0]


@TOYS
@pytest.mark.parametrize(
    "tokens", [33, *(pytest.param(tokens, marks=pytest.mark.slow) for tokens in (1, MOST_TOKENS + 1))]
)
def test_a_mixture_computes_in_the_format(toy, tokens):
    layer, plain = make_pair(toy)
    found, expected = mix(layer, rows(tokens)), mix(plain, rows(tokens))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    # and its numbers are not those that were drawn
    plain.experts = Experts(init(), CONFIG, Dense)
    assert np.abs(mix(plain, rows(tokens)) - expected).max() > 1e-3 * np.abs(expected).max()


@TOYS
def test_a_linear_computes_in_the_format(toy):
    layer = Linear(init(), 48, HIDDEN, ("mlp", "embed"), bias=True, weight_format=toy)
    expected = rows(5) @ layer.read().dequantize(jnp.float32).T + layer.bias[...]
    np.testing.assert_allclose(layer(rows(5)), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def gradient_of_x(layer, x):
    graph, params = nnx.split(layer)
    return jax.jit(jax.grad(lambda x: jnp.sum(mix_experts(nnx.merge(graph, params), x[None], StreamLayout()) ** 2)))(x)


@TOYS
def test_gradients_with_respect_to_x_are_those_of_the_numbers(toy):
    layer, plain = make_pair(toy)
    found, expected = (gradient_of_x(layer, rows(33)) for layer in (layer, plain))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_gradients_reach_weights_that_are_trained_and_no_others():
    pair = make_pair(FakeInt4)
    gradients = [nnx.grad(lambda layer: jnp.sum(mix(layer, rows(33)) ** 2))(layer) for layer in pair]
    for name in ("gate_proj", "up_proj", "down_proj"):
        found, expected = (gradient["experts"][name]["weight"][...] for gradient in gradients)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        assert np.any(expected)
    for constant in (Int8, Int4):
        assert not jax.tree.leaves(nnx.state(Experts(init(), CONFIG, constant), nnx.Param))


def test_parts_are_sharded_as_the_weight_is():
    partition = Partition(make_mesh("1x2x4x1"))
    specs, plain = (
        dict(nnx.to_flat_state(weight_specs(nnx.split(Experts(init(), CONFIG, kind))[1], partition)))
        for kind in (Int8, Dense)
    )
    for name in ("gate_proj", "up_proj", "down_proj"):
        found = [specs[name, part].get_value() for part in ("bytes", "scales")]
        assert found == [plain[name, "weight"].get_value()] * 2


def test_a_kernel_that_is_not_there_is_refused_by_name():
    weight = Int8.from_dense(rows(32)[None])
    with pytest.raises(ValueError, match=r"implementation 'mosaic_tpu' is not available, expected None or one of"):
        grouped_matmul(rows(4), weight, jnp.asarray([4], jnp.int32), implementation="mosaic_tpu")
