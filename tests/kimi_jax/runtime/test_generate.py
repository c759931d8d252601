"""The decode loop: ragged batches, stops, seeds, rows that fail, memory, compilation, and refused arguments."""

import dataclasses

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from whole_rows import WholeRows

import kimi_jax
from kimi_jax.model.context import PAGE
from kimi_jax.runtime.batch import Finish
from kimi_jax.runtime.generate import stream
from kimi_jax.runtime.program import Program
from sharding import make_mesh

NAMES = ["k2.5", "kimi-linear"]
# For what the loop does with any model: Kimi Linear has both kinds of mixers
LOOP = [pytest.param("k2.5", marks=pytest.mark.slow), "kimi-linear"]


@pytest.fixture
def prompts():
    return np.random.RandomState(5).randint(0, 500, (3, 20)).astype(np.int32)


@pytest.mark.parametrize("name", LOOP)
def test_a_row_does_not_see_its_neighbours_or_its_padding(model, prompts, name):
    prompts, lengths = prompts[:, :16], np.array([16, 1, 7])
    batched = kimi_jax.generate(model(name), prompts, lengths=lengths, max_new_tokens=6, stop_ids=())
    scribbled = np.where(np.arange(16) < lengths[:, None], prompts, 499)
    np.testing.assert_array_equal(
        kimi_jax.generate(model(name), scribbled, lengths=lengths, max_new_tokens=6, stop_ids=()), batched
    )
    for row, length in enumerate(lengths):
        single = kimi_jax.generate(model(name), prompts[row : row + 1, :length], max_new_tokens=6, stop_ids=())
        np.testing.assert_array_equal(single[0], batched[row])


@pytest.mark.parametrize(
    ("name", "chunk"),
    [
        ("k2.5", 8),
        ("kimi-linear", 1),
        pytest.param("k2.5", 1, marks=pytest.mark.slow),
        pytest.param("kimi-linear", 8, marks=pytest.mark.slow),
    ],
)
def test_ragged_prompts_in_chunks(model, prompts, name, chunk):
    lengths = np.array([20, 1, 7])
    asked = {"lengths": lengths, "max_new_tokens": 4, "stop_ids": ()}
    whole = kimi_jax.generate(model(name), prompts, **asked)
    pieces = kimi_jax.generate(model(name), prompts, prefill_chunk=chunk, **asked)
    np.testing.assert_array_equal(pieces, whole)


def test_a_prompt_longer_than_a_piece_of_history(model):
    # 16 pages of history are expanded at a time; the last piece is cut off by the end of the page table
    kimi = model("k2.5")
    tokens = np.random.RandomState(1).randint(0, 500, (1, 17 * PAGE + 50)).astype(np.int32)
    lengths = np.array([tokens.shape[1]])
    one, many = (WholeRows(kimi, 1, 2400).prefill(tokens, lengths, chunk) for chunk in (4096, 1000))
    np.testing.assert_allclose(many, one, rtol=0, atol=5e-5)


def test_stops_are_part_of_the_answer_and_padding_follows(model, prompts):
    asked = {"lengths": np.array([20, 1, 7]), "max_new_tokens": 24}
    expected = np.asarray(kimi_jax.generate(model("k2.5"), prompts, stop_ids=(), **asked))
    stop = int(expected[0, 5])
    new = kimi_jax.generate(model("k2.5"), prompts, stop_ids=[stop], **asked)
    pad = model("k2.5").config.text.pad_token_id
    for row in range(len(expected)):
        ends = np.flatnonzero(expected[row] == stop)
        end = ends[0] + 1 if len(ends) else 24
        np.testing.assert_array_equal(new[row, :end], expected[row, :end])
        assert (new[row, end:] == pad).all()


def test_a_stream_ends_when_all_rows_have_stopped(model, prompts):
    prompt = prompts[:1, :16]
    first = kimi_jax.generate(model("k2.5"), prompt, max_new_tokens=4, stop_ids=())[0]
    columns = list(stream(model("k2.5"), prompt, max_new_tokens=4, stop_ids=[int(first[1])]))
    assert [int(column.tokens[0]) for column in columns] == first[: list(first).index(first[1]) + 1].tolist()
    assert [int(column.finish[0]) for column in columns[-2:]] == [Finish.NOT_YET, Finish.STOP][-len(columns) :]


def test_none_stops_where_the_model_does_and_nothing_at_all_never(model, prompts, monkeypatch):
    kimi, prompt = model("k2.5"), prompts[:1, :16]
    free = kimi_jax.generate(kimi, prompt, max_new_tokens=4, stop_ids=())[0].tolist()
    monkeypatch.setattr(kimi, "config", dataclasses.replace(kimi.config, stop_ids=(free[0],)))
    pad = kimi.config.text.pad_token_id
    assert kimi_jax.generate(kimi, prompt, max_new_tokens=4)[0].tolist() == [free[0], pad, pad, pad]
    assert kimi_jax.generate(kimi, prompt, max_new_tokens=4, stop_ids=())[0].tolist() == free
    (column,) = stream(kimi, prompt, max_new_tokens=1, stop_ids=())
    assert column.finish[0] == Finish.LENGTH


def test_a_seed_belongs_to_a_prompt_wherever_it_stands(model, prompts):
    drawing = {"max_new_tokens": 8, "temperature": 1.0, "stop_ids": ()}
    same = np.stack([prompts[0], prompts[1], prompts[0]])
    one, two = (kimi_jax.generate(model("k2.5"), same, seed=seed, **drawing) for seed in (1, 2))
    np.testing.assert_array_equal(one, kimi_jax.generate(model("k2.5"), same, seed=1, **drawing))
    np.testing.assert_array_equal(one[0], one[2])
    assert (one != two).any(axis=1).all()
    # a seed for each row draws the same tokens in another order, beside other rows, and in chunks
    each = kimi_jax.generate(model("k2.5"), same, seed=[1, 2, 2**40], **drawing)
    np.testing.assert_array_equal(each[:2], [one[0], two[1]])
    assert (each[2] != each[0]).any()
    turned = kimi_jax.generate(model("k2.5"), same[::-1], seed=np.array([2**40, 2, 1]), prefill_chunk=8, **drawing)
    np.testing.assert_array_equal(turned, each[::-1])
    np.testing.assert_array_equal(
        kimi_jax.generate(model("k2.5"), same, seed=3, top_k=1, **drawing),
        kimi_jax.generate(model("k2.5"), same, max_new_tokens=8, stop_ids=()),
    )


@pytest.mark.parametrize("name", LOOP)
def test_values_of_a_call_compile_nothing(model, prompts, name):
    # Given a batch of five rows, which no other test has compiled
    program, prompts = Program(model(name)), np.concatenate([prompts, prompts[:2]])
    calls = [
        {},
        {"temperature": 0.7},
        {"temperature": 1.0, "seed": 5},
        {"temperature": 1.0, "seed": [5, 6, 2**62, 0, 1]},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 0.3, "top_p": 0.9},
        {"temperature": 1.3, "min_p": 0.1},
        {"stop_ids": ()},
        {"stop_ids": [7]},
        {"stop_ids": [7, 8], "max_new_tokens": 7},
        {"stop_ids": [1, 2, 3, 4, 5], "max_new_tokens": 40},
        {"lengths": [20, 1, 7, 3, 9], "max_new_tokens": 2, "temperature": 0.6, "top_k": 9, "top_p": 0.5, "min_p": 0.01},
    ]
    asked = {"max_new_tokens": 3}
    before = program.compiled
    kimi_jax.generate(model(name), prompts, **asked)
    assert program.compiled == before + 2
    for call in calls:
        kimi_jax.generate(model(name), prompts, **asked | call)
    assert program.compiled == before + 2
    # and a prompt of another length in the same bucket compiles nothing either
    kimi_jax.generate(model(name), prompts[:, :17], **asked)
    assert program.compiled == before + 2


def test_calls_alike_compile_nothing_at_all(model, prompts):
    compiled = []
    kimi_jax.generate(model("k2.5"), prompts, max_new_tokens=3)
    listener = lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        for _ in range(3):
            kimi_jax.generate(model("k2.5"), prompts, max_new_tokens=3)
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert compiled == []


def test_a_row_that_is_not_finite_ends_with_that_reason(checkpoint, model, prompts):
    # Given weights that make NaN of one token, which the second row holds
    for name in NAMES:
        kimi = kimi_jax.load(checkpoint(name), dtype=jnp.float32)
        words = kimi.model.embed_tokens.weight
        words.set_value(words.get_value().at[600].set(jnp.nan))
        bad = prompts.copy()
        bad[1, 3] = 600
        good = kimi_jax.generate(kimi, prompts, max_new_tokens=4, stop_ids=())
        # Then that row ends at once, and the other rows have the tokens that they have without it
        columns = list(stream(kimi, bad, max_new_tokens=4, stop_ids=()))
        found = np.stack([column.tokens for column in columns], axis=1)
        np.testing.assert_array_equal(found[[0, 2]], good[[0, 2]])
        assert (found[1] == kimi.config.text.pad_token_id).all()
        assert columns[0].finish.tolist() == [Finish.NOT_YET, Finish.NOT_FINITE, Finish.NOT_YET]
        assert columns[-1].finish.tolist() == [Finish.LENGTH, Finish.NOT_FINITE, Finish.LENGTH]
        # and `generate` names it, greedy or drawing
        for temperature in (0.0, 1.0):
            with pytest.raises(ValueError, match=r"the logits of rows \[1\] are not finite"):
                kimi_jax.generate(kimi, bad, max_new_tokens=4, stop_ids=(), temperature=temperature)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOP)
def test_batches_of_1_to_9_rows_on_eight_devices(checkpoint, model, name):
    # Given nine rows on one device
    random = np.random.RandomState(3)
    lengths = np.array([33, 3, 8, 40, 1, 17, 16, 5, 29])
    tokens = random.randint(0, 500, (9, 40))
    options = {"max_new_tokens": 5, "stop_ids": ()}
    expected = kimi_jax.generate(model(name), tokens, lengths=lengths, **options)
    # Then any number of them, on a mesh that shards the batch, have the same tokens; two of a device also in chunks
    meshed = kimi_jax.load(checkpoint(name), dtype=jnp.float32, mesh=make_mesh("8x1"))
    for count in range(1, 10):
        asked = options | ({"prefill_chunk": 16} if count == 9 else {})
        new = kimi_jax.generate(meshed, tokens[:count], lengths=lengths[:count], **asked)
        np.testing.assert_array_equal(new, expected[:count])
    # and a row of NaN changes no row of another device
    words = meshed.model.embed_tokens.weight
    words.set_value(words.get_value().at[600].set(jnp.nan))
    tokens[2, 3] = 600
    columns = list(stream(meshed, tokens, lengths=lengths, prefill_chunk=16, **options))
    assert np.flatnonzero(columns[0].finish == Finish.NOT_FINITE).tolist() == [2]
    rest = np.arange(9) != 2
    np.testing.assert_array_equal(np.stack([column.tokens for column in columns], axis=1)[rest], expected[rest])


@pytest.mark.slow
def test_in_bf16_a_batch_repeats_and_a_row_does_not_see_its_neighbours_tokens(checkpoint, prompts):
    # (Single rows and chunks sum in another order before rounding to 8 bits, so tokens near a tie may differ.)
    kimi = kimi_jax.load(checkpoint("kimi-linear"), dtype=jnp.bfloat16)
    options = {"max_new_tokens": 8, "stop_ids": ()}
    first = kimi_jax.generate(kimi, prompts, **options)
    np.testing.assert_array_equal(first, kimi_jax.generate(kimi, prompts, **options))
    changed = kimi_jax.generate(kimi, np.stack([prompts[0], 499 - prompts[1], 499 - prompts[2]]), **options)
    np.testing.assert_array_equal(first[0], changed[0])


def test_a_step_writes_its_cache_in_place(model, prompts):
    rows = WholeRows(model("k2.5"), 3, 40)
    rows.prefill(prompts, np.full(3, 20))
    before = rows.cache.layers[0].pages
    rows.step(np.array([1, 2, 3]))
    assert before.is_deleted()


def test_prefill_makes_logits_of_the_last_position_only(model, prompts):
    # No array of the lowered prefill has both the prompt's and the vocabulary's width
    rows = WholeRows(model("k2.5"), 1, 48)
    (batch,) = rows.batches(np.resize(prompts, (1, 48)), np.array([48]))
    text = rows.program.jitted.step.lower(rows.program.arrays, rows.cache, batch).as_text()
    words = rows.program.config.text.vocab_size
    assert f"48x{words}x" not in text and f"1x{words}x" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": np.array([20, 21, 1])}, "lengths are"),
        ({"lengths": np.array([0, 1, 1])}, "lengths are"),
        ({"lengths": np.array([1, 1])}, "lengths are"),
        ({"max_new_tokens": 0}, "at least 1 new token"),
        ({"max_new_tokens": 10**6}, "max_position_embeddings = 262144"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"prefill_chunk": 0}, "prefill_chunk is 0"),
        ({"lengths": np.array([1.0, 2.0, 3.0])}, "lengths are float64, expected integers"),
        ({"lengths": np.array([True, True, True])}, "lengths are bool"),
        (
            {"lengths": np.array([2**32 + 1, 1, 1])},
            "lengths are .4294967297, 1, 1., expected 3 of them between 1",
        ),
        ({"stop_ids": [10**12]}, "stop_ids are .1000000000000., expected token ids from 0 to 767"),
        ({"stop_ids": [-1]}, "stop_ids are .-1."),
        ({"seed": -3}, "seeds lie between -3 and -3"),
    ],
)
def test_bad_arguments_are_refused(model, prompts, arguments, message):
    with pytest.raises(ValueError, match=message):
        kimi_jax.generate(model("k2.5"), prompts, **arguments)


def test_bad_tokens_are_refused(model):
    with pytest.raises(ValueError, match="token ids lie between 0 and 768, expected 0 to 767"):
        kimi_jax.generate(model("k2.5"), np.array([[0, 768]]))
    with pytest.raises(ValueError, match=r"tokens have shape \(3,\)"):
        kimi_jax.generate(model("k2.5"), np.array([0, 1, 2]))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.array([[1.7, 2.2]]), "tokens are float64, expected integers of at most 64 bits"),
        (np.array([[np.nan, 2.0]]), "tokens are float64"),
        (np.array([[True, False]]), "tokens are bool"),
        (np.array([[2**70, 1]]), "tokens are object"),
        (np.array([["a", "b"]]), "tokens are <U1"),
        (np.array([[2**40, 1]]), "token ids lie between 1 and 1099511627776, expected 0 to 767"),
        (np.array([[2**32 + 5, 1]]), "token ids lie between 1 and 4294967301"),
        (np.array([[2**63 + 1, 1]], np.uint64), "token ids lie between 1 and 9223372036854775809"),
        (np.zeros((0, 3), int), "tokens have shape"),
    ],
)
def test_tokens_are_looked_at_before_they_are_cast(model, tokens, message):
    for call in (kimi_jax.generate, lambda kimi, tokens: kimi(tokens)):
        with pytest.raises(ValueError, match=message):
            call(model("k2.5"), tokens)


def test_placeholders_must_match_the_media(model):
    kimi = model("k2.5")
    placeholder = kimi.config.media_placeholder_token_id
    grids = np.array([[1, 4, 6]], np.int32)
    media = kimi_jax.Media(cases.media(grids[0]), grids)
    with pytest.raises(ValueError, match=r"holds 2 media placeholders .* come to 6 tokens"):
        kimi_jax.generate(kimi, np.array([[1, placeholder, placeholder, 2]]), media=media)
    with pytest.raises(ValueError, match=r"holds 1 media placeholders .* come to 0 tokens"):
        kimi(jnp.array([[placeholder]]))
    with pytest.raises(ValueError, match="ask for 24 patches"):
        kimi_jax.Media(media.patches[:-1], grids)
    with pytest.raises(ValueError, match=r"media grid \(t, h, w\) = \(1, 3, 8\)"):
        kimi.encode_media(kimi_jax.Media(media.patches, np.array([[1, 3, 8]])))
    with pytest.raises(ValueError, match="a kimi_linear model takes no images"):
        model("kimi-linear")(jnp.array([[1]]), media)


@pytest.mark.parametrize("name", NAMES)
def test_two_loads_of_a_checkpoint_share_their_compiled_code(model, checkpoint, name):
    again = kimi_jax.load(checkpoint(name), dtype=jnp.float32)
    assert Program(again).jitted is Program(model(name)).jitted
