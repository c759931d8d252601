"""Reads a trace back: what each agent did and when, its counts, and the longest chain of steps through a swarm."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kimi_jax import json_reader
from kimi_jax.agents.model import Usage
from kimi_jax.stages import Stage, critical_steps

Span = tuple[float, float]  # begin and end, seconds since the start of the trace


class TraceError(ValueError):
    """Raised where a file is no trace; the text names the line."""


@dataclass
class AgentRecord:
    """What a trace says about one agent.

    stage: the step of the parent that launched it, counted from 1, and 0 where it has no parent.
    steps, calls: when the model wrote its messages, and when its calls of tools ran; a call without a result ends with
    the trace. stop: why it ended, None where the trace does not say.
    """

    name: str
    parent: str | None
    stage: int
    begin: float
    end: float
    steps: list[Span] = field(default_factory=list)
    calls: list[Span] = field(default_factory=list)
    failed: int = 0
    usage: Usage = field(default_factory=Usage)
    stop: str | None = None


@dataclass(frozen=True)
class Timeline:
    """The agents of a trace in the order of their begin. is_whole: whether the trace ends with the end of the run."""

    agents: dict[str, AgentRecord]
    is_whole: bool

    @property
    def stages(self) -> list[Stage]:
        """The steps of the main agents with those of each sub-agent launched in it."""
        return [
            (1, [len(sub.steps) for sub in self._launched(main, number)])
            for main in self.agents.values()
            if main.parent is None
            for number in range(1, len(main.steps) + 1)
        ]

    @property
    def critical_steps(self) -> int:
        """The steps of the longest chain."""
        return critical_steps(self.stages)

    @property
    def critical_path(self) -> list[str]:
        """The agents of the longest chain: those without a parent, and for each of their steps the sub-agent with the
        most steps, of several the one that ended last."""
        path = []
        for main in self.agents.values():
            if main.parent is None:
                path.append(main.name)
                for number in range(1, len(main.steps) + 1):
                    if launched := self._launched(main, number):
                        path.append(max(launched, key=lambda sub: (len(sub.steps), sub.end)).name)
        return path

    def _launched(self, main: AgentRecord, stage: int) -> list[AgentRecord]:
        return [one for one in self.agents.values() if (one.parent, one.stage) == (main.name, stage)]


def read_events(path: str | Path) -> tuple[list[dict[str, Any]], bool]:
    """Returns a trace's events, and whether its last line is whole; one that is cut off is left out.

    Raises OSError, and TraceError where a line is no event.
    """
    *lines, rest = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    events = []
    for number, line in enumerate(lines, 1):
        label = f"{path}: line {number}"
        try:
            event = json_reader.parse(line, label)
        except json_reader.JSONError as error:
            raise TraceError(str(error)) from None
        kinds = {"t": int | float, "agent": str, "parent": str | None, "event": str}
        if not isinstance(event, dict) or not all(isinstance(event.get(key), kind) for key, kind in kinds.items()):
            raise TraceError(f"{label}: expected an event with the fields t, agent, parent and event")
        events.append(event)
    return events, not rest


def timeline(events: Sequence[dict[str, Any]]) -> Timeline:
    """Returns what the events of a trace say about each agent.

    Raises TraceError where an event lacks a field.
    """
    agents: dict[str, AgentRecord] = {}
    open_calls: dict[tuple[str, str], list[float]] = {}
    last = float(events[-1]["t"]) if events else 0.0
    for number, event in enumerate(events, 1):
        try:
            _take(event, agents, open_calls)
        except (KeyError, TypeError) as error:
            raise TraceError(f"line {number}: the event {event['event']} has no {error}") from None
    for (name, _), begins in open_calls.items():
        agents[name].calls += [(begin, last) for begin in begins]
    for record in agents.values():
        record.end = last if record.stop is None else record.end
    return Timeline(agents, bool(events) and events[-1]["event"] == "stop" and events[-1]["parent"] is None)


def _take(
    event: dict[str, Any], agents: dict[str, AgentRecord], open_calls: dict[tuple[str, str], list[float]]
) -> None:
    """Adds one event to the record of its agent."""
    name, parent, t = event["agent"], event["parent"], float(event["t"])
    if name not in agents:
        above = agents.get(parent) if parent is not None else None
        agents[name] = AgentRecord(name, parent, 0 if above is None else len(above.steps), t, t)
    record = agents[name]
    record.end = t
    match event["event"]:
        case "step":
            record.steps.append((t - event["s"], t))
            record.usage += Usage(event["prompt_tokens"], event["cached_tokens"], event["completion_tokens"])
        case "call":
            open_calls.setdefault((name, event["id"]), []).append(t)
        case "result":
            begins = open_calls.get((name, event["id"])) or [t]
            record.calls.append((begins.pop(), t))
            record.failed += not event["ok"]
        case "stop":
            record.stop = event["why"]
