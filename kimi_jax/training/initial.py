"""The state that a run begins with: the optimizer's arrays are sharded as the parameters that they are of.

A compiler left to itself replicates arrays of zeros, of which an optimizer's first state consists.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from kimi_jax.training.leaves import leaf_name, named_leaves
from sharding import REPLICATED


def initial_optimizer(
    optimizer: optax.GradientTransformation, trained: Any, mesh: Mesh | AbstractMesh | None
) -> tuple[Any, Any]:
    """Returns the number of steps done, zero, and the optimizer's first state, on the mesh of the parameters.

    Where these are shapes (`jax.ShapeDtypeStruct`), shapes are returned.
    """

    def begin(trained: Any) -> tuple[jax.Array, Any]:
        return jnp.zeros((), jnp.int32), optimizer.init(trained)

    shapes = jax.eval_shape(begin, trained)
    shardings = None if mesh is None else _shardings(shapes, trained, mesh)
    if not isinstance(jax.tree.leaves(trained)[0], jax.ShapeDtypeStruct):
        return jax.jit(begin, out_shardings=shardings)(trained)
    if shardings is None:
        return shapes
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, shardings)


def _shardings(state: Any, trained: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Returns the sharding of every array of a state: that of the parameter whose name its own ends with, if it has the
    parameter's shape."""
    params = named_leaves(trained)

    def place(path: Any, leaf: Any) -> NamedSharding:
        parts = leaf_name(path).split(".")
        endings = (".".join(parts[i:]) for i in range(len(parts)))
        param = next((params[name] for name in endings if name in params), None)
        if param is None or param.shape != leaf.shape:
            return NamedSharding(mesh, REPLICATED)
        return NamedSharding(mesh, param.sharding.spec)

    return jax.tree_util.tree_map_with_path(place, state)
