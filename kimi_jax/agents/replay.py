"""Reads a trace back: its events, and a model that gives the recorded answers to the recorded prompts."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kimi_jax import json_reader
from kimi_jax.agents.context import STRATEGIES
from kimi_jax.agents.model import Call, Message, Reply, Usage
from kimi_jax.agents.trace import without_pictures
from kimi_jax.printable import printable

_FILE = re.compile(r"(\d+ characters left out), all of it in [^\n]*\]")


def read_trace(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yields the events of a trace; a last line that was cut is left out.

    Raises OSError where the file cannot be read, and ValueError naming a line that is no event.
    """
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):  # a line without its end was being written when the process died
                yield json_reader.parse_object(line, f"{path}, line {number}")


@dataclass
class _Conversation:
    """The recorded prompts of one agent, each with the answer to it."""

    name: str
    tools: list[Any]
    messages: list[Message]
    answers: list[tuple[list[Message], Reply]] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    step: Mapping[str, Any] = field(default_factory=dict)

    def add(self, event: Mapping[str, Any]) -> None:
        """Takes the next event of this agent."""
        if event["event"] == "result":
            self.results[event["id"]] = event["content"]
        elif event["event"] == "step":
            self.step = event
        elif event["event"] == "context":
            self._end_round()
            self.messages = STRATEGIES[event["strategy"]](self.messages)
        elif event["event"] == "message":
            self._end_round()
            if event["message"]["role"] == "assistant":
                self.answers.append((list(self.messages), self._reply(event["message"])))
            self.messages.append(event["message"])

    def _end_round(self) -> None:
        """Adds the results since the last answer, in the order of its calls."""
        for call in self.messages[-1].get("tool_calls", ()) if self.results else ():
            result = self.results.pop(call["id"])
            self.messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})

    def _reply(self, message: Message) -> Reply:
        calls = tuple(Call(one["id"], **one["function"]) for one in message.get("tool_calls", ()))
        usage = Usage(*(self.step[f"{kind}_tokens"] for kind in ("prompt", "cached", "completion")))
        return Reply(message["content"], message.get("reasoning_content"), calls, usage, self.step["finish"])


def replay(path: str | Path) -> Callable[[Sequence[Message], Sequence[Mapping[str, Any]]], Reply]:
    """Returns a function that answers each prompt of a trace as it was answered, once, for `ScriptedModel`.

    It raises ValueError for a prompt that is not in the trace, naming the first message that differs. Raises what
    `read_trace` raises.
    """
    agents: dict[str, _Conversation] = {}
    for event in read_trace(path):
        name = event["agent"]
        if event["event"] == "run":
            system = [] if event["system"] is None else [{"role": "system", "content": event["system"]}]
            agents[name] = _Conversation(name, event["tools"], [*system, {"role": "user", "content": event["task"]}])
        elif name in agents:
            agents[name].add(event)

    def answer(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> Reply:
        asked, shown = [_comparable(one) for one in messages], without_pictures(list(tools))
        closest, most = "the trace has no answer left", -1
        for one in agents.values():
            if not one.answers or (shown and shown != one.tools):
                continue
            recorded = [_comparable(message) for message in one.answers[0][0]]
            if recorded == asked:
                return one.answers.pop(0)[1]
            equal = next((n for n, pair in enumerate(zip(recorded, asked, strict=False)) if pair[0] != pair[1]), None)
            equal = min(len(recorded), len(asked)) if equal is None else equal
            if equal > most:
                most, closest = equal, _difference(one.name, equal, recorded, asked)
        raise ValueError(f"{path}: {closest}")

    return answer


def _comparable(message: Message) -> Message:
    """Returns a message as a trace has it, without the name of the file that holds the whole of a long result."""
    content = without_pictures(message["content"])
    parts = [{"text": content}] if isinstance(content, str) else content or []
    texts = [{**one, "text": _FILE.sub(r"\1]", one["text"])} if "text" in one else one for one in parts]
    return {**message, "content": texts}


def _difference(name: str, number: int, recorded: list[Message], asked: list[Message]) -> str:
    there, here = (printable(messages[number]) if number < len(messages) else "none" for messages in (recorded, asked))
    return f"message {number} of {name} differs: the trace has {there}, the prompt {here}"
