"""Masters: the dense weights that quantisation-aware training updates, made of a model with INT4 experts."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kimi_jax.model.kimi import Kimi, abstract
from pallas_kernels.formats import Weight
from sharding import TRAIN, Rules, array_mesh


def dense_masters(model: Kimi, dtype: jax.typing.DTypeLike = jnp.float32, rules: Rules = TRAIN) -> Kimi:
    """Returns `Kimi(model.config.dense())` with the numbers of `model`, in `dtype`, sharded by `rules` over its mesh.

    What a bf16 model has in float32 is float32 in any. Experts that are dense already are cast like all others.
    """
    mesh = array_mesh(model.model.embed_tokens.weight.get_value())
    graph, state = nnx.split(abstract(model.config.dense(), dtype, mesh, rules))
    found = dict(nnx.to_flat_state(nnx.state(model)))
    masters: list[tuple[Any, nnx.Variable]] = []
    for path, variable in nnx.to_flat_state(state):
        wanted = variable.get_value()
        if path in found:
            value = found[path].get_value().astype(wanted.dtype)
        else:
            matrix: Any = functools.reduce(_child, path[:-1], model)
            value = _dequantize(matrix.read(), wanted.dtype)
        masters.append((path, variable.replace(jax.device_put(value, wanted.sharding))))
    return nnx.merge(graph, nnx.from_flat_state(masters))


def _child(module: Any, name: Any) -> Any:
    return module[name] if isinstance(name, int) else getattr(module, name)


@functools.partial(jax.jit, static_argnums=1)
def _dequantize(weight: Weight, dtype: jnp.dtype) -> jax.Array:
    return weight.dequantize(dtype)
