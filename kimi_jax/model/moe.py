"""Feed-forward layers: SwiGLU, and the mixture of experts of DeepSeek-V3 (arXiv 2412.19437, section 2.1.2).

Tokens go through grouped matmuls (`pallas_kernels`), sorted by expert, few of them through one kernel of their own; an
expert nobody chose costs nothing, and no token meets an expert it did not choose.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from kimi_jax.axes import Float32, Hidden, Int32, Rows
from kimi_jax.config import TextConfig
from kimi_jax.model.param import Init, Linear, columns_as
from pallas_kernels import (
    grouped_matmul,
    grouped_swiglu,
    int4_grouped_matmul,
    int4_grouped_swiglu,
    mixture,
    quantize_int4,
)
from pallas_kernels.mixture import MOST_TOKENS
from sharding import ALONE, Residual, exchanged, first_expert

# One projection of some experts: weight [e, out, in], or codes [e, in, out] and scales [e, in/32, out]
ExpertWeight = jax.Array | tuple[jax.Array, jax.Array]
# Pairs of a token and an expert of its whose vectors exist at one time.
BLOCK = 8192
# Up to so many tokens go through one kernel, unsorted.
FEW_TOKENS = MOST_TOKENS
# gate, up, down
ExpertWeights = tuple[ExpertWeight, ExpertWeight, ExpertWeight]


class MLP(nnx.Module):
    """down(silu(gate x) * up x); where the width is split, this part of the sum."""

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

    def __call__(self, x: Rows) -> tuple[Int32[jax.Array, "t j"], Float32[jax.Array, "t j"]]:
        """x [t, d] -> the chosen experts of each token and their weights."""
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
        """-inf outside the `topk_group` groups whose two best experts sum highest."""
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
            self.codes = nnx.Variable(codes, axes=("expert", *axes[::-1]))
            self.scales = init.param(scales, ("expert", *axes[::-1]))

    def arrays(self) -> ExpertWeight:
        """`weight`, or (`codes`, `scales`)."""
        return (self.codes[...], self.scales[...]) if hasattr(self, "codes") else self.weight[...]


class Experts(nnx.Module):
    """The routed experts of a layer."""

    def __init__(self, init: Init, config: TextConfig):
        hidden, width = config.hidden_size, config.moe_intermediate_size
        self.gate_proj = ExpertLinear(init, config, width, hidden, ("expert_mlp", "embed"))
        self.up_proj = ExpertLinear(init, config, width, hidden, ("expert_mlp", "embed"))
        self.down_proj = ExpertLinear(init, config, hidden, width, ("embed", "expert_mlp"))

    def weights(self) -> ExpertWeights:
        return self.gate_proj.arrays(), self.up_proj.arrays(), self.down_proj.arrays()


def feed_forward(
    x: Rows, experts: ExpertWeights, group_sizes: Int32[jax.Array, "e"], first: jax.Array | int = 0
) -> Rows:
    """x [t, d], sorted by expert, `group_sizes[i]` rows to expert i -> [t, d].

    `experts` holds those from number `first` on; the rows of others are zero.
    """
    gate, up, down = experts
    if isinstance(gate, tuple) and isinstance(up, tuple) and isinstance(down, tuple):
        h = int4_grouped_swiglu(x, gate, up, group_sizes, group_offset=first)
        return int4_grouped_matmul(h, *down, group_sizes, group_offset=first)
    assert not isinstance(gate, tuple) and not isinstance(up, tuple) and not isinstance(down, tuple)
    h = grouped_swiglu(x, gate, up, group_sizes, group_offset=first)
    return grouped_matmul(h, down, group_sizes, group_offset=first)


class MoE(nnx.Module):
    """Routed experts, weighted, plus the shared experts, unweighted."""

    def __init__(self, init: Init, config: TextConfig):
        self.gate = Router(init, config)
        self.experts = Experts(init, config)
        width = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = MLP(init, config.hidden_size, width, "shared_mlp") if width else None

    def __call__(self, x: Hidden, residual: Residual = ALONE) -> Hidden:
        if residual.exchange:
            return self.exchanged(x, residual)
        tokens = residual.everyone(x)
        y = self.routed(tokens)
        if self.shared_experts is not None:
            y = y + self.shared_experts(tokens)
        return residual.back(y, x)

    def exchanged(self, x: Hidden, residual: Residual) -> Hidden:
        """The same, tokens travelling to their experts. Shared experts have the tokens of their rows instead of all."""
        mine = residual.alone(x)
        held, count = jax.tree.leaves(self.experts.weights())[0].shape[0], self.gate.config.n_routed_experts
        y = residual.rejoined(exchanged(mine, *self.gate(mine), self.part, held, count), x)
        if self.shared_experts is None:
            return y
        shared = columns_as(self.shared_experts, "shared_mlp", like="mlp")
        return y + residual.summed(shared(residual.mine(x)), "mlp", x.dtype)

    def routed(self, x: Rows) -> Float32[jax.Array, "t d"]:
        """The part of each token's weighted sum over its experts that comes from those held here."""
        return self.part(x, *self.gate(x))

    def part(
        self, x: Rows, chosen: Int32[jax.Array, "t j"], weights: Float32[jax.Array, "t j"]
    ) -> Float32[jax.Array, "t d"]:
        experts, count = self.experts.weights(), self.gate.config.n_routed_experts
        first = first_expert(jax.tree.leaves(experts)[0].shape[0], count)
        return weighted_sum(x, chosen, weights, experts, count, first)


def weighted_sum(
    x: Rows,
    chosen: Int32[jax.Array, "t j"],
    weights: Float32[jax.Array, "t j"],
    experts: ExpertWeights,
    num_experts: int,
    first: jax.Array | int,
) -> Float32[jax.Array, "t d"]:
    """The part of each token's sum that comes from `experts`, those from number `first` on of `num_experts`; a `chosen`
    of -1 is no expert.

    Few tokens go through one kernel. Very many are taken in blocks of `BLOCK` pairs of a token and one of its experts,
    those held here first, so that memory and work are bounded by the pairs that there are.
    """
    if x.shape[0] <= FEW_TOKENS:
        return mixture(x, chosen, weights, *experts, first=first)
    choices, flat = chosen.shape[1], chosen.reshape(-1)
    if flat.size <= BLOCK:
        flat = jnp.where(flat < 0, num_experts, flat)
        order = jnp.argsort(flat)
        # (jnp.bincount would scatter, which a TPU sends to its SparseCore and back)
        group_sizes = jnp.sum(flat[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
        y = feed_forward(x[order // choices], experts, group_sizes, first)
        back = jnp.zeros_like(order).at[order].set(jnp.arange(flat.size, dtype=jnp.int32))
        return jnp.einsum("tjd,tj->td", y[back].reshape(*chosen.shape, -1), weights, preferred_element_type=jnp.float32)

    held = jax.tree.leaves(experts)[0].shape[0]
    local = jnp.where((flat >= first) & (flat < first + held), flat - first, held)
    order = jnp.argsort(local, stable=True)
    ends = jnp.sum(local[:, None] <= jnp.arange(held), axis=0, dtype=jnp.int32)
    order = jnp.pad(order, (0, -order.size % BLOCK))

    @jax.checkpoint
    def block(begin: jax.Array) -> jax.Array:
        pairs = jax.lax.dynamic_slice_in_dim(order, begin, BLOCK)
        sizes = jnp.diff(jnp.clip(ends - begin, 0, BLOCK), prepend=0).astype(jnp.int32)
        rows = pairs // choices
        y = feed_forward(x[rows], experts, sizes)
        share = jnp.where(begin + jnp.arange(BLOCK) < ends[-1], weights.reshape(-1)[pairs], 0)
        return jnp.zeros(x.shape, jnp.float32).at[rows].add(share[:, None] * y.astype(jnp.float32))

    def add(total: jax.Array, begin: jax.Array) -> tuple[jax.Array, None]:
        return jax.lax.cond(begin < ends[-1], lambda total: total + block(begin), lambda total: total, total), None

    return jax.lax.scan(add, jnp.zeros(x.shape, jnp.float32), jnp.arange(0, order.size, BLOCK))[0]
