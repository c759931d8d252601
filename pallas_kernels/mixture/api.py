"""A mixture of experts for few tokens: each token's weighted sum over those of its experts whose matrices are given.

Source of the form: DeepSeek-V3 (arXiv 2412.19437, section 2.1.2). For many tokens, sort rows by expert and take the
grouped ops.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32

from pallas_kernels.checks import bind_shapes, check_dtype, checks_arguments, known
from pallas_kernels.dispatch import Backend, choose, with_gradient
from pallas_kernels.formats.int4 import GROUP_SIZE, check_codes
from pallas_kernels.mixture import mosaic_tpu, xla
from pallas_kernels.mixture.stages import ExpertMatrix

_BACKENDS = (
    Backend("mosaic_tpu", mosaic_tpu.mixture, ("tpu",), mosaic_tpu.unsupported),
    Backend("xla", xla.mixture),
)


@checks_arguments
def mixture(
    x: Float[Array, "T K"],
    chosen: Int32[Array, "T J"],
    weights: Float32[Array, "T J"],
    gate: ExpertMatrix,
    up: ExpertMatrix,
    down: ExpertMatrix,
    *,
    first: Int[Array, ""] | int = 0,
    implementation: str | None = None,
) -> Float32[Array, "T K"]:
    """Returns, for each token t, the sum over j of weights[t, j] * down(silu(gate x[t]) * up x[t]).

    The matrices gate, up and down are those of expert chosen[t, j].

    Args:
      x: [T, K], few tokens.
      chosen: int32 [T, J], a token's experts, all different. Experts without matrices here (-1, say) add nothing.
      weights: float32 [T, J].
      gate, up: [E, N, K] in x's dtype, as Linears are published, or INT4 codes [E, K, N] and scales [E, K//32, N].
      down: [E, K, N], or codes [E, N, K] and scales [E, N//32, K].
      first: the matrices are those of experts [first, first + E).
      implementation: "mosaic_tpu" (x bf16 or float32, T at most 512, K 8192, and in float32 an eighth of the chip's
        vector memory; dense K and N multiples of 128, INT4 as `int4_grouped_matmul`), "xla", or None for the best that
        the platform has.

    Returns:
      float32 [T, K]: products accumulated in float32, silu(gate x) * up x rounded to x's dtype between the two.
      Differentiable with respect to x, weights and dense matrices; codes and scales are constants.

    Raises:
      ValueError: shapes or dtypes other than these, or (where the values are known) an expert chosen twice by a token.
    """
    op = "mixture"
    check_dtype(op, "x", x, jnp.floating)
    check_dtype(op, "chosen", chosen, jnp.int32)
    check_dtype(op, "weights", weights, jnp.float32)
    sizes = bind_shapes(op, x=(x, "T K"), chosen=(chosen, "T J"), weights=(weights, "T J"))
    if isinstance(gate, tuple) != isinstance(up, tuple) or isinstance(gate, tuple) != isinstance(down, tuple):
        raise ValueError(f"{op}: gate, up and down are INT4 in part, expected all of them or none")
    num_local, width = jnp.shape(gate[0])[::2] if isinstance(gate, tuple) else jnp.shape(gate)[:2]
    for name, weight, out, in_ in (
        ("gate", gate, width, sizes["K"]),
        ("up", up, width, sizes["K"]),
        ("down", down, sizes["K"], width),
    ):
        if isinstance(weight, tuple):
            codes, scales = weight
            bind_shapes(
                op,
                **{
                    f"{name}'s codes": (codes, f"{num_local} {in_} {out}"),
                    f"{name}'s scales": (scales, f"{num_local} {in_ // GROUP_SIZE} {out}"),
                },
            )
            check_codes(op, codes, scales)
        else:
            check_dtype(op, name, weight, jnp.result_type(x))
            bind_shapes(op, **{name: (weight, f"{num_local} {out} {in_}")})
    _check_different(op, chosen)
    arguments = jax.tree.map(jnp.asarray, (x, chosen, weights, gate, up, down, jnp.asarray(first, jnp.int32)))
    run = choose(op, implementation, _BACKENDS, *arguments)
    return with_gradient(run, xla.mixture)(*arguments)


def _check_different(op: str, chosen: Array) -> None:
    values = known(chosen)
    for token, experts in enumerate(() if values is None else values):
        real = sorted(expert for expert in experts.tolist() if expert >= 0)
        if len(set(real)) < len(real):
            raise ValueError(f"{op}: token {token} has chosen experts {experts.tolist()}, expected each of them once")
