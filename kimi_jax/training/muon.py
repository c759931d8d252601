"""Muon (Keller Jordan), as Moonlight scales it (arXiv 2502.16982) and MuonClip uses it (Kimi K2, arXiv 2507.20534)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from kimi_jax.training.leaves import named_leaves
from kimi_jax.training.newton_schulz import orthogonalize_leaves
from sharding import SINGLE_DEVICE, Partition


class MuonState(NamedTuple):
    """The number of updates made, and the momentum of every matrix in float32, sharded as the matrices are."""

    updates: jax.Array
    momentum: Any


def muon(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float = 0.95,
    weight_decay: float = 0.1,
    rms: float = 0.2,
    steps: int = 5,
    dtype: DTypeLike = jnp.float32,
    *,
    partition: Partition = SINGLE_DEVICE,
    specs: Mapping[str, PartitionSpec] | None = None,
) -> optax.GradientTransformation:
    """Makes the optimizer of a tree of matrices [*stack, out, in], each of which is a matrix of its own.

    M <- mu M + (1 - mu) G; U = mu M / (1 - mu^(t+1)) + (1 - mu) G / (1 - mu^t) with t from 1 (Nesterov);
    W <- W - lr (rms sqrt(max(out, in)) orthogonalize(U) + wd W).
    It equals `optax.contrib.scale_by_muon` with `consistent_rms`, but iterates once per shape instead of per array.

    Args:
      learning_rate: a number, or a schedule of the update's number. The updates' root mean square is about `rms` times
        that, so that AdamW's learning rates serve.
      momentum: mu.
      weight_decay: wd, multiplied by the learning rate.
      steps: the number of Newton-Schulz steps.
      dtype: the dtype of these; bf16 is enough at scale. Momentum is float32.
      partition: the mesh over which parameters are sharded. Each matrix is then iterated on one device.
      specs: the parameters' PartitionSpecs by name (`leaves.leaf_name`), which a mesh needs; that of one that is not
        there is replicated.

    Raises:
      ValueError: at `init`, a parameter has fewer than two axes.
    """
    return optax.chain(
        scale_by_muon(momentum, rms, steps, dtype, partition, specs or {}),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_muon(
    momentum: float,
    rms: float,
    steps: int,
    dtype: DTypeLike,
    partition: Partition,
    specs: Mapping[str, PartitionSpec],
) -> optax.GradientTransformation:
    """Makes the transformation of gradients into `rms * sqrt(max(out, in)) * orthogonalize(U)`; see `muon`."""

    def init(params: Any) -> MuonState:
        for name, leaf in named_leaves(params).items():
            if leaf.ndim < 2:
                raise ValueError(f"muon: {name} has shape {leaf.shape}, expected matrices [..., out, in]")
        return MuonState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params, dtype=jnp.float32))

    def update(updates: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        gradients = optax.tree.cast(updates, jnp.float32)
        moments = optax.tree.update_moment(gradients, state.momentum, momentum, 1)
        count = optax.safe_increment(state.updates)
        ahead = optax.tree.bias_correction(moments, momentum, optax.safe_increment(count))
        now = optax.tree.bias_correction(gradients, momentum, count)
        nesterov = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, ahead, now)
        named = named_leaves(nesterov)
        placed = [specs.get(name, PartitionSpec(*[None] * leaf.ndim)) for name, leaf in named.items()]
        solved = orthogonalize_leaves(list(named.values()), placed, partition, steps, dtype)
        scaled = [rms * max(leaf.shape[-2:]) ** 0.5 * leaf for leaf in solved]
        return jax.tree.unflatten(jax.tree.structure(updates), scaled), MuonState(count, moments)

    return optax.GradientTransformation(init, update)
