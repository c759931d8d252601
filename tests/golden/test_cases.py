"""The goldens are whole, belong to the checkpoints that the tests write, and decide their greedy steps clearly."""

import numpy as np
import pytest

from tests.golden.cases import (
    CASES,
    HERE,
    IMAGE_GRIDS,
    MARGIN,
    NEW_TOKENS,
    PROMPT_IMAGES,
    VIDEO_GRIDS,
    config,
    fingerprint,
    golden,
    media,
)

VOCAB = 768
HIDDEN = 128
COMMON = {
    "text_tokens": (8, 40),
    "text_lengths": (8,),
    "text_positions": (8, 6),
    "text_logits": (8, 6, VOCAB),
    "error_text_logits": (),
    "greedy_prompts": (4, 21),
    "greedy_lengths": (4,),
    "greedy_tokens": (4, NEW_TOKENS),
    "greedy_margins": (4, NEW_TOKENS),
    "sha256": (),
    "transformers": (),
}
SHAPES = {
    "k2": COMMON,
    "deepseek-v3": COMMON,
    "kimi-linear": COMMON
    | {
        "long_tokens": (200,),
        "long_positions": (22,),
        "long_logits": (22, VOCAB),
        "error_long_logits": (),
        "long_argmax": (200,),
        "long_margins": (200,),
    },
    "k2.5": COMMON
    | {
        "image_features": (16 + 30 + 6 + 18, HIDDEN),
        "error_image_features": (),
        "video_features": (12 + 15, HIDDEN),
        "error_video_features": (),
        "prompt_tokens": (6 + 30 + 5 + 6 + 7,),
        "prompt_positions": (14,),
        "prompt_logits": (14, VOCAB),
        "error_prompt_logits": (),
        "prompt_greedy_tokens": (NEW_TOKENS,),
        "prompt_greedy_margins": (NEW_TOKENS,),
    },
}


@pytest.mark.parametrize("name", CASES)
def test_golden_belongs_to_the_checkpoint_that_is_written_from_its_seed(name):
    assert fingerprint(name) == golden(name)["sha256"].item()


@pytest.mark.parametrize("name", CASES)
def test_golden_holds_what_its_maker_says(name):
    stored = golden(name)
    assert {key: array.shape for key, array in stored.items()} == SHAPES[name]
    for key, array in stored.items():
        if key.endswith(("_logits", "_features")) and not key.startswith("error_"):
            assert array.dtype == np.float32
            assert 0.5 < array.std() < 1.5, f"{key} is not of unit scale"


@pytest.mark.parametrize("name", CASES)
def test_reference_is_certain_enough_to_be_compared_with(name):
    """The reference's own float32 error is a tenth of the 2e-4 allowed to ours, and no greedy step is a near tie."""
    stored = golden(name)
    errors = {key: array.item() for key, array in stored.items() if key.startswith("error_")}
    assert errors and all(0 < error < 2e-5 for error in errors.values()), errors
    for key in stored:
        if key.endswith("greedy_margins"):
            assert stored[key].min() > MARGIN


@pytest.mark.parametrize("name", CASES)
def test_positions_and_tokens_lie_inside_their_prompts(name):
    stored = golden(name)
    lengths, positions = stored["text_lengths"], stored["text_positions"]
    assert (positions[:, 0] == 0).all() and (positions[:, -1] == lengths - 1).all()
    assert (np.diff(positions, axis=1) >= 0).all()
    for rows, counts in (("text_tokens", lengths), ("greedy_prompts", stored["greedy_lengths"])):
        for row, count in zip(stored[rows], counts, strict=True):
            assert (row[:count] < VOCAB - 256).all() and (row[count:] == config(name)["pad_token_id"]).all()


def test_image_prompt_has_a_placeholder_for_every_merged_patch():
    stored = golden("k2.5")
    counts = [int(h * w) // 4 for _, h, w in IMAGE_GRIDS[list(PROMPT_IMAGES)]]
    placeholders = stored["prompt_tokens"] == config("k2.5")["media_placeholder_token_id"]
    assert placeholders.sum() == sum(counts)
    assert placeholders[6 : 6 + counts[0]].all() and placeholders[-7 - counts[1] : -7].all()


def test_grids_cover_the_position_table_itself_larger_and_smaller():
    vision = config("k2.5")["vision_config"]
    table = np.array([vision["init_pos_emb_height"], vision["init_pos_emb_width"]])
    signs = {tuple(np.sign(grid[1:] - table)) for grid in IMAGE_GRIDS}
    assert signs == {(0, 0), (1, 1), (-1, -1), (-1, 1)}
    assert {int(t) for t, _, _ in VIDEO_GRIDS} == {3, 4}


def test_media_is_its_own_for_each_grid():
    patches = media(VIDEO_GRIDS[0])
    assert patches.shape == (3 * 8 * 6, 3, 14, 14) and patches.dtype == np.float32
    assert -1 <= patches.min() < -0.99 and 0.99 < patches.max() < 1
    assert not np.array_equal(patches[:24], media(IMAGE_GRIDS[2]))


def test_goldens_are_small_enough_to_commit():
    assert sum(path.stat().st_size for path in HERE.glob("*.npz")) < 1.5e6
