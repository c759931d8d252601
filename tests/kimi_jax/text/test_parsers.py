"""Answers fall into reasoning, content and calls, in whatever pieces they come; only special tokens are markers."""

import json
import random
from pathlib import Path

import answer_cases as ac
import numpy as np
import pytest
from answer_cases import CASES, Case, cuts, deltas, spell
from chat_cases import EVIL, TOOLS, answer, folder, user
from chat_cases import call as called
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_jax.text import Tokenizer, chat


@pytest.fixture(scope="module")
def tok(tiny_tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny_tokenizer_dir)


@pytest.fixture(scope="module")
def real(real_tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer.from_folder(real_tokenizer_dir)


@pytest.fixture(scope="module")
def vectors(real_tokenizer_dir: Path) -> list[dict]:
    """Returns the published vectors, which lie beside the real tokenizer's folder."""
    file = real_tokenizer_dir.parent / "parsers" / "vectors.json"
    if not file.exists():
        pytest.skip(f"{file} does not exist")
    return json.loads(file.read_text(encoding="utf-8"))["cases"]


def check(tok: Tokenizer, case: Case, text: tuple[str, ...] = ()) -> None:
    """Checks a case in every way of feeding it, as ids and as text; the markers of `text` are text among the ids."""
    finish = "length" if case.cut else "stop"
    draw = random.Random(case.raw)
    for pieces in cuts(spell(tok, case.raw, text), draw):
        found = deltas(chat.Parser(tok, case.thinking, case.declared), pieces, finish)
        assert chat.join(found) == case.expected
        holds_no_marker(found)
    for pieces in cuts(case.raw, draw):
        found = deltas(chat.TextParser(case.thinking, case.declared), pieces, finish)
        assert chat.join(found) == case.expected
        holds_no_marker(found)
    whole = chat.parse(tok, spell(tok, case.raw, text), case.thinking, case.declared, finish=finish)
    assert whole == chat.parse_text(case.raw, case.thinking, case.declared, finish=finish) == case.expected


def holds_no_marker(found: list[chat.Delta]) -> None:
    for delta in found:
        assert not any(marker in (delta.reasoning or delta.content or "") for marker in ac.MARKERS)


@pytest.mark.parametrize("name", CASES)
def test_an_answer_falls_into_its_parts_however_it_is_cut(tok, name):
    check(tok, CASES[name])


def test_the_published_vectors_however_they_are_cut(real, vectors):
    assert len(vectors) >= 44
    for vector in vectors:
        case = Case(
            vector["raw"],
            vector["reasoning"],
            vector["content"],
            tuple((one["id"], one["arguments"]) for one in vector["tool_calls"]),
            tuple(one["name"] for one in vector["tool_calls"]),
            vector["finish_reason"],
            vector["starts_in"] == "reasoning",
            vector["engine_finish"] == "length",
            tuple(vector.get("tools", ())),
        )
        check(real, case, text=(ac.THINK, ac.END_THINK) if vector.get("note", "").startswith("as text") else ())


def test_text_that_spells_a_marker_is_text(tok):
    evil = tok.encode(EVIL, allow_special=False)
    begin, arguments, end = spell(tok, ac.SECTION + ac.CALL), spell(tok, ac.ARGUMENTS), spell(tok, ac.END_CALL)
    ids = [*evil, *spell(tok, ac.END_THINK), *evil, *begin, *evil, *spell(tok, ":0"), *arguments, *evil, *end]
    for pieces in ([ids], [[token] for token in ids]):
        found = chat.join(deltas(chat.Parser(tok), pieces, "stop"))
        assert (found.reasoning, found.content) == (EVIL, EVIL)
        assert found.tool_calls == [
            {"id": f"{EVIL}:0", "type": "function", "function": {"name": EVIL, "arguments": EVIL}}
        ]


def test_special_tokens_without_a_meaning_in_answers_leave_no_text(tok):
    others = [
        token for name, token in tok.special_tokens.items() if name not in (*ac.MARKERS, "[EOS]", "[EOT]", "[PAD]")
    ]
    assert len(others) > 200
    ids = [*others, *tok.encode("a"), *others, *tok.encode("b"), *others]
    assert chat.parse(tok, ids, thinking=False) == chat.Parsed(None, "ab", [], "stop")
    for end in (ac.END, "[EOS]", "[EOT]", "[PAD]"):
        ids = [*tok.encode("a"), tok.special_tokens[end], *spell(tok, ac.END_THINK + "b")]
        assert chat.parse(tok, ids) == chat.Parsed("a", None, [], "stop")


def test_a_character_is_held_back_until_it_is_whole(tok):
    ids = tok.encode("👍")
    assert len(ids) == 4
    parser = chat.Parser(tok, thinking=False)
    assert [parser.feed([token]) for token in ids] == [[], [], [], [chat.Delta(content="👍")]]
    # A marker or the end cuts it off
    assert chat.parse(tok, [*ids[:2], *spell(tok, ac.END_THINK), *ids[:3]]).reasoning == "\N{REPLACEMENT CHARACTER}"
    assert chat.parse(tok, ids[:2], thinking=False).content == "\N{REPLACEMENT CHARACTER}"


def test_text_is_held_back_only_while_it_may_be_a_marker():
    parser = chat.TextParser(thinking=False)
    fed = [parser.feed(piece) for piece in ("a <", "|tool_calls_", "x<thin", "<", "b", "<think", "er")]
    given = ["".join(delta.content for delta in found) for found in fed]
    assert given == ["a ", "", "<|tool_calls_x", "<thin", "<b", "", "<thinker"]


def test_arguments_come_in_pieces_and_not_at_the_end(tok):
    ids = spell(tok, ac.SECTION + ac.CALL + "f:0" + ac.ARGUMENTS + '{"text": "' + "word " * 50)
    parser = chat.Parser(tok)
    found = [delta.tool_calls[0] for token in ids for delta in parser.feed([token])]
    assert found[0]["function"] == {"name": "f", "arguments": ""} and len(found) > 50
    assert "".join(one["function"]["arguments"] for one in found).endswith("word word")


def test_tokens_of_reasoning_are_counted(tok):
    parser = chat.Parser(tok)
    ids = spell(tok, "Let me think." + ac.END_THINK + "Yes." + ac.END)
    parser.feed(ids)
    assert parser.reasoning_tokens == ids.index(tok.special_tokens[ac.END_THINK])


def test_an_answer_ends_once(tok):
    for parser, piece in ((chat.Parser(tok), [65]), (chat.TextParser(), "a")):
        assert parser.end("length") == [chat.Delta(finish_reason="length")]
        with pytest.raises(ValueError, match="answer has ended; each answer needs a parser of its own"):
            parser.feed(piece)
        with pytest.raises(ValueError, match="answer has ended"):
            parser.end()


def test_what_no_model_answers_is_refused(tok, tmp_path):
    with pytest.raises(ValueError, match="token id 768 is outside the vocabulary of 768"):
        chat.parse(tok, [65, 768])
    with pytest.raises(ValueError, match="token id -1 is outside"):
        chat.Parser(tok).feed(np.array([-1], np.int32))
    with pytest.raises(ValueError, match=r"tools is a dict, expected a list"):
        chat.Parser(tok, tools={})
    with pytest.raises(ValueError, match=r"none of 'k2\.5', 'k2', 'k3', nor a folder with chat_template"):
        chat.parse_text("", model=tmp_path)


@pytest.mark.parametrize("generation", ["", "<think>", "<think></think>"])
def test_the_template_says_where_the_answer_begins(tok, tmp_path, generation):
    # Given K2.5 and K2 (Kimi Linear has K2's), and folders whose prompts end otherwise
    folder(tmp_path, "{% for m in messages %}<|im_middle|>{{ m.content }}{% endfor %}<|im_middle|>" + generation)
    for model in ("k2.5", "k2", tmp_path):
        for thinking in (True, False):
            prompt = chat.encode(tok, [user("<think>")], TOOLS, thinking, model)
            starts = chat.answer_starts_in(tok, np.array(prompt, np.int32))
            opened = {"k2.5": thinking, "k2": False}.get(str(model), generation == "<think>")
            assert starts == ("reasoning" if opened else "content")
            found = chat.parse_text("a</think>b", thinking, TOOLS, model)
            assert found == chat.parse_text("a</think>b", starts_in=starts)
            assert found.reasoning == ("a" if opened else None)


CALLS = [
    {"id": "functions.f:0", **called("f", '{"k": "é</think>"}')},
    {"id": "functions.a.b:1", **called("a.b", "not JSON")},
]


@pytest.mark.parametrize("model", ["k2.5", "k2"])
@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("calls", [[], CALLS[:1], CALLS])
@pytest.mark.parametrize("content", ["Look: <|im_end|>北京\n\n", ""])
def test_a_message_is_parsed_back_from_its_prompt(tok, model, thinking, calls, content):
    reasoning = "Hm.\n" if model == "k2.5" and thinking else None
    before, message = [user("Hi")], answer(content, reasoning, *calls)
    options = {"thinking": thinking, "model": model, "preserve_thinking": thinking}
    prompt = chat.encode(tok, before, TOOLS, **options)
    whole = chat.encode(tok, [*before, message], TOOLS, add_generation_prompt=False, **options)
    assert whole[: len(prompt)] == prompt
    found = chat.parse(tok, whole[len(prompt) :], thinking, TOOLS, model)
    assert found == chat.Parsed(reasoning, content or None, calls, "tool_calls" if calls else "stop")


PIECES = st.sampled_from([*ac.MARKERS, "functions.f:0", "0", ":", " ", "\n", "{}", "a", "é", "👍", "<|", "<", "think>"])


@settings(max_examples=150, deadline=None)
@given(raw=st.lists(PIECES, max_size=25), data=st.data(), thinking=st.booleans(), cut=st.booleans())
def test_any_text_streams_as_it_is_parsed_whole(raw, data, thinking, cut):
    raw, finish = "".join(raw), "length" if cut else "stop"
    sizes = data.draw(st.lists(st.integers(0, 9), max_size=20))
    places = np.cumsum([0, *sizes]).tolist()
    pieces = [raw[begin:end] for begin, end in zip(places, [*places[1:], None], strict=True)]
    found = deltas(chat.TextParser(thinking, TOOLS), pieces, finish)
    assert chat.join(found) == chat.parse_text(raw, thinking, TOOLS, finish=finish)
    holds_no_marker(found)


TOKENS = st.sampled_from(range(523, 528)) | st.sampled_from([514, 520, 534, 535]) | st.integers(0, 767)


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(TOKENS, max_size=60), data=st.data(), thinking=st.booleans(), cut=st.booleans())
def test_any_tokens_stream_as_they_are_parsed_whole(tok, ids, data, thinking, cut):
    finish = "length" if cut else "stop"
    places = np.cumsum([0, *data.draw(st.lists(st.integers(0, 9), max_size=20))]).tolist()
    pieces = [ids[begin:end] for begin, end in zip(places, [*places[1:], None], strict=True)]
    found = deltas(chat.Parser(tok, thinking, TOOLS), pieces, finish)
    assert chat.join(found) == chat.parse(tok, ids, thinking, TOOLS, finish=finish)
    if not any(token < 512 and b"<" in tok.decode_bytes([token]) for token in ids):
        holds_no_marker(found)


@pytest.mark.parametrize("raw", [" ", "<", "<think>", ac.SECTION + ac.CALL, "x " + ac.ARGUMENTS])
def test_no_length_is_too_much(raw):
    # Each of these is held back or dropped somewhere; a parser of quadratic time would not come to an end here
    long = ac.SECTION + ac.CALL + "f:0" + ac.ARGUMENTS + "1" + " " * 200_000 + "2"
    parser = chat.TextParser(thinking=False)
    for piece in [raw] * 10_000:
        parser.feed(piece)
    assert parser.feed(" .") is not None
    assert chat.parse_text(long).tool_calls[0]["function"]["arguments"] == "1" + " " * 200_000 + "2"
