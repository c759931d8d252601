"""Checks a request, and makes of it what the engine works on. Everything that a request can do wrong is found here,
before it is beside others."""

import dataclasses
import hashlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from kimi_jax.config import KimiConfig
from kimi_jax.engine.mask_provider import Guide, MaskProvider
from kimi_jax.engine.pages import Placeholders
from kimi_jax.engine.requests import Event, Request, TokenLogprobs
from kimi_jax.engine.sequence import Sequence
from kimi_jax.engine.stop_strings import StopStrings, check_stop_strings
from kimi_jax.model.context import PAGE
from kimi_jax.model.splice import Media, media_index, tokens_per_item
from kimi_jax.model.token_ids import integers, token_ids
from kimi_jax.runtime.batch import BANNED, STOP_IDS
from kimi_jax.runtime.choose import MOST_LOGPROBS
from kimi_jax.runtime.drafts import Drafter
from kimi_jax.runtime.sampling import NO_PENALTIES, Sampling, checked_seeds
from kimi_jax.text import StreamDecoder, Tokenizer

# Ends of messages that are known beginnings: the first ones are of the system prompt and tools, the last of the turn.
FIRST_ENDS, LAST_ENDS = 2, 2


@dataclasses.dataclass(eq=False)
class Job:
    """A request in the engine: its sequence for the scheduler, and where its events go.

    `index` says which media token each token of the prompt takes, -1 for none. `cancelled` is set once nobody waits
    for the answer any more.
    """

    request: Request
    sequence: Sequence
    stop_ids: tuple[int, ...]
    banned: tuple[int, ...]
    index: np.ndarray | None
    deliver: Callable[[Event], Any]
    submitted: float
    stop_strings: StopStrings | None
    guide: Guide | None = None
    drafter: Drafter | None = None
    first_token: float | None = None
    generated: int = 0
    cancelled: bool = False
    logprobs: deque[TokenLogprobs] = dataclasses.field(default_factory=deque)  # of tokens that are not handed out yet

    @property
    def deadline(self) -> float:
        return math.inf if self.request.timeout is None else self.submitted + self.request.timeout

    @property
    def may_draft(self) -> bool:
        """True where a token is chosen by nothing that a token before it changes: with penalties, masks and logprobs
        the tokens of a step depend on one another."""
        request = self.request
        plain = request.mask_provider is None and request.top_logprobs is None
        return plain and request.sampling.penalties == NO_PENALTIES

    def take(self, token: int) -> tuple[int, ...]:
        """Takes a new token, and returns those that are part of the answer by now."""
        return (token,) if self.stop_strings is None else self.stop_strings.push(token)

    def take_logprobs(self, logprobs: TokenLogprobs | None) -> None:
        """Keeps a new token's logprobs, with the alternatives that the request wants, until the token is handed out."""
        if self.request.top_logprobs is not None and logprobs is not None:
            top = logprobs.top[: self.request.top_logprobs]
            self.logprobs.append(dataclasses.replace(logprobs, top=top))

    def event(self, tokens: tuple[int, ...], **end: Any) -> Event:
        """Returns an event of tokens with their logprobs; `end` are the further fields of the last one."""
        count = len(tokens) if self.request.top_logprobs is not None else 0
        return Event(tokens, logprobs=tuple(self.logprobs.popleft() for _ in range(count)), **end)


def make_job(
    request: Request,
    config: KimiConfig,
    max_length: int,
    tokenizer: Tokenizer | None,
    number: int,
    deliver: Callable[[Event], Any],
) -> Job:
    """Returns the job of a request.

    Raises ValueError, naming the field, what was found and what was expected, for one that cannot be served.
    """
    ids, vocab = prompt_ids(request.tokens, config), config.text.vocab_size
    new = _whole("max_new_tokens", request.max_new_tokens)
    if new < 1 or len(ids) + new > max_length:
        raise ValueError(
            f"a prompt of {len(ids)} tokens and {new} new ones: expected at least 1 new token, and at most "
            f"{max_length} in all"
        )
    (seed,) = checked_seeds(request.seed, 1)
    wanted = config.stop_ids if request.stop_ids is None else request.stop_ids
    stops = _ids("stop_ids", wanted, STOP_IDS, vocab)
    banned = _ids("banned", request.banned, BANNED, vocab)
    strings = check_stop_strings(request.stop_strings)
    if strings and tokenizer is None:
        raise ValueError("stop_strings need an engine with a tokenizer")
    if not isinstance(request.sampling, Sampling):
        raise ValueError(f"sampling is {type(request.sampling).__name__}, expected Sampling")
    timeout = request.timeout
    if timeout is not None and not (isinstance(timeout, int | float) and timeout > 0):
        raise ValueError(f"timeout is {timeout!r}, expected seconds above 0, or None")
    top = request.top_logprobs
    if top is not None and not 0 <= _whole("top_logprobs", top) <= min(MOST_LOGPROBS, vocab):
        raise ValueError(f"top_logprobs is {top}, expected 0 to {min(MOST_LOGPROBS, vocab)}, or None")
    provider = request.mask_provider
    if provider is not None and not isinstance(provider, MaskProvider):
        raise ValueError(f"mask_provider is {type(provider).__name__}, expected the methods of MaskProvider")
    index = media_index(ids[None], request.media, config)
    ends, shared = message_ends(ids.tolist(), config.stop_ids), request.shared_prefixes
    if shared is not None:
        if not isinstance(shared, list | tuple):
            raise ValueError(f"shared_prefixes is {shared!r}, expected lengths, or None")
        ends += tuple(_whole("shared_prefixes", length) for length in shared)
    sequence = Sequence(
        ids.tolist(),
        len(ids) + new,
        number,
        priority=_whole("priority", request.priority),
        stepwise=provider is not None,
        media=placeholders(request.media, index, config),
        boundaries=ends if ends or shared is not None else None,
    )
    return Job(
        dataclasses.replace(request, seed=int(seed)),
        sequence,
        stops,
        banned,
        None if index is None else index[0],
        deliver,
        time.monotonic(),
        StopStrings(strings, StreamDecoder(tokenizer)) if strings and tokenizer is not None else None,
        None if provider is None else Guide(provider, vocab),
    )


def prompt_ids(tokens: Any, config: KimiConfig) -> np.ndarray:
    """Returns a prompt's ids, int32 [t]. Raises ValueError for anything but one prompt of ids of the vocabulary."""
    ids = np.asarray(tokens)
    ids = token_ids(ids[None] if ids.ndim == 1 else ids, config.text.vocab_size)
    if ids.shape[0] != 1 or not ids.size:
        raise ValueError(f"tokens have shape {ids.shape}, expected one prompt of at least one token")
    return ids[0]


def placeholders(media: Media | None, index: np.ndarray | None, config: KimiConfig) -> tuple[Placeholders, ...]:
    """Returns where the placeholders of each picture or video chunk stand, with a digest of its grid and patches."""
    if media is None or index is None:
        return ()
    counts = tokens_per_item(media.grids, config)
    where, patches = np.flatnonzero(index[0] >= 0), np.asarray(media.patches)
    found, patch, token = [], 0, 0
    for grid, count in zip(media.grids, counts, strict=True):
        size = int(grid.prod())
        content = hashlib.blake2b(np.asarray(grid, np.int32).tobytes(), digest_size=16)
        content.update(np.ascontiguousarray(patches[patch : patch + size]).tobytes())
        here = where[token : token + count]
        found.append(Placeholders(int(here[0]), int(here[-1]) + 1, content.digest()))
        patch, token = patch + size, token + int(count)
    return tuple(found)


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"{name} is {value!r}, expected a whole number")
    return int(value)


def _ids(name: str, given: Any, most: int, vocab: int) -> tuple[int, ...]:
    """Returns the token ids of a request's field, each once, ascending. Raises ValueError naming the field."""
    if not isinstance(given, Iterable):
        raise ValueError(f"{name} is {given!r}, expected token ids")
    ids = sorted(set(given))
    if ids and not 0 <= integers(name, ids).min() <= max(ids) < vocab:
        raise ValueError(f"{name} are {ids}, expected token ids from 0 to {vocab - 1}")
    if len(ids) > most:
        raise ValueError(f"{len(ids)} {name}, expected at most {most}")
    return tuple(map(int, ids))


def message_ends(tokens: Iterable[int], stop_ids: Iterable[int]) -> tuple[int, ...]:
    """Returns the lengths of the beginnings of a prompt that end with a message, which a stop id ends: the first ones,
    of the system prompt and tools, and the last ones, of the turn. Of those between two page boundaries it is the last.
    """
    stops, last_in_page = frozenset(stop_ids), {}
    for length, token in enumerate(tokens, 1):
        if token in stops and length >= PAGE:
            last_in_page[length // PAGE] = length
    ends = list(last_in_page.values())
    return tuple(sorted({*ends[:FIRST_ENDS], *ends[-LAST_ENDS:]}))
