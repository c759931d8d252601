"""Models of any configuration with weights drawn by NumPy, which compiles nothing."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from kimi_jax import Kimi
from kimi_jax.config import KimiConfig
from kimi_jax.training.leaves import map_leaves


def structure(config: KimiConfig) -> tuple[Any, Any]:
    """Returns a float32 model's `nnx.GraphDef`, and its parameters as shapes."""
    return nnx.split(nnx.eval_shape(lambda: Kimi(config, rngs=nnx.Rngs(0), dtype=jnp.float32)))


def drawn(config: KimiConfig, std: float = 0.3) -> tuple[Any, Any]:
    """Returns a float32 model's `nnx.GraphDef`, and its parameters: vectors of ones, and normal numbers."""
    graph, shapes = structure(config)
    random = np.random.RandomState(0)

    def draw(name: str, leaf: Any) -> Any:
        values = np.ones(leaf.shape) if len(leaf.shape) == 1 else std * random.standard_normal(leaf.shape)
        return jnp.asarray(values, leaf.dtype)

    return graph, map_leaves(draw, shapes)
