"""Gated activations: the values between the products of gate and up and the product of down, in a feed-forward layer.

An op takes one by name, or as any function (gate, up) -> value of two arrays that is hashable: compiled programs are
kept by it. A function with parameters is best a frozen dataclass with `__call__`, of which two that are equal share a
program. Kernels call it with float32.
"""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Activation = str | Callable[[Array, Array], Array]


def silu_gated(gate: Float[Array, "..."], up: Float[Array, "..."]) -> Float[Array, "..."]:
    """Computes silu(gate) * up, which is called SwiGLU (arXiv 2002.05202)."""
    return jax.nn.silu(gate) * up


def gelu_gated(gate: Float[Array, "..."], up: Float[Array, "..."]) -> Float[Array, "..."]:
    """Computes gelu(gate) * up (arXiv 2002.05202), GELU by its approximation with tanh."""
    return jax.nn.gelu(gate, approximate=True) * up


@dataclasses.dataclass(frozen=True)
class SituGated:
    """Computes beta * tanh(gate / beta) * sigmoid(gate) * squashed(up), Kimi K3's SiTU-GLU.

    squashed(up) is linear_beta * tanh(up / linear_beta), or `up` itself where `linear_beta` is None. The values are
    computed in float32 and cast once, to the dtype of `gate`. For small gates this is SwiGLU.
    """

    beta: float
    linear_beta: float | None = None

    def __call__(self, gate: Float[Array, "..."], up: Float[Array, "..."]) -> Float[Array, "..."]:
        wide = jnp.promote_types(gate.dtype, jnp.float32)
        g, u = gate.astype(wide), up.astype(wide)
        if self.linear_beta is not None:
            u = self.linear_beta * jnp.tanh(u / self.linear_beta)
        return (self.beta * jnp.tanh(g / self.beta) * jax.nn.sigmoid(g) * u).astype(gate.dtype)


# By the names that config.json files have for them (`hidden_act`).
ACTIVATIONS: dict[str, Callable[[Array, Array], Array]] = {"silu": silu_gated, "gelu_pytorch_tanh": gelu_gated}


def find_activation(op: str, activation: Any) -> Callable[[Array, Array], Array]:
    """Returns the function that an op's argument `activation` names or is.

    Raises:
      ValueError: no activation has this name, or the argument is no hashable function.
    """
    if isinstance(activation, str) and activation in ACTIVATIONS:
        return ACTIVATIONS[activation]
    if isinstance(activation, Hashable) and callable(activation):
        return activation
    raise ValueError(
        f"{op}: activation is {activation!r}, expected one of {sorted(ACTIVATIONS)} or a hashable function (gate, up)"
    )
