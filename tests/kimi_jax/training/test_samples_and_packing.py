"""Documents have the tokens that a model would generate after the prompts that it would see, and rows have room."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kimi_jax import Processor
from kimi_jax.text import chat
from kimi_jax.training.packing import Packing, Room, make_rows
from kimi_jax.training.samples import Document, documents, read_documents

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


def call(number):
    return {"id": f"functions.add:{number}", "type": "function", "function": {"name": "add", "arguments": "{}"}}


USER = {"role": "user", "content": "Add 1 and 2 <|im_end|>"}
CALL = {"role": "assistant", "content": "", "reasoning_content": "I call add.", "tool_calls": [call(0)]}
RESULT = {"role": "tool", "tool_call_id": "functions.add:0", "content": "3"}
ANSWER = {"role": "assistant", "content": "It is 3.", "reasoning_content": "So 3."}
MORE = {"role": "user", "content": "Again"}


@pytest.fixture(scope="module")
def processor(checkpoint):
    return Processor.from_folder(checkpoint("k2.5"))


def made(processor, *messages, tools=TOOLS, **fields):
    return documents({"messages": list(messages), "tools": tools, **fields}, processor)


def trained_texts(processor, document):
    """Returns the text of each run of trained tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], document.trained, [0]])))
    runs = [document.tokens[start:end].tolist() for start, end in edges.reshape(-1, 2)]
    return [processor.tokenizer.decode(run) for run in runs]


def test_a_chain_is_one_document_with_the_reasoning_of_every_step(processor):
    (document,) = made(processor, USER, CALL, RESULT, ANSWER)
    called, answered = trained_texts(processor, document)
    assert called.startswith("I call add.</think><|tool_calls_section_begin|>")
    assert called.endswith("<|tool_calls_section_end|><|im_end|>") and answered == "So 3.</think>It is 3.<|im_end|>"
    # The prompts are those of inference
    tok, first = processor.tokenizer, np.flatnonzero(document.trained)[0]
    assert document.tokens[:first].tolist() == chat.encode(tok, [USER], TOOLS)
    before_answer = chat.encode(tok, [USER, CALL, RESULT], TOOLS)
    assert document.tokens[: len(before_answer)].tolist() == before_answer
    # A finished conversation, rendered once, has lost the reasoning before the call
    assert "I call add." not in chat.render([USER, CALL, RESULT, ANSWER], TOOLS, add_generation_prompt=False)


def test_a_later_turn_is_a_document_without_earlier_reasoning(processor):
    conversation = [USER, CALL, RESULT, ANSWER, MORE, ANSWER]
    first, second = made(processor, *conversation)
    assert first.tokens.tolist() == made(processor, *conversation[:4])[0].tokens.tolist()
    assert trained_texts(processor, second) == ["So 3.</think>It is 3.<|im_end|>"]
    prompt = chat.encode(processor.tokenizer, conversation[:5], TOOLS)
    assert second.tokens[: len(prompt)].tolist() == prompt and not second.trained[: len(prompt)].any()
    # Messages after the last answer say nothing
    assert len(made(processor, *conversation, MORE)) == 2


def test_without_thinking_turns_are_one_document(processor, checkpoint):
    (document,) = made(processor, USER, CALL, RESULT, ANSWER, MORE, ANSWER, thinking=False)
    called, answered, again = trained_texts(processor, document)
    assert called.startswith("<|tool_calls_section_begin|>") and answered == again == "It is 3.<|im_end|>"
    k2 = dataclasses.replace(processor, template="k2")
    (document,) = made(k2, USER, ANSWER, MORE, ANSWER)
    assert trained_texts(k2, document) == ["It is 3.<|im_end|>"] * 2


def test_labels_are_the_tokens_that_follow(processor):
    (document,) = made(processor, USER, ANSWER)
    np.testing.assert_array_equal(document.labels + 1, np.flatnonzero(document.trained))
    # The prompt's last token has the first label, and the last token has none
    assert not document.trained[document.labels[0]] and document.labels[-1] == len(document.tokens) - 2


def test_pictures_go_with_the_documents_that_show_them(processor, tmp_path):
    for name, size in (("a", (56, 56)), ("b", (84, 56))):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")

    def shown(name):
        return {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": f"{name}.png"}}, {"type": "text", "text": "?"}],
        }

    lines = [{"messages": [shown("a"), ANSWER, shown("b"), ANSWER]}, {"messages": [USER, ANSWER]}]
    (tmp_path / "data.jsonl").write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    first, second, third = read_documents(tmp_path / "data.jsonl", processor)
    pad = processor.config.media_placeholder_token_id
    assert first.grids.tolist() == [[1, 4, 4]] and second.grids.tolist() == [[1, 4, 4], [1, 4, 6]]
    assert [int((document.tokens == pad).sum()) for document in (first, second, third)] == [4, 10, 0]
    assert len(second.patches) == 40 and third.patches is None
    assert not (second.trained & (second.tokens == pad)).any()
    # The prompt is the one that the processor makes
    prompt = processor([shown("a"), ANSWER, shown("b")], files=tmp_path)
    np.testing.assert_array_equal(second.tokens[: prompt.tokens.shape[1]], prompt.tokens[0])
    np.testing.assert_array_equal(second.patches, prompt.media.patches)
    # In rows, media tokens are counted within their own
    room = Room.of([first, second, third], 128)
    assert room.patches == 128 and room.tokens == 128
    rows = make_rows([[third, second], [first]], processor.config, room)
    at = len(third.tokens) + np.flatnonzero(second.tokens == pad)
    assert rows.media_index[0, at].tolist() == list(range(10)) and (rows.media_index[1] >= 0).sum() == 4
    np.testing.assert_array_equal(rows.patches[0, :40], second.patches)
    assert rows.patch_layout.segment[0].tolist() == [0] * 16 + [1] * 24 + [-1] * 88


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[]", "line 2"),
        ('{"messages": []}', "line 2: messages"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "line 2: messages: no message is an assistant's"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', r"line 2: messages\[0\] is an assistant's"),
        ('{"messages": [{"role": "user"}, {"role": "king"}]}', r"line 2: messages\[\d\]"),
        ('{"text": "a"}', "line 2: has the field 'text', expected messages, tools, thinking"),
        ('{"messages": [{"role": "user", "content": "a"}], "thinking": 1}', "line 2: thinking is '?1'?"),
    ],
)
def test_a_line_that_is_no_conversation_is_named(processor, tmp_path, line, reason):
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"messages": [USER, ANSWER]}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=rf"data\.jsonl: {reason}"):
        list(read_documents(file, processor))


def drawn(lengths):
    rng = np.random.RandomState(len(lengths))
    return [Document(rng.randint(1, 9, n).astype(np.int32), np.arange(n) % 3 > 0) for n in lengths]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(2, 20), min_size=1, max_size=30), st.integers(1, 4), st.integers(0, 3))
def test_an_epoch_has_every_document_once(processor, lengths, rows, seed):
    found = drawn(lengths)
    packing = Packing(found, processor.config, Room.of(found, 20), rows, seed)
    seen, step = [], 0
    while len(seen) < len(found):
        batch = packing.batch(step)
        assert batch.tokens.shape == (rows, 20) and batch.columns.shape == (rows, packing.room.labels)
        for row in range(rows):
            for number in range(batch.segments[row].max() + 1):
                here = batch.segments[row] == number
                seen.append(tuple(batch.tokens[row, here]))
                np.testing.assert_array_equal(batch.positions[row, here], np.arange(here.sum()))
            padding = batch.segments[row] == -1
            assert (batch.positions[row, padding] == -1).all()
            columns = batch.columns[row][batch.columns[row] >= 0]
            np.testing.assert_array_equal(batch.labels[row, : len(columns)], batch.tokens[row, columns + 1])
            assert (batch.segments[row, columns] == batch.segments[row, columns + 1]).all()
        step += 1
    assert sorted(seen) == sorted(tuple(document.tokens) for document in found)
    # Another run finds the same rows at the same step, without the steps before
    again = Packing(found, processor.config, packing.room, rows, seed).batch(step + 1)
    np.testing.assert_array_equal(again.tokens, packing.batch(step + 1).tokens)


def test_what_has_no_room_is_refused():
    with pytest.raises(ValueError, match="document 1 has 9 tokens, but a row has 8"):
        Room.of(drawn([3, 9]), 8)
    with pytest.raises(ValueError, match="there are no documents"):
        Room.of([], 8)
    with pytest.raises(ValueError, match="no document has a token to train"):
        Room.of([Document(np.array([1, 2], np.int32), np.zeros(2, bool))], 8)
