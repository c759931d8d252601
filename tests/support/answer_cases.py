"""Answers of a model, each with what it says, and ways to feed them to a parser."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kimi_jax.text import chat

SECTION, END_SECTION = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL, ARGUMENTS, END_CALL = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
THINK, END_THINK, END = "<think>", "</think>", "<|im_end|>"
MARKERS = (SECTION, END_SECTION, CALL, ARGUMENTS, END_CALL, THINK, END_THINK, END)


@dataclass(frozen=True)
class Case:
    """An answer `raw`, with markers spelt out, and its parts. `calls` are pairs of id and arguments, `names` of them;
    `tools` are names of declared tools."""

    raw: str
    reasoning: str | None = None
    content: str | None = None
    calls: tuple[tuple[str, str], ...] = ()
    names: tuple[str, ...] = ()
    finish: str = "stop"
    thinking: bool = False
    cut: bool = False
    tools: tuple[str, ...] = ()

    @property
    def expected(self) -> chat.Parsed:
        calls = [
            {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
            for (call_id, arguments), name in zip(self.calls, self.names, strict=True)
        ]
        return chat.Parsed(self.reasoning, self.content, calls, self.finish)

    @property
    def declared(self) -> list[dict[str, Any]]:
        return [{"type": "function", "function": {"name": name}} for name in self.tools]


def call(call_id: str = "functions.f:0", arguments: str = '{"x":1}') -> str:
    return f"{CALL}{call_id}{ARGUMENTS}{arguments}{END_CALL}"


def section(*calls: str) -> str:
    return SECTION + "".join(calls) + END_SECTION


def calls(*found: tuple[str, str, str], **more: Any) -> dict[str, Any]:
    """Returns the fields of a case that ends in calls, each of an id, a name and arguments."""
    pairs = tuple((call_id, arguments) for call_id, _, arguments in found)
    return {"calls": pairs, "names": tuple(name for _, name, _ in found), "finish": "tool_calls"} | more


F0 = ("functions.f:0", "f", '{"x":1}')
CASES = {
    "nothing": Case(""),
    "content": Case("Six.", content="Six."),
    "the end and what follows it": Case("Six.<|im_end|> more</think>", content="Six."),
    "reasoning and content": Case("Two and two.</think>Four.", "Two and two.", "Four.", thinking=True),
    "the model opens its reasoning": Case("<think>Hm.</think>Yes.", "Hm.", "Yes."),
    "blanks before it": Case(" \n<think>Hm.</think>Yes.", "Hm.", "Yes."),
    "the model opens it again": Case("<think>Hm.</think>Yes.", "Hm.", "Yes.", thinking=True),
    "it opens it twice": Case("Hm.</think>\n<think>And.</think>Yes.", "Hm.And.", "Yes.", thinking=True),
    "no reasoning": Case("</think>Yes.", None, "Yes.", thinking=True),
    "only reasoning": Case("Hm", "Hm", thinking=True),
    "cut reasoning": Case("Hm", "Hm", thinking=True, cut=True, finish="length"),
    "cut content": Case("A long", content="A long", cut=True, finish="length"),
    "late marks of thinking": Case("A.</think>B<think>C</think>D", content="A.BCD"),
    "blanks are content": Case("</think>\n\n", None, "\n\n", thinking=True),
    "blanks around content": Case("\n\nYes. \n", content="\n\nYes. \n"),
    "beginnings of markers": Case("a < b</think>a </thin <|tool_call", "a < b", "a </thin <|tool_call", thinking=True),
    "a call": Case(section(call()), **calls(F0)),
    "blanks before a call": Case(f"Hm.</think>\n\n{section(call())}", "Hm.", thinking=True, **calls(F0)),
    "content before a call": Case(f"Look.\n\n{section(call())}", None, "Look.\n\n", **calls(F0)),
    "a section ends the reasoning": Case(f"Hm. {section(call())}", "Hm. ", thinking=True, **calls(F0)),
    "the singular": Case(section(call()).replace("calls_section", "call_section"), **calls(F0)),
    "two calls": Case(section(call(), call("functions.g:7", "[]")), **calls(F0, ("functions.g:7", "g", "[]"))),
    "two sections": Case(section(call()) + " and " + section(call("g:1")), **calls(F0, ("g:1", "g", '{"x":1}'))),
    "an empty section": Case(f"Well.{section()} Done.", None, "Well."),
    "noise": Case(
        f"{SECTION} um {ARGUMENTS}1{call()} and {END_CALL}{END_THINK}{END_SECTION}{END_THINK}so", **calls(F0)
    ),
    "a call outside a section": Case(f"A{call('b', 'c')}{END_SECTION}d", content="Abcd"),
    "blanks in a call": Case(
        section(call(" \nfunctions.f:0\n ", '\n {"x": 1}\t\n')), **calls(("functions.f:0", "f", '{"x": 1}'))
    ),
    "no arguments": Case(section(call(arguments=" \n")), **calls(("functions.f:0", "f", "{}"))),
    "no arguments after some": Case(section(call(), call("f:1", " ")), **calls(F0, ("f:1", "f", "{}"))),
    "two marks of arguments": Case(
        section(call("f:0", f"1{ARGUMENTS}2"), call("f", f":0{ARGUMENTS}1")), **calls(("f:0", "f", "12"))
    ),
    "broken arguments": Case(section(call(arguments='{"x": ')), **calls(("functions.f:0", "f", '{"x":'))),
    "marks of thinking in arguments": Case(
        section(call(arguments='{"x":"<think> </think>"}')), **calls(("functions.f:0", "f", '{"x":"<think> </think>"}'))
    ),
    "dots and dashes": Case(section(call("functions.a.b-c:12")), **calls(("functions.a.b-c:12", "a.b-c", '{"x":1}'))),
    "colons": Case(section(call("a:b:3")), **calls(("a:b:3", "a:b", '{"x":1}'))),
    "ids that are none": Case(section(*map(call, ("f", "f:", ":0", "functions.:0", "f:x", "f:٣", "a\nb:0", "", "0")))),
    "a bare number of one tool": Case(section(call("07")), tools=("g",), **calls(("functions.g:07", "g", '{"x":1}'))),
    "a bare number of two tools": Case(section(call("0")), tools=("g", "h")),
    "no end of a call": Case(
        f"{SECTION}{CALL}f:0{ARGUMENTS}1{CALL}f:1{ARGUMENTS}2{END_SECTION}",
        **calls(("f:0", "f", "1"), ("f:1", "f", "2")),
    ),
    "no end of the section": Case(f"{SECTION}{call()}{END}", **calls(F0)),
    "a section in arguments": Case(f"{SECTION}{CALL}f:0{ARGUMENTS}{SECTION}{call()}", **calls(("f:0", "f", "{}"), F0)),
    "no arguments' marker": Case(section(f"{CALL}functions.f:0{END_CALL}")),
    "stopped in arguments": Case(f"{SECTION}{CALL}f:0{ARGUMENTS}{END}", **calls(("f:0", "f", "{}"))),
    "cut in arguments": Case(
        f'{SECTION}{CALL}f:0{ARGUMENTS}{{"x": ', cut=True, **calls(("f:0", "f", '{"x":'), finish="length")
    ),
    "cut before arguments": Case(
        f"{SECTION}{CALL}f:0{ARGUMENTS}", cut=True, **calls(("f:0", "f", ""), finish="length")
    ),
    "cut in an id": Case(f"Wait.{SECTION}{CALL}functions.f:0", None, "Wait.", finish="length", cut=True),
    "cut after a call": Case(f"{SECTION}{call()}", cut=True, **calls(F0, finish="length")),
    "characters of many bytes": Case("é北京 ☂ 👩‍👩‍👧</think>👍🏽", "é北京 ☂ 👩‍👩‍👧", "👍🏽", thinking=True),
}


def deltas(parser: Any, pieces: Iterable[Any], finish: str) -> list[chat.Delta]:
    """Returns all deltas of an answer in pieces, and checks the form of each."""
    found = [delta for piece in pieces for delta in parser.feed(piece)] + parser.end(finish)
    calls = 0
    for delta in found:
        fields = (delta.reasoning, delta.content, delta.tool_calls or None, delta.finish_reason)
        assert sum(field is not None for field in fields) == 1 and "" not in fields
        for begun in delta.tool_calls:
            function = begun["function"]
            if "id" in begun:
                assert begun.keys() == {"index", "id", "type", "function"} and begun["type"] == "function"
                assert function.keys() == {"name", "arguments"} and function["arguments"] == "" != function["name"]
                assert begun["index"] == calls
                calls += 1
            else:
                assert begun.keys() == {"index", "function"} and function.keys() == {"arguments"}
                assert function["arguments"] and begun["index"] == calls - 1
    assert [delta.finish_reason is not None for delta in found] == [False] * (len(found) - 1) + [True]
    return found


def cuts(whole: Sequence[Any], random: Any) -> Iterator[list[Sequence[Any]]]:
    """Yields `whole` in one piece, in each two, one by one, and in random pieces, some of which are empty."""
    yield [whole]
    yield from ([whole[:place], whole[place:]] for place in range(1, len(whole)))
    yield [whole[place : place + 1] for place in range(len(whole))]
    for _ in range(5):
        places = sorted(random.choices(range(len(whole) + 1), k=min(8, len(whole))))
        yield [whole[begin:end] for begin, end in zip([0, *places], [*places, len(whole)], strict=True)]


def spell(tok: Any, raw: str, text: Sequence[str] = ()) -> list[int]:
    """Returns the ids of an answer in which every marker but those of `text` is its special token."""
    pattern = "|".join(re.escape(marker) for marker in MARKERS if marker not in text)
    parts = re.split(f"({pattern})", raw.replace("call_section", "calls_section"))
    ids: list[int] = []
    for index, part in enumerate(parts):
        ids += [tok.special_tokens[part]] if index % 2 else tok.encode(part, allow_special=False)
    return ids
