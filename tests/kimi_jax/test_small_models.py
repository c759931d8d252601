"""The trained models of the package: they answer what they were trained for, in every form and way."""

import asyncio

import numpy as np
import pytest
from PIL import Image, ImageDraw

import checkpoints
import kimi_jax
from kimi_jax import small
from kimi_jax.engine import Engine
from kimi_jax.processor import Processor
from kimi_jax.runtime.sampling import Sampling
from kimi_jax.training.small import digits, k25_digits, kimi_linear
from kimi_jax.training.small.measure import is_right


@pytest.fixture(scope="module")
def digits_model():
    """Gives an engine and a processor of k25-digits; all tests share its programs, those of test_serve_command.py,
    too."""
    folder = small.path("k25-digits")
    engine = Engine(checkpoints.load(folder), slots=1, cache_memory="4MB", prefill_chunk=64, max_length=300)
    yield engine, Processor.from_folder(folder)
    engine.close()


def share_right(conversations, engine, processor):
    async def ask():
        return await asyncio.gather(*(is_right(one, engine, processor) for one in conversations))

    return np.mean(asyncio.run(ask()))


def answered(measures, least, engine, processor, count=12):
    """Checks that of the first `count` of twelve held-out conversations of each kind no more are answered wrongly than
    of twelve, of which at least `least` are right word for word (the models' cards have hundreds)."""
    for measure, right in least.items():
        drawn = [measures[measure](np.random.default_rng((7, number))) for number in range(count)]
        assert round(count * (1 - share_right(drawn, engine, processor))) <= 12 - right, measure


@pytest.mark.parametrize("count", [6, pytest.param(12, marks=pytest.mark.slow)])
def test_digits_are_read_and_added(digits_model, count):
    least = {
        "single digits": 11,
        "3-digit numbers": 11,
        "read, a tool declared": 11,
        "add two pictures": 10,
        "talk": 12,
    }
    answered(k25_digits.recipe().measures, least, *digits_model, count)


@pytest.mark.slow
def test_lists_are_recalled_and_numbers_added():
    folder = small.path("kimi-linear-small")
    engine = Engine(checkpoints.load(folder), slots=2, prefill_chunk=128, max_length=512)
    least = {"copy": 8, "recall one of 20": 6, "add two numbers": 9}
    answered(kimi_linear.recipe().measures, least, engine, Processor.from_folder(folder))
    engine.close()


def test_there_are_two_models_in_published_layouts():
    assert checkpoints.summary(small.path("k25-digits")).model_type == "kimi_k25"
    assert checkpoints.summary(small.path("kimi-linear-small")).model_type == "kimi_linear"
    for name in small.NAMES:
        folder = small.path(name)
        assert sum(file.stat().st_size for file in folder.iterdir()) < 2.05e6 and (folder / "README.md").exists()
        # Every command draws their tokens as they are measured: greedily
        assert Sampling.from_folder(folder, Sampling.recommended(thinking=True)) == Sampling()
    with pytest.raises(ValueError, match=r"small model 'k3': expected one of k25-digits, kimi-linear-small"):
        small.path("k3")
    with pytest.raises(FileNotFoundError, match=r"no picture of '9999', but of .*427"):
        small.picture("9999")


def test_a_drawn_number_of_ones_own_is_read(digits_model):
    # Given digits drawn with a pen, reduced to 8 x 8 in each cell and enlarged again, as those of training are
    strokes = {
        "1": [(15, 4, 14, 24)],
        "7": [(7, 5, 21, 5), (21, 5, 12, 24)],
        "4": [(10, 4, 6, 15), (6, 15, 21, 15), (17, 9, 16, 25)],
    }
    picture = np.full((28, 84, 3), 255, np.uint8)
    for cell, digit in enumerate("174"):
        drawn = Image.new("L", (28, 28), 0)
        for line in strokes[digit]:
            ImageDraw.Draw(drawn).line(line, fill=255, width=4)
        again = drawn.resize((8, 8), Image.Resampling.BOX).resize((28, 28), Image.Resampling.BICUBIC)
        picture[:, 28 * cell : 28 * cell + 28] = 255 - np.asarray(again)[:, :, None]
    conversation = {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": picture}},
                    {"type": "text", "text": "What number is in the picture?"},
                ],
            },
            {"role": "assistant", "content": "174", "reasoning_content": "I see 1, 7 and 4."},
        ],
        "thinking": True,
    }
    assert share_right([conversation], *digits_model) == 1


def test_the_pictures_of_the_package_are_of_held_out_digits():
    held = k25_digits.pictures()
    for number, picture in held.items():
        with Image.open(small.picture(number)) as image:
            np.testing.assert_array_equal(np.asarray(image), picture)
    assert digits.load(True).images[0].shape[1:] == (8, 8)


@pytest.mark.slow
def test_every_form_and_mesh_answers_alike(tmp_path):
    # Given the model as it is published, converted, as bf16, as INT4 again, and over eight devices
    published = small.path("k25-digits")
    checkpoints.convert(published, tmp_path / "orbax")
    checkpoints.convert(published, tmp_path / "bf16", experts="bf16")
    checkpoints.export(tmp_path / "orbax", tmp_path / "exported")
    ways = {
        "published": checkpoints.load(published),
        "converted": checkpoints.load(tmp_path / "orbax"),
        "bf16": checkpoints.load(tmp_path / "bf16"),
        "exported": checkpoints.load(tmp_path / "exported"),
    }
    from sharding import make_mesh

    ways |= {mesh: checkpoints.load(published, mesh=make_mesh(mesh)) for mesh in ("1x8", "2x4", "2x2x2", "1x2x2x2")}
    processor = Processor.from_folder(published)
    for way, model in ways.items():
        # Then each reads, calls the tool and says the sum
        said = kimi_jax.answer(model, "Read the number.", images=[small.picture("427")], processor=processor)
        assert (said.content, said.reasoning) == ("427", "I see 4, 2 and 7."), way
        shown = [{"type": "image_url", "image_url": {"url": small.picture(number)}} for number in ("58", "316")] + [
            {"type": "text", "text": "Add the numbers."}
        ]
        messages = [{"role": "user", "content": shown}]
        said = kimi_jax.answer(model, messages, [small.ADD_TOOL], False, processor=processor)
        assert said.tool_calls[0]["function"] == {"name": "add", "arguments": '{"a": 58, "b": 316}'}, way
