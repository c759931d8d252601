"""The projections around `mla_decode`, for one token a sequence, in the absorbed form.

Source of the formulas: DeepSeek-V2 (arXiv 2405.04434, section 2.1); RMSNorm as arXiv 1910.07467, RoPE as arXiv
2104.09864 over interleaved pairs.
"""

from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.checks import bind_shapes, check_dtype, checks_arguments
from pallas_kernels.dispatch import Backend, choose, with_gradient
from pallas_kernels.mla_projections import mosaic_tpu, xla

_OUTPUT = (
    Backend("mosaic_tpu", mosaic_tpu.mla_output, ("tpu",), mosaic_tpu.output_unsupported),
    Backend("xla", xla.mla_output),
)


@checks_arguments
def mla_query(
    q_a: Float[Array, "B C"] | None,
    kv_a: Float[Array, "S B columns"],
    rotation: tuple[Float32[Array, "B R"], Float32[Array, "B R"]] | None,
    q_norm: Float[Array, "C"] | None,
    kv_norm: Float[Array, "L"],
    q_b: Float[Array, "heads_key C"],
    kv_b: Float[Array, "heads_keyvalue L"],
    *,
    heads: int,
    eps: float,
    implementation: str | None = None,
) -> tuple[Float[Array, "B H width"], Float[Array, "B width"]]:
    """Computes the absorbed queries and the token's entry of the cache.

    Args:
      q_a: [B, C], the source of queries: the low rank before its norm, or (`q_norm` None) the hidden vector itself.
      kv_a: [S, B, (L + R) / S], the columns that each of S devices has, as an all-gather leaves them, of the latent
        before its norm, then the rotated channels of keys. Where `q_a` is None, [S, B, C / S + (L + R) / S]: each
        device's columns of the low rank of queries come before them.
      rotation: cos and sin, float32 [B, R] each, those of the R/2 pairs twice; None does not rotate.
      q_norm, kv_norm: RMSNorm weights [C] and [L].
      q_b: [H (N + R), C], for each head the N channels that meet the latent and the R rotated ones.
      kv_b: [H (N + V), L], for each head the rows for N channels of a key and V of a value.
      heads: H.
      eps: that of both norms.
      implementation: "mosaic_tpu" (bf16 or float32; C, L and N multiples of 128, V as N, H one of 1, 2, 4 or a multiple
        of 8, B at most 128), "xla", or None for the best that the platform has.

    Returns:
      q [B, H, L + R], the queries folded into the latent's space, then their rotated channels; and the cached [normed
      latent | rotated] [B, L + R]; both in kv_a's dtype. Rotated channels are de-interleaved: first members, then
      second ones.

    Raises:
      ValueError: shapes or dtypes other than these.
    """
    op = "mla_query"
    arrays = {"kv_norm": kv_norm, "q_b": q_b, "kv_b": kv_b}
    optional = {name: array for name, array in (("q_a", q_a), ("q_norm", q_norm)) if array is not None}
    check_dtype(op, "kv_a", kv_a, jnp.floating)
    for name, array in (arrays | optional).items():
        check_dtype(op, name, array, jnp.result_type(kv_a))
    patterns = {"kv_a": "S B columns", "kv_norm": "L", "q_b": "rows C", "kv_b": "both L", "q_a": "B C", "q_norm": "C"}
    named = {"kv_a": kv_a, **arrays, **optional}
    sizes = bind_shapes(op, **{name: (array, patterns[name]) for name, array in named.items()})
    low = 0 if q_a is not None else sizes["C"]
    rope = sizes["S"] * sizes["columns"] - low - sizes["L"]
    if rope < 0 or low % sizes["S"]:
        raise ValueError(
            f"{op}: kv_a has {sizes['columns']} columns on each of {sizes['S']} devices, expected as many devices' "
            f"shares of {low} of queries, {sizes['L']} of the latent, and rotated ones"
        )
    if heads < 1 or sizes["rows"] % heads or sizes["both"] % heads or sizes["rows"] // heads <= rope:
        raise ValueError(
            f"{op}: q_b has {sizes['rows']} rows and kv_b {sizes['both']}, expected multiples of {heads} heads, "
            f"of more than the {rope} rotated channels each"
        )
    for name, array in zip(("cos", "sin"), rotation or (), strict=False):
        check_dtype(op, name, array, jnp.float32)
        bind_shapes(op, kv_a=(kv_a, "S B columns"), **{name: (array, f"B {rope}")})
    arguments = (q_a, kv_a, rotation, q_norm, kv_norm, q_b, kv_b)
    kernel, plain = (partial(module.mla_query, heads=heads, eps=eps) for module in (mosaic_tpu, xla))
    backends = (
        Backend("mosaic_tpu", kernel, ("tpu",), partial(mosaic_tpu.query_unsupported, heads=heads)),
        Backend("xla", plain),
    )
    return with_gradient(choose(op, implementation, backends, *arguments), plain)(*arguments)


@checks_arguments
def mla_output(
    o: Float[Array, "B H L"] | Float32[Array, "S B H packed"],
    kv_b: Float[Array, "heads_keyvalue L"],
    o_proj: Float[Array, "D heads_value"],
    gate: Float[Array, "B heads_value"] | None = None,
    *,
    implementation: str | None = None,
) -> Float32[Array, "B D"]:
    """Computes what attention over latents adds to the stream: each head's values from its sum of latents, where
    given times the sigmoid of `gate`, then `o_proj`.

    Args:
      o: [B, H, L], the output of `mla_decode`; or float32 [S, B, H, L + 1], packed outputs over S caches with their
        log-sum-exps (`mla_decode`'s `shards`), which are merged into the output over all of them.
      kv_b: [H (N + V), L], as in `mla_query`.
      o_proj: [D, H V].
      gate: [B, H V] in kv_b's dtype, before the sigmoid; None for ungated attention.
      implementation: "mosaic_tpu" (bf16 or float32; L, V and D multiples of 128, N as V, B at most 128), "xla", or None
        for the best that the platform has.

    Returns:
      float32 [B, D]; merged outputs, and the values once they are gated, are rounded to kv_b's dtype in between.

    Raises:
      ValueError: shapes or dtypes other than these.
    """
    op = "mla_output"
    packed = jnp.ndim(o) == 4
    check_dtype(op, "kv_b", kv_b, jnp.floating)
    check_dtype(op, "o", o, jnp.float32 if packed else jnp.result_type(kv_b))
    check_dtype(op, "o_proj", o_proj, jnp.result_type(kv_b))
    axes = f"S B H {jnp.shape(kv_b)[-1] + 1}" if packed else "B H L"
    sizes = bind_shapes(op, o=(o, axes), kv_b=(kv_b, "both L"), o_proj=(o_proj, "D values"))
    if sizes["both"] % sizes["H"] or sizes["values"] % sizes["H"] or sizes["both"] <= sizes["values"]:
        raise ValueError(
            f"{op}: kv_b has {sizes['both']} rows and o_proj {sizes['values']} columns, expected keys and values, and "
            f"values, of {sizes['H']} heads"
        )
    if gate is not None:
        check_dtype(op, "gate", gate, jnp.result_type(kv_b))
        bind_shapes(op, o=(o, axes), gate=(gate, f"B {sizes['values']}"))
    arguments = (o, kv_b, o_proj, gate)
    return with_gradient(choose(op, implementation, _OUTPUT, *arguments), xla.mla_output)(*arguments)
