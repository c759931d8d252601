"""The decode loop: ragged batches, stops, seeds, memory, compilation, and what it refuses."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kimi_jax
from kimi_jax import decoding
from kimi_jax.sampling import Sampling
from kimi_jax.state import PAGE

NAMES = ["k2.5", "kimi-linear"]


@pytest.fixture
def prompts():
    return np.random.RandomState(5).randint(0, 500, (3, 20)).astype(np.int32)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_does_not_see_its_neighbours_or_its_padding(model, prompts, name):
    prompts, lengths = prompts[:, :16], np.array([16, 1, 7])
    together = kimi_jax.generate(model(name), prompts, lengths=lengths, max_new_tokens=6)
    scribbled = np.where(np.arange(16) < lengths[:, None], prompts, 499)
    np.testing.assert_array_equal(
        kimi_jax.generate(model(name), scribbled, lengths=lengths, max_new_tokens=6), together
    )
    for row, length in enumerate(lengths):
        alone = kimi_jax.generate(model(name), prompts[row : row + 1, :length], max_new_tokens=6)
        np.testing.assert_array_equal(alone[0], together[row])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk", [1, 8])
def test_ragged_prompts_in_chunks(model, prompts, name, chunk):
    lengths = np.array([20, 1, 7])
    whole = kimi_jax.generate(model(name), prompts, lengths=lengths, max_new_tokens=4)
    pieces = kimi_jax.generate(model(name), prompts, lengths=lengths, max_new_tokens=4, prefill_chunk=chunk)
    np.testing.assert_array_equal(pieces, whole)


def test_a_prompt_longer_than_a_piece_of_history(model):
    # 16 pages of history are expanded at a time; the last piece is cut off by the end of the page table
    kimi = model("k2")
    tokens = np.random.RandomState(1).randint(0, 500, (1, 17 * PAGE + 50)).astype(np.int32)
    lengths = np.array([tokens.shape[1]])
    runner = decoding.Runner(kimi)
    one, _ = runner.prefill(runner.start(1, 2400), tokens, lengths, chunk=4096)
    many, _ = runner.prefill(runner.start(1, 2400), tokens, lengths, chunk=1000)
    np.testing.assert_allclose(many, one, rtol=0, atol=5e-5)


def test_stops_are_part_of_the_answer_and_padding_follows(model):
    golden = cases.golden("k2.5")
    expected = golden["greedy_tokens"]
    stop = int(expected[0, 5])
    new = kimi_jax.generate(
        model("k2.5"), golden["greedy_prompts"], lengths=golden["greedy_lengths"], max_new_tokens=24, stop_ids=[stop]
    )
    pad = model("k2.5").config.text.pad_token_id
    for row in range(len(expected)):
        ends = np.flatnonzero(expected[row] == stop)
        end = ends[0] + 1 if len(ends) else 24
        np.testing.assert_array_equal(new[row, :end], expected[row, :end])
        assert (new[row, end:] == pad).all()


def test_a_stream_ends_when_all_rows_have_stopped(model, prompts):
    first = kimi_jax.generate(model("k2.5"), prompts[:1], max_new_tokens=4)[0]
    columns = list(decoding.stream(model("k2.5"), prompts[:1], max_new_tokens=4, stop_ids=[int(first[1])]))
    assert [int(column[0]) for column in columns] == first[: list(first).index(first[1]) + 1].tolist()


def test_seeds_repeat_and_rows_draw_for_themselves(model, prompts):
    same = np.repeat(prompts[:1], 3, axis=0)
    draw = [kimi_jax.generate(model("k2.5"), same, max_new_tokens=8, temperature=1.0, seed=s) for s in (1, 1, 2)]
    np.testing.assert_array_equal(draw[0], draw[1])
    assert (draw[0] != draw[2]).any()
    assert (draw[0][0] != draw[0][1]).any()
    np.testing.assert_array_equal(
        kimi_jax.generate(model("k2.5"), same, max_new_tokens=8, temperature=1.0, top_k=1),
        kimi_jax.generate(model("k2.5"), same, max_new_tokens=8),
    )


@pytest.mark.parametrize("name", NAMES)
def test_one_compilation_for_all_steps_and_all_sampling_values_of_a_call(model, prompts, name):
    kimi = model(name)
    sampling = Sampling(temperature=0.7, top_p=0.9)
    list(decoding.stream(kimi, prompts, max_new_tokens=2, sampling=sampling))
    before = decoding._advance._cache_size()
    list(decoding.stream(kimi, prompts, max_new_tokens=9, sampling=sampling, seed=3))
    assert decoding._advance._cache_size() == before


def test_the_state_holds_latents_and_never_heads(model):
    text = model("k2.5").config.text
    state = decoding.Runner(model("k2.5")).start(2, PAGE + 1)
    assert state.capacity == 2 * PAGE
    assert [layer.pages.shape for layer in state.layers] == [(4, text.latent_dim, PAGE)] * text.num_hidden_layers
    linear = model("kimi-linear").config.text
    kinds = [type(layer).__name__ for layer in decoding.Runner(model("kimi-linear")).start(2, 10).layers]
    assert kinds == ["MLACache" if kind == "mla" else "KDAState" for kind in linear.layer_kinds]


def test_a_step_writes_its_state_in_place(model, prompts):
    kimi = model("k2.5")
    runner = decoding.Runner(kimi)
    state = runner.start(3, 40)
    _, state = runner.prefill(state, prompts, np.full(3, 20))
    before = state.layers[0].pages
    _, state = runner.step(state, jnp.array([1, 2, 3]))
    assert before.is_deleted()
    assert state.lengths.tolist() == [21, 21, 21]


def test_prefill_makes_logits_of_the_last_position_only(model, prompts):
    # No array of the lowered prefill has both the prompt's and the vocabulary's width
    kimi = model("k2.5")
    tokens = jnp.asarray(np.resize(prompts, (1, 48)))
    state = decoding.Runner(kimi).start(1, 48)
    text = jax.jit(lambda s, t: kimi.extend(s, t, jnp.array([48]))).lower(state, tokens).as_text()
    assert f"48x{kimi.config.text.vocab_size}x" not in text and f"1x{kimi.config.text.vocab_size}x" in text


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
    assert decoding.Runner(again).program is decoding.Runner(model(name)).program
