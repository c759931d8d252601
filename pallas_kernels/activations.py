"""Gated activations: the values between the products of gate and up and the product of down, in a feed-forward layer.

An op takes one by name, or as any function (gate, up) -> value of two arrays that is hashable: compiled programs are
kept by it. A function with parameters is best a frozen dataclass with `__call__`, of which two that are equal share a
program. Kernels call it with float32.
"""

from collections.abc import Callable, Hashable
from typing import Any

import jax
from jaxtyping import Array, Float

Activation = str | Callable[[Array, Array], Array]


def silu_gated(gate: Float[Array, "..."], up: Float[Array, "..."]) -> Float[Array, "..."]:
    """Computes silu(gate) * up, which is called SwiGLU (arXiv 2002.05202)."""
    return jax.nn.silu(gate) * up


def gelu_gated(gate: Float[Array, "..."], up: Float[Array, "..."]) -> Float[Array, "..."]:
    """Computes gelu(gate) * up (arXiv 2002.05202), GELU by its approximation with tanh."""
    return jax.nn.gelu(gate, approximate=True) * up


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
