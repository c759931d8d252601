"""Limits of a run, and what is left of those that a whole tree of agents shares."""

import asyncio
import time
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


class Concurrency:
    """Lets at most `limit` sub-agents run at one time, first come first served: `async with` waits for its turn.

    `halve` lowers the limit. It grows by one after each `REGAIN` seconds in which it was not lowered.
    """

    REGAIN = 60.0

    def __init__(self, most: int):
        self.limit = self._most = most
        self._free = asyncio.Semaphore(most)
        self._owed = 0  # turns that end with the sub-agents that have them
        self._lowered = float("-inf")
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> None:
        await self._free.acquire()

    async def __aexit__(self, *_: object) -> None:
        self._release()

    def _release(self) -> None:
        if self._owed:
            self._owed -= 1
        else:
            self._free.release()

    async def halve(self, asked: float) -> None:
        """Halves the limit, to no less than one, unless a request sent before the last halving is the reason.

        asked: the `time.monotonic()` of the request that the server refused.
        """
        if asked < self._lowered:
            return
        self._lowered = time.monotonic()
        lost = self.limit - max(1, self.limit // 2)
        self.limit -= lost
        for _ in range(lost):
            if self._free.locked():
                self._owed += 1
            else:
                await self._free.acquire()  # returns at once
        self.close()
        self._regain_later()

    def _regain_later(self) -> None:
        if self.limit < self._most:
            self._timer = asyncio.get_running_loop().call_later(self.REGAIN, self._regain)

    def _regain(self) -> None:
        self.limit += 1
        self._release()
        self._regain_later()

    def close(self) -> None:
        """Ends the growth of the limit."""
        if self._timer is not None:
            self._timer.cancel()


@dataclass
class Budget:
    """Counts that all agents of a tree share."""

    limits: Limits
    tool_calls: int = 0
    subagents: int = 0
    usage: Usage = field(default_factory=Usage)

    def __post_init__(self) -> None:
        self.concurrency = Concurrency(self.limits.concurrency)

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
