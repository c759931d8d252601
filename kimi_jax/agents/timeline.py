"""Reads a trace back: what each agent did and when, its counts, and the longest chain of steps through a swarm."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kimi_jax.agents.model import Usage
from kimi_jax.agents.replay import read_trace
from kimi_jax.stages import Stage, critical_steps

Span = tuple[float, float]  # begin and end, seconds since the start of the trace
KINDS: dict[str, Any] = {"t": int | float, "agent": str, "parent": str | None, "event": str}


@dataclass
class AgentRecord:
    """Holds the record of one agent in a trace.

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
    def critical_steps(self) -> int:
        """The steps of the longest chain."""
        return sum(self._chain(main)[0] for main in self.agents.values() if main.parent is None)

    @property
    def critical_path(self) -> list[str]:
        """The agents of the longest chain: one without a parent, and for each of its steps the sub-agent with the
        longest chain of its own, of several the one that ended last."""
        return [name for main in self.agents.values() if main.parent is None for name in self._chain(main)[1]]

    def _chain(self, agent: AgentRecord) -> tuple[int, list[str]]:
        """Returns the steps and the agents of an agent's longest chain."""
        stages: list[Stage] = []
        path = [agent.name]
        for number in range(len(agent.steps) + 1):  # runs that are merged are launched before the first step
            launched = [one for one in self.agents.values() if (one.parent, one.stage) == (agent.name, number)]
            chains = [(*self._chain(one), one.end) for one in launched]
            stages.append((int(number > 0), [steps for steps, _, _ in chains]))
            if chains:
                path += max(chains, key=lambda chain: (chain[0], chain[2]))[1]
        return critical_steps(stages), path


def read_timeline(path: str | Path) -> Timeline:
    """Returns what a trace says about each agent. A last line that is cut off is left out.

    Raises OSError where the file cannot be read, and ValueError naming a line that is no event or lacks a field.
    """
    agents: dict[str, AgentRecord] = {}
    open_calls: dict[tuple[str, str], list[float]] = {}
    last, is_whole = 0.0, False
    for number, event in enumerate(read_trace(path), 1):
        if not all(isinstance(event.get(key), kind) for key, kind in KINDS.items()):
            raise ValueError(f"{path}, line {number}: expected an event with t, agent, parent and event")
        try:
            _take(event, agents, open_calls)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: the event {event['event']} has no {error}") from None
        last, is_whole = float(event["t"]), event["event"] == "stop" and event["parent"] is None
    for (name, _), begins in open_calls.items():
        agents[name].calls += [(begin, last) for begin in begins]
    for record in agents.values():
        record.end = last if record.stop is None else record.end
    return Timeline(agents, is_whole)


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
