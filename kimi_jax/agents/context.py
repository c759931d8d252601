"""Strategies for a prompt that nears the end of the context (Kimi K2-Thinking and K2.5, arXiv 2602.02276)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from kimi_jax.agents.model import Message

Strategy = Literal["keep", "hide-tool-results", "discard-all"]
HIDDEN = "[This result was removed to make room.]"


def hide_tool_results(messages: Sequence[Message]) -> list[Message]:
    """Returns the messages with a placeholder for each result, except those of the latest message with calls."""
    latest = max((n for n, message in enumerate(messages) if "tool_calls" in message), default=0)
    return [
        {**message, "content": HIDDEN} if message["role"] == "tool" and n < latest else message
        for n, message in enumerate(messages)
    ]


def discard_all(messages: Sequence[Message]) -> list[Message]:
    """Returns the system prompt and the task, and a user's message at the end, such as that of the last step."""
    task = next(n for n, message in enumerate(messages) if message["role"] == "user")
    return [
        message
        for n, message in enumerate(messages)
        if n <= task or (n == len(messages) - 1 and message["role"] == "user")
    ]


def keep(messages: Sequence[Message]) -> list[Message]:
    """Returns the messages as they are; a prompt that is too long ends the run."""
    return list(messages)


STRATEGIES: Mapping[Strategy, Callable[[Sequence[Message]], list[Message]]] = {
    "keep": keep,
    "hide-tool-results": hide_tool_results,
    "discard-all": discard_all,
}


def prompt_limit(context: int, max_tokens: int, threshold: float) -> int:
    """Returns the tokens of a prompt beyond which a strategy is applied: a share of the context less the room for an
    answer, which is taken as half of that share at most."""
    share = int(threshold * context)
    return share - min(max_tokens, share // 2)
