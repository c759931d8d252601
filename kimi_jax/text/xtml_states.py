"""Follows an answer of Kimi K3 through its elements, as texts and markers come (`xtml` has the format).

reasoning <|close|>think<|sep|><|open|>response<|sep|> content <|close|>response<|sep|>
<|open|>tools<|sep|>
    (<|open|>call tool="NAME" index="1"<|sep|>
        (<|open|>argument key="KEY" type="TYPE"<|sep|> VALUE <|close|>argument<|sep|>)*
    <|close|>call<|sep|>)*
<|close|>tools<|sep|><|close|>message<|sep|><|end_of_msg|>
"""

import enum
import json
import re
from typing import Any, get_args

from kimi_jax import json_reader
from kimi_jax.printable import printable
from kimi_jax.text.answer_states import State
from kimi_jax.text.answers import Delta, EngineFinish


class XtmlMarker(enum.Enum):
    """A special token that has a meaning in an answer of K3, by its spelling."""

    OPEN = "<|open|>"
    CLOSE = "<|close|>"
    SEP = "<|sep|>"
    END = "<|end_of_msg|>"


XTML_SPELLINGS = {marker.value: marker for marker in XtmlMarker}

_TAGS = ("think", "response", "tools", "call", "argument", "json", "message")
_ATTRIBUTE = re.compile(r' ([\w-]+)="([^"]*)"')
_OPENING = re.compile(rf'({"|".join(_TAGS)})((?: [\w-]+="[^"]*")*)')
_MAX_TAG = 4096  # characters; names of functions and keys have less


class XtmlStates:
    """Takes an answer's texts and markers one after another, and keeps the deltas that they are certain to give.

    - Reasoning ends where `think` closes, or another element of the message opens; content is in `response`.
    - Text between reasoning and calls without a `response` around it is content too, blanks alone are none.
    - A call is given when it closes, whole: its arguments as a JSON object. One without a name, or that never closes,
      is none. A value that is not JSON of its type is the string that it is; the text of a `json` element is passed on
      as it is.
    - A marker that makes no tag of the format is dropped, and the text after it stays; tags out of place are dropped.

    starts: REASONING or CONTENT.
    """

    spellings = XTML_SPELLINGS
    end_marker = XtmlMarker.END

    def __init__(self, starts: State) -> None:
        self.state = starts
        self.ended = False
        self._tag: list[str] | None = None  # the text of a tag that is not complete
        self._closing = False
        self._bare = False  # outside all elements, after reasoning
        self._blanks: list[str] = []
        self._call: dict[str, str] | None = None
        self._arguments: dict[str, Any] = {}
        self._raw: str | None = None
        self._value: dict[str, str] | None = None
        self._text: list[str] = []
        self._calls = 0
        self._deltas: list[Delta] = []

    def take(self) -> list[Delta]:
        """Returns the deltas since the last call of it."""
        deltas, self._deltas = self._deltas, []
        return deltas

    @property
    def in_reasoning(self) -> bool:
        """Says whether the next text is reasoning."""
        return self.state is State.REASONING and not self.ended and self._tag is None

    def add_text(self, text: str) -> None:
        """Adds text without markers."""
        if self.ended or not text:
            return
        if self._tag is None:
            self._add_body(text)
            return
        self._tag.append(text)
        whole = "".join(self._tag)
        self._tag = [whole]
        if not _may_be_tag(whole):
            self._drop_marker()

    def add_marker(self, marker: XtmlMarker) -> None:
        """Adds a marker, which comes after all texts before it."""
        if self.ended:
            return
        if marker is XtmlMarker.SEP:
            if self._tag is not None:
                self._end_tag("".join(self._tag))
            return
        self._drop_marker()
        if marker is XtmlMarker.END:
            self.ended = True
        else:
            self._tag, self._closing = [], marker is XtmlMarker.CLOSE

    def end(self, finish: EngineFinish) -> None:
        """Ends the answer, for the engine's reason `finish`. Raises ValueError for a reason that no answer has."""
        if finish not in get_args(EngineFinish):
            raise ValueError(f"finish is {printable(repr(finish), 60)}, expected stop or length")
        self._drop_marker()
        calls = finish == "stop" and self._calls > 0
        self._deltas.append(Delta(finish_reason="tool_calls" if calls else finish))

    def _drop_marker(self) -> None:
        """Takes the text after a marker that began no tag as the text that it is."""
        text, self._tag = "".join(self._tag or ()), None
        if text:
            self._add_body(text)

    def _add_body(self, text: str) -> None:
        if self._value is not None:
            self._text.append(text)
        elif self.state is State.REASONING:
            self._deltas.append(Delta(reasoning=text))
        elif self.state is State.CONTENT:
            self._blanks.append(text)
            if not self._bare or text.strip():
                self._deltas.append(Delta(content="".join(self._blanks)))
                self._blanks, self._bare = [], False

    def _end_tag(self, text: str) -> None:
        found = _OPENING.fullmatch(text)
        if found is None or (self._closing and found[2]):
            self._drop_marker()
            return
        self._tag = None
        attributes = {key: _unescape(value) for key, value in _ATTRIBUTE.findall(found[2])}
        (self._close if self._closing else self._open)(found[1], attributes)

    def _open(self, tag: str, attributes: dict[str, str]) -> None:
        match tag:
            case "think" if self._bare:  # before any content
                self._enter(State.REASONING)
            case "response" if self.state is not State.SECTION:
                self._enter(State.CONTENT)
            case "tools":
                self._enter(State.SECTION)
            case "call" if self.state is State.SECTION:
                self._enter(State.SECTION)
                self._call = attributes
            case "argument" | "json" if self._call is not None:
                self._value, self._text = attributes | {"": tag}, []

    def _close(self, tag: str, _: dict[str, str]) -> None:
        match tag:
            case "think" if self.state is State.REASONING:
                self._enter(State.CONTENT, bare=True)
            case "response" if self.state is State.CONTENT:
                self._enter(State.AFTER)
            case "argument" | "json" if self._value is not None and self._value[""] == tag:
                self._end_value(self._value, "".join(self._text))
            case "call" if self._call is not None:
                self._end_call(self._call)
            case "tools" | "message" if self.state is not State.REASONING:
                self._enter(State.AFTER)

    def _enter(self, state: State, bare: bool = False) -> None:
        """Leaves the present state, in which an open call is lost, for another."""
        self.state, self._bare, self._blanks = state, bare, []
        self._call = self._value = self._raw = None
        self._arguments = {}

    def _end_value(self, attributes: dict[str, str], text: str) -> None:
        self._value = None
        if attributes[""] == "json":
            self._raw = text
        elif "key" in attributes:
            self._arguments[attributes["key"]] = _decoded(text, attributes.get("type", "string"))

    def _end_call(self, attributes: dict[str, str]) -> None:
        raw = self._raw if self._raw is not None and not self._arguments else None
        arguments = json.dumps(self._arguments, ensure_ascii=False) if raw is None else raw
        self._enter(State.SECTION)
        if not (name := attributes.get("tool")):
            return
        number, function = self._calls, {"name": name, "arguments": ""}
        call = {"index": number, "id": f"functions.{name}:{number}", "type": "function", "function": function}
        self._deltas.append(Delta(tool_calls=[call]))
        self._deltas.append(Delta(tool_calls=[{"index": number, "function": {"arguments": arguments}}]))
        self._calls += 1


def _may_be_tag(text: str) -> bool:
    """Says whether text after a marker may be the beginning of a tag."""
    if len(text) > _MAX_TAG:
        return False
    name, blank, rest = text.partition(" ")
    if not blank:
        return any(tag.startswith(name) for tag in _TAGS)
    return name in _TAGS and re.fullmatch(r'(?:[\w-]+="[^"]*" )*[\w-]*(?:="?|="[^"]*"?)?', rest) is not None


def _unescape(text: str) -> str:
    return text.replace("&quot;", '"').replace("&amp;", "&")


def _decoded(text: str, kind: str) -> Any:
    if kind == "string":
        return text
    try:
        return json_reader.parse(text, "an argument")
    except json_reader.JSONError:
        return text
