"""Closes forms before an answer's tokens run out: JSON that is cut off is of no use to anybody.

Nothing makes a model end a string, a list or a chain of objects. So the shortest way that is easily found to the end of
the form is measured now and then on a copy of the matcher, and taken while there are tokens for it.
"""

import enum
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from kimi_jax.text import Tokenizer
from kimi_jax.text.answer_states import Marker
from kimi_jax.text.parsers import end_of_calls
from kimi_jax.text.xtml import CLOSE, OPEN

# Tokens that closing may need beyond the measured ones, an eighth of an answer's at most: a model spells what it may
# choose, a number or a name say, in its own way.
MARGIN = 256
# Lists and objects within one another with which a form is closed whatever is left: clients' parsers and validators
# call themselves for each, and give up at some hundreds.
DEEPEST = 64
_EVERY = 64  # tokens between two measurements, fewer where the end is near
# Tokens of a measurement that are no steps to the end, those of a string that needs a length or a pattern say: more are
# not tried, which would take more than some 20 ms.
_TRIES = 1_024


class Place(enum.Enum):
    """Says where in JSON an answer has come to: `ESCAPE` is a string after a backslash."""

    OUTSIDE = enum.auto()
    STRING = enum.auto()
    ESCAPE = enum.auto()


class ClosingTokens:
    """Knows which tokens of a vocabulary of `words` tokens bring JSON nearer to its end, and which begin more of it."""

    def __init__(self, tok: Tokenizer, words: int):
        self._tok, self._words = tok, words
        self._special = frozenset(tok.special_tokens.values())
        self.end_section = end_of_calls(tok)
        # K3's ends every element, its content too
        close = CLOSE.text if CLOSE.text in tok.special_tokens else Marker.END_SECTION.value
        self._ends = [tok.special_tokens[close]] if close in tok.special_tokens else []

    @functools.cached_property
    def _closers(self) -> dict[Place, list[int]]:
        ids = {one: self._tok.encode(one, allow_special=False)[0] for one in ']}",:'}
        # (All that is not a quote is text in a string. After a backslash a quote is too, and the string goes on.)
        inside = [*self._ends, ids['"']]
        return {Place.OUTSIDE: [*self._ends, *ids.values()], Place.STRING: inside, Place.ESCAPE: inside}

    @functools.cached_property
    def beginnings(self) -> list[int]:
        """The tokens with which an object, a list, and a name or a string begin."""
        return [self._tok.encode(one, allow_special=False)[0] for one in '{["']

    @functools.cached_property
    def openers(self) -> np.ndarray:
        """A mask of the tokens that begin an object, a list, a section or a call; uint32 [words / 32, rounded up]."""
        opens = np.zeros(-(-self._words // 32) * 32, bool)
        single = self._tok.encoding.decode_single_token_bytes
        for token in range(min(self._words, self._tok.vocab_size)):
            opens[token] = token not in self._special and single(token).lstrip().startswith((b"{", b"["))
        for marker in (Marker.BEGIN_SECTION.value, Marker.BEGIN_CALL.value, OPEN.text):
            if (token := self._tok.special_tokens.get(marker, self._words)) < self._words:
                opens[token] = True
        return np.packbits(opens, bitorder="little").view(np.uint32)

    def place(self, before: Place, tokens: Sequence[int]) -> Place:
        """Returns where an answer is after further tokens."""
        place = before
        for token in tokens:
            if token in self._special:
                place = Place.OUTSIDE
                continue
            data = self._tok.encoding.decode_single_token_bytes(token)
            if place is not Place.ESCAPE and b'"' not in data and b"\\" not in data:
                continue
            for byte in data:
                if place is Place.ESCAPE:
                    place = Place.STRING
                elif byte == ord('"'):
                    place = Place.OUTSIDE if place is Place.STRING else Place.STRING
                elif byte == ord("\\") and place is Place.STRING:
                    place = Place.ESCAPE
        return place

    def count_ends(self, tokens: Sequence[int]) -> int:
        """Counts the ends of lists and objects in tokens that have no strings but empty ones."""
        data = b"".join(self._tok.encoding.decode_single_token_bytes(one) for one in tokens if one not in self._special)
        return data.count(b"]") + data.count(b"}")

    def may_end_section(self, matcher: Any) -> bool:
        """Says whether a section of calls may end now."""
        return bool(self.end_section) and matcher.validate_tokens(self.end_section) == len(self.end_section)

    def closer(self, matcher: Any, place: Place) -> int | None:
        """Returns the token that brings the form nearest to its end, None where the matcher takes no such token."""
        return next((token for token in self._closers[place] if matcher.validate_tokens([token])), None)

    def narrow(self, mask: np.ndarray, place: Place) -> np.ndarray:
        """Returns a mask without the tokens that open something, or `mask` itself where it has no others."""
        fewer = mask & ~self.openers
        return fewer if place is Place.OUTSIDE and fewer.any() else mask

    def only(self, token: int) -> np.ndarray:
        """Returns the mask of one token alone; uint32 [words / 32, rounded up]."""
        mask = np.zeros(-(-self._words // 32), np.uint32)
        mask[token // 32] = 1 << token % 32
        return mask


class Closing:
    """Closes the form of one answer of at most `max_tokens` tokens.

    It only looks at the matcher, which somebody else gives the tokens. `shortened` says that the model was left less
    than the matcher allows.
    """

    def __init__(self, matcher: Any, tokens: ClosingTokens, max_tokens: int):
        self._matcher, self._tokens, self._max_tokens = matcher, tokens, max_tokens
        self._margin = min(MARGIN, max_tokens // 8)
        self._place = Place.OUTSIDE
        self._last_try = -1  # the token of a way out that was last taken where there was a choice
        self._next_measurement = 0
        self._near = self._begun = self.shortened = False

    def feed(self, tokens: Sequence[int]) -> None:
        """Takes tokens of the answer that came after its reasoning."""
        self._place = self._tokens.place(self._place, tokens)

    def narrow(self, mask: np.ndarray, position: int) -> np.ndarray:
        """Returns the mask of the token at `position` of the answer, `mask` itself until the form must be closed.

        mask: what the matcher allows where the answer may not end; uint32 [words / 32, rounded up].
        """
        left = self._max_tokens - position
        if not self._begun:
            self._begun = (
                left <= self._margin
                or self._measure(position, self._margin) is not None
                or (self._near and self._leads_too_far(left))
            )
            if not self._begun:
                return mask
        if forced := self._matcher.compute_ff_tokens():  # (not taken in yet where logprobs are wanted)
            return self._tokens.only(forced[0])
        closer = self._tokens.closer(self._matcher, self._place)
        if closer is not None:
            narrow = self._tokens.only(closer)
        else:
            narrow = self._tokens.narrow(mask, self._place)
            way = self._measure(position, self._margin // 2)
            if way is not None and len(way) <= left:  # the model's own choices have led too far
                self._last_try = way[0]
                narrow = self._tokens.only(way[0])
        # (A further call that is not made is no loss: the model can make it in its next turn.)
        self.shortened |= bool((mask != narrow).any()) and not self._tokens.may_end_section(self._matcher)
        return narrow

    def _measure(self, position: int, margin: int) -> list[int] | None:
        """Returns the way out where no more than `margin` tokens would be left after it, or the form is too deep; None
        else and between measurements."""
        if position < self._next_measurement:
            return None
        left = self._max_tokens - position
        way = self._way_out(left)
        spare = 8 * _EVERY if way is None else left - len(way) - margin
        if spare <= 0 or (way is not None and self._tokens.count_ends(way) >= DEEPEST):
            return way
        self._near = spare < 2 * _EVERY
        # A token may open what takes several to close: a spare one is trusted to stand for an eighth of them.
        self._next_measurement = position + min(_EVERY, 1 + spare // 8)
        return None

    def _leads_too_far(self, left: int) -> bool:
        """Returns whether a token that the model may choose begins more than can be closed in `left` tokens."""
        if self._place is not Place.OUTSIDE:
            return False
        begun = [token for token in self._tokens.beginnings if self._matcher.validate_tokens([token])]
        return any((way := self._way_out(left, token)) is not None and len(way) > left for token in begun)

    def _way_out(self, most: int, first: int | None = None) -> list[int] | None:
        """Returns tokens that end the form, or their beginning where `most` are not enough; None where none are found.

        first: the token to begin with, if one is given. Where there is a choice it takes the lowest token above the
        last one so chosen: each has its turn, so that the letter that ends a pattern, or the kind of object that has
        no further one, is found.
        """
        matcher, place, way = self._matcher.deep_copy(), self._place, list[int]()
        new = [] if first is None else [first]
        tries, last = 0, self._last_try
        while not matcher.is_accepting() and len(way) - tries <= most:
            new = new or matcher.compute_ff_tokens()
            if not new:
                token = self._tokens.closer(matcher, place)
                if token is None:
                    if tries == _TRIES:
                        return None
                    mask = np.frombuffer(matcher.compute_bitmask(), np.uint32, count=self._tokens.openers.size)
                    token = last = _lowest(self._tokens.narrow(mask, place), last + 1)
                    tries += 1
                new = [token]
            if not matcher.consume_tokens(new):  # beyond a limit of the matcher's own
                return None
            place = self._tokens.place(place, new)
            way += new
            new = []
        return way


def _lowest(mask: np.ndarray, begin: int) -> int:
    """Returns the lowest token of a mask from `begin` on, and the lowest of all where none is there."""
    rest = mask.copy()
    rest[: begin // 32] = 0
    rest[begin // 32 : begin // 32 + 1] &= np.uint32(0xFFFFFFFF << begin % 32 & 0xFFFFFFFF)
    if not rest.any():
        rest = mask
    word = int((rest != 0).argmax())
    bits = int(rest[word])
    return word * 32 + (bits & -bits).bit_length() - 1
