"""Masks of tokens for answers of a form: grammars compiled by llguidance, and reasoning that must end."""

import functools
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from kimi_jax.server.closing import Closing, ClosingTokens
from kimi_jax.server.errors import invalid
from kimi_jax.text import Tokenizer
from kimi_jax.text.parsers import end_of_reasoning
from kimi_jax.text.xtml import OPEN

# Compiled grammars that are kept: clients send the same few tools and schemas again and again.
_KEPT = 64


class Masks:
    """Makes the mask providers of requests.

    words: the model's vocabulary. stop_ids: the tokens that end an answer. Making it is quick; the first grammar waits
    until llguidance has read the tokenizer, some seconds for a real one, which `warm` does ahead.
    """

    def __init__(self, tok: Tokenizer, words: int, stop_ids: Sequence[int]):
        self.tok, self.words, self.stop_ids = tok, words, list(stop_ids)
        self._lock = threading.Lock()
        self._compile = functools.lru_cache(_KEPT)(self._compiled)
        self.end_think = end_of_reasoning(tok)
        self.open = tok.special_tokens.get(OPEN.text)  # with which K3 may begin its content, its reasoning unclosed
        self.closing = ClosingTokens(tok, words)

    def warm(self) -> None:
        """Reads the tokenizer into llguidance, and for closing forms."""
        with self._lock:
            _ = self._guidance, self.closing.openers

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
    def reasoning_mask(self) -> np.ndarray:
        """A mask of all tokens but special ones, and of the first that ends reasoning; uint32 [words / 32]."""
        ids = np.arange(-(-self.words // 32) * 32)
        allowed = (ids < self.tok.vocab_size) & ~np.isin(ids, list(self.tok.special_tokens.values()))
        allowed[self.end_think[0]] = True
        return np.packbits(allowed, bitorder="little").view(np.uint32)

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

    In reasoning all plain tokens are allowed until `budget` of them are there, then its end alone, which K3 spells in
    several tokens; after it what the matcher allows, all without one. A form is closed before `max_tokens` run out.
    """

    def __init__(self, matcher: Any, masks: Masks, reasoning: bool, budget: int | None, max_tokens: int):
        self._matcher, self._masks, self._reasoning, self._budget = matcher, masks, reasoning, budget
        self._closing = None if matcher is None else Closing(matcher, masks.closing, max_tokens)
        self._position = 0  # tokens that were looked at
        self._ended = 0  # of the tokens that end reasoning, those that are there
        self._mask = np.zeros(-(-masks.words // 32), np.int32)

    @property
    def shortened(self) -> bool:
        """Returns whether the form was closed where the model might have gone on."""
        return self._closing is not None and self._closing.shortened

    def next_mask(self, tokens: list[int]) -> np.ndarray | None:
        """Returns the mask of the next token, None for all; see the engine's `MaskProvider`."""
        self._advance(tokens)
        if self._reasoning:
            if rest := self._rest_of_end():
                return self._masks.closing.only(rest[0])
            return None if self._matcher is None else self._masks.reasoning_mask
        if self._matcher is None or self._closing is None:
            return None
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, self._mask[None])
        if self._matcher.is_accepting():
            return self._mask
        return self._closing.narrow(self._mask.view(np.uint32), self._position)

    def forced(self, tokens: list[int]) -> list[int]:
        """Returns the tokens that must come next."""
        self._advance(tokens)
        if self._reasoning:
            return self._rest_of_end()
        return [] if self._matcher is None else list(self._matcher.compute_ff_tokens())

    def stopped(self, tokens: list[int]) -> bool:
        """Returns whether the answer is complete."""
        self._advance(tokens)
        return not self._reasoning and self._matcher is not None and self._matcher.is_stopped()

    def _rest_of_end(self) -> list[int]:
        """Returns the tokens that end the reasoning, or their rest, where they must come now."""
        begun = self._ended > 0 and self._matcher is not None
        over = self._budget is not None and self._position >= self._budget
        return self._masks.end_think[self._ended :] if begun or over else []

    def _advance(self, tokens: list[int]) -> None:
        end = self._masks.end_think
        while self._reasoning and self._position < len(tokens):
            token = tokens[self._position]
            self._ended = self._ended + 1 if token == end[self._ended] else int(token == end[0])
            unclosed = token == self._masks.open and self._position > 0
            self._reasoning = self._ended < len(end) and not unclosed
            self._position += 1
        if self._reasoning or self._matcher is None or self._closing is None:
            return
        new = tokens[self._position :]
        self._position = len(tokens)
        if new and not self._matcher.consume_tokens(new):
            raise ValueError(f"the grammar does not take the tokens {new}: {self._matcher.get_error()}")
        self._closing.feed(new)
