"""Shows an answer as it comes: reasoning dim behind a bar, content, calls of tools, each apart from the other."""

import re
from collections.abc import Callable
from typing import Any, Literal

from rich.cells import cell_len
from rich.console import Console

from kimi_jax.cli.terminal import escaped
from kimi_jax.printable import printable
from kimi_jax.text.answers import Delta

BAR = "│ "
ARROW, RESULT = "→ ", "← "
RESULT_SHOWN = 300  # characters of a result
_NARROWEST = 10  # columns; in less, words are not kept whole
# A line feed, blanks, a wide character (which a line may break after), or a word.
_PIECE = re.compile(r"\n|[^\S\n]+|[\u1100-\u11ff\u2e80-\u9fff\uac00-\ud7ff\uf900-\ufaff\uff00-\uff60]|\S")

Part = Literal["reasoning", "content", "call"]
_STYLE: dict[Part, str] = {"reasoning": "dim", "content": "", "call": "cyan"}


class WrappedText:
    """Breaks a text that comes in pieces into lines of at most `width()` columns, between words where it can.

    Each line begins with `margin`. A word is held back until its end is known, and until then it is in no result.
    """

    def __init__(self, width: Callable[[], int], margin: str = ""):
        self._width, self._margin = width, margin
        self._column, self._blanks, self._word = -1, "", ""  # column -1: the line's margin is not written yet

    def push(self, text: str) -> str:
        """Returns what further `text` lets be shown."""
        shown = ""
        for piece in _PIECE.findall(text.expandtabs(4)):
            if piece == "\n":
                shown += self.finish() + self._begin() + "\n"
                self._column, self._blanks = -1, ""
            elif piece.isspace():
                shown += self.finish()
                self._blanks += piece
            else:
                wide = cell_len(piece) > 1
                if wide or cell_len(self._word + piece) > max(_NARROWEST, self._width() - len(self._margin)):
                    shown += self.finish()
                self._word += piece
                if wide:
                    shown += self.finish()
        return shown

    def finish(self) -> str:
        """Returns the word that is held back; blanks at the end are dropped."""
        if not self._word:
            return ""
        word, blanks, self._word, self._blanks = self._word, self._blanks, "", ""
        shown, room = self._begin(), max(self._width(), _NARROWEST + len(self._margin))
        over = self._column + len(blanks) + cell_len(word) - room
        if over > 0 and self._column > len(self._margin):
            self._column, blanks = -1, ""
            shown += "\n" + self._begin()
        elif over > 0:  # a line that begins with blanks
            blanks = blanks[over:]
        self._column += len(blanks) + cell_len(word)
        return shown + blanks + word

    def _begin(self) -> str:
        if self._column >= 0:
            return ""
        self._column = len(self._margin)
        return self._margin


def result_line(content: str | list[dict[str, Any]]) -> str:
    """Returns the line that shows a tool's result: a text, or parts, of which pictures are only named."""
    if not isinstance(content, str):
        content = " ".join(one.get("text", "[picture]") for one in content)
    return RESULT + printable(content, RESULT_SHOWN)


class Screen:
    """Shows answers: content and calls of tools on `out`, reasoning on `log`.

    On a terminal lines break between words and steering characters are escaped; elsewhere texts stay as they are, and
    reasoning is not shown where `log` is no terminal.
    """

    def __init__(self, out: Console, log: Console):
        self.out, self.log = out, log
        self._part: Part | None = None  # whose last line is not ended
        self._last: Part | None = None  # of this answer
        self._text = WrappedText(lambda: 0)

    def show(self, delta: Delta) -> None:
        """Shows the next piece of an answer; the one with the finish_reason ends it."""
        if delta.reasoning is not None and self.log.is_terminal:
            self._show("reasoning", delta.reasoning)
        if delta.content is not None:
            self._show("content", delta.content)
        for call in delta.tool_calls:
            if "id" in call:
                self._leave()
                self._show("call", f"{ARROW}{call['function']['name']} ")
            self._show("call", call["function"]["arguments"])
        if delta.finish_reason is not None:
            self.end()

    def end(self) -> None:
        """Ends the answer's last line."""
        self._leave()
        self._last = None

    def result(self, content: str | list[dict[str, Any]]) -> None:
        """Shows the beginning and the end of a tool's result in a line."""
        self.out.out(result_line(content), style=_STYLE["call"], highlight=False)

    def note(self, text: str) -> None:
        """Shows a line about the conversation, on `log`."""
        self.log.print(text, style="dim", markup=False, highlight=False)

    def _console(self, part: Part) -> Console:
        return self.log if part == "reasoning" else self.out

    def _show(self, part: Part, text: str) -> None:
        console = self._console(part)
        if part != self._part:
            self._leave()
            if self._last not in (None, part) and self.out.is_terminal:
                console.out("")  # an empty line between reasoning, content and calls
            self._part = self._last = part
            self._text = WrappedText(lambda: console.width, BAR if part == "reasoning" else "")
        self._write(part, self._text.push(escaped(text)) if console.is_terminal else text)

    def _leave(self) -> None:
        if self._part is not None:
            self._write(self._part, self._text.finish())
            self._console(self._part).out("")
            self._part = None

    def _write(self, part: Part, text: str) -> None:
        if text:
            console = self._console(part)
            console.out(text, style=_STYLE[part], highlight=False, end="")
            console.file.flush()
