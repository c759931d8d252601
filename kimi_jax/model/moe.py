"""Feed-forward layers: gated linear units, and the mixture of experts of DeepSeek-V3 (arXiv 2412.19437, section 2.1.2).

Kimi K3's experts are latent: they compute at a width of their own, between two projections (arXiv 2607.24653).

`pallas_kernels.mixture` computes the experts, whatever their format and the number of tokens.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from kimi_jax.axes import FlatHidden, Float, Float32, Int32
from kimi_jax.config import TextConfig
from kimi_jax.model.norm import RMSNorm
from kimi_jax.model.param import Init, Linear, Matrix
from pallas_kernels import grouped_glu, grouped_matmul, mixture, route
from pallas_kernels.activations import Activation, SituGated, find_activation
from pallas_kernels.formats import Dense, Int4, Mxfp4, Weight


class MLP(nnx.Module):
    """Computes down(silu(gate x) * up x), or with another `activation` of (gate x, up x); where the width is sharded,
    this device's part of the sum."""

    def __init__(self, init: Init, hidden: int, width: int, activation: Activation = "silu", axis: str = "mlp"):
        self.activation = find_activation("MLP", activation)
        self.gate_proj = Linear(init, width, hidden, (axis, "embed"))
        self.up_proj = Linear(init, width, hidden, (axis, "embed"))
        self.down_proj = Linear(init, hidden, width, ("embed", axis))

    def __call__(self, x: jax.Array) -> Float32[jax.Array, "..."]:
        return self.down_proj(self.activation(self.gate_proj(x), self.up_proj(x)), dtype=jnp.float32)


def choose_activation(config: TextConfig) -> Activation:
    """Returns the activation of all feed-forward layers."""
    if config.activation_situ_beta is None:
        return "silu"
    return SituGated(config.activation_situ_beta, config.activation_situ_linear_beta)


class Router(nnx.Module):
    """The `noaux_tc` gate: sigmoid scores in float32, a correction bias that only chooses, groups of experts."""

    def __init__(self, init: Init, config: TextConfig):
        self.config = config
        self.weight = init.normal((config.n_routed_experts, config.hidden_size), ("expert_scores", "embed"))
        self.e_score_correction_bias = init.param(jnp.zeros(config.n_routed_experts, jnp.float32), ("expert_scores",))

    def __call__(
        self, x: FlatHidden, implementation: str | None = None
    ) -> tuple[Int32[jax.Array, "t j"], Float32[jax.Array, "t j"]]:
        """Returns the chosen experts of each token of x [t, d], and their weights, as `pallas_kernels.route` does."""
        config = self.config
        return route(
            x,
            self.weight[...],
            self.e_score_correction_bias[...],
            choices=config.num_experts_per_tok,
            groups=config.n_group,
            kept_groups=config.topk_group,
            normalize=config.norm_topk_prob,
            scale=config.routed_scaling_factor,
            implementation=implementation,
        )


def expert_format(config: TextConfig) -> type[Weight]:
    """Returns the format of the routed experts."""
    if config.quantization is None:
        return Dense
    return Mxfp4 if config.quantization.format == "mxfp4" else Int4


class Experts(nnx.Module):
    """The routed experts of a layer, a stack of matrices [e, out, in] for each projection."""

    def __init__(self, init: Init, config: TextConfig, weight_format: type[Weight]):
        experts, hidden, width = config.n_routed_experts, config.expert_width, config.moe_intermediate_size
        into, out_of = ("expert", "expert_mlp", "embed"), ("expert", "embed", "expert_mlp")
        self.gate_proj = Matrix(init, (experts, width, hidden), into, weight_format)
        self.up_proj = Matrix(init, (experts, width, hidden), into, weight_format)
        self.down_proj = Matrix(init, (experts, hidden, width), out_of, weight_format)

    @property
    def num_local(self) -> int:
        """Returns the number of experts on this device."""
        return self.gate_proj.read().shape[0]

    def operands(self, dtype: jnp.dtype) -> tuple[Weight, Weight, Weight]:
        """Returns the matrices of gate, up and down as ops multiply vectors of `dtype` by them."""
        gate, up, down = (matrix.read().operand(dtype) for matrix in (self.gate_proj, self.up_proj, self.down_proj))
        return gate, up, down


class MoE(nnx.Module):
    """Routed experts, weighted, plus the shared experts, unweighted; `block.mix_experts` adds them up over devices.

    Of latent experts this is up(norm(sum over the chosen of weight * expert(down x))): every device has the two
    projections whole, since they meet all of a vector, and each token's sum is complete before its norm.
    """

    def __init__(self, init: Init, config: TextConfig):
        self.gate = Router(init, config)
        self.experts = Experts(init, config, expert_format(config))
        self.activation, hidden = choose_activation(config), config.hidden_size
        width = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = MLP(init, hidden, width, self.activation, "shared_mlp") if width else None
        self.is_latent, latent = config.routed_expert_hidden_size is not None, config.expert_width
        if self.is_latent:
            self.routed_expert_down_proj = Linear(init, latent, hidden, (None, "embed"))
            self.routed_expert_norm = RMSNorm(init, latent, config.rms_norm_eps)
            self.routed_expert_up_proj = Linear(init, hidden, latent, ("embed", None))

    def project_down(self, x: FlatHidden) -> Float[jax.Array, "t width"]:
        """Returns the vectors that the routed experts take."""
        return self.routed_expert_down_proj(x) if self.is_latent else x

    def project_up(self, sums: Float[jax.Array, "... width"], dtype: jnp.dtype) -> Float[jax.Array, "... d"]:
        """Maps whole sums over experts to the stream's width and `dtype`."""
        sums = sums.astype(dtype)
        return self.routed_expert_up_proj(self.routed_expert_norm(sums)) if self.is_latent else sums

    def sum_experts(
        self,
        x: Float[jax.Array, "t *d"],
        chosen: Int32[jax.Array, "t j"],
        weights: Float32[jax.Array, "t j"],
        first: jax.Array | int = 0,
    ) -> Float32[jax.Array, "t *d"]:
        """Returns this device's part of each token's weighted sum over its `chosen` experts.

        A token's vector may have any shape. A `chosen` of -1 is no expert. The experts on this device are those from
        number `first` on.
        """
        experts = self.experts
        gate, up, down = (matrix.read() for matrix in (experts.gate_proj, experts.up_proj, experts.down_proj))
        num_experts = self.gate.config.n_routed_experts
        return mixture(
            x, chosen, weights, gate, up, down, first=first, num_experts=num_experts, activation=self.activation
        )


def multiply_rows(
    matrices: tuple[Weight, Weight, Weight],
    rows: Float[jax.Array, "m d"],
    expert: Int32[jax.Array, "m"],
    activation: Activation = "silu",
) -> Float[jax.Array, "m d"]:
    """Computes down(activation(gate x, up x)) of each row x with the matrices of its expert; -1 is no expert, and gives
    zeros."""
    gate, up, down = matrices
    number = jnp.where(expert >= 0, expert, gate.shape[0])
    order = jnp.argsort(number, stable=True)
    inverse = jnp.argsort(order)
    sizes = jnp.sum(number[:, None] == jnp.arange(gate.shape[0]), axis=0, dtype=jnp.int32)
    hidden = grouped_glu(_permute(rows, order, inverse), gate, up, sizes, activation=activation)
    return _permute(grouped_matmul(hidden, down, sizes), inverse, order)


@jax.custom_vjp
def _permute(rows: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """Returns rows[order]. Given the inverse, a gradient gathers too, instead of scattering."""
    return rows[order]


_permute.defvjp(
    lambda rows, order, inverse: (rows[order], inverse), lambda inverse, gradient: (gradient[inverse], None, None)
)
