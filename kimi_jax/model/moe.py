"""Feed-forward layers: SwiGLU, and the mixture of experts of DeepSeek-V3 (arXiv 2412.19437, section 2.1.2).

Tokens go through grouped matmuls (`pallas_kernels`), sorted by expert, few of them through one kernel of their own; an
expert that no token chose costs nothing, and no token meets an expert it did not choose.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from kimi_jax.axes import FlatHidden, Float, Float32, Int32
from kimi_jax.config import TextConfig
from kimi_jax.model.param import Init, Linear
from pallas_kernels import (
    grouped_matmul,
    grouped_swiglu,
    int4_grouped_matmul,
    int4_grouped_swiglu,
    mixture,
    quantize_int4,
)
from pallas_kernels.mixture import fits

# One projection of some experts: weight [e, out, in], or codes [e, in, out] and scales [e, in/32, out]
ExpertWeight = jax.Array | tuple[jax.Array, jax.Array]
# The most pairs of a token and one of its experts whose vectors exist at one time.
BLOCK = 8192
# A block is a multiple of this, if there are as many pairs.
WINDOW = 128
# gate, up, down
ExpertWeights = tuple[ExpertWeight, ExpertWeight, ExpertWeight]


class MLP(nnx.Module):
    """Computes down(silu(gate x) * up x); where the width is sharded, this device's part of the sum."""

    def __init__(self, init: Init, hidden: int, width: int, axis: str = "mlp"):
        self.gate_proj = Linear(init, width, hidden, (axis, "embed"))
        self.up_proj = Linear(init, width, hidden, (axis, "embed"))
        self.down_proj = Linear(init, hidden, width, ("embed", axis))

    def __call__(self, x: jax.Array) -> Float32[jax.Array, "..."]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x), dtype=jnp.float32)


class Router(nnx.Module):
    """The `noaux_tc` gate: sigmoid scores in float32, a correction bias that only chooses, groups of experts."""

    def __init__(self, init: Init, config: TextConfig):
        self.config = config
        self.weight = init.normal((config.n_routed_experts, config.hidden_size), ("expert_scores", "embed"))
        self.e_score_correction_bias = init.param(jnp.zeros(config.n_routed_experts, jnp.float32), ("expert_scores",))

    def __call__(self, x: FlatHidden) -> tuple[Int32[jax.Array, "t j"], Float32[jax.Array, "t j"]]:
        """Returns the chosen experts of each token of x [t, d], and their weights."""
        config = self.config
        x, w = x.astype(jnp.float32), self.weight[...].astype(jnp.float32)
        scores = jax.nn.sigmoid(jnp.einsum("td,ed->te", x, w, precision=jax.lax.Precision.HIGHEST))
        choice = self.eligible(scores + self.e_score_correction_bias[...].astype(jnp.float32))
        _, chosen = jax.lax.top_k(choice, config.num_experts_per_tok)
        # (jnp.take_along_axis would gather number by number)
        is_chosen = chosen[:, :, None] == jnp.arange(config.n_routed_experts)
        weights = jnp.sum(jnp.where(is_chosen, scores[:, None], 0), axis=-1)
        if config.norm_topk_prob:
            weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
        return chosen, weights * config.routed_scaling_factor

    def eligible(self, choice: Float32[jax.Array, "t e"]) -> Float32[jax.Array, "t e"]:
        """Sets scores to -inf outside the `topk_group` groups whose two best experts sum highest."""
        config = self.config
        if config.n_group == 1:
            return choice
        groups = choice.reshape(-1, config.n_group, config.n_routed_experts // config.n_group)
        best_two, _ = jax.lax.top_k(groups, 2)
        _, kept = jax.lax.top_k(best_two.sum(-1), config.topk_group)
        mask = jax.nn.one_hot(kept, config.n_group, dtype=bool).any(axis=1)
        return jnp.where(mask[:, :, None], groups, -jnp.inf).reshape(choice.shape)


class ExpertLinear(nnx.Module):
    """One projection of all experts: `weight` [e, out, in] as published, or in the INT4 kernels' layout `codes`
    [e, in, out] and `scales` [e, in/32, out]."""

    def __init__(self, init: Init, config: TextConfig, out: int, in_: int, axes: tuple[str, str]):
        if config.quantization is None:
            self.weight = init.normal((config.n_routed_experts, out, in_), ("expert", *axes))
        else:
            weight = init.normal((config.n_routed_experts, in_, out), ("expert", *axes[::-1]))
            codes, scales = jax.jit(quantize_int4)(weight[...])
            self.codes = nnx.Variable(codes, axes=("expert", *axes[::-1]), full_shape=codes.shape)
            self.scales = init.param(scales, ("expert", *axes[::-1]))

    def arrays(self) -> ExpertWeight:
        """Returns `weight`, or (`codes`, `scales`)."""
        return (self.codes[...], self.scales[...]) if hasattr(self, "codes") else self.weight[...]


class Experts(nnx.Module):
    """The routed experts of a layer."""

    def __init__(self, init: Init, config: TextConfig):
        hidden, width = config.hidden_size, config.moe_intermediate_size
        self.gate_proj = ExpertLinear(init, config, width, hidden, ("expert_mlp", "embed"))
        self.up_proj = ExpertLinear(init, config, width, hidden, ("expert_mlp", "embed"))
        self.down_proj = ExpertLinear(init, config, hidden, width, ("embed", "expert_mlp"))

    @property
    def num_local(self) -> int:
        """Returns the number of experts on this device."""
        return jax.tree.leaves(self.weights())[0].shape[0]

    def weights(self) -> ExpertWeights:
        return self.gate_proj.arrays(), self.up_proj.arrays(), self.down_proj.arrays()


def feed_forward(x: FlatHidden, experts: ExpertWeights, group_sizes: Int32[jax.Array, "e"]) -> FlatHidden:
    """Computes SwiGLU of x [t, d] sorted by expert, `group_sizes[i]` rows to expert i; rows past the last are zero."""
    gate, up, down = experts
    if isinstance(gate, tuple) and isinstance(up, tuple) and isinstance(down, tuple):
        return int4_grouped_matmul(int4_grouped_swiglu(x, gate, up, group_sizes), *down, group_sizes)
    assert not isinstance(gate, tuple) and not isinstance(up, tuple) and not isinstance(down, tuple)
    return grouped_matmul(grouped_swiglu(x, gate, up, group_sizes), down, group_sizes)


class MoE(nnx.Module):
    """Routed experts, weighted, plus the shared experts, unweighted; `block.mix_experts` adds them up over devices."""

    def __init__(self, init: Init, config: TextConfig):
        self.gate = Router(init, config)
        self.experts = Experts(init, config)
        width = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = MLP(init, config.hidden_size, width, "shared_mlp") if width else None

    def sum_experts(
        self,
        x: Float[jax.Array, "t *d"],
        chosen: Int32[jax.Array, "t j"],
        weights: Float32[jax.Array, "t j"],
        first: jax.Array | int = 0,
    ) -> Float32[jax.Array, "t *d"]:
        """Returns this device's part of each token's weighted sum over its `chosen` experts.

        The experts on this device are those from number `first` on.
        """
        return weighted_sum(x, chosen, weights, self.experts.weights(), self.gate.config.n_routed_experts, first)


def weighted_sum(
    x: Float[jax.Array, "t *d"],
    chosen: Int32[jax.Array, "t j"],
    weights: Float32[jax.Array, "t j"],
    experts: ExpertWeights,
    num_experts: int,
    first: jax.Array | int,
) -> Float32[jax.Array, "t *d"]:
    """Computes the part of each token's weighted sum that comes from `experts`, numbers `first` on of `num_experts`.

    A `chosen` of -1 is no expert. A token's vector may have any shape. Few tokens go through one kernel. For many,
    pairs of a token and one of its experts are sorted, those of local experts first, and taken in blocks, so that
    memory and work are bounded by the number of local pairs. The first block has room for twice as many as there are if
    experts are chosen evenly.
    """
    if fits(len(x), x.size // len(x)):
        return mixture(x.reshape(len(x), -1), chosen, weights, *experts, first=first).reshape(x.shape)
    num_local, choices, flat = jax.tree.leaves(experts)[0].shape[0], chosen.shape[1], chosen.reshape(-1)
    size = min(BLOCK, flat.size, -(-2 * flat.size * num_local // num_experts // WINDOW) * WINDOW)
    local = jnp.where((flat >= first) & (flat < first + num_local), flat - first, num_local)
    order = jnp.argsort(local, stable=True)
    # (jnp.bincount would scatter, which a TPU sends to its SparseCore and back)
    ends = jnp.sum(local[:, None] <= jnp.arange(num_local), axis=0, dtype=jnp.int32)
    order = jnp.pad(order, (0, -order.size % size))

    @jax.checkpoint
    def block(begin: jax.Array | int) -> jax.Array:
        pairs = jax.lax.dynamic_slice_in_dim(order, begin, size)
        sizes = jnp.diff(jnp.clip(ends - begin, 0, size), prepend=0).astype(jnp.int32)
        rows = pairs // choices
        y = feed_forward(x[rows].reshape(size, -1), experts, sizes)
        share = jnp.where(begin + jnp.arange(size) < ends[-1], weights.reshape(-1)[pairs], 0)
        y = (share[:, None] * y.astype(jnp.float32)).reshape(size, *x.shape[1:])
        return jnp.zeros(x.shape, jnp.float32).at[rows].add(y)

    def add(total: jax.Array, begin: jax.Array) -> tuple[jax.Array, None]:
        return jax.lax.cond(begin < ends[-1], lambda total: total + block(begin), lambda total: total, total), None

    def others(total: jax.Array) -> jax.Array:
        return jax.lax.scan(add, total, jnp.arange(size, order.size, size))[0]

    return jax.lax.cond(ends[-1] > size, others, lambda total: total, block(0))
