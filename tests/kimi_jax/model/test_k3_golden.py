"""Kimi K3 against its float64 reference: one pass, its parts, pictures, chunks of packed rows, and decoding."""

import cases
import numpy as np
import pytest
from greedy_batch import greedy_batch
from whole_rows import WholeRows

import kimi_jax
from kimi_jax.looking import look
from kimi_jax.runtime.program import Program
from sharding import SINGLE_DEVICE

ATOL = 2e-4  # of logits of unit scale
OTHER_WAY = 1e-4  # of logits computed in another way than in one pass


@pytest.fixture(scope="module")
def golden():
    return cases.golden("k3")


@pytest.fixture(scope="module")
def media():
    return kimi_jax.Media(np.concatenate([cases.media(grid) for grid in cases.K3_GRIDS]), cases.K3_GRIDS)


@pytest.fixture(scope="module")
def one_pass(model, golden, media):
    """Returns what a pass over the long prompt and the one with pictures shows, and its logits."""
    tokens = np.zeros((2, 150), np.int32)
    tokens[0], tokens[1, : len(golden["prompt_tokens"])] = golden["text_tokens"], golden["prompt_tokens"]
    found = look(model("k3"), tokens, media, what=("hidden", "router", "kda"))
    return found, np.asarray(model("k3").logits(found.last, SINGLE_DEVICE))


def test_the_golden_belongs_to_the_checkpoint_and_decides_clearly(golden):
    assert cases.fingerprint("k3") == golden["sha256"].item()
    assert golden["router_margin"] > 5e-5 and golden["greedy_margins"].min() > cases.MARGIN
    assert (cases.HERE / "k3.npz").stat().st_size < 300_000
    for name in ("text_logits", "features", "prompt_logits"):
        assert 0.5 < golden[name].std() < 1.5, f"{name} is not of unit scale"


def test_logits_of_one_pass(one_pass, golden):
    text, prompt = one_pass[1][0, golden["text_positions"]], one_pass[1][1, golden["prompt_positions"]]
    np.testing.assert_allclose(text, golden["text_logits"], rtol=0, atol=ATOL)
    np.testing.assert_allclose(prompt, golden["prompt_logits"], rtol=0, atol=ATOL)


def test_every_layer_of_one_pass(one_pass, golden):
    found, _ = one_pass
    for layer, prefix in enumerate(golden["text_prefix"]):
        np.testing.assert_allclose(found.hidden[layer][0, golden["text_positions"]], prefix, rtol=0, atol=ATOL)
    for routing, experts in zip(found.router.values(), golden["text_experts"], strict=True):
        np.testing.assert_array_equal(routing.chosen[0], experts)
    for memory, state in zip(found.kda.values(), golden["text_states"], strict=True):
        np.testing.assert_allclose(memory.state[0], state, rtol=0, atol=ATOL)
        assert 0.0067 < float(memory.decay.min()) < 0.1  # e^-5 at the least


def test_the_embeddings_of_pictures(one_pass, golden):
    np.testing.assert_allclose(one_pass[0].media_tokens, golden["features"], rtol=0, atol=2e-5)


def test_the_reference_s_snapshots_are_the_stream_before_every_second_layer(golden, model):
    embedding = np.asarray(model("k3").model.embed_tokens.weight[...])[golden["text_tokens"][golden["text_positions"]]]
    np.testing.assert_allclose(golden["text_snapshots"][0], embedding, atol=1e-6)
    np.testing.assert_array_equal(golden["text_snapshots"][1:], golden["text_prefix"][[1, 3]])


def test_chunks_packed_in_one_row_and_decode_steps_compute_what_one_pass_does(model, one_pass, golden):
    program, prompts = Program(model("k3")), (golden["text_tokens"], golden["greedy_prompt"])
    table, slots, cache = np.array([[3, 0], [1, 2]]), [2, 0], program.cache(4, 3)
    # Given the long prompt's first tokens beside all of the short one, and then more of the long one alone
    for pieces in ([(0, 101), (0, 11)], [(101, 140), (11, 11)]):
        tokens, positions, segments = np.zeros((1, 128)), np.full((1, 128), -1), np.full((1, 128), -1, np.int32)
        at = 0
        for number, (begin, end) in enumerate(pieces):
            here = slice(at, at := at + end - begin)
            tokens[0, here], positions[0, here] = prompts[number][begin:end], range(begin, end)
            segments[0, here] = number
        cache, logits = program.logits(cache, greedy_batch(tokens, positions, table, slots, segments=segments))
        np.testing.assert_allclose(logits[0], one_pass[1][0, pieces[0][1] - 1], rtol=0, atol=OTHER_WAY)
        chosen = [int(logits[1].argmax())] if pieces[1][0] == 0 else chosen
    # Then both continue, the long one with its own tokens
    for step in range(cases.NEW_TOKENS - 1):
        place = min(140 + step, 150)
        forced = prompts[0][place] if place < 150 else 0
        positions = [[place if place < 150 else -1], [11 + step]]
        batch = greedy_batch([[forced], [chosen[-1]]], positions, table, slots, phase="decode")
        cache, logits = program.logits(cache, batch)
        if place < 150:
            np.testing.assert_allclose(logits[0], one_pass[1][0, place], rtol=0, atol=OTHER_WAY)
        chosen.append(int(logits[1].argmax()))
    assert chosen == golden["greedy_tokens"].tolist()


@pytest.mark.slow
def test_chunks_in_rows_of_their_own_compute_what_one_pass_does(model, one_pass, golden):
    rows = WholeRows(model("k3"), 1, 300)
    logits = rows.prefill(golden["text_tokens"][None, :140], np.array([140]), chunk=128)
    np.testing.assert_allclose(logits[0], one_pass[1][0, 139], rtol=0, atol=OTHER_WAY)


@pytest.mark.slow
def test_generate_chooses_the_reference_s_tokens(model, golden):
    found = kimi_jax.generate(model("k3"), golden["greedy_prompt"][None], max_new_tokens=cases.NEW_TOKENS, stop_ids=())
    assert found[0].tolist() == golden["greedy_tokens"].tolist()


@pytest.mark.slow
def test_the_model_called_with_pictures(model, golden, media):
    logits = np.asarray(model("k3")(golden["prompt_tokens"][None], media))[0, golden["prompt_positions"]]
    np.testing.assert_allclose(logits, golden["prompt_logits"], rtol=0, atol=ATOL)
