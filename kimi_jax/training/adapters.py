"""Low-rank adapters (LoRA, arXiv 2106.09685): W + B A is trained in place of a matrix W that stays as it is.

The sum is rounded as it will be published, so that the merged checkpoint computes what was trained. Only A and B have
gradients that are kept and an optimizer's state, so that experts stay in INT4 and cost no more than to run them.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from sharding import SINGLE_DEVICE, Partition, array_mesh

# Projections of attention, and of dense and shared MLPs
_ADAPTED = re.compile(r"model\.layers\.\d+\.(self_attn|mlp|mlp\.shared_experts)\.\w+_proj(_with_mqa)?\.weight")
_A, _B = "lora_a", "lora_b"


def is_adapted(name: str) -> bool:
    """Tells whether a parameter usually has an adapter: a projection of attention, or of a dense or shared MLP."""
    return _ADAPTED.fullmatch(name) is not None


def make_adapters(weights: Any, rank: int, partition: Partition = SINGLE_DEVICE, seed: int = 0) -> Any:
    """Makes the adapters of matrices [out, in]: A [rank, in] is drawn, with deviation in^-0.5, and B [out, rank] zero.

    They are float32 and sharded as their matrix is.

    Raises:
      ValueError: a weight is no matrix.
    """
    adapters: list[tuple[Any, nnx.Variable]] = []
    for number, (path, variable) in enumerate(nnx.to_flat_state(weights)):
        axes, weight = variable.get_metadata()["axes"], variable.get_value()
        mesh, shape = array_mesh(weight), weight.shape
        if len(shape) != 2:
            raise ValueError(f"{'.'.join(map(str, path))} has shape {shape}, expected a matrix for an adapter")
        key = jax.random.fold_in(jax.random.key(seed), number)
        drawn = jax.random.normal(key, (rank, shape[1]), jnp.float32) * shape[1] ** -0.5
        parts = {_A: (drawn, (None, axes[1])), _B: (jnp.zeros((shape[0], rank)), (axes[0], None))}
        for name, (array, own) in parts.items():
            if mesh is not None:  # (every process draws the whole of it)
                placement = NamedSharding(mesh, partition.spec(own, array.shape))
                array = jax.make_array_from_callback(array.shape, placement, np.asarray(array).__getitem__)
            adapters.append(((*path, name), nnx.Param(array, axes=own, full_shape=array.shape)))
    return nnx.from_flat_state(adapters)


def merge_adapters(weights: Any, adapters: Any) -> tuple[Any, Any]:
    """Returns the matrices that have adapters, each as W + B A in its dtype, and all other weights."""
    factors = {path: variable.get_value() for path, variable in nnx.to_flat_state(adapters)}
    merged, others = [], []
    for path, variable in nnx.to_flat_state(weights):
        if (*path, _A) not in factors:
            others.append((path, variable))
            continue
        product = jnp.matmul(factors[(*path, _B)], factors[(*path, _A)], precision=jax.lax.Precision.HIGHEST)
        weight = variable.get_value()
        merged.append((path, variable.replace((weight.astype(jnp.float32) + product).astype(weight.dtype))))
    return nnx.from_flat_state(merged), nnx.from_flat_state(others)
