"""Models against transformers' outputs on the same published checkpoints, in float32 (from `tests/golden/make.py`).

The reference's own float32 error against float64 is about 1e-5 on logits of unit scale; ours may be five times that.
"""

import cases
import jax.numpy as jnp
import numpy as np
import pytest
from whole_rows import WholeRows

import kimi_jax

ATOL = 5e-5
FAMILIES = ["k2.5", "k2", "deepseek-v3", "kimi-linear"]
# K2 and DeepSeek-V3 have other ropes, experts and routes than K2.5, which know no chunks and no steps: the logits of a
# text are the quick test of theirs.
QUICK_AND_OTHERS = [
    pytest.param(name, marks=[] if name in ("k2.5", "kimi-linear") else [pytest.mark.slow]) for name in FAMILIES
]


def media(grids):
    return kimi_jax.Media(np.concatenate([cases.media(grid) for grid in grids]), grids)


def at(logits, positions):
    return np.take_along_axis(np.asarray(logits), positions[..., None], axis=-2)


@pytest.mark.parametrize("name", FAMILIES)
def test_text_logits(model, name):
    golden = cases.golden(name)
    logits = model(name)(jnp.asarray(golden["text_tokens"]))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(at(logits, golden["text_positions"]), golden["text_logits"], rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", QUICK_AND_OTHERS)
def test_greedy_continuation_of_a_ragged_batch(model, name):
    golden = cases.golden(name)
    new = kimi_jax.generate(
        model(name), golden["greedy_prompts"], lengths=golden["greedy_lengths"], max_new_tokens=24, stop_ids=()
    )
    np.testing.assert_array_equal(new, golden["greedy_tokens"])


@pytest.mark.parametrize("chunk", [37, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", QUICK_AND_OTHERS)
def test_prefill_in_chunks_and_decoding_give_the_logits_of_one_pass(model, two_layer_model, name, chunk):
    # Given a prompt and the logits of a layer of each kind in one pass (test_text_logits holds whole models to the
    # reference); the whole Kimi Linear costs no more, since tests below run it over as many tokens
    kimi, golden = (model if name == "kimi-linear" else two_layer_model)(name), cases.golden(name)
    tokens = np.resize(golden["text_tokens"], (1, 200)) if "long_tokens" not in golden else golden["long_tokens"][None]
    whole = np.asarray(kimi(jnp.asarray(tokens)))[0]
    # When all but the last four tokens are a prompt, and those four come one at a time
    rows = WholeRows(kimi, 1, 200)
    steps = [rows.prefill(tokens[:, :196], np.array([196]), chunk)[0]]
    steps += [rows.step(tokens[:, i])[0] for i in range(196, 200)]
    # Then the logits are those of one pass
    np.testing.assert_allclose(np.stack(steps), whole[195:], rtol=0, atol=ATOL)


def test_kimi_linear_over_200_tokens(model):
    golden = cases.golden("kimi-linear")
    logits = np.asarray(model("kimi-linear")(jnp.asarray(golden["long_tokens"][None])))[0]
    np.testing.assert_allclose(at(logits, golden["long_positions"]), golden["long_logits"], rtol=0, atol=ATOL)
    np.testing.assert_array_equal(logits.argmax(-1), golden["long_argmax"])


def test_kimi_linear_recurrent_over_200_tokens(model):
    # Every KDA layer runs its recurrent step, since tokens come one at a time from the start
    kimi, golden = model("kimi-linear"), cases.golden("kimi-linear")
    rows = WholeRows(kimi, 1, 200)
    logits = np.stack([rows.step([token])[0] for token in golden["long_tokens"]])
    np.testing.assert_allclose(logits[golden["long_positions"]], golden["long_logits"], rtol=0, atol=ATOL)


@pytest.mark.parametrize(
    ("key", "grids"), [("image_features", cases.IMAGE_GRIDS), ("video_features", cases.VIDEO_GRIDS)]
)
def test_media_features(model, key, grids):
    features = model("k2.5").encode_media(media(grids))
    np.testing.assert_allclose(features, cases.golden("k2.5")[key], rtol=0, atol=1e-5)


def test_logits_of_a_prompt_with_two_images(model):
    golden, grids = cases.golden("k2.5"), cases.IMAGE_GRIDS[list(cases.PROMPT_IMAGES)]
    logits = model("k2.5")(jnp.asarray(golden["prompt_tokens"][None]), media(grids))[0]
    np.testing.assert_allclose(at(logits, golden["prompt_positions"]), golden["prompt_logits"], rtol=0, atol=ATOL)


@pytest.mark.parametrize("chunk", [pytest.param(2048, marks=pytest.mark.slow), 16])
def test_greedy_continuation_of_a_prompt_with_two_images(model, chunk):
    golden, grids = cases.golden("k2.5"), cases.IMAGE_GRIDS[list(cases.PROMPT_IMAGES)]
    new = kimi_jax.generate(
        model("k2.5"),
        golden["prompt_tokens"][None],
        media=media(grids),
        max_new_tokens=24,
        stop_ids=(),
        prefill_chunk=chunk,
    )
    np.testing.assert_array_equal(new[0], golden["prompt_greedy_tokens"])
