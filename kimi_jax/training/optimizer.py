"""MuonClip's optimizer of a whole model: Muon for matrices of layers, AdamW for the rest; and its learning rate.

QK-Clip and the router's bias follow the optimizer's step: `qk_clip`, `router_bias`.
"""

from typing import Any, Literal

import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from kimi_jax.model.param import weight_specs
from kimi_jax.training.leaves import map_leaves, named_leaves, treatment
from kimi_jax.training.muon import muon
from sharding import SINGLE_DEVICE, Partition

# Moonlight's (arXiv 2502.16982, appendix D)
_ADAM = {"b1": 0.9, "b2": 0.95, "eps": 1e-8}


def optimizer(
    params: Any,
    schedule: optax.ScalarOrSchedule,
    *,
    adamw_schedule: optax.ScalarOrSchedule | None = None,
    weight_decay: float = 0.1,
    adamw_weight_decay: float | None = None,
    clip: float = 1.0,
    dtype: DTypeLike = jnp.float32,
    partition: Partition = SINGLE_DEVICE,
) -> optax.GradientTransformation:
    """Makes the optimizer of a model's parameters, with what each is updated by as `leaves.treatment` says.

    Gradients are clipped to a global norm first. Matrices of layers take Muon with weight decay, vocabulary tables
    AdamW with weight decay, all others AdamW without; the router's correction bias and quantised weights stay.

    Args:
      params: the parameters that are trained, arrays or their shapes; on a mesh a `flax.nnx.State`, whose variables
        know their logical axes.
      schedule: the learning rate, a number or a function of the update's number.
      adamw_schedule: the learning rate of AdamW, if not `schedule`.
      weight_decay: that of Muon, multiplied by the learning rate; `adamw_weight_decay` that of AdamW, if not this.
      clip: the largest global norm of gradients.
      dtype: the dtype of Muon's iteration.
      partition: the partition of the parameters.
    """
    rate = schedule if adamw_schedule is None else adamw_schedule
    decay = weight_decay if adamw_weight_decay is None else adamw_weight_decay
    by_treatment = {
        "muon": muon(
            schedule, weight_decay=weight_decay, dtype=dtype, partition=partition, specs=_specs(params, partition)
        ),
        "decayed": optax.adamw(rate, **_ADAM, weight_decay=decay),
        "plain": optax.adam(rate, **_ADAM),
        "constant": optax.set_to_zero(),
    }
    return optax.chain(optax.clip_by_global_norm(clip), optax.partition(by_treatment, map_leaves(treatment, params)))


def _specs(params: Any, partition: Partition) -> dict[str, PartitionSpec]:
    """Returns the PartitionSpec of every parameter by name; none on a single device."""
    if partition.devices == 1:
        return {}
    if not isinstance(params, nnx.State):
        raise ValueError(f"on a mesh parameters are an nnx.State with logical axes, found a {type(params).__name__}")
    return named_leaves(weight_specs(params, partition))


def warmup_stable_decay(
    peak: float,
    warmup: int,
    stable: int,
    decay: int,
    *,
    end: float = 0.1,
    shape: Literal["cosine", "linear"] = "cosine",
) -> optax.Schedule:
    """Makes the schedule of Kimi K2 (arXiv 2507.20534, section 2.5).

    The learning rate rises linearly from 0 to `peak` over `warmup` updates, stays there for `stable`, falls to
    `end * peak` over `decay` by half a cosine or a line, and stays there.
    """
    last = {
        "cosine": optax.cosine_decay_schedule(peak, decay, alpha=end),
        "linear": optax.linear_schedule(peak, end * peak, decay),
    }[shape]
    rising = optax.linear_schedule(0.0, peak, warmup)
    return optax.join_schedules([rising, optax.constant_schedule(peak), last], [warmup, warmup + stable])
