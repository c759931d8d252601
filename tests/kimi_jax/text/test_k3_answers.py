"""K3's answers: their parts by the rules of its format, however the ids come, and no marker in any of them."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_jax.text import Tokenizer, chat
from kimi_jax.text.tiny import K3_SLOTS, write_tiny_tokenizer

MARKERS = ("<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>")


def opened(tag: str) -> str:
    return f"<|open|>{tag}<|sep|>"


def closed(tag: str) -> str:
    return f"<|close|>{tag}<|sep|>"


def argument(key: str, kind: str, text: str) -> str:
    return opened(f'argument key="{key}" type="{kind}"') + text + closed("argument")


def call(name: str, *body: str) -> str:
    return opened(f'call tool="{name}" index="1"') + "".join(body) + closed("call")


END = closed("message") + "<|end_of_msg|>"
THOUGHT = "Hm, é 你好." + closed("think")
ANSWER = opened("response") + " An answer.\n" + closed("response")
CALLS = opened("tools") + call("look.at", argument("s", "string", 'a "b" <c>'), argument("n", "number", "1.5"))
CALLS += call("go") + closed("tools")
WHOLE = THOUGHT + ANSWER + CALLS + END


@pytest.fixture(scope="module")
def tok(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("k3-answers")
    write_tiny_tokenizer(folder, slots=K3_SLOTS)
    return Tokenizer.from_folder(folder)


def parts(parsed: chat.Parsed):
    calls = [(one["function"]["name"], one["function"]["arguments"]) for one in parsed.tool_calls]
    return parsed.reasoning, parsed.content, calls


def parse(tok: Tokenizer, text: str, **options) -> chat.Parsed:
    """Parses ids whose markers are special tokens, and checks that text which spells its markers gives the same."""
    parsed = chat.parse(tok, tok.encode(text), model="k3", **options)
    assert chat.parse_text(text, model="k3", **options) == parsed
    return parsed


def test_a_whole_answer(tok):
    parsed = parse(tok, WHOLE)
    calls = [("look.at", json.dumps({"s": 'a "b" <c>', "n": 1.5})), ("go", "{}")]
    assert parts(parsed) == ("Hm, é 你好.", " An answer.\n", calls)
    assert parsed.finish_reason == "tool_calls"
    assert [one["id"] for one in parsed.tool_calls] == ["functions.look.at:0", "functions.go:1"]
    assert parse(tok, WHOLE, finish="length").finish_reason == "length"


# text after the prompt's `think`, and its parts
CASES = {
    "never closed": ("all of it", ("all of it", None, [])),
    "an opener that leads": (opened("think") + "R" + closed("think") + opened("response") + "C", ("R", "C", [])),
    "a response without a thought's end": (opened("response") + "C" + END, (None, "C", [])),
    "an empty response": (THOUGHT + opened("response") + closed("response") + END, ("Hm, é 你好.", None, [])),
    "a response that is not closed": ("R" + closed("think") + opened("response") + "C", ("R", "C", [])),
    "text without a response": ("R" + closed("think") + "\nC " + CALLS + END, ("R", "\nC ", [*range(2)])),
    "blanks without a response": ("R" + closed("think") + "\n" + CALLS + END, ("R", None, [*range(2)])),
    "a call that is not closed": (
        closed("think") + opened("tools") + call("a") + opened('call tool="b"') + argument("k", "string", "v"),
        (None, None, [("a", "{}")]),
    ),
    "a call without a name": (
        opened("tools") + opened('call index="1"') + closed("call") + call("b"),
        (None, None, [("b", "{}")]),
    ),
    "names are unescaped once": (opened("tools") + call("a&amp;quot;&quot;"), (None, None, [('a&quot;"', "{}")])),
    "a value that is not JSON": (
        opened("tools") + call("a", argument("k", "number", "one"), argument("l", "array", '["é"]')),
        (None, None, [("a", '{"k": "one", "l": ["é"]}')]),
    ),
    "a string that is JSON": (
        opened("tools") + call("a", argument("k", "string", "1")),
        (None, None, [("a", '{"k": "1"}')]),
    ),
    "arguments that are not JSON": (
        opened("tools") + call("a", opened('json type="object"') + "{not" + closed("json")),
        (None, None, [("a", "{not")]),
    ),
    "markers that make no tag": (
        "a<|open|>b<|sep|>c<|close|>d" + closed("think") + opened("response") + "e<|sep|>f",
        ("abcd", "ef", []),
    ),
    "tags out of place": ("a" + closed("call") + opened("argument") + "b" + closed("think"), ("ab", None, [])),
    "nothing after the end": (THOUGHT + "<|end_of_msg|>" + ANSWER, ("Hm, é 你好.", None, [])),
}


@pytest.mark.parametrize("case", CASES)
def test_answers_that_are_not_as_they_should_be(tok, case):
    text, (reasoning, content, calls) = CASES[case]
    found = parts(parse(tok, text))
    assert found[:2] == (reasoning, content)
    assert found[2] == calls or (calls == [0, 1] and [name for name, _ in found[2]] == ["look.at", "go"])


def test_without_thinking_an_answer_begins_in_its_response(tok):
    assert parts(parse(tok, "C" + closed("response") + END, thinking=False)) == (None, "C", [])


def test_a_marker_that_is_spelt_is_text(tok):
    ids = tok.encode(WHOLE, allow_special=False)
    assert parts(chat.parse(tok, ids, model="k3")) == (WHOLE, None, [])
    # Inside an argument, too
    spelt = closed("argument") + closed("call")
    ids = tok.encode(opened("tools") + opened('call tool="a"') + opened('argument key="k" type="string"'))
    ids += tok.encode(spelt, allow_special=False) + tok.encode(closed("argument") + closed("call"))
    assert parts(chat.parse(tok, ids, model="k3")) == (None, None, [("a", json.dumps({"k": spelt}))])


def test_an_answer_is_read_as_it_was_written(tok):
    """An answer that a prompt shows is parsed into the same parts."""
    arguments = {"s": "x\n<|sep|>", "n": -1, "l": [None, {"a": 'q"&'}], "b": False}
    message = {
        "role": "assistant",
        "content": " C ",
        "reasoning_content": "R\n",
        "tool_calls": [{"id": "1", "function": {"name": 'f"&', "arguments": arguments}}],
    }
    options = {"model": "k3", "add_generation_prompt": False}
    ids = chat.encode(tok, [message], **options)
    begin = tok.encode(opened("think"))
    start = next(i for i in range(len(ids)) if ids[i : i + len(begin)] == begin) + len(begin)
    parsed = chat.parse(tok, ids[start:], model="k3")
    assert parts(parsed) == ("R\n", " C ", [('f"&', json.dumps(arguments, ensure_ascii=False))])


def feed(tok: Tokenizer, pieces) -> list[chat.Delta]:
    parser = chat.Parser(tok, model="k3")
    return [delta for piece in pieces for delta in parser.feed(piece)] + parser.end()


def assert_clean(deltas) -> None:
    for delta in deltas:
        texts = [delta.reasoning or "", delta.content or "", json.dumps(delta.tool_calls, ensure_ascii=False)]
        assert not any(marker in text for marker in MARKERS for text in texts)
        assert sum(map(bool, (delta.reasoning, delta.content, delta.tool_calls, delta.finish_reason))) == 1


def test_every_cut_gives_the_whole_answer(tok):
    ids = tok.encode(WHOLE)
    whole = chat.parse(tok, ids, model="k3")
    for cut in range(len(ids) + 1):
        assert chat.join(feed(tok, (ids[:cut], ids[cut:]))) == whole
    deltas = feed(tok, [[token] for token in ids])
    assert chat.join(deltas) == whole
    assert_clean(deltas)
    parser = chat.TextParser(model="k3")
    letters = [delta for letter in WHOLE for delta in parser.feed(letter)] + parser.end()
    assert chat.join(letters) == whole
    assert_clean(letters)


def test_reasoning_and_content_come_at_once(tok):
    parser = chat.Parser(tok, model="k3")
    assert parser.feed(tok.encode("Hm")) == [chat.Delta(reasoning="Hm")]
    assert parser.feed(tok.encode("<|close|>")) == parser.feed(tok.encode("think")) == []
    assert parser.feed(tok.encode("<|sep|>" + opened("response") + "A")) == [chat.Delta(content="A")]
    assert parser.reasoning_tokens == len(tok.encode("Hm"))


PIECES = [*MARKERS, "think", "response", "tools", 'call tool="f"', 'argument key="k" type="number"', "json", "1", " "]
PIECES += [closed("think"), opened("response"), opened("tools"), call("g", argument("a", "array", "[1]")), "é", "text"]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=14), st.randoms(use_true_random=False))
def test_random_streams_are_parsed_as_a_whole(tok, pieces, rng: random.Random):
    ids = [token for piece in pieces for token in tok.encode(piece)]
    whole = chat.parse(tok, ids, model="k3")
    cuts = sorted(rng.randint(0, len(ids)) for _ in range(4))
    chunks = [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    for stream in (chunks, [[token] for token in ids]):
        deltas = feed(tok, stream)
        assert chat.join(deltas) == whole
        assert_clean(deltas)


def test_a_long_tag_takes_linear_time(tok):
    text = opened("tools") + '<|open|>call tool="' + "a" * 100_000
    assert parts(parse(tok, text)) == (None, None, [])
