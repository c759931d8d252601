"""Defines the protocol of what says which tokens an answer may go on with, a grammar say, and asks it.

A matcher of llguidance is a provider in a few lines: each method gives it the tokens that it has not consumed yet
(`consume_tokens`), and then returns its bitmask (`fill_next_token_bitmask`, a row of int32), `compute_ff_tokens()` or
`is_stopped()`.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from kimi_jax.printable import printable

# Characters of a provider's error that an answer repeats.
_LONGEST_REASON = 300


@runtime_checkable
class MaskProvider(Protocol):
    """Says what one answer may go on with. Each method is given all tokens of the answer so far, none of which is ever
    taken back, and must leave the list as it is. The engine's thread calls them, after each token, so that they had
    better be quick; what they raise ends this request alone."""

    def next_mask(self, tokens: list[int], /) -> np.ndarray | None:
        """Returns a bit for each token that may come next, the lowest first, int32 or uint32 [vocab_size / 32, rounded
        up]; None allows all."""
        ...

    def forced(self, tokens: list[int], /) -> list[int]:
        """Returns tokens that must come next, if there are any: they are taken in without a step for each. (Not asked
        where logprobs are wanted, which need the steps.)"""
        ...

    def stopped(self, tokens: list[int], /) -> bool:
        """Returns whether the answer is complete, so that no stop id is needed to end it."""
        ...


class MaskError(ValueError):
    """Raised for what a provider raises, and for masks and tokens that mean nothing."""


@dataclass(frozen=True)
class Guide:
    """Asks a provider, and checks what it says against a vocabulary of `words` tokens.

    Each method raises `MaskError`, in words.
    """

    provider: MaskProvider
    words: int

    def stopped(self, tokens: list[int]) -> bool:
        """Returns whether the answer is complete."""
        found = self._ask("stopped", tokens)
        if not isinstance(found, bool | np.bool_):
            raise MaskError(f"the mask provider says {type(found).__name__} for stopped, expected True or False")
        return bool(found)

    def forced(self, tokens: list[int]) -> list[int]:
        """Returns the tokens that must come next, checked."""
        found = self._ask("forced", tokens)
        if not isinstance(found, list | tuple) or not all(isinstance(token, int | np.integer) for token in found):
            raise MaskError("the mask provider forces something else than a list of token ids")
        ids = [int(token) for token in found]
        if ids and not 0 <= min(ids) <= max(ids) < self.words:
            raise MaskError(
                f"the mask provider forces tokens {min(ids)} to {max(ids)}, expected ids from 0 to {self.words - 1}"
            )
        return ids

    def mask(self, tokens: list[int]) -> np.ndarray | None:
        """Returns the mask of the next token, uint32 [words / 32, rounded up]; None allows all."""
        found, expected = self._ask("next_mask", tokens), -(-self.words // 32)
        if found is None:
            return None
        if not isinstance(found, np.ndarray) or found.dtype not in (np.int32, np.uint32) or found.size != expected:
            said = f"{found.dtype} {list(found.shape)}" if isinstance(found, np.ndarray) else type(found).__name__
            raise MaskError(f"the mask provider's mask is {said}, expected 32-bit integers [{expected}]")
        mask = found.reshape(-1).view(np.uint32).copy()
        if self.words % 32:
            mask[-1] &= np.uint32(2 ** (self.words % 32) - 1)
        if not mask.any():
            raise MaskError("the mask provider allows no token")
        return mask

    def _ask(self, method: str, tokens: list[int]) -> object:
        try:
            return getattr(self.provider, method)(tokens)
        except BaseException as failure:  # a stranger's code; a panic of a Rust library is no `Exception`
            try:
                said = printable(f"{type(failure).__name__}: {failure}", _LONGEST_REASON)
            except Exception:  # its text cannot be made either
                said = type(failure).__name__
            raise MaskError(f"the mask provider failed: {said}") from failure
