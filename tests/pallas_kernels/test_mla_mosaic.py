"""The latent attention kernels, interpreted, against float64 numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from kernel_numerics import dots, relative_rmse

from pallas_kernels import merge_partials, mla_decode, mla_prefill
from pallas_kernels.mla_attention import mosaic_prefill, mosaic_tpu, mosaic_write, reference, xla

TOLERANCES = [(jnp.float32, 1e-5), (jnp.bfloat16, 5e-3)]
LATENT, ROPE, PAGE, HEADS, SCALE = 128, 16, 128, 3, 0.1
DECODE = partial(mla_decode, scale=SCALE, return_lse=True, implementation="mosaic_tpu")
DECODE_JIT = jax.jit(DECODE)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def paged(lengths, dtype=jnp.float32, max_pages=12, seed=0):
    """Queries, and a cache whose pages lie in any order; NaN wherever no sequence has a token, wild table entries."""
    used = [-(-length // PAGE) for length in lengths]
    order = np.random.default_rng(seed).permutation(sum(used) + 2)
    cache = np.full((len(order), LATENT + ROPE, PAGE), np.nan, np.float32)
    table = np.full((len(lengths), max_pages), 10**6, np.int32)
    first = 0
    for row, (length, pages) in enumerate(zip(lengths, used, strict=True)):
        table[row, :pages] = order[first : first + pages]
        first += pages
        for i, page in enumerate(table[row, :pages]):
            filled = min(PAGE, length - i * PAGE)
            cache[page, :, :filled] = normal(page + 10, LATENT + ROPE, filled)
    q_latent, q_rope = normal(seed + 1, len(lengths), HEADS, LATENT), normal(seed + 2, len(lengths), HEADS, ROPE)
    arrays = tuple(jnp.asarray(array, dtype) for array in (q_latent, q_rope, cache))
    return *arrays, jnp.asarray(table), jnp.asarray(lengths, jnp.int32)


def expected_decode(arguments):
    wide = [np.asarray(array, np.float32) for array in arguments[:3]]
    return reference.mla_decode(*wide, *map(np.asarray, arguments[3:]), SCALE)


@pytest.mark.parametrize("dtype,tolerance", TOLERANCES)
@pytest.mark.parametrize("lengths,max_pages", [((1,), 1), ((0, 1300, 0, 128, 1024, 1, 200), 12), ((0, 0), 1)])
def test_decode(lengths, max_pages, dtype, tolerance):
    arguments = paged(lengths, dtype, max_pages)
    out, lse = DECODE_JIT(*arguments)
    expected, expected_lse = expected_decode(arguments)
    assert out.dtype == dtype and lse.dtype == jnp.float32
    assert relative_rmse(out, expected) <= tolerance
    np.testing.assert_allclose(lse, expected_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype,tolerance", TOLERANCES)
def test_decode_of_two_halves_merged(dtype, tolerance):
    # Given a sequence whose pages lie half in one table, half in another
    arguments = paged((700,), dtype, max_pages=6)
    q_latent, q_rope, cache, table, _ = arguments
    halves = [(table[:, :3], 3 * PAGE), (table[:, 3:], 700 - 3 * PAGE)]

    # When each half is attended to and the two are merged
    parts = [DECODE_JIT(q_latent, q_rope, cache, rows, jnp.array([length], jnp.int32)) for rows, length in halves]
    out, lse = merge_partials(*parts)

    # Then it is the attention over the whole
    expected, expected_lse = expected_decode(arguments)
    assert relative_rmse(out, expected) <= tolerance
    np.testing.assert_allclose(lse, expected_lse, atol=1e-5, rtol=1e-5)


def test_decode_races_with_nothing_and_stays_in_bounds():
    arguments = paged((130, 0, 300), max_pages=3)
    strict = pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan")
    out, _ = mosaic_tpu.mla_decode(*arguments, scale=SCALE, interpret=strict)
    assert relative_rmse(out, expected_decode(arguments)[0]) <= 1e-5
    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_of_float32_are_full_and_of_bf16_single(dtype):
    found = list(dots(jax.make_jaxpr(partial(mosaic_tpu.mla_decode, scale=1.0, interpret=True))(*paged((5,), dtype))))
    assert len(found) == 3
    wanted = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    for dot in found:
        assert {operand.aval.dtype for operand in dot.invars} == {jnp.dtype(dtype)}
        assert set(dot.params["precision"]) == {wanted}
        assert dot.params["preferred_element_type"] == jnp.float32


@pytest.mark.parametrize(
    "change,reason",
    [
        (lambda q, r, c: (q, r, c[:, :, :64]), "pages hold 64 tokens, expected a multiple of 128"),
        (lambda q, r, c: (q[:, :, :-8], r, c[:, :-8]), r"latents have 120 \+ 16 values"),
        (lambda q, r, c: (q, r, c.astype(jnp.bfloat16)), "operands are float32, float32, bfloat16"),
    ],
)
def test_decode_says_why_it_cannot_serve(change, reason):
    *arrays, table, _ = paged((5,))
    with pytest.raises(ValueError, match=reason):
        DECODE(*change(*arrays), table, jnp.array([5], jnp.int32))


PREFILL = partial(mla_prefill, scale=SCALE, return_lse=True, implementation="mosaic_tpu")


def prompt(dtype, queries=140, keys=600, heads=2):
    """The last queries of a row of three segments with padding between, and what of it nobody may look at as NaN."""
    q, k, v = (normal(i, 1, n, heads, d) for i, (n, d) in enumerate([(queries, 64), (keys, 64), (keys, 128)]))
    kv_positions = np.arange(keys, dtype=np.int32)[None]
    kv_segments = np.sort(np.arange(keys, dtype=np.int32)[None] * 3 // keys)
    kv_segments[:, keys - 70 : keys - 60] = -1
    seen = slice(keys - queries, None)
    unseen = (kv_segments < 0) | (kv_segments < kv_segments[:, seen].min())
    for array in (k, v):
        array[unseen] = np.nan
    marks = {
        "q_positions": kv_positions[:, seen],
        "kv_positions": kv_positions,
        "q_segments": kv_segments[:, seen],
        "kv_segments": kv_segments,
    }
    return tuple(jnp.asarray(array, dtype) for array in (q, k, v)), marks


def expected_prefill(arrays, marks):
    return reference.mla_prefill(*(np.nan_to_num(np.asarray(a, np.float32)) for a in arrays), *marks.values(), SCALE)


@pytest.mark.parametrize("dtype,tolerance", TOLERANCES)
def test_prefill(dtype, tolerance):
    arrays, marks = prompt(dtype)
    out, lse = PREFILL(*arrays, **marks)
    expected, expected_lse = expected_prefill(arrays, marks)
    assert out.dtype == dtype and lse.dtype == jnp.float32
    assert relative_rmse(out, expected) <= tolerance
    np.testing.assert_allclose(lse, expected_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype,tolerance", TOLERANCES)
def test_prefill_of_two_halves_merged(dtype, tolerance):
    q, k, v = (normal(i, 1, 200, 1, d) for i, d in enumerate((64, 64, 64)))
    positions = np.arange(200, dtype=np.int32)[None]
    arrays = tuple(jnp.asarray(array, dtype) for array in (q, k, v))
    parts = [
        PREFILL(arrays[0], arrays[1][:, s], arrays[2][:, s], q_positions=positions, kv_positions=positions[:, s])
        for s in (np.s_[:70], np.s_[70:])
    ]
    zeros = np.zeros_like(positions)
    wide = [np.asarray(array, np.float32) for array in arrays]
    expected, _ = reference.mla_prefill(*wide, positions, positions, zeros, zeros, SCALE)
    assert relative_rmse(merge_partials(*parts)[0], expected) <= tolerance


def test_prefill_gradients_are_those_of_the_plain_form():
    arrays, marks = prompt(jnp.float32, 30, 90, 1)

    def loss(implementation, arrays):
        out = mla_prefill(*arrays, **marks, scale=SCALE, implementation=implementation)
        return jnp.sum(jnp.sin(out))

    found, expected = (jax.grad(partial(loss, implementation))(arrays) for implementation in ("mosaic_tpu", "xla"))
    for one, other in zip(found, expected, strict=True):
        assert relative_rmse(one, other) <= 1e-5


def test_prefill_products_of_float32_are_full():
    arrays, marks = prompt(jnp.float32, 30, 90, 1)
    run = partial(mosaic_prefill.mla_prefill, scale=SCALE, interpret=True)
    found = [dot for dot in dots(jax.make_jaxpr(run)(*arrays, *marks.values())) if dot.primitive.name == "dot_general"]
    assert found
    for dot in found:
        assert set(dot.params["precision"]) == {jax.lax.Precision.HIGHEST}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_are_written_where_the_plain_form_writes_them(dtype):
    # Given rows of two sequences that cross a page, go back, are dropped, or name a page that is not there
    cache, latents = jnp.asarray(normal(1, 4, 32, PAGE), dtype), jnp.asarray(normal(2, 2, 5, 32))
    table = jnp.array([[2, 0], [3, 9]], jnp.int32)
    positions = jnp.array([[126, 127, 128, 3, -1], [-1, 5, 130, 300, 6]], jnp.int32)

    # When the kernel writes them
    written = mosaic_write.mla_write(cache, latents, table, positions, interpret=True)

    # Then the cache is exactly that of the scatter
    np.testing.assert_array_equal(written, xla.mla_write(cache, latents, table, positions))
