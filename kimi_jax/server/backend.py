"""Says what the server needs of a model and its engine. `kimi_jax.serving` joins the real ones; neither name is
imported here, so that the server knows no JAX."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from kimi_jax.text import Tokenizer

# The values of `Settings.sampling`, by the names that requests have for them.
SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)


@dataclass(frozen=True)
class Settings:
    """Says how one answer is generated.

    sampling: values by the names of `SAMPLING`. top_logprobs: None computes none. banned: tokens that are never
    chosen. mask_provider: None allows all.
    """

    max_new_tokens: int
    sampling: Mapping[str, float | int]
    seed: int
    top_logprobs: int | None = None
    banned: tuple[int, ...] = ()
    mask_provider: Any = None


@dataclass(frozen=True)
class Prompt:
    """Holds the ids of a prompt, with every placeholder of media expanded, and its media for the engine."""

    ids: list[int]
    media: Any = None


@runtime_checkable
class Usage(Protocol):
    """Counts the tokens of one answer."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@runtime_checkable
class Times(Protocol):
    """Holds seconds on the clock of `time.monotonic`."""

    submitted: float
    first_token: float | None
    finished: float


@runtime_checkable
class TokenLogprobs(Protocol):
    """Holds a token's log probability, and those of the most likely tokens with their ids."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@runtime_checkable
class Event(Protocol):
    """Holds new tokens of an answer; the last event of a stream has a reason, usage and times."""

    tokens: tuple[int, ...]
    finish_reason: Literal["stop", "length", "cancelled", "error"] | None
    usage: Usage | None
    times: Times | None
    error: str | None
    logprobs: tuple[TokenLogprobs, ...]


@runtime_checkable
class Stream(Protocol):
    """Yields the events of one answer. `cancel` ends it early: its last event still comes. `aclose` drops the rest."""

    def __aiter__(self) -> AsyncIterator[Any]: ...  # of `Event`

    def cancel(self) -> None: ...

    async def aclose(self) -> None: ...


@runtime_checkable
class Stats(Protocol):
    """Counts what an engine has and does at the moment."""

    compiled_programs: int
    pages: int
    free_pages: int
    slots: int
    free_slots: int
    waiting: int
    running: int
    drafts: int
    drafted_tokens: int
    accepted_tokens: int
    acceptance_rate: float
    accepted_length: float


@runtime_checkable
class Backend(Protocol):
    """Is a model with its tokenizer and engine.

    template: the chat template, as `kimi_jax.chat` takes it. max_length: the most tokens of a prompt with its answer.
    vocab_size: of the model, which may be larger than the tokenizer's. stop_ids: the tokens that end an answer.
    """

    tokenizer: Tokenizer
    template: str
    max_length: int
    vocab_size: int
    stop_ids: Sequence[int]

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Any,
        thinking: bool,
        preserve_thinking: bool,
        options: Mapping[str, Any],
    ) -> Prompt:
        """Returns a conversation's prompt; takes long where there are pictures. `options` are those that only some
        templates have, by the names of `chat.render`. Raises `RequestError`."""
        ...

    def submit(self, prompt: Prompt, settings: Settings) -> Stream:
        """Takes in a request, in the event loop that reads the stream. Raises `RequestError`."""
        ...

    def stats(self) -> Stats:
        """Returns the engine's counts of the moment."""
        ...

    def fail(self, reason: str) -> None:
        """Ends all answers with an error, and takes no more requests."""
        ...

    @property
    def failed(self) -> bool:
        """True once the engine has died."""
        ...
