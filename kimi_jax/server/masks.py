"""Masks of tokens for answers of a form: grammars compiled by llguidance, reasoning that must end, and forms that are
closed before the tokens run out."""

import functools
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from kimi_jax.server.errors import invalid
from kimi_jax.text import Tokenizer
from kimi_jax.text.answer_states import Marker

# Compiled grammars that are kept: clients send the same few tools and schemas again and again.
_KEPT = 64
# The last tokens of an answer, an eighth of it at most, are for closing its form: a few values that a schema requires,
# with their names.
CLOSING = 256
_CLOSERS = '"]},:'  # a string first, in which all others are text; what goes on with an object or a list last


class Masks:
    """Makes the mask providers of requests.

    words: the model's vocabulary. stop_ids: the tokens that end an answer. Making it is quick; the first grammar waits
    until llguidance has read the tokenizer, some seconds for a real one, which `warm` does ahead.
    """

    def __init__(self, tok: Tokenizer, words: int, stop_ids: Sequence[int]):
        self.tok, self.words, self.stop_ids = tok, words, list(stop_ids)
        self._lock = threading.Lock()
        self._compile = functools.lru_cache(_KEPT)(self._compiled)
        self.end_think = tok.special_tokens.get(Marker.END_THINK.value)
        self.end_section = tok.special_tokens.get(Marker.END_SECTION.value)

    def warm(self) -> None:
        """Reads the tokenizer into llguidance."""
        with self._lock:
            _ = self._guidance

    def providers(
        self, written: str | None, reasoning: bool, budget: int | None, max_tokens: int, count: int
    ) -> list[Any]:
        """Returns the mask providers of `count` answers, each None where its answer is free.

        written: the grammar from the end of the reasoning on. reasoning: whether the answer begins in it. budget: the
        most tokens of reasoning. max_tokens: those of the answer. Raises `RequestError` for a grammar that llguidance
        refuses.
        """
        if not reasoning:
            budget = None
        if written is None and budget is None:
            return [None] * count
        matcher = None
        if written is not None:
            with self._lock:
                matcher = self._compile(written)
        return [
            AnswerMask(None if matcher is None else matcher.deep_copy(), self, reasoning, budget, max_tokens)
            for _ in range(count)
        ]

    @functools.cached_property
    def closers(self) -> list[int]:
        """The tokens that bring JSON nearer to its end, the first the one that brings it nearest."""
        return [self.tok.encode(one, allow_special=False)[0] for one in _CLOSERS]

    @functools.cached_property
    def reasoning_mask(self) -> np.ndarray:
        """A mask of all tokens but special ones, with the end of reasoning; uint32 [words / 32, rounded up]."""
        ids = np.arange(-(-self.words // 32) * 32)
        allowed = (ids < self.tok.vocab_size) & ~np.isin(ids, list(self.tok.special_tokens.values()))
        allowed[self.end_think] = True
        return np.packbits(allowed, bitorder="little").view(np.uint32)

    @functools.cached_property
    def end_mask(self) -> np.ndarray:
        """A mask of the end of reasoning alone; uint32 [words / 32, rounded up]."""
        assert self.end_think is not None
        return self.one_token(self.end_think)

    def one_token(self, token: int) -> np.ndarray:
        """Returns the mask of one token alone; uint32 [words / 32, rounded up]."""
        mask = np.zeros(-(-self.words // 32), np.uint32)
        mask[token // 32] = 1 << token % 32
        return mask

    @functools.cached_property
    def _guidance(self) -> Any:
        from llguidance.tiktoken import lltokenizer_from_encoding

        return lltokenizer_from_encoding(self.tok.encoding, n_vocab=self.words, eos_token=self.stop_ids)

    def _compiled(self, written: str) -> Any:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._guidance, written, log_level=0)
        if matcher.is_error():
            raise invalid(f"the schema or pattern cannot be kept: {matcher.get_error()}", "response_format or tools")
        return matcher


class AnswerMask:
    """Says which tokens one answer may go on with, as the engine's mask providers do.

    In reasoning all plain tokens are allowed until `budget` of them are there, then its end alone; after it what the
    matcher allows, all without one. In the last tokens of `max_tokens`, where the answer may not end yet, a token that
    ends a call, a string, a list or an object is the only one allowed, if it is: JSON that is cut off is of no use to
    anybody. `shortened` says that this left the model less than the matcher.
    """

    def __init__(self, matcher: Any, masks: Masks, reasoning: bool, budget: int | None, max_tokens: int):
        self._matcher, self._masks, self._reasoning, self._budget = matcher, masks, reasoning, budget
        self._closes_from = max_tokens - min(CLOSING, max_tokens // 8)
        self.shortened = False
        self._position = 0  # tokens that were looked at
        self._mask = np.zeros(-(-masks.words // 32), np.int32)

    def next_mask(self, tokens: list[int]) -> np.ndarray | None:
        """Returns the mask of the next token, None for all; see the engine's `MaskProvider`."""
        self._advance(tokens)
        if self._reasoning:
            if self._must_end():
                return self._masks.end_mask
            return None if self._matcher is None else self._masks.reasoning_mask
        if self._matcher is None:
            return None
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, self._mask[None])
        if self._position < self._closes_from or self._matcher.is_accepting():
            return self._mask
        return self._closing(self._mask.view(np.uint32))

    def forced(self, tokens: list[int]) -> list[int]:
        """Returns the tokens that must come next."""
        self._advance(tokens)
        if self._reasoning:
            return [self._masks.end_think] if self._must_end() and self._masks.end_think is not None else []
        return [] if self._matcher is None else list(self._matcher.compute_ff_tokens())

    def stopped(self, tokens: list[int]) -> bool:
        """Returns whether the answer is complete."""
        self._advance(tokens)
        return not self._reasoning and self._matcher is not None and self._matcher.is_stopped()

    def _closing(self, mask: np.ndarray) -> np.ndarray:
        """Returns the mask of the one token of `mask` that closes most; `mask` itself where none does."""
        end = self._masks.end_section
        for token in self._masks.closers if end is None else [end, *self._masks.closers]:
            if mask[token // 32] >> token % 32 & 1:
                only = self._masks.one_token(token)
                # (A further call that is not made is no loss: the model can make it in its next turn.)
                self.shortened |= token != end and bool((mask != only).any())
                return only
        return mask

    def _must_end(self) -> bool:
        return self._budget is not None and self._position >= self._budget

    def _advance(self, tokens: list[int]) -> None:
        while self._reasoning and self._position < len(tokens):
            self._reasoning = tokens[self._position] != self._masks.end_think
            self._position += 1
        if self._reasoning or self._matcher is None:
            return
        new = tokens[self._position :]
        self._position = len(tokens)
        if new and not self._matcher.consume_tokens(new):
            raise ValueError(f"the grammar does not take the tokens {new}: {self._matcher.get_error()}")
