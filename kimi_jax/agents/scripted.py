"""A model that answers by a script, for tests and measurements of the loop itself."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kimi_jax.agents.model import Message, Mode, Reply, Usage
from kimi_jax.agents.replay import replay


class ScriptedModel:
    """Answers with the replies of a list, one after the other, or with what a function makes of the messages and tools.

    latency: seconds before each answer. Raises RuntimeError where the list is at its end.
    """

    def __init__(
        self,
        script: Sequence[Reply] | Callable[[Sequence[Message], Sequence[Mapping[str, Any]]], Reply],
        latency: float = 0.0,
    ):
        self._replies = None if callable(script) else iter(script)
        self._script, self._latency = script, latency

    @classmethod
    def from_trace(cls, path: str | Path) -> "ScriptedModel":
        """Returns a model that answers each prompt of a recorded run as it was answered.

        It raises ValueError for the first prompt that differs, naming the message, and is then the `error` of a run.
        Raises OSError or ValueError where the trace cannot be read.
        """
        return cls(replay(path))

    def __str__(self) -> str:
        return "scripted"

    async def __call__(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        *,
        mode: Mode,
        max_tokens: int,
        seed: int | None = None,
    ) -> Reply:
        """Returns the next reply."""
        await asyncio.sleep(self._latency)
        if callable(self._script):
            return self._script(messages, tools)
        assert self._replies is not None
        try:
            return next(self._replies)
        except StopIteration:
            raise RuntimeError("the script has no further reply") from None

    def measure(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], *, mode: Mode, last: Usage
    ) -> None:
        """Returns None: a script has no tokens and no context."""
