"""Kimi Delta Attention: linear attention with the delta rule and a decay per channel (arXiv 2510.26692, section 3).

Per head, with the state S [Dk, Dv]: S <- exp(g) S;  S <- S + beta k (v - S^T k)^T;  o = S^T q.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax.experimental import checkify
from jaxtyping import Array, Float, Int32

from pallas_kernels.checks import bind_shapes, check_dtype, checks_arguments, known
from pallas_kernels.dispatch import Backend, choose, with_gradient
from pallas_kernels.kda import backward, mosaic_backward, mosaic_step, mosaic_tpu, triton, triton_step, xla

# Below this many tokens the recurrence costs less than a chunk.
_SHORT = 16


@checks_arguments
def kda(
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B T H Dk"],
    v: Float[Array, "B T H Dv"],
    g: Float[Array, "B T H Dk"],
    beta: Float[Array, "B T H"],
    *,
    initial_state: Float[Array, "B H Dk Dv"] | Float[Array, "B N H Dk Dv"] | None = None,
    segment_ids: Int32[Array, "B T"] | None = None,
    num_segments: int | None = None,
    normalize_qk: bool = False,
    scale: float = 1.0,
    lower_bound: float | None = None,
    return_transition: bool = False,
    return_state: bool = True,
    implementation: str | None = None,
) -> tuple[Any, ...]:
    """Returns outputs for T tokens and the state after them, exact for any gate, however strong.

    States and arithmetic are float32, except that the kernels round products' operands to bf16 if q, k and v are bf16.

    Args:
      q, k: [B, T, H, Dk]; v: [B, T, H, Dv]. q and k are used as given unless `normalize_qk` or `scale` ask otherwise.
      g: float32 [B, T, H, Dk], natural logarithm of the decay, <= 0.
      beta: [B, T, H], in (0, 1).
      initial_state: float32 [B, H, Dk, Dv], or [B, num_segments, H, Dk, Dv] of packed rows; None is zeros.
      segment_ids: int32 [B, T], rows packed of several sequences: ids in [0, num_segments) that do not decrease, and -1
        for padding, whose inputs may hold anything and whose outputs are zero. Needs `num_segments`.
      normalize_qk: divides q and k by sqrt(sum of squares + 1e-6) first.
      scale: multiplies q, after the norm.
      lower_bound: a promise that lower_bound <= g, which lets a kernel take a faster path. A violation makes the
        result undefined; under `jax.experimental.checkify` it is an error that names the least g.
      return_transition: also returns the linear map of the state over the whole span, S_out = transition @ S_in +
        (S_out for S_in = 0).
      return_state: False returns None for the final state. Packed rows without an `initial_state` then cost the "xla"
        implementation no more than rows of one segment, however many segments there are; a NaN in one segment may
        then reach others of its row.
      implementation: "mosaic_tpu", "triton" (Dk and Dv powers of two from 16 and 32), "xla", or None for the best that
        the platform has.

    Returns:
      o [B, T, H, Dv] in v's dtype, the final state float32 [B, H, Dk, Dv] (packed: [B, num_segments, H, Dk, Dv]; a
      segment without tokens keeps its initial one), and with `return_transition` float32 [B, H, Dk, Dk] (packed: [B,
      num_segments, H, Dk, Dk]). Differentiable with respect to q, k, v, g, beta and initial_state.

    Raises:
      ValueError: shapes or dtypes other than these, segment_ids without num_segments (or the reverse), a positive
        lower_bound, (where the values are known) ids out of range or decreasing, or a call that the kernel asked for
        cannot serve (it wants Dk and Dv to be multiples of 128).
    """
    op = "kda"
    sizes = _check_tokens(op, "B T H", q, k, v, g, beta)
    if lower_bound is not None and lower_bound > 0:
        raise ValueError(f"{op}: lower_bound is {lower_bound}, expected a number <= 0, as g is")
    packed = _check_segments(op, segment_ids, num_segments, sizes)
    rows = num_segments if packed else 1
    wide = jnp.promote_types(g.dtype, jnp.float32)
    states = jnp.zeros((sizes["B"], rows, sizes["H"], sizes["Dk"], sizes["Dv"]), wide)
    if initial_state is not None:
        pattern = (
            f"{sizes['B']} {rows} {sizes['H']} {sizes['Dk']} {sizes['Dv']}"
            if packed
            else f"{sizes['B']} {sizes['H']} {sizes['Dk']} {sizes['Dv']}"
        )
        bind_shapes(op, initial_state=(initial_state, pattern))
        check_dtype(op, "initial_state", initial_state, wide)
        states = jnp.asarray(initial_state if packed else initial_state[:, None])

    values = jnp.asarray(v)
    if return_transition:
        # The map is linear: an identity as state, and no values, in Dk more columns.
        values = jnp.concatenate([values, jnp.zeros_like(k, values.dtype)], axis=-1)
        identity = jnp.broadcast_to(jnp.eye(sizes["Dk"], dtype=wide), (*states.shape[:-1], sizes["Dk"]))
        states = jnp.concatenate([states, identity], axis=-1)
    if segment_ids is not None:
        segment_ids = jnp.asarray(segment_ids)
    if lower_bound is not None:
        _check_lower_bound(op, g, segment_ids, lower_bound)

    options: dict[str, Any] = {"normalize_qk": normalize_qk, "scale": scale}
    tokens = (*map(jnp.asarray, (q, k)), values, *map(jnp.asarray, (g, beta)))
    arguments = (*tokens, states, segment_ids)
    kernel = partial(mosaic_tpu.kda, lower_bound=lower_bound, **options)
    outputs_only = initial_state is None and not (return_state or return_transition)
    chunked = partial(xla.chunked, outputs_only=outputs_only, **options)
    plain = partial(xla.recurrent, **options) if sizes["T"] <= _SHORT else chunked
    gradients = partial(backward.gradients, outputs_only=outputs_only, **options)
    on_gpus = Backend("triton", partial(triton.kda, **options), ("cuda",), triton.unsupported)
    on_tpus, anywhere = _backends(kernel, plain)
    run = choose(op, implementation, (on_tpus, on_gpus, anywhere), *arguments)
    # There is no gradient's kernel for GPUs
    of_gradient = "xla" if implementation == "triton" else implementation
    run_saving, run_backward = (
        choose(op, of_gradient, _backends(*ways), *arguments)
        for ways in (
            (partial(kernel, visit_states=True), partial(chunked, chunk_states=True)),
            (partial(mosaic_backward.kda_backward, **options), gradients),
        )
    )
    o, states = backward.differentiable(run, run_saving, run_backward)(*arguments)
    o = o[..., : sizes["Dv"]]
    states = states if packed else states[:, 0]
    final = states[..., : sizes["Dv"]] if return_state else None
    return (o, final, states[..., sizes["Dv"] :]) if return_transition else (o, final)


def _backends(kernel: Callable[..., Any], plain: Callable[..., Any]) -> tuple[Backend, ...]:
    return Backend("mosaic_tpu", kernel, ("tpu",), mosaic_tpu.unsupported), Backend("xla", plain)


@checks_arguments
def kda_step(
    q: Float[Array, "B H Dk"],
    k: Float[Array, "B H Dk"],
    v: Float[Array, "B H Dv"],
    g: Float[Array, "B H Dk"],
    beta: Float[Array, "B H"],
    state: Float[Array, "B H Dk Dv"],
    *,
    normalize_qk: bool = False,
    scale: float = 1.0,
    implementation: str | None = None,
) -> tuple[Float[Array, "B H Dv"], Float[Array, "B H Dk Dv"]]:
    """Advances every state by one token as `kda` does: the state decays, takes the token in and is read.

    Args:
      q, k: [B, H, Dk]; v: [B, H, Dv]; g: float32 [B, H, Dk]; beta: [B, H]; normalize_qk, scale: as in `kda`.
      state: float32 [B, H, Dk, Dv]. Donate it to the jitted step that calls this, and it stays in place.
      implementation: "mosaic_tpu", "triton" (Dk a power of two, Dv a multiple of 32), "xla", or None for the best that
        the platform has.

    Returns:
      o [B, H, Dv] in v's dtype and the new state. Differentiable with respect to q, k, v, g, beta and state.

    Raises:
      ValueError: shapes or dtypes other than these, an implementation that is not there, or a state that the kernel
        asked for cannot serve (it wants Dk and Dv to be multiples of 128).
    """
    op = "kda_step"
    sizes = _check_tokens(op, "B H", q, k, v, g, beta)
    wide = jnp.promote_types(g.dtype, jnp.float32)
    bind_shapes(op, state=(state, f"{sizes['B']} {sizes['H']} {sizes['Dk']} {sizes['Dv']}"))
    check_dtype(op, "state", state, wide)
    arrays = tuple(map(jnp.asarray, (q, k, v, g, beta, state)))
    options: dict[str, Any] = {"normalize_qk": normalize_qk, "scale": scale}
    plain = partial(xla.kda_step, **options)
    backends = (
        Backend("mosaic_tpu", partial(mosaic_step.kda_step, **options), ("tpu",), mosaic_step.unsupported),
        Backend("triton", partial(triton_step.kda_step, **options), ("cuda",), triton_step.unsupported),
        Backend("xla", plain),
    )
    return with_gradient(choose(op, implementation, backends, *arrays), plain)(*arrays)


@checks_arguments
def _check_tokens(op: str, axes: str, q: Array, k: Array, v: Array, g: Array, beta: Array) -> dict[str, int]:
    for name, array in (("q", q), ("k", k), ("v", v), ("beta", beta)):
        check_dtype(op, name, array, jnp.floating)
    check_dtype(op, "g", g, jnp.float32, jnp.float64)
    keys, values = f"{axes} Dk", f"{axes} Dv"
    return bind_shapes(op, q=(q, keys), k=(k, keys), v=(v, values), g=(g, keys), beta=(beta, axes))


@checks_arguments
def _check_segments(op: str, segment_ids: Array | None, num_segments: int | None, sizes: dict[str, int]) -> bool:
    if (segment_ids is None) != (num_segments is None):
        raise ValueError(f"{op}: segment_ids and num_segments go together, found one of them only")
    if segment_ids is None or num_segments is None:
        return False
    bind_shapes(op, segment_ids=(segment_ids, f"{sizes['B']} {sizes['T']}"))
    check_dtype(op, "segment_ids", segment_ids, jnp.int32)
    if num_segments < 1:
        raise ValueError(f"{op}: num_segments is {num_segments}, expected at least 1")
    values = known(segment_ids)
    if values is not None and values.size:
        if values.min() < -1 or values.max() >= num_segments:
            raise ValueError(
                f"{op}: segment_ids run from {values.min()} to {values.max()}, expected -1 to {num_segments - 1}"
            )
        for row in values:
            if (row[row >= 0][1:] < row[row >= 0][:-1]).any():
                raise ValueError(f"{op}: segment_ids of a row decrease, expected them sorted (padding apart): {row}")
    return True


@checks_arguments
def _check_lower_bound(op: str, g: Array, segment_ids: Array | None, lower_bound: float) -> None:
    """Checks under `checkify` (with `all_checks` or `user_checks`) that the promise is kept."""
    least = jnp.min(g if segment_ids is None else jnp.where((segment_ids >= 0)[..., None, None], g, 0), initial=0)
    checkify.debug_check(
        least >= lower_bound,
        f"{op}: g goes down to {{least}}, lower_bound promises {{bound}} <= g",
        least=least,
        bound=jnp.asarray(lower_bound, g.dtype),
    )
