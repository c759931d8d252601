"""A conversation with Kimi K3, from the files of its folder."""

import numpy as np
import pytest
from PIL import Image

from kimi_jax import Processor
from kimi_jax.config_json import preset
from kimi_jax.model.splice import tokens_per_item


@pytest.fixture(scope="module")
def processor(checkpoint) -> Processor:
    return Processor.from_folder(checkpoint("k3"))


def test_a_picture_stands_in_the_prompt_with_the_size_that_it_had(processor: Processor) -> None:
    prompt = processor("What is this?", images=[Image.new("RGBA", (90, 50), (255, 0, 0, 128))])
    text = processor.tokenizer.decode(prompt.tokens[0].tolist())
    assert "<|media_begin|>image 90x50<|media_content|>" in text and "<|media_end|>What is this?" in text
    assert (prompt.tokens == processor.config.media_placeholder_token_id).sum() == 4 * 2
    assert prompt.media.grids.tolist() == [[1, 4, 8]]
    # Half of red on squares of white and gray
    first, second = prompt.media.patches[0, :, 0, [0, 8]] * 127.5 + 127.5
    np.testing.assert_allclose([first, second], [[255, 127, 127], [217, 89, 89]], atol=1)


def test_what_a_request_asks_stands_in_the_prompt(processor: Processor) -> None:
    asked = {"thinking_effort": "low", "tool_choice": "none", "response_format": {"type": "json_object"}}
    text = processor.tokenizer.decode(processor("Hello", **asked).tokens[0].tolist())
    for shown in ("invoked with `thinking_effort=low`", "invoked with `tool_choice=none`", "json_object"):
        assert shown in text
    with pytest.raises(ValueError, match=r"thinking_effort is 'medium', expected low, high, max"):
        processor("Hello", thinking_effort="medium")


def test_answers_end_at_either_stop_id(processor: Processor) -> None:
    # [EOS] too, which no file of the release names, in its vocabulary
    assert preset("kimi-k3").stop_ids == (163585, 163586)
    assert processor.config.stop_ids == (514,) and processor.template == "k3"


def test_a_grid_beyond_the_limits_is_refused_in_one_line(processor: Processor) -> None:
    assert tokens_per_item(np.array([[1, 512, 2], [4, 2, 512]]), processor.config).tolist() == [256, 256]
    for grid in ([1, 514, 2], [1, 2, 514], [5, 2, 2], [1, 3, 2], [1, 0, 2]):
        with pytest.raises(ValueError, match=r"^media grid \(t, h, w\) = .*patches, at most 512$"):
            tokens_per_item(np.array([grid]), processor.config)
