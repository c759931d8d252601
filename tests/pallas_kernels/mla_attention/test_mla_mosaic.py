"""The latent attention kernels, interpreted, against float64 numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from kernel_numerics import dots, relative_rmse

from pallas_kernels import merge_partials, mla_decode, mla_prefill
from pallas_kernels.mla_attention import mosaic_prefill, mosaic_tpu, mosaic_write, reference, xla

TOLERANCES = [(jnp.float32, 1e-5), (jnp.bfloat16, 5e-3)]
LATENT, ROPE, PAGE, HEADS, SCALE = 128, 16, 128, 3, 0.1
DECODE = partial(mla_decode, latent=LATENT, scale=SCALE, return_lse=True, implementation="mosaic_tpu")
DECODE_JIT = jax.jit(DECODE)
DECODES = {"mosaic_tpu": DECODE_JIT, "triton": jax.jit(partial(DECODE, implementation="triton"))}
WRITE_JIT = jax.jit(partial(mosaic_write.mla_write, interpret=True))


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def paged(lengths, dtype=jnp.float32, max_pages=12, seed=0):
    """Draws queries, and a cache with pages in any order, NaN where no sequence has a token, and wild table entries."""
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
    q = normal(seed + 1, len(lengths), HEADS, LATENT + ROPE)
    arrays = tuple(jnp.asarray(array, dtype) for array in (q, cache))
    return *arrays, jnp.asarray(table), jnp.asarray(lengths, jnp.int32)


def expected_decode(arguments):
    wide = [np.asarray(array, np.float32) for array in arguments[:2]]
    return reference.mla_decode(*wide, *map(np.asarray, arguments[2:]), LATENT, SCALE)


@pytest.mark.parametrize("implementation", DECODES)
@pytest.mark.parametrize("dtype,tolerance", TOLERANCES)
@pytest.mark.parametrize("lengths,max_pages", [((1,), 1), ((0, 1300, 0, 128, 1024, 1, 200), 12), ((0, 0), 1)])
def test_decode(lengths, max_pages, dtype, tolerance, implementation):
    arguments = paged(lengths, dtype, max_pages)
    out, lse = DECODES[implementation](*arguments)
    expected, expected_lse = expected_decode(arguments)
    assert out.dtype == dtype and lse.dtype == jnp.float32
    assert relative_rmse(out, expected) <= tolerance
    np.testing.assert_allclose(lse, expected_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", DECODES)
@pytest.mark.parametrize("dtype,tolerance", TOLERANCES)
def test_decode_of_two_halves_merged(dtype, tolerance, implementation):
    # Given a sequence with half of its pages in one table, half in another
    arguments = paged((700,), dtype, max_pages=6)
    q, cache, table, _ = arguments
    halves = [(table[:, :3], 3 * PAGE), (table[:, 3:], 700 - 3 * PAGE)]

    # When attention runs over each half and the two are merged
    decode = DECODES[implementation]
    parts = [decode(q, cache, rows, jnp.array([length], jnp.int32)) for rows, length in halves]
    out, lse = merge_partials(*parts)

    # Then it is the attention over the whole
    expected, expected_lse = expected_decode(arguments)
    assert relative_rmse(out, expected) <= tolerance
    np.testing.assert_allclose(lse, expected_lse, atol=1e-5, rtol=1e-5)


NEWEST = ((1021, 1022, 1023, 1024, 1025), (0, 0, 0, 0, 0), (127, 128, 129, 0, 0), (1, 0, 0, 0, 0))


@pytest.mark.parametrize("implementation", [*DECODES, "xla"])
@pytest.mark.parametrize("dtype,tolerance", TOLERANCES)
def test_decode_of_several_tokens(dtype, tolerance, implementation):
    # Given five new tokens of each sequence, some of them padding, across the ends of pages and of a block
    _, *cached, _ = paged(tuple(map(max, NEWEST)), dtype)
    q = jnp.asarray(normal(1, len(NEWEST), HEADS, 5, LATENT + ROPE), dtype)
    arguments = (q, *cached, jnp.array(NEWEST, jnp.int32))

    # Then each token attends to those up to itself, and padding to nothing
    out, lse = jax.jit(partial(DECODE, implementation=implementation))(*arguments)
    expected, expected_lse = expected_decode(arguments)
    assert out.shape == (len(NEWEST), HEADS, 5, LATENT) and out.dtype == dtype
    assert relative_rmse(out, expected) <= tolerance
    assert not np.asarray(out)[2, :, 3:].any()
    np.testing.assert_allclose(lse, expected_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", [*DECODES, "xla"])
@pytest.mark.parametrize("new_tokens", [1, 5])
def test_decode_packs_outputs_and_their_weights_for_devices(implementation, new_tokens):
    # Given six heads of three devices, sequences with and without tokens, in bf16
    lengths = NEWEST if new_tokens > 1 else ((1025,), (0,), (129,), (1,))
    _, *cached, _ = paged(tuple(map(max, lengths)), jnp.bfloat16)
    q = jnp.asarray(normal(1, len(lengths), 6, new_tokens, LATENT + ROPE), jnp.bfloat16)
    arguments = (q, *cached, jnp.array(lengths, jnp.int32))
    packed = jax.jit(partial(DECODE, implementation=implementation, shards=3))(*arguments)

    # Then each device's two heads are together, without rounding to bf16
    assert packed.shape == (3, len(lengths), 2, new_tokens, LATENT + 1) and packed.dtype == jnp.float32
    found = jnp.concatenate(list(packed), axis=1)
    expected, expected_lse = expected_decode(arguments)
    close_to((found[..., :-1], found[..., -1]), (expected, expected_lse), 4e-3)
    assert (found[..., :-1] != found[..., :-1].astype(jnp.bfloat16)).any()


def test_decode_races_with_nothing_and_stays_in_bounds():
    arguments = paged((130, 0, 300), max_pages=3)
    strict = pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan")
    out, _ = mosaic_tpu.mla_decode(*arguments, latent=LATENT, scale=SCALE, shards=None, interpret=strict)
    assert relative_rmse(out, expected_decode(arguments)[0]) <= 1e-5
    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_of_float32_are_full_and_of_bf16_single(dtype):
    run = partial(mosaic_tpu.mla_decode, latent=LATENT, scale=1.0, shards=None, interpret=True)
    found = list(dots(jax.make_jaxpr(run)(*paged((5,), dtype))))
    assert len(found) == 3
    wanted = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    for dot in found:
        assert {operand.aval.dtype for operand in dot.invars} == {jnp.dtype(dtype)}
        assert set(dot.params["precision"]) == {wanted}
        assert dot.params["preferred_element_type"] == jnp.float32


@pytest.mark.parametrize(
    "change,reason",
    [
        (lambda q, c: (q, c[:, :, :64]), "pages hold 64 tokens, expected a multiple of 128"),
        (lambda q, c: (q[:, :, :-8], c[:, :-8]), r"latents have 128 \+ 8 values"),
        (lambda q, c: (q, c.astype(jnp.bfloat16)), "q is float32 and the cache bfloat16"),
    ],
)
def test_decode_says_why_it_cannot_serve(change, reason):
    *arrays, table, _ = paged((5,))
    with pytest.raises(ValueError, match=reason):
        DECODE(*change(*arrays), table, jnp.array([5], jnp.int32))


PREFILL = partial(mla_prefill, scale=SCALE, return_lse=True, implementation="mosaic_tpu")
PREFILL_JIT = jax.jit(PREFILL)
PREFILLS = {"mosaic_tpu": PREFILL_JIT, "triton": jax.jit(partial(PREFILL, implementation="triton"))}
WIDTHS = {"q": 192, "k": 192, "v": 128}


def prompt(dtype, queries=140, keys=600, heads=2, batch=1):
    """Draws the last queries of rows of three segments with padding between; keys that no query may see are NaN."""
    lengths = {"q": queries, "k": keys, "v": keys}
    q, k, v = (normal(i, batch, lengths[name], heads, width) for i, (name, width) in enumerate(WIDTHS.items()))
    kv_positions = np.tile(np.arange(keys, dtype=np.int32), (batch, 1))
    kv_segments = kv_positions * 3 // keys
    kv_segments[:, -70:-60] = -1
    seen = slice(keys - queries, None)
    unseen = (kv_segments < 0) | (kv_segments < kv_segments[:, seen].max(axis=1, keepdims=True) - 1)
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


def close_to(found, expected, tolerance):
    """Compares the output and, where a row sees any key, the log-sum-exp."""
    (out, lse), (expected_out, expected_lse) = found, expected
    some = np.isfinite(expected_lse)
    assert relative_rmse(out, expected_out) <= tolerance
    assert relative_rmse(np.asarray(lse)[some], expected_lse[some]) <= tolerance
    assert np.isneginf(np.asarray(lse)[~some]).all() and not np.asarray(out, np.float32)[~some].any()


@pytest.mark.parametrize(
    "implementation,queries,keys,heads,dtype,tolerance",
    [
        ("mosaic_tpu", 200, 500, 2, *TOLERANCES[0]),
        ("mosaic_tpu", 200, 500, 2, *TOLERANCES[1]),
        ("mosaic_tpu", 1, 1, 1, *TOLERANCES[0]),
        pytest.param("triton", 200, 500, 2, *TOLERANCES[0], marks=pytest.mark.slow),
        ("triton", 200, 500, 2, *TOLERANCES[1]),
        ("triton", 1, 1, 1, *TOLERANCES[0]),
    ],
)
def test_prefill(implementation, queries, keys, heads, dtype, tolerance):
    arrays, marks = prompt(dtype, queries, keys, heads)
    out, lse = PREFILLS[implementation](*arrays, **marks)
    assert out.dtype == dtype and lse.dtype == jnp.float32
    close_to((out, lse), expected_prefill(arrays, marks), tolerance)


@pytest.mark.parametrize("implementation", ["mosaic_tpu", pytest.param("triton", marks=pytest.mark.slow)])
def test_prefill_without_segments_of_a_later_chunk(implementation):
    # Given queries that see the first block whole, parts of the next, and nothing of the last
    (q, k, v), marks = prompt(jnp.bfloat16, 256, 2100)
    k, v = (jnp.nan_to_num(array) for array in (k, v))
    positions = {"q_positions": marks["q_positions"] - 500, "kv_positions": marks["kv_positions"]}

    # When keys after the last query are arbitrary
    unseen = jnp.asarray(marks["kv_positions"] > positions["q_positions"].max())[..., None, None]
    found = PREFILLS[implementation](q, jnp.where(unseen, jnp.nan, k), jnp.where(unseen, jnp.nan, v), **positions)

    # Then it is causal attention
    zeros = {name.replace("positions", "segments"): np.zeros_like(marks) for name, marks in positions.items()}
    marks = {**positions, **zeros}
    order = "q_positions", "kv_positions", "q_segments", "kv_segments"
    close_to(found, expected_prefill((q, k, v), {name: marks[name] for name in order}), 5e-3)


@pytest.mark.parametrize("implementation,width", [("mosaic_tpu", 128), ("triton", 72)])
def test_prefill_of_other_widths_and_of_large_scores(implementation, width):
    q, k, v = (10 * normal(i, 1, 130, 3, width) for i in range(3))
    positions = np.zeros((1, 130), np.int32)  # bidirectional
    found = PREFILLS[implementation](*map(jnp.asarray, (q, k, v)), q_positions=positions, kv_positions=positions)
    close_to(found, reference.mla_prefill(q, k, v, *[positions] * 4, SCALE), 1e-5)


@pytest.mark.parametrize("implementation", ["mosaic_tpu", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype,tolerance", TOLERANCES)
def test_prefill_of_two_halves_merged(dtype, tolerance, implementation):
    arrays, marks = prompt(dtype, 120, 120)
    q, k, v = (jnp.nan_to_num(array) for array in arrays)
    positions = marks["q_positions"]
    parts = [
        PREFILLS[implementation](q, k[:, s], v[:, s], q_positions=positions, kv_positions=positions[:, s])
        for s in (np.s_[:60], np.s_[60:])
    ]
    zeros = np.zeros_like(positions)
    wide = [np.asarray(array, np.float32) for array in (q, k, v)]
    expected = reference.mla_prefill(*wide, positions, positions, zeros, zeros, SCALE)
    close_to(merge_partials(*parts), expected, tolerance)


@pytest.mark.parametrize("implementation", ["mosaic_tpu", pytest.param("triton", marks=pytest.mark.slow), "xla"])
def test_prefill_returns_the_largest_score_of_each_head(implementation):
    # Given a row without any visible key beside one whose queries see some
    arrays, marks = prompt(jnp.float32, 30, 90, 2, 2)
    marks["q_segments"] = np.stack([marks["q_segments"][0], np.full(30, -1, np.int32)])
    run = partial(mla_prefill, **marks, scale=SCALE, implementation=implementation)
    out, lse, top = jax.jit(partial(run, return_lse=True, return_max=True))(*arrays)
    # Then it is that of the whole matrix of scores
    close_to((out, lse), expected_prefill(arrays, marks), 1e-5)
    q, k = (np.nan_to_num(np.asarray(array, np.float64)) for array in arrays[:2])
    visible = marks["kv_positions"][:, None] <= marks["q_positions"][:, :, None]
    segments = marks["q_segments"][..., None]
    visible &= (marks["kv_segments"][:, None] == segments) & (segments >= 0)
    scores = np.where(visible[:, None], SCALE * np.einsum("bshd,bthd->bhst", q, k), -np.inf)
    np.testing.assert_allclose(top, scores.max(axis=(2, 3)), rtol=1e-5)
    assert top.dtype == jnp.float32 and np.isneginf(top[1]).all()
    # And no gradient flows through it
    if implementation == "xla":
        gradient = jax.jit(jax.grad(lambda q: jnp.sum(run(q, *arrays[1:], return_max=True)[1][0])))(arrays[0])
        assert not np.any(gradient)


STRICT = pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan")


def test_prefill_races_with_nothing_and_stays_in_bounds():
    # Given several blocks of queries and of keys, two rows and two groups of heads
    arrays, marks = prompt(jnp.float32, 300, 600, 4, 2)
    out, lse = mosaic_prefill.mla_prefill(*arrays, *map(jnp.asarray, marks.values()), scale=SCALE, interpret=STRICT)
    close_to((out, lse), expected_prefill(arrays, marks), 1e-5)
    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize("implementation", ["mosaic_tpu", pytest.param("triton", marks=pytest.mark.slow)])
def test_prefill_gradients_are_those_of_the_plain_form(implementation):
    arrays, marks = prompt(jnp.float32, 30, 90, 1)

    def loss(implementation, arrays):
        out = mla_prefill(*arrays, **marks, scale=SCALE, implementation=implementation)
        return jnp.sum(jnp.sin(out))

    found, expected = (jax.jit(jax.grad(partial(loss, which)))(arrays) for which in (implementation, "xla"))
    for one, other in zip(found, expected, strict=True):
        assert relative_rmse(one, other) <= 1e-5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_prefill_products_of_float32_are_full_and_of_bf16_single(dtype):
    arrays, marks = prompt(dtype, 30, 90, 1)
    run = partial(mosaic_prefill._forward, scale=SCALE, interpret=True)
    found = list(dots(jax.make_jaxpr(run)(*arrays, *map(jnp.asarray, marks.values()))))
    assert len(found) == 6  # scores and values, of whole blocks, whole parts, and parts with hidden keys
    wanted = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    for dot in found:
        assert {operand.aval.dtype for operand in dot.invars} == {jnp.dtype(dtype)}
        assert set(dot.params["precision"]) == {wanted}
        assert dot.params["preferred_element_type"] == jnp.float32


@pytest.mark.parametrize(
    "heads,width,values,reason",
    [
        (2, 96, 128, "heads have 96 and 128 values, expected multiples of 64 and 128"),
        (2, 64, 64, "heads have 64 and 64 values"),
        (3, 192, 128, "there are 3 heads of 192, expected an even number or one"),
    ],
)
def test_prefill_says_why_it_cannot_serve(heads, width, values, reason):
    q, v, positions = jnp.zeros((1, 5, heads, width)), jnp.zeros((1, 5, heads, values)), jnp.zeros((1, 5), jnp.int32)
    with pytest.raises(ValueError, match=reason):
        PREFILL(q, q, v, q_positions=positions, kv_positions=positions)


def run(first, count, padding=0):
    return [*range(first, first + count), *[-1] * padding]


# Positions of each sequence's rows; a page of 256 tokens is two of 128.
WRITES = {
    "over pages, back, dropped, and of no page": [[126, 127, 128, 3, -1], [-1, 5, 130, 300, 6]],
    "from a page's first token": [run(0, 256), run(0, 130, 126)],
    "within a page, over its end, padded": [run(70, 200), run(0, 30, 170)],
    "holes, each other's neighbours, and all dropped": [[*run(3, 60), -1, -1, *run(65, 70)], [-1] * 132],
    "parts of two devices": [[*[-1] * 128, *run(0, 128), *[-1] * 44], [*run(100, 28), *[-1] * 128, *run(128, 144)]],
    "backwards, and twice": [run(120, 30)[::-1], [*run(40, 100), *run(50, 20)[::-1]]],
    "more rows at once than there are slots": [list(range(0, 256, 128)) * 10, list(range(5, 250, 40)) * 2 + [1, 2] * 3],
}


def rows_and_cache(positions, dtype=jnp.float32, page=PAGE, table=((2, 0), (3, 9))):
    """Returns rows at these positions and dropped ones, up to 270 rows, with NaN in the dropped ones."""
    positions = jnp.array([row + [-1] * (270 - len(row)) for row in positions], jnp.int32)
    cache, latents = jnp.asarray(normal(1, 4, 32, page), dtype), jnp.asarray(normal(2, *positions.shape, 32))
    return cache, jnp.where((positions < 0)[..., None], jnp.nan, latents), jnp.array(table, jnp.int32), positions


def written_in_turn(cache, latents, table, positions):
    """Writes one row after another into the cache: of two rows for one token the later stays."""
    rows, cache = np.asarray(latents.astype(cache.dtype)), np.array(cache)
    pages, _, page = cache.shape
    for b, s in np.ndindex(positions.shape):
        entry, lane = divmod(int(positions[b, s]), page)
        if 0 <= entry < table.shape[1] and 0 <= table[b, entry] < pages:
            cache[table[b, entry], :, lane] = rows[b, s]
    return cache


# Any two of positions, a page and a dtype are together in a quick case
PLACES = [
    pytest.param(
        positions, page, dtype,
        id=f"{kind}-{page}-{dtype.__name__}",
        marks=[] if (i + j + k) % 2 == 0 else [pytest.mark.slow],
    )
    for i, (kind, positions) in enumerate(WRITES.items())
    for j, page in enumerate((128, 256))
    for k, dtype in enumerate((jnp.float32, jnp.bfloat16))
]  # fmt: skip


@pytest.mark.parametrize(("positions", "page", "dtype"), PLACES)
def test_rows_are_written_where_one_after_another_would_be(positions, page, dtype):
    arguments = rows_and_cache(positions, dtype, page)
    np.testing.assert_array_equal(WRITE_JIT(*arguments), written_in_turn(*arguments))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_row_each_is_written_where_the_plain_form_writes_it(dtype):
    # Given 200 sequences, more than a block's rows, of pages shared by some
    table = np.random.default_rng(5).integers(-1, 31, (200, 2)).astype(np.int32)
    places = np.random.default_rng(6).permutation(256)[:200].astype(np.int32)[:, None]
    places[7::20] = -1
    cache, latents = jnp.asarray(normal(1, 30, 32, PAGE), dtype), jnp.asarray(normal(2, 200, 1, 32))
    arguments = cache, latents, jnp.asarray(table), jnp.asarray(places)

    # When they are written, then the cache is that of the plain form
    np.testing.assert_array_equal(WRITE_JIT(*arguments), xla.mla_write(*arguments))


@pytest.mark.parametrize(
    "kind",
    [
        "more rows at once than there are slots",
        pytest.param("within a page, over its end, padded", marks=pytest.mark.slow),
    ],
)
def test_write_races_with_nothing_and_stays_in_bounds(kind):
    # Given sequences that share their pages
    arguments = rows_and_cache(WRITES[kind], table=((2, 0), (0, 2)))
    written = mosaic_write.mla_write(*arguments, interpret=STRICT)
    np.testing.assert_array_equal(written, written_in_turn(*arguments))
    assert not interpret_pallas_call.races.races_found


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.integers(0, 2 * PAGE), min_size=2, max_size=2),
    st.permutations(range(6)),
    st.integers(0, 2**31),
)
def test_what_is_written_anywhere_is_read(lengths, pages, seed):
    # Given tables that name the pages in any order, and a cache of NaN
    table = np.array(pages[:4], np.int32).reshape(2, 2)
    rows = normal(seed, 2, 2 * PAGE, LATENT + ROPE)
    at = np.tile(np.arange(2 * PAGE, dtype=np.int32), (2, 1))
    lengths = np.array(lengths, np.int32)
    positions = np.where(at < lengths[:, None], at, -1)
    empty = jnp.full((6, LATENT + ROPE, PAGE), jnp.nan)

    # When rows are written and attended to
    cache = WRITE_JIT(empty, rows, table, positions)
    q = normal(seed + 1, 2, HEADS, LATENT + ROPE)
    found = DECODE_JIT(q, cache, table, lengths)

    # Then the attention is that over the rows themselves
    close_to(found, reference.mla_decode(q, np.asarray(cache), table, lengths, LATENT, SCALE), 1e-5)
    expected = np.full((6, LATENT + ROPE, PAGE), np.nan, np.float32)
    for b, p in zip(*np.nonzero(positions >= 0), strict=True):
        expected[table[b, p // PAGE], :, p % PAGE] = rows[b, p]
    np.testing.assert_array_equal(cache, expected)
