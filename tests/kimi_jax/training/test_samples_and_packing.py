"""Samples have the tokens that a model would generate after the prompts it would see; rows have each sample once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_jax.text import Tokenizer, chat
from kimi_jax.training.packing import assign_rows, pack
from kimi_jax.training.samples import Sample, make_samples

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


def call(number):
    return {"id": f"functions.add:{number}", "type": "function", "function": {"name": "add", "arguments": "{}"}}


USER = {"role": "user", "content": "Add 1 and 2 <|im_end|>"}
CALL = {"role": "assistant", "content": "", "reasoning_content": "I call add.", "tool_calls": [call(0)]}
RESULT = {"role": "tool", "tool_call_id": "functions.add:0", "content": "3"}
ANSWER = {"role": "assistant", "content": "It is 3.", "reasoning_content": "So 3."}
MORE = {"role": "user", "content": "Again"}


@pytest.fixture(scope="module")
def tok(tiny_tokenizer_dir):
    return Tokenizer.from_folder(tiny_tokenizer_dir)


def trained_texts(tok, sample):
    """Returns the text of each run of trained tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], sample.trained, [0]])))
    return [tok.decode(sample.tokens[start:end].tolist()) for start, end in edges.reshape(-1, 2)]


def test_a_chain_is_one_sample_with_the_reasoning_of_every_step(tok):
    (sample,) = make_samples(tok, [USER, CALL, RESULT, ANSWER], TOOLS)
    called, answered = trained_texts(tok, sample)
    assert called.startswith("I call add.</think><|tool_calls_section_begin|>")
    assert called.endswith("<|tool_calls_section_end|><|im_end|>") and answered == "So 3.</think>It is 3.<|im_end|>"
    # The prompts are those of inference
    first = np.flatnonzero(sample.trained)[0]
    assert sample.tokens[:first].tolist() == chat.encode(tok, [USER], TOOLS)
    before_answer = chat.encode(tok, [USER, CALL, RESULT], TOOLS)
    assert sample.tokens[: len(before_answer)].tolist() == before_answer
    # A finished conversation, rendered once, has lost the reasoning before the call
    once = chat.render([USER, CALL, RESULT, ANSWER], TOOLS, add_generation_prompt=False)
    assert "I call add." not in once and sample.messages == 4


def test_a_later_turn_is_a_sample_without_earlier_reasoning(tok):
    conversation = [USER, CALL, RESULT, ANSWER, MORE, ANSWER]
    first, second = make_samples(tok, conversation, TOOLS)
    assert first.tokens.tolist() == make_samples(tok, conversation[:4], TOOLS)[0].tokens.tolist()
    assert trained_texts(tok, second) == ["So 3.</think>It is 3.<|im_end|>"]
    prompt = chat.encode(tok, conversation[:5], TOOLS)
    assert second.tokens[: len(prompt)].tolist() == prompt and not second.trained[: len(prompt)].any()
    # Messages after the last answer say nothing
    assert len(make_samples(tok, [*conversation, MORE], TOOLS)) == 2
    assert make_samples(tok, [USER]) == []


def test_without_thinking_and_in_another_template(tok):
    (sample,) = make_samples(tok, [USER, CALL, RESULT, ANSWER], TOOLS, thinking=False)
    called, answered = trained_texts(tok, sample)
    assert called.startswith("<|tool_calls_section_begin|>") and answered == "It is 3.<|im_end|>"
    (sample,) = make_samples(tok, [USER, ANSWER], model="k2")
    assert trained_texts(tok, sample) == ["It is 3.<|im_end|>"]
    with pytest.raises(ValueError, match=r"messages\[0\]: the template does not write this answer"):
        make_samples(tok, [ANSWER])


def test_labels_are_the_tokens_that_follow(tok):
    (sample,) = make_samples(tok, [USER, ANSWER])
    (places,) = np.nonzero(sample.labels != -100)
    np.testing.assert_array_equal(sample.labels[places], sample.tokens[places + 1])
    np.testing.assert_array_equal(places + 1, np.flatnonzero(sample.trained))
    # The prompt's last token has the first label, and the last token has none
    assert not sample.trained[places[0]] and sample.labels[-1] == -100


def test_media_are_expanded_and_never_trained_on():
    sample = Sample(np.asarray([1, 9, 2, 9, 3], np.int32), np.asarray([0, 0, 0, 1, 1], bool), 1)
    expanded = sample.expand_media(9, [2, 3])
    assert expanded.tokens.tolist() == [1, 9, 9, 2, 9, 9, 9, 3]
    assert expanded.labels.tolist() == [-100] * 6 + [3, -100]
    with pytest.raises(ValueError, match="2 media placeholders, expected 1"):
        sample.expand_media(9, [2])
    # In a row, media tokens are counted from its beginning
    rows = pack([expanded, Sample(np.asarray([9, 4], np.int32), np.asarray([0, 1], bool), 1)], 12, 0, 9)
    assert rows.media_index.tolist() == [[-1, 0, 1, -1, 2, 3, 4, -1, 5, -1, -1, -1]]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=30))
def test_rows_have_every_sample_once(lengths):
    rng = np.random.RandomState(len(lengths))
    samples = [Sample(rng.randint(1, 9, n).astype(np.int32), rng.uniform(size=n) < 0.5, 1) for n in lengths]
    rows = pack(samples, 20, 0)
    assert sorted(number for row in rows.order for number in row) == list(range(len(lengths)))
    for row, members in enumerate(rows.order):
        for segment, number in enumerate(members):
            here = rows.segments[row] == segment
            np.testing.assert_array_equal(rows.tokens[row, here], samples[number].tokens)
            np.testing.assert_array_equal(rows.labels[row, here], samples[number].labels)
            np.testing.assert_array_equal(rows.positions[row, here], np.arange(lengths[number]))
        padding = rows.segments[row] == -1
        assert (rows.positions[row, padding] == -1).all() and (rows.labels[row, padding] == -100).all()
        assert not rows.tokens[row, padding].any() and (np.diff(np.flatnonzero(~padding)) == 1).all()
    # No two rows would fit in one
    free = sorted(20 - sum(lengths[i] for i in row) for row in rows.order)
    assert len(free) < 2 or free[-1] + free[-2] < 20


def test_a_sample_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="sample 1 has 9 tokens, expected at most 8"):
        assign_rows([3, 9], 8)
