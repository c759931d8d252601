"""Limits of a run, and what is left of those that a whole tree of agents shares."""

from dataclasses import dataclass, field
from typing import Literal

from kimi_jax.agents.model import Usage

Stop = Literal[
    "answer", "steps", "critical_steps", "tool_calls", "tokens", "time", "length", "cancelled", "model_error"
]


@dataclass(frozen=True)
class Limits:
    """Bounds of a run; None is no bound.

    steps, calls: assistant messages and tool calls of one agent. sub_steps: messages of a sub-agent.
    tool_calls, tokens, time: of the whole tree; tokens are those of prompts and answers, time is in seconds.
    critical_steps: of the longest chain of steps. subagents: launched in all. concurrency: sub-agents at one time.
    max_tokens: new tokens of a step. sub_time: seconds of a sub-agent.
    """

    steps: int = 300
    calls: int | None = None
    tool_calls: int | None = 1_500
    tokens: int | None = None
    time: float | None = None
    critical_steps: int | None = None
    sub_steps: int = 100
    subagents: int = 100
    concurrency: int = 32
    max_tokens: int = 16_384
    sub_time: float = 1_800.0


@dataclass
class Budget:
    """Counts that all agents of a tree share."""

    limits: Limits
    tool_calls: int = 0
    subagents: int = 0
    usage: Usage = field(default_factory=Usage)

    def take_call(self) -> bool:
        """Counts a tool call that starts, and returns whether the budget had it."""
        if self.limits.tool_calls is not None and self.tool_calls >= self.limits.tool_calls:
            return False
        self.tool_calls += 1
        return True

    @property
    def tokens_spent(self) -> bool:
        """Says whether the budget of tokens is used up."""
        return self.limits.tokens is not None and self.usage.prompt + self.usage.completion >= self.limits.tokens
