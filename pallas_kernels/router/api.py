"""The choice of each token's experts: sigmoid scores, a bias that only chooses, the best few, weights that add up to
one.

Source of the form: the `noaux_tc` gate of DeepSeek-V3 (arXiv 2412.19437, section 2.1.2).
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.checks import bind_shapes, check_dtype, checks_arguments
from pallas_kernels.dispatch import Backend, choose, with_gradient
from pallas_kernels.router import mosaic_tpu, xla


@checks_arguments
def route(
    x: Float[Array, "T D"],
    weight: Float[Array, "E D"],
    bias: Float[Array, "E"],
    *,
    choices: int,
    groups: int = 1,
    kept_groups: int = 1,
    normalize: bool = True,
    scale: float = 1.0,
    implementation: str | None = None,
) -> tuple[Int32[Array, "T J"], Float32[Array, "T J"]]:
    """Chooses the `choices` experts of each token whose score sigmoid(weight x) plus bias is highest.

    Args:
      x: [T, D]; weight: [E, D]. Products are those of the given numbers, in float32.
      bias: [E]. It chooses, and does not weigh.
      choices: J, at most E.
      groups, kept_groups: of so many groups of consecutive experts, those outside the `kept_groups` groups whose two
        best experts (bias included) sum highest are not chosen.
      normalize: divides a token's weights by their sum (plus 1e-20).
      scale: multiplies the weights.
      implementation: "mosaic_tpu" (x and weight both bf16 or both float32, D a multiple of 128 and E of 16, T and J at
        most 128, one group), "xla", or None for the best that the platform has.

    Returns:
      The chosen experts, int32 [T, J], best first, of equals the lowest number first; and their weights, the scores
      without the bias, float32 [T, J]. Differentiable in x and weight.

    Raises:
      ValueError: shapes or dtypes other than these.
    """
    op = "route"
    sizes = bind_shapes(op, x=(x, "T D"), weight=(weight, "E D"), bias=(bias, "E"))
    for name, array in (("x", x), ("weight", weight), ("bias", bias)):
        check_dtype(op, name, array, jnp.floating)
    if not 0 < choices <= sizes["E"]:
        raise ValueError(f"{op}: choices is {choices}, expected 1 to {sizes['E']}, the number of experts")
    if groups < 1 or sizes["E"] % groups or not 0 < kept_groups <= groups:
        raise ValueError(
            f"{op}: {kept_groups} of {groups} groups of {sizes['E']} experts are kept, expected a number of groups "
            "that divides the experts, and 1 or more of them"
        )
    arguments = (jnp.asarray(x), jnp.asarray(weight), jnp.asarray(bias).astype(jnp.float32))
    options: dict[str, Any] = {"choices": choices, "normalize": normalize, "scale": scale}
    plain = partial(xla.route, groups=groups, kept_groups=kept_groups, **options)
    refuse = partial(mosaic_tpu.unsupported, choices=choices, groups=groups)
    backends = (
        Backend("mosaic_tpu", partial(mosaic_tpu.route, **options), ("tpu",), refuse),
        Backend("xla", plain),
    )
    return with_gradient(choose(op, implementation, backends, *arguments), plain)(*arguments)
