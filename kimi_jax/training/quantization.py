"""Quantisation-aware training (Kimi K2 Thinking, K2.5): the loss is taken of the numbers that are published.

The weights that are trained, the masters, belong to `Kimi(config.dense())`, in float32 or bf16. Either
`as_published` rounds all of them at once, before the forward pass; or `fake_quantize_experts` lets every layer round
its experts where it multiplies by them, on the shard that a device has, which needs no second copy of all experts.
"""

from typing import Any

import jax
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from kimi_jax.config import KimiConfig
from kimi_jax.model.kimi import Kimi
from kimi_jax.model.moe import MoE
from kimi_jax.model.param import Matrix
from kimi_jax.training.leaves import ROUTER_BIAS, map_leaves, treatment
from pallas_kernels.formats import Dense, FakeInt4, fake_quantize_int4, straight_through

# Published in float32, and so never rounded.
_FLOAT32 = (ROUTER_BIAS, "A_log", "dt_bias")


@straight_through
def round_bf16(weight: jax.Array) -> jax.Array:
    """Rounds numbers to bf16 in their own dtype; the derivative is the identity."""
    return lax.reduce_precision(weight, exponent_bits=8, mantissa_bits=7)


def as_published(params: Any, config: KimiConfig) -> Any:
    """Returns the numbers that a checkpoint saved of `params` will compute with, in the dtypes of `params`.

    Routed experts [e, out, in] are rounded as `fake_quantize_int4` does where `config`, the published one, has INT4;
    the router's correction bias, `A_log` and `dt_bias` stay as they are; all others are rounded to bf16. Weights that
    are quantised already stay. The derivative is the identity.
    """

    def publish(name: str, weight: jax.Array) -> jax.Array:
        if name.endswith(_FLOAT32) or treatment(name, weight) == "constant":
            return weight
        if ".experts." in name and config.text.quantization is not None:
            return fake_quantize_int4(weight)
        return round_bf16(weight)

    return map_leaves(publish, params)


def in_dtype(params: Any, dtype: DTypeLike | None) -> Any:
    """Returns parameters in the dtype that a model computes in, except those that any model has in float32; None leaves
    all as they are."""
    if dtype is None:
        return params

    def cast(name: str, weight: jax.Array) -> jax.Array:
        return weight if name.endswith(_FLOAT32) or treatment(name, weight) == "constant" else weight.astype(dtype)

    return map_leaves(cast, params)


def fake_quantize_experts(model: Kimi) -> Kimi:
    """Returns the model with its routed experts, which are dense, read as INT4 will round them; arrays are shared.

    Raises:
      ValueError: the experts are quantised already, or there are none.
    """
    model = nnx.merge(*nnx.split(model))
    mixtures = [block.mlp for block in model.model.layers if isinstance(block.mlp, MoE)]
    if not mixtures:
        raise ValueError("the model has no routed experts to fake-quantise")
    for mixture in mixtures:
        for matrix in (mixture.experts.gate_proj, mixture.experts.up_proj, mixture.experts.down_proj):
            _fake_quantize(matrix)
    return model


def _fake_quantize(matrix: Matrix) -> None:
    if matrix.weight_format is not Dense:
        raise ValueError(f"experts are {matrix.weight_format.__name__}, expected Dense: those of Kimi(config.dense())")
    matrix.weight_format = FakeInt4
