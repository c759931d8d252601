"""A step on its way to the device and back."""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np

from kimi_jax.engine.requests import TokenLogprobs
from kimi_jax.engine.sequence import Sequence
from kimi_jax.runtime.batch import Chosen
from kimi_jax.runtime.choose import Logprobs
from kimi_jax.runtime.verify import Verified


@dataclasses.dataclass(frozen=True)
class Dispatched:
    """A step on its way: for each of its programs, the sequences that it chooses tokens for, their rows, and its
    result, whose `logprobs` are None where no sequence asks for them."""

    parts: tuple[tuple[tuple[Sequence, ...], tuple[int, ...], Chosen | Verified], ...]

    def read(self) -> Iterator[tuple[Sequence, list[int], int, TokenLogprobs | None, list[int]]]:
        """Waits for the step: each sequence, its tokens, the `Finish` of the last, logprobs where they are asked for,
        of one token, and what a draft head drafts after them."""
        for sequences, rows, result in self.parts:
            at = list(rows)
            chosen = result.chosen if isinstance(result, Verified) else result
            columns = np.asarray(result.tokens).reshape(len(chosen.finish), -1)[at].tolist()
            counts = np.asarray(result.counts)[at].tolist() if isinstance(result, Verified) else [1] * len(at)
            tokens = [row[:count] for row, count in zip(columns, counts, strict=True)]
            finish = np.asarray(chosen.finish)[at].tolist()
            found: list[TokenLogprobs | None] = [None] * len(at)
            if chosen.logprobs is not None:
                logprobs = jax.tree.map(np.asarray, chosen.logprobs)
                found = [_token_logprobs(logprobs, row) for row in at]
            drafts: list[list[int]] = [[] for _ in at]
            if chosen.drafts is not None:
                drafts = [row[row >= 0].tolist() for row in np.asarray(chosen.drafts)[at]]
            yield from zip(sequences, tokens, finish, found, drafts, strict=True)


def _token_logprobs(logprobs: Logprobs, row: int) -> TokenLogprobs:
    top = zip(logprobs.top_tokens[row].tolist(), logprobs.top[row].tolist(), strict=True)
    return TokenLogprobs(float(logprobs.chosen[row]), tuple(top))
