"""The one form in which an agent's loop sees a model: messages and tools in, one assistant message out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

Mode = Literal["instant", "thinking"]
Message = dict[str, Any]
Content = str | list[dict[str, Any]]  # of a message: a text, or parts that are texts and pictures


class Parts(list[dict[str, Any]]):
    """The result of a tool as parts of its message: texts, and pictures as `data:` URLs. Other lists become JSON."""


TEMPERATURE: Mapping[Mode, float] = {"instant": 0.6, "thinking": 1.0}  # Moonshot's recommendation, as is TOP_P
TOP_P = 0.95


@dataclass(frozen=True)
class Call:
    """A call of a tool: the arguments are JSON as the model wrote them."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Usage:
    """Counts of tokens: the prompt's, those of the prompt that came from a cache, and those generated."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(self.prompt + other.prompt, self.cached + other.cached, self.completion + other.completion)


@dataclass(frozen=True)
class Reply:
    """One assistant message; `finish` is "length" where the tokens ran out."""

    content: str | None
    reasoning: str | None = None
    calls: tuple[Call, ...] = ()
    usage: Usage = Usage()
    finish: str = "stop"


class ContextLengthError(RuntimeError):
    """Raised by a model whose context does not hold the prompt."""


class BusyError(RuntimeError):
    """Raised by a model whose server cannot be reached or refuses for now.

    too_many: whether it refuses because it is asked too often. after: the seconds until it may be asked again, None
    where it does not say.
    """

    def __init__(self, message: str, *, too_many: bool = False, after: float | None = None):
        super().__init__(message)
        self.too_many, self.after = too_many, after


@runtime_checkable
class ChatModel(Protocol):
    """Answers a conversation in OpenAI's schema with one assistant message.

    seed: makes an answer repeatable; None leaves it to the model.

    Raises ContextLengthError for a prompt that is too long, BusyError where asking again may help, and what its server
    or engine raises.
    """

    async def __call__(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        *,
        mode: Mode,
        max_tokens: int,
        seed: int | None = None,
    ) -> Reply: ...

    def measure(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], *, mode: Mode, last: Usage
    ) -> tuple[int, int] | None:
        """Returns the tokens of a prompt and those that the context holds; None where either is unknown.

        last: the usage of the conversation's last answer; zero where there is none that these messages go on from.
        """
        ...
