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

GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def engines():
    """Gives an engine and a processor for each model; all tests share their programs."""
    made = {}
    for name, longest in zip(small.NAMES, (256, 1280), strict=True):
        folder = small.path(name)
        engine = Engine(checkpoints.load(folder), slots=4, prefill_chunk=128, max_length=longest)
        made[name] = engine, Processor.from_folder(folder)
    yield made
    for engine, _ in made.values():
        engine.close()


def share_right(conversations, engine, processor):
    async def ask():
        return await asyncio.gather(*(is_right(one, engine, processor) for one in conversations))

    return np.mean(asyncio.run(ask()))


@pytest.mark.parametrize(
    ("name", "recipe"), [("k25-digits", k25_digits.recipe), ("kimi-linear-small", kimi_linear.recipe)]
)
def test_held_out_conversations_are_answered(engines, name, recipe):
    # Given some conversations of each kind that are held out from training (500 of each are in the model's card)
    for measure, draw in recipe().measures.items():
        drawn = [draw(np.random.default_rng((7, number))) for number in range(12)]
        # Then nearly all are answered word for word
        assert share_right(drawn, *engines[name]) >= 0.8, measure


def test_there_are_two_models_in_published_layouts():
    assert checkpoints.summary(small.path("k25-digits")).model_type == "kimi_k25"
    assert checkpoints.summary(small.path("kimi-linear-small")).model_type == "kimi_linear"
    for name in small.NAMES:
        folder = small.path(name)
        assert sum(file.stat().st_size for file in folder.iterdir()) < 2.05e6 and (folder / "README.md").exists()
    with pytest.raises(ValueError, match=r"small model 'k3': expected one of k25-digits, kimi-linear-small"):
        small.path("k3")
    with pytest.raises(FileNotFoundError, match=r"no picture of '9999', but of .*427"):
        small.picture("9999")


def test_a_drawn_number_of_ones_own_is_read(engines):
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
    engine, processor = engines["k25-digits"]
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
    assert share_right([conversation], engine, processor) == 1


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
        shown = [
            {"type": "image_url", "image_url": {"url": small.picture(number)}} for number in ("58", "316")
        ] + [{"type": "text", "text": "Add the numbers."}]
        messages = [{"role": "user", "content": shown}]
        said = kimi_jax.answer(model, messages, [small.ADD_TOOL], False, processor=processor)
        assert said.tool_calls[0]["function"] == {"name": "add", "arguments": '{"a": 58, "b": 316}'}, way
