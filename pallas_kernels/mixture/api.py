"""A mixture of experts: each token's weighted sum over those of its experts whose matrices are given.

Source of the form: DeepSeek-V3 (arXiv 2412.19437, section 2.1.2). An expert that no token chose costs nothing, and no
token meets an expert that it did not choose, but for few tokens on a CPU that choose nearly all experts (`xla`).
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float32, Int, Int32

from pallas_kernels.activations import Activation, find_activation
from pallas_kernels.checks import bind_shapes, check_dtype, checks_arguments, known
from pallas_kernels.dispatch import Backend, choose, with_gradient
from pallas_kernels.formats import Weight
from pallas_kernels.grouped_matmul.api import check_one_format, check_weight
from pallas_kernels.mixture import mosaic_tpu, triton, xla


@checks_arguments
def mixture(
    x: Float[Array, "T *K"],
    chosen: Int32[Array, "T J"],
    weights: Float32[Array, "T J"],
    gate: Weight | ArrayLike,
    up: Weight | ArrayLike,
    down: Weight | ArrayLike,
    *,
    first: Int[Array, ""] | int = 0,
    num_experts: int | None = None,
    activation: Activation = "silu",
    implementation: str | None = None,
) -> Float32[Array, "T *K"]:
    """Returns, for each token t, the sum over j of weights[t, j] * down(silu(gate x[t]) * up x[t]).

    The matrices gate, up and down are those of expert chosen[t, j]. TPUs multiply few tokens in one kernel; many, and
    those of other platforms, are sorted by expert for the grouped ops, or on a CPU meet all experts where they are few.

    Args:
      x: [T, K]; a token's vector may have any shape, of K numbers in all.
      chosen: int32 [T, J], a token's experts, all different. Experts without matrices here (-1, say) add nothing.
      weights: float32 [T, J].
      gate, up: [E, N, K], arrays in x's dtype, as Linears are published, or weights of any format.
      down: [E, K, N], of the format of gate and up.
      first: the matrices are those of experts [first, first + E).
      num_experts: the experts on all devices, among which `chosen` chooses, E where it is None: with more than E, room
        is made for E's share of the pairs of a token and an expert, and work is repeated where there are more.
      activation: a name of `activations.ACTIVATIONS`, or a hashable function of (gate x, up x).
      implementation: "mosaic_tpu" (x bf16 or float32, T at most 512, K 8192, and in float32 an eighth of the chip's
        vector memory; dense K and N multiples of 128, `Int4` as in `grouped_matmul`), "triton" (as in
        `grouped_matmul`), "xla", or None for the best that the platform has.

    Returns:
      float32 of x's shape: products accumulated in float32, silu(gate x) * up x rounded to x's dtype between the two.
      "triton" also rounds each expert's weighted result to it, before these are added up in float32.
      Differentiable with respect to x, weights and dense matrices; the parts of quantised ones are constants.

    Raises:
      ValueError: shapes, dtypes or formats other than these, or (where the values are known) an expert chosen twice by
        a token.
    """
    op = "mixture"
    combine = find_activation(op, activation)
    check_dtype(op, "x", x, jnp.floating)
    check_dtype(op, "chosen", chosen, jnp.int32)
    check_dtype(op, "weights", weights, jnp.float32)
    x = jnp.asarray(x)
    rows = jax.ShapeDtypeStruct((*x.shape[:1], math.prod(x.shape[1:])), x.dtype)
    K = bind_shapes(op, x=(rows, "T K"), chosen=(chosen, "T J"), weights=(weights, "T J"))["K"]
    named = {"gate": gate, "up": up, "down": down}
    gate, up, down = (check_weight(op, name, weight, x.dtype) for name, weight in named.items())
    check_one_format(op, gate=gate, up=up, down=down)
    num_local, width = gate.shape[:2]
    into, out_of = f"{num_local} {width} {K}", f"{num_local} {K} {width}"
    bind_shapes(op, gate=(gate, into), up=(up, into), down=(down, out_of))
    _check_different(op, chosen)
    # A kernel's gradient is that of the sorted form, whose grouped ops choose for themselves.
    grouped = "xla" if implementation == "xla" else None
    backends = (
        Backend("mosaic_tpu", partial(mosaic_tpu.mixture, activation=combine), ("tpu",), mosaic_tpu.unsupported),
        Backend(
            "triton",
            partial(triton.mixture, activation=combine, num_experts=num_experts),
            ("cuda",),
            triton.unsupported,
        ),
        Backend("xla", partial(xla.mixture, activation=combine, num_experts=num_experts, implementation=grouped)),
    )
    arguments = (x, jnp.asarray(chosen), jnp.asarray(weights), gate, up, down, jnp.asarray(first, jnp.int32))
    return with_gradient(choose(op, implementation, backends, *arguments), backends[-1].run)(*arguments)


def _check_different(op: str, chosen: Array) -> None:
    values = known(chosen)
    for token, experts in enumerate(() if values is None else values):
        real = sorted(expert for expert in experts.tolist() if expert >= 0)
        if len(set(real)) < len(real):
            raise ValueError(f"{op}: token {token} has chosen experts {experts.tolist()}, expected each of them once")
