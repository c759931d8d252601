"""Keeps a conversation: its messages, the mode, pictures that wait for the next message, and the commands on it."""

import difflib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kimi_jax.printable import printable
from kimi_jax.text.answers import Parsed

MODES = {"thinking": True, "instant": False}
HELP = """\
/mode [thinking|instant]  think first, or answer at once
/image FILE               a picture for the next message
/system [TEXT]            set or drop the system prompt
/reset                    forget all but the system prompt
/save FILE                write JSON, for `generate --chat`
/exit                     end (Ctrl-D too)
Ctrl-C stops an answer; twice ends.
A line that begins with a blank is no command."""


class Conversation:
    """A conversation with a model: `messages` in OpenAI's schema, the `tools` that it may call, and its mode."""

    def __init__(self, tools: Sequence[dict[str, Any]] = (), *, system: str = "", thinking: bool = True):
        self.tools, self.thinking = list(tools), thinking
        self.messages: list[dict[str, Any]] = []
        self.ended = False
        self._pictures: list[str] = []
        self._calls: list[dict[str, Any]] = []  # that have no result yet
        self._system(system)

    @property
    def waiting_call(self) -> str | None:
        """Returns the name of the tool whose result the next line is, None where it is the user's message."""
        return self._calls[0]["function"]["name"] if self._calls else None

    @property
    def waiting_calls(self) -> list[dict[str, Any]]:
        """Returns the calls that have no result yet, in their order."""
        return list(self._calls)

    def say(self, text: str | list[dict[str, Any]]) -> bool:
        """Adds the user's message, with the pictures that wait, or the result of a call, which may be parts. Returns
        whether the model is to answer now, and False where results of other calls are missing."""
        if self._calls:
            call = self._calls.pop(0)
            self.messages.append({"role": "tool", "tool_call_id": call["id"], "content": text})
            return not self._calls
        shown = [{"type": "image_url", "image_url": {"url": url}} for url in self._pictures]
        self._pictures = []
        self.messages.append({"role": "user", "content": [*shown, {"type": "text", "text": text}] if shown else text})
        return True

    def add(self, answer: Parsed) -> None:
        """Adds the model's answer, or the part of it that was there when it was stopped."""
        message: dict[str, Any] = {"role": "assistant", "content": answer.content or ""}
        if answer.reasoning is not None:
            message["reasoning_content"] = answer.reasoning
        if answer.finish_reason == "tool_calls":  # those of an answer that was cut off may not be whole
            message["tool_calls"] = answer.tool_calls
            self._calls = list(answer.tool_calls)
        self.messages.append(message)

    def take_back(self) -> None:
        """Removes the user's last message and what follows it, since it could not be answered."""
        while self.messages and self.messages[-1]["role"] != "system":
            if self.messages.pop()["role"] == "user":
                break
        self._calls = []

    def command(self, line: str) -> str:
        """Does what a line that begins with "/" asks, and returns what to say about it.

        Raises ValueError for an unknown command and for arguments that it does not take, and OSError where a file
        cannot be read or written.
        """
        name, _, argument = line[1:].strip().partition(" ")
        commands: dict[str, Callable[[str], str]] = {
            "help": lambda _: HELP,
            "mode": self._mode,
            "image": self._image,
            "system": self._system,
            "reset": self._reset,
            "save": self._save,
            "exit": self._exit,
        }
        if name not in commands:
            near = difflib.get_close_matches(name, commands, 1)
            advice = f"did you mean /{near[0]}?" if near else "/help lists them"
            raise ValueError(f"there is no command /{printable(name, 20)}; {advice}")
        return commands[name](argument.strip())

    def _mode(self, name: str) -> str:
        if name not in ("", *MODES):
            raise ValueError(f"/mode {printable(name, 20)}: expected {' or '.join(MODES)}")
        self.thinking = MODES[name] if name else not self.thinking
        return "thinks before it answers" if self.thinking else "answers at once"

    def _image(self, name: str) -> str:
        from kimi_jax.media.opening import open_image
        from kimi_jax.media.sources import as_data_url

        if not name:
            raise ValueError("/image: expected the name of a file")
        path = Path(name).expanduser()
        url = as_data_url(path)
        width, height = open_image(path).size
        self._pictures.append(url)
        return f"{printable(path.name)}, {width} x {height}: goes with the next message"

    def _system(self, text: str) -> str:
        if self.messages and self.messages[0]["role"] == "system":
            del self.messages[0]
        if not text:
            return "no system prompt"
        self.messages.insert(0, {"role": "system", "content": text})
        return "system prompt set"

    def _reset(self, _: str) -> str:
        self.messages = [message for message in self.messages if message["role"] == "system"]
        self._pictures, self._calls = [], []
        return "the conversation is forgotten"

    def _save(self, name: str) -> str:
        if not name:
            raise ValueError("/save: expected the name of a file")
        path = Path(name).expanduser()
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{printable(path.parent)}: no such folder")
        data = {"messages": self.messages} | ({"tools": self.tools} if self.tools else {})
        new = path.with_name(f".{path.name}.new")
        try:
            new.write_text(json.dumps(data, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
        return f"{printable(path)}: {len(self.messages)} messages"

    def _exit(self, _: str) -> str:
        self.ended = True
        return ""
