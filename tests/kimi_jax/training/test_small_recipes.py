"""The recipes of the small models: their data is what it says, and a function of seed and step."""

import json
import re

import numpy as np
import pytest

from kimi_jax import small
from kimi_jax.processor import Processor
from kimi_jax.training.small import conversations, digits, k25_digits, kimi_linear
from kimi_jax.training.small.batches import ahead, draw_rows
from kimi_jax.training.small.make import write_begin

INK = digits.Hand(size=(28.0, 28.0), width=(1.0, 1.0), degrees=0.0, jitter=0.0)


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    """Gives a processor for each recipe, of the files that training begins with."""
    root = tmp_path_factory.mktemp("small")
    recipes = (k25_digits.recipe(), kimi_linear.recipe())
    return {one.name: (one, Processor.from_folder(write_begin(one, root / one.name, 0))) for one in recipes}


def blank(text):
    return np.zeros((28, 28, 3), np.uint8)


def test_held_out_digits_are_none_of_the_others():
    held, others = (digits.load(kind).images for kind in (True, False))
    assert sum(map(len, held)) == 360 and sum(map(len, others)) == 1437
    for digit in range(10):
        seen = {image.tobytes() for image in others[digit]}
        assert len(held[digit]) > 20 and not any(image.tobytes() in seen for image in held[digit])
        assert held[digit].max() == 16 and held[digit].shape[1:] == (8, 8)


def test_a_digit_is_drawn_as_it_is():
    # Given a digit at its own size, upright
    image = digits.load(True).images[7][0]
    ink = digits.draw_digit(image, INK, np.random.default_rng(0))
    # Then averages over the places of its 64 pixels are its pixels, but for the filter's softness
    small_again = ink.reshape(4, 7, 4, 7).mean(axis=(1, 3))
    expected = image.reshape(4, 2, 4, 2).mean(axis=(1, 3)) / 16
    assert np.corrcoef(small_again.ravel(), expected.ravel())[0, 1] > 0.98
    # And turned by a right angle it is not
    assert np.corrcoef(np.rot90(small_again).ravel(), expected.ravel())[0, 1] < 0.7


def test_numbers_stand_in_cells_one_line_each():
    random, places = np.random.default_rng(0), set()
    for _ in range(40):
        picture = digits.draw_number("12\n345", digits.load(False), digits.PLAIN, random)
        height, width, channels = picture.shape
        assert channels == 3 and height == 56 and width in (84, 112)
        cells = picture[:, :, 0].reshape(2, 28, width // 28, 28).min(axis=(1, 3)) < 128
        assert cells.sum(axis=1).tolist() == [2, 3]
        places.add(cells.tobytes())
    assert len(places) > 3


def test_numbers_have_as_many_digits_as_asked():
    random = np.random.default_rng(0)
    numbers = [conversations.number(random) for _ in range(600)]
    assert {len(number) for number in numbers} == {1, 2, 3} and "0" in numbers
    assert not any(len(number) > 1 and number[0] == "0" for number in numbers)
    counts = np.bincount([len(number) for number in numbers])[1:]
    assert counts.min() > 160
    assert {len(conversations.number(random, 3, 3)) for _ in range(50)} == {3}


def test_sums_are_right_and_calls_are_their_arguments():
    random = np.random.default_rng(1)
    for make in (conversations.add_text, conversations.add_pictures):
        for _ in range(50):
            messages = [m for m in make(random, blank)["messages"] if m["role"] != "system"]
            asked, called, result, said = messages
            (call,) = called["tool_calls"]
            arguments = json.loads(call["function"]["arguments"])
            assert sorted(arguments) == sorted(small.ADD_TOOL["function"]["parameters"]["required"])
            assert int(result["content"]) == arguments["a"] + arguments["b"]
            assert said["content"] == f"The sum is {result['content']}."
            if isinstance(asked["content"], str):
                assert re.findall(r"\d+", asked["content"]) == [str(arguments["a"]), str(arguments["b"])]


def test_calls_are_numbered_over_a_conversation_of_two():
    random, counts = np.random.default_rng(4), set()
    for _ in range(100):
        drawn = conversations.mixed(random, blank)
        messages = drawn["messages"]
        assert [m["role"] for m in messages].count("user") in (2, 3, 4) and "system" not in [
            m["role"] for m in messages[1:]
        ]
        ids = [call["id"] for m in messages for call in m.get("tool_calls", ())]
        assert ids == [f"functions.add:{i}" for i in range(len(ids))]
        assert ids == [m["tool_call_id"] for m in messages if m["role"] == "tool"]
        assert not ids or drawn["tools"] == [small.ADD_TOOL]
        refused = any(m["content"] == conversations.NO_TOOL for m in messages)
        assert not (refused and "tools" in drawn)
        counts.add(len(ids))
    assert counts == {0, 1, 2}


def test_a_sum_in_steps_carries():
    random = np.random.default_rng(2)
    for _ in range(200):
        asked, said = (message["content"] for message in kimi_linear.add(random)["messages"])
        a, b = map(int, re.findall(r"\d+", asked))
        *steps, last = said.split(". ")
        carry, written = 0, ""
        for step in steps:
            x, y, carried, total = map(int, re.findall(r"\d+", step))
            assert carried == carry and x + y + carried == total
            carry, written = total // 10, f"{total % 10}{written}"
        assert last == f"So {a + b}." and int(f"{carry}{written}") == a + b


def test_what_is_recalled_is_in_the_list_once():
    for things in (2, 160):
        asked, said = kimi_linear.recall(np.random.default_rng(3), things)["messages"]
        name = re.search(r"has the (\w+ \w+)\?", asked["content"]).group(1)
        assert [f"{name} {value}" for value in re.findall(rf"\b{name} (\d+)", asked["content"])] == [said["content"]]
        assert asked["content"].count(",") == things - 1


@pytest.mark.parametrize("name", small.NAMES)
def test_rows_are_full_and_a_function_of_the_step(processors, name):
    recipe, processor = processors[name]
    for stage in recipe.stages:
        source = stage.source(processor, 0.5)
        rows, again, other = (
            draw_rows(source, processor.config, stage.room, 2, np.random.default_rng((0, step))) for step in (5, 5, 6)
        )
        assert (rows.tokens == again.tokens).all() and rows.tokens.shape == other.tokens.shape
        assert (rows.tokens != other.tokens).any()
        assert (rows.positions >= 0).mean() > 0.75 and (rows.columns >= 0).sum(axis=1).min() > 5
        if rows.patches is not None:
            assert (rows.patches == again.patches).all()


def test_stages_follow_one_another():
    recipe = k25_digits.recipe()
    first = recipe.stages[0].steps
    assert recipe.stage_at(0) == (recipe.stages[0], 0.0)
    assert recipe.stage_at(first - 1)[0] is recipe.stages[0] and recipe.stage_at(first) == (recipe.stages[1], 0.0)
    with pytest.raises(ValueError, match=f"trained for {recipe.steps} steps"):
        recipe.stage_at(recipe.steps)


def test_batches_come_in_order_and_errors_with_them():
    def batch(step):
        if step == 3:
            raise ValueError("step 3")
        return step

    steps = ahead(batch, range(4))
    assert [next(steps) for _ in range(3)] == [(0, 0), (1, 1), (2, 2)]
    with pytest.raises(ValueError, match="step 3"):
        next(steps)
