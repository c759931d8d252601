"""Requests to an engine and its answers: tokens in, events out."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from kimi_jax.axes import AnyArray
from kimi_jax.engine.mask_provider import MaskProvider
from kimi_jax.model.splice import Media
from kimi_jax.runtime.sampling import Sampling

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to continue.

    tokens: the prompt's ids, with every media placeholder expanded (`Processor` makes them), [t] or [1, t].
    max_new_tokens: the most tokens that are generated, a stop id included.
    sampling, seed: how tokens are chosen; the same prompt, seed and sampling give the same tokens whatever else runs.
    stop_ids: token ids that end the answer; None is the model's own, () never stops.
    stop_strings: texts that end the answer, which then has the tokens before the first of them; the engine needs a
        tokenizer for it.
    media: belongs to the placeholders in `tokens`.
    priority: requests with a larger one go first; a waiting request's rises as it ages.
    shared_prefixes: lengths of beginnings of `tokens` that other requests share, such as a system prompt with its
        tools; it matters only where a model has recurrent states. Ends of messages are found without it. None, in a
        prompt without any: every 128 tokens may be such a place, which costs shorter pieces of prefill; () is none.
    top_logprobs: the number of alternatives, 0 to 20, whose logprobs come with each token, beside that of the token
        itself; None computes none.
    banned: at most 4 token ids that are never chosen.
    mask_provider: says before each token which ones are allowed; None allows all.
    timeout: seconds from `submit` after which the request is cancelled; None is no limit.
    """

    tokens: AnyArray | Sequence[int]
    max_new_tokens: int = 24
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    seed: int = 0
    stop_ids: Iterable[int] | None = None
    stop_strings: tuple[str, ...] = ()
    media: Media | None = None
    priority: int = 0
    shared_prefixes: tuple[int, ...] | None = None
    top_logprobs: int | None = None
    banned: tuple[int, ...] = ()
    mask_provider: MaskProvider | None = None
    timeout: float | None = None


@dataclasses.dataclass(frozen=True)
class Usage:
    """Counts of tokens: the prompt's, those generated (a stop id included), and those of the prompt whose computation
    an earlier request had done."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds on `time.monotonic`'s clock: when the request came, when its first token was there, when it ended."""

    submitted: float
    first_token: float | None
    finished: float


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """The logarithm of a token's probability by the model itself, before filters, penalties and masks; and the most
    likely tokens with theirs, the best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Event:
    """New tokens of an answer, without a stop id; the last event has a reason, usage and times too.

    `error` says in words why an answer ended by "error" or "cancelled". `logprobs` has one for each of the tokens where
    the request asked for them.
    """

    tokens: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    times: Times | None = None
    error: str | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclasses.dataclass(frozen=True)
class Result:
    """A whole answer: what its events say, together."""

    tokens: list[int]
    finish_reason: FinishReason
    usage: Usage
    times: Times
    error: str | None = None
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)


def collect(next_event: Callable[[], Event]) -> Result:
    """Takes events up to the last one, and returns them as one result."""
    tokens: list[int] = []
    logprobs: list[TokenLogprobs] = []
    while True:
        event = next_event()
        tokens += event.tokens
        logprobs += event.logprobs
        if event.finish_reason is not None:
            assert event.usage is not None and event.times is not None
            return Result(tokens, event.finish_reason, event.usage, event.times, event.error, logprobs)


class QueueFullError(RuntimeError):
    """Raised by `Engine.submit` where as many requests wait as the engine keeps."""
