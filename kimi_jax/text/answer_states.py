"""Follows an answer of Kimi K2 or K2.5 through reasoning, content and calls of tools, as texts and markers come.

    reasoning </think> content <|tool_calls_section_begin|>
        (<|tool_call_begin|> functions.NAME:NUMBER <|tool_call_argument_begin|> JSON <|tool_call_end|>)*
    <|tool_calls_section_end|> <|im_end|>

Models leave markers out and put others in. The rules, where the published parsers differ, are those of `AnswerStates`.
"""

import enum
from collections.abc import Collection
from typing import get_args

from kimi_jax.printable import printable
from kimi_jax.text.answers import Delta, EngineFinish


class Marker(enum.Enum):
    """A special token that has a meaning in an answer, by its spelling."""

    THINK = "<think>"
    END_THINK = "</think>"
    BEGIN_SECTION = "<|tool_calls_section_begin|>"
    END_SECTION = "<|tool_calls_section_end|>"
    BEGIN_CALL = "<|tool_call_begin|>"
    BEGIN_ARGUMENTS = "<|tool_call_argument_begin|>"
    END_CALL = "<|tool_call_end|>"
    END = "<|im_end|>"


# Some models write the singular.
SPELLINGS = {marker.value: marker for marker in Marker} | {
    "<|tool_call_section_begin|>": Marker.BEGIN_SECTION,
    "<|tool_call_section_end|>": Marker.END_SECTION,
}


class State(enum.Enum):
    """The part of an answer in which the next text stands."""

    REASONING = enum.auto()
    CONTENT = enum.auto()
    SECTION = enum.auto()
    ID = enum.auto()
    ARGUMENTS = enum.auto()
    AFTER = enum.auto()


_IN_SECTION = (State.SECTION, State.ID, State.ARGUMENTS)


class AnswerStates:
    """Takes an answer's texts and markers one after another, and keeps the deltas that they are certain to give.

    - `<think>` opens reasoning only where no content has begun; a section of calls closes it as `</think>` does.
    - Blanks alone between reasoning and a section are no content; blanks after other content stay.
    - Noise inside a section, text after it, and markers out of place are dropped. A second section may follow.
    - An id is NAME:NUMBER, with or without `functions.` before it; NAME may hold dots. A bare number is taken where
      exactly one tool is declared, and is rewritten to the standard form. With any other id there is no call.
    - Arguments are passed on as they came, JSON or not, without the blanks around them; nothing at all becomes `{}`.
      `<think>` and `</think>` in them are text.
    - A call begins at its arguments' marker. Where the answer is cut after it, the call is reported as it is.

    starts: REASONING or CONTENT. names: those of the declared tools.
    """

    spellings = SPELLINGS
    end_marker = Marker.END

    def __init__(self, starts: State, names: Collection[str]) -> None:
        self.state = starts
        self.ended = False  # at `Marker.END`: nothing follows
        self._only_name = next(iter(names)) if len(names) == 1 else None
        self._calls = 0
        self._id: list[str] = []
        self._begun = False  # the content, or the arguments of the present call, with a character that is no blank
        self._blanks: list[str] = []  # held back: before content, after arguments
        self._deltas: list[Delta] = []

    def take(self) -> list[Delta]:
        """Returns the deltas since the last call of it."""
        deltas, self._deltas = self._deltas, []
        return deltas

    @property
    def in_reasoning(self) -> bool:
        """Says whether the next text is reasoning."""
        return self.state is State.REASONING and not self.ended

    def add_text(self, text: str) -> None:
        """Adds text in which nothing is a marker."""
        if not text or self.ended:
            return
        match self.state:
            case State.REASONING:
                self._deltas.append(Delta(reasoning=text))
            case State.CONTENT:
                self._add_content(text)
            case State.ID:
                self._id.append(text)
            case State.ARGUMENTS:
                self._add_arguments(text)

    def add_marker(self, marker: Marker) -> None:
        """Adds a marker."""
        if self.ended:
            return
        match marker:
            case Marker.END:
                self.ended = True
            case Marker.THINK | Marker.END_THINK if self.state is State.ARGUMENTS:
                self._add_arguments(marker.value)
            case Marker.THINK if self.state is State.CONTENT and not self._begun:
                self._enter(State.REASONING)
            case Marker.END_THINK if self.state is State.REASONING:
                self._enter(State.CONTENT)
            case Marker.BEGIN_SECTION:
                self._enter(State.SECTION)
            case Marker.END_SECTION if self.state in _IN_SECTION:
                self._enter(State.AFTER)
            case Marker.BEGIN_CALL if self.state in _IN_SECTION:
                self._enter(State.ID)
            case Marker.BEGIN_ARGUMENTS if self.state is State.ID:
                self._begin_call("".join(self._id).strip())
            case Marker.END_CALL if self.state in _IN_SECTION:
                self._enter(State.SECTION)

    def end(self, finish: EngineFinish) -> None:
        """Ends the answer, for the engine's reason `finish`. Raises ValueError for a reason that no answer has."""
        if finish not in get_args(EngineFinish):
            raise ValueError(f"finish is {printable(repr(finish), 60)}, expected stop or length")
        if self.state is State.CONTENT and self._blanks:
            self._deltas.append(Delta(content="".join(self._blanks)))
        if finish == "stop":
            self._enter(State.AFTER)
        calls = finish == "stop" and self._calls > 0
        self._deltas.append(Delta(finish_reason="tool_calls" if calls else finish))

    def _enter(self, state: State) -> None:
        """Leaves the present state, in which an open call ends, for another."""
        if self.state is State.ARGUMENTS and not self._begun:
            self._add_arguments("{}")
        self.state = state
        self._id, self._blanks, self._begun = [], [], False

    def _add_content(self, text: str) -> None:
        self._begun = self._begun or bool(text.strip())
        self._blanks.append(text)
        if self._begun:
            self._deltas.append(Delta(content="".join(self._blanks)))
            self._blanks = []

    def _add_arguments(self, text: str) -> None:
        text = text if self._begun else text.lstrip()
        kept = text.rstrip()
        if kept:
            arguments = "".join(self._blanks) + kept
            self._deltas.append(Delta(tool_calls=[{"index": self._calls - 1, "function": {"arguments": arguments}}]))
            self._blanks, self._begun = [], True
        self._blanks.append(text[len(kept) :])

    def _begin_call(self, call_id: str) -> None:
        if self._only_name is not None and _is_number(call_id):
            call_id = f"functions.{self._only_name}:{call_id}"
        prefix, _, number = call_id.rpartition(":")
        name = prefix.removeprefix("functions.")
        if not name or not _is_number(number) or "\n" in call_id:
            self._enter(State.SECTION)  # the arguments of no call are noise
            return
        self._enter(State.ARGUMENTS)
        function = {"name": name, "arguments": ""}
        call = {"index": self._calls, "id": call_id, "type": "function", "function": function}
        self._deltas.append(Delta(tool_calls=[call]))
        self._calls += 1


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()
