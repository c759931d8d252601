"""Parses what Kimi K2, K2.5 and K3 answer into reasoning, content and calls of tools, whole or as it comes.

`Parser` takes token ids: only special tokens are markers, so that text which spells one stays text. `TextParser` takes
text from elsewhere, in which a marker is what is spelt like one. Both keep the rules of `answer_states.AnswerStates`,
K3's those of `xtml_states.XtmlStates`, hold no more back than may turn out to be a marker or a tag, half a character or
blanks, and take linear time.
"""

import codecs
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import numpy as np

from kimi_jax.text.answer_states import AnswerStates, Marker, State
from kimi_jax.text.answers import Delta, EngineFinish, Parsed, join
from kimi_jax.text.folder_template import FolderTemplate
from kimi_jax.text.segments import Segment
from kimi_jax.text.templates import BUILT_IN
from kimi_jax.text.tokenizer import Tokenizer
from kimi_jax.text.tools import Tools, read_tools
from kimi_jax.text.xtml import OPEN
from kimi_jax.text.xtml_states import XtmlMarker, XtmlStates

StartsIn = Literal["reasoning", "content"]

_ENDS = ("<|im_end|>", "[EOS]", "[EOT]")


class Parser:
    """Parses one answer, given as token ids.

    tok: the tokenizer of the model.
    thinking, tools, model: those with which `encode` made the prompt; they say whether the answer begins in reasoning,
        and which tool a bare number calls.
    starts_in: overrules `thinking` and `model`, for a prompt that ends otherwise.

    `reasoning_tokens` counts the ids of reasoning so far, without markers. Raises ValueError where `tools` is not a
    list of objects, and where `model` is a folder without a chat template that can be rendered.
    """

    def __init__(
        self,
        tok: Tokenizer,
        thinking: bool = True,
        tools: Tools = None,
        model: str | Path = "k2.5",
        *,
        starts_in: StartsIn | None = None,
    ) -> None:
        self.reasoning_tokens = 0
        self._states = _states(thinking, tools, model, starts_in)
        self._tok = tok
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        special = tok.special_tokens
        self._special = frozenset(special.values())
        spellings = self._states.spellings
        self._markers: dict[int, Any] = {special[name]: spellings[name] for name in spellings if name in special}
        ends = (tok.eos_id, tok.pad_id, *(special.get(name) for name in _ENDS))
        self._markers |= {token: self._states.end_marker for token in ends if token is not None}
        self._finished = False

    def feed(self, ids: Iterable[SupportsIndex]) -> list[Delta]:
        """Returns what further `ids` of the answer are certain to give, which may be nothing.

        Raises ValueError for an id outside the vocabulary, and after `end`.
        """
        _refuse(self._finished)
        run: list[int] = []
        for token in map(operator.index, ids):
            if token not in self._special:
                run.append(token)
                continue
            self._add(run, final=True)
            run = []
            if token in self._markers:  # the others have no meaning in an answer, and no text
                self._states.add_marker(self._markers[token])
        self._add(run)
        return self._states.take()

    def end(self, finish: EngineFinish = "stop") -> list[Delta]:
        """Returns the rest, the last delta with the answer's finish_reason.

        finish: why the engine ended the answer. Raises ValueError for another reason, and after `end`.
        """
        _refuse(self._finished)
        self._finished = True
        self._add([], final=True)
        self._states.end(finish)
        return self._states.take()

    def _add(self, run: list[int], final: bool = False) -> None:
        """Adds ids without special tokens; a character cut by a marker or by the end is `final`, and U+FFFD."""
        if self._states.in_reasoning:
            self.reasoning_tokens += len(run)
        self._states.add_text(self._utf8.decode(self._tok.decode_bytes(run), final))


class TextParser:
    """Parses one answer, given as text that spells its markers.

    The arguments are those of `Parser`.
    """

    def __init__(
        self,
        thinking: bool = True,
        tools: Tools = None,
        model: str | Path = "k2.5",
        *,
        starts_in: StartsIn | None = None,
    ) -> None:
        self._states = _states(thinking, tools, model, starts_in)
        self._marker = re.compile("|".join(map(re.escape, self._states.spellings)))
        self._rest = ""  # what may be the beginning of a marker
        self._finished = False

    def feed(self, text: str) -> list[Delta]:
        """Returns what further `text` of the answer is certain to give, which may be nothing.

        Raises ValueError after `end`.
        """
        _refuse(self._finished)
        text = self._rest + text
        place = 0
        spellings: Mapping[str, Any] = self._states.spellings
        for found in self._marker.finditer(text):
            self._states.add_text(text[place : found.start()])
            self._states.add_marker(spellings[found[0]])
            place = found.end()
        cut = text.rfind("<", place)  # no marker has another `<` than its first character
        if cut < 0 or not any(spelling.startswith(text[cut:]) for spelling in spellings):
            cut = len(text)
        self._states.add_text(text[place:cut])
        self._rest = text[cut:]
        return self._states.take()

    def end(self, finish: EngineFinish = "stop") -> list[Delta]:
        """Returns the rest, the last delta with the answer's finish_reason.

        finish: why the engine ended the answer. Raises ValueError for another reason, and after `end`.
        """
        _refuse(self._finished)
        self._finished = True
        self._states.add_text(self._rest)
        self._states.end(finish)
        return self._states.take()


def parse(
    tok: Tokenizer,
    ids: Iterable[SupportsIndex],
    thinking: bool = True,
    tools: Tools = None,
    model: str | Path = "k2.5",
    finish: EngineFinish = "stop",
    *,
    starts_in: StartsIn | None = None,
) -> Parsed:
    """Parses a whole answer, given as token ids, as `Parser` does it piece by piece."""
    parser = Parser(tok, thinking, tools, model, starts_in=starts_in)
    return join([*parser.feed(ids), *parser.end(finish)])


def parse_text(
    text: str,
    thinking: bool = True,
    tools: Tools = None,
    model: str | Path = "k2.5",
    finish: EngineFinish = "stop",
    *,
    starts_in: StartsIn | None = None,
) -> Parsed:
    """Parses a whole answer, given as text that spells its markers, as `TextParser` does it piece by piece."""
    parser = TextParser(thinking, tools, model, starts_in=starts_in)
    return join([*parser.feed(text), *parser.end(finish)])


def answer_starts_in(tok: Tokenizer, prompt: Sequence[SupportsIndex] | np.ndarray) -> StartsIn:
    """Returns where the answer to the prompt's ids begins: "reasoning" where a `<think>` of its last turn is open."""
    if OPEN.text in tok.special_tokens:
        return _starts_in_element(tok, prompt)
    ids = [tok.special_tokens.get(name) for name in ("<think>", "</think>", "<|im_middle|>")]
    last = next((token for token in map(operator.index, reversed(prompt)) if token in ids), None)
    return "reasoning" if last is not None and last == ids[0] else "content"


def end_of_reasoning(tok: Tokenizer) -> list[int]:
    """Returns the ids that end reasoning, `</think>` or K3's tag of it, empty where the tokenizer has none."""
    if OPEN.text in tok.special_tokens:
        return _tag(tok, XtmlMarker.CLOSE, "think")
    end = tok.special_tokens.get(Marker.END_THINK.value)
    return [] if end is None else [end]


def beginning_of_content(tok: Tokenizer) -> list[int]:
    """Returns the ids that open the content after reasoning: K3's `response`, and none for others."""
    return _tag(tok, XtmlMarker.OPEN, "response") if OPEN.text in tok.special_tokens else []


def end_of_calls(tok: Tokenizer) -> list[int]:
    """Returns the ids that end a section of calls of tools, empty where the tokenizer has none."""
    if OPEN.text in tok.special_tokens:
        return _tag(tok, XtmlMarker.CLOSE, "tools")
    end = tok.special_tokens.get(Marker.END_SECTION.value)
    return [] if end is None else [end]


def _tag(tok: Tokenizer, marker: XtmlMarker, name: str) -> list[int]:
    special = tok.special_tokens
    return [special[marker.value], *tok.encode(name, allow_special=False), special[XtmlMarker.SEP.value]]


def _starts_in_element(tok: Tokenizer, prompt: Sequence[SupportsIndex] | np.ndarray) -> StartsIn:
    """Returns "reasoning" where the last tag of K3's prompt opens `think`."""
    tags = {tok.special_tokens[marker.value]: marker for marker in (XtmlMarker.OPEN, XtmlMarker.CLOSE)}
    ids = [*map(operator.index, prompt)]
    last = next((place for place in reversed(range(len(ids))) if ids[place] in tags), None)
    if last is None or tags[ids[last]] is XtmlMarker.CLOSE:
        return "content"
    think = _tag(tok, XtmlMarker.OPEN, "think")
    return "reasoning" if ids[last : last + len(think)] == think else "content"


def _states(thinking: bool, tools: Tools, model: str | Path, starts_in: StartsIn | None) -> AnswerStates | XtmlStates:
    tools = read_tools(tools)
    if starts_in is None:
        starts_in = "reasoning" if _ends_in_think(thinking, tools, model) else "content"
    starts = State.REASONING if starts_in == "reasoning" else State.CONTENT
    if model in BUILT_IN and BUILT_IN[str(model)].is_xtml:
        return XtmlStates(starts)
    functions = [tool["function"] for tool in tools if isinstance(tool.get("function"), Mapping)]
    names = [name for function in functions if isinstance(name := function.get("name"), str)]
    return AnswerStates(starts, names)


def _ends_in_think(thinking: bool, tools: Sequence[Mapping[str, Any]], model: str | Path) -> bool:
    """Says whether the prompts of `model`'s template end in `<think>`, by writing one."""
    if model in BUILT_IN and BUILT_IN[str(model)].is_xtml:
        return thinking
    messages = [{"role": "user", "content": ""}]
    options = {"thinking": thinking, "preserve_thinking": False, "add_generation_prompt": True}
    if model in BUILT_IN:
        return BUILT_IN[str(model)].write(messages, None, **options)[-1] == Segment(Marker.THINK.value, True)
    prompt = FolderTemplate(model, with_tools=bool(tools)).render(messages, tools, **options)
    return prompt.rstrip().endswith(Marker.THINK.value)


def _refuse(finished: bool) -> None:
    if finished:
        raise ValueError("this parser's answer has ended; each answer needs a parser of its own")
