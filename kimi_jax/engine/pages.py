"""Records which sequences use which pages of the device's pools, and which pages hold the start of a text that may
come again.

A pool belongs to one data shard. On a mesh with a `sequence` axis a sequence's page i is on part i mod S of the pool
(`model.context`), so that each part has its own numbers. Pages are shared by content: the key of a full page is a hash
of the key before it, its token ids, and the digests of the pictures whose placeholders stand in it, since all
placeholders have one token id. A page that a sequence left full in part, its tail, is found by the key before it, and
taken over: the next turn of a conversation goes on in the page where the last one ended.
"""

import bisect
import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kimi_jax.model.context import PAGE

Key = bytes


@dataclass(eq=False)
class Page:
    """A page of `part` of the pool. `users` counts the sequences whose tables name it; `key` says what it holds, once
    it is full or nobody fills it further. `before` is the key of the page before a tail, None in other pages."""

    part: int
    number: int
    users: int = 0
    key: Key | None = None
    before: Key | None = None


@dataclass(frozen=True)
class Placeholders:
    """The media tokens of one picture or video chunk in a prompt: positions [start, stop), and a digest of its
    content."""

    start: int
    stop: int
    digest: bytes


def extend_keys(keys: list[Key], tokens: Sequence[int], media: Sequence[Placeholders] = ()) -> None:
    """Appends the keys of those full pages of `tokens` that `keys` does not have yet."""
    for first in range(len(keys) * PAGE, len(tokens) // PAGE * PAGE, PAGE):
        keys.append(_hash(keys[-1] if keys else b"", tokens, first, first + PAGE, media))


def tail_key(keys: Sequence[Key], tokens: Sequence[int], stop: int, media: Sequence[Placeholders] = ()) -> Key:
    """Returns the key of a page that holds the tokens from `len(keys)` full pages on to `stop`."""
    return _hash(keys[-1] if keys else b"", tokens, len(keys) * PAGE, stop, media, kind=b"tail")


def _hash(
    before: Key, tokens: Sequence[int], first: int, stop: int, media: Sequence[Placeholders], kind: bytes = b""
) -> Key:
    content = hashlib.blake2b(before, digest_size=16, person=kind)
    content.update(np.asarray(tokens[first:stop], np.int32).tobytes())
    for item in media:
        if item.start < stop and item.stop > first:
            content.update(item.digest)
    return content.digest()


def count_shared(keys: Sequence[Key], others: Sequence[Key]) -> int:
    """Returns how many of the first keys are equal: by bisection, since equal keys have equal ones before them."""
    return bisect.bisect_left(range(min(len(keys), len(others))), True, key=lambda page: keys[page] != others[page])


class PagePool:
    """The pages of one data shard: `pages` of each of `parts` parts."""

    def __init__(self, pages: int, parts: int = 1):
        self.parts = parts
        self.pages = pages * parts
        self._free = [[Page(part, number) for number in reversed(range(pages))] for part in range(parts)]
        # Full pages that no sequence uses, those used longest ago first
        self._unused: list[OrderedDict[Key, Page]] = [OrderedDict() for _ in range(parts)]
        self._by_key: dict[Key, Page] = {}
        # The keys of tails by that of the page before, b"" where they are the first, and how many tokens each holds
        self._tails: dict[Key, dict[Key, int]] = {}

    @property
    def free(self) -> int:
        """The number of pages that no sequence uses; what some of them hold may still be found by its key."""
        return sum(map(len, self._free)) + sum(map(len, self._unused))

    def find(self, keys: Sequence[Key]) -> list[Page]:
        """Returns the pages of the first of `keys`, up to the first that is not there."""
        found: list[Page] = []
        for key in keys:
            if (page := self._by_key.get(key)) is None:
                break
            found.append(page)
        return found

    def has_room(self, first: int, stop: int, taken: Sequence[Page] = ()) -> bool:
        """Returns whether `allocate` can give pages `first` to `stop - 1` of a sequence that also uses `taken`."""
        for part in range(self.parts):
            wanted = len(range(first + (part - first) % self.parts, stop, self.parts))
            idle = sum(page.users == 0 and page.part == part for page in taken)
            if wanted > len(self._free[part]) + len(self._unused[part]) - idle:
                return False
        return True

    def allocate(self, index: int) -> Page | None:
        """Returns a page, used once, for page `index` of a sequence; None where all are in use.

        The page that was used longest ago is evicted where none is free.
        """
        part = index % self.parts
        if self._free[part]:
            page = self._free[part].pop()
        elif self._unused[part]:
            _, page = self._unused[part].popitem(last=False)
            self._remove_key(page)
        else:
            return None
        page.users = 1
        return page

    def share(self, pages: Sequence[Page]) -> None:
        """Counts one more user of each page."""
        for page in pages:
            if page.users == 0 and page.key is not None:
                del self._unused[page.part][page.key]
            page.users += 1

    def publish(self, page: Page, key: Key) -> None:
        """Lets `find` return the page under the key of what it holds, unless another page holds that already."""
        if page.key is None and key not in self._by_key:
            page.key = key
            self._by_key[key] = page

    def publish_tail(self, page: Page, keys: Sequence[Key], key: Key, count: int) -> None:
        """Lets `find_tail` return the page under `key`, of its first `count` tokens after full pages of these keys,
        unless another page holds them already."""
        if page.key is None and key not in self._by_key:
            page.key, page.before = key, keys[-1] if keys else b""
            self._by_key[key] = page
            self._tails.setdefault(page.before, {})[key] = count

    def find_tail(
        self, keys: Sequence[Key], tokens: Sequence[int], media: Sequence[Placeholders] = ()
    ) -> Iterator[tuple[Page, int]]:
        """Yields the tails after full pages of these keys that begin as the tokens go on, each with how many tokens it
        holds, one less than there are at most: the fullest first."""
        first = len(keys) * PAGE
        tails = self._tails.get(keys[-1] if keys else b"", {})
        for key, count in sorted(tails.items(), key=lambda tail: -tail[1]):
            if first + count < len(tokens) and tail_key(keys, tokens, first + count, media) == key:
                yield self._by_key[key], count

    def take_over(self, tail: Page) -> None:
        """Gives a tail to a sequence that fills it further; nobody else finds it any more."""
        assert tail.users == 0 and tail.key is not None
        del self._unused[tail.part][tail.key]
        self._remove_key(tail)
        tail.users = 1

    def _remove_key(self, page: Page) -> None:
        """Lets nobody find a page that has a key."""
        assert page.key is not None
        del self._by_key[page.key]
        if page.before is not None:
            tails = self._tails[page.before]
            del tails[page.key]
            if not tails:
                del self._tails[page.before]
        page.key = page.before = None

    def release(self, pages: Sequence[Page]) -> None:
        """Counts one user less of each page, the last one of a sequence first: it is then evicted before those that it
        needs."""
        for page in reversed(pages):
            page.users -= 1
            if page.users:
                continue
            if page.key is None:
                self._free[page.part].append(page)
            else:
                self._unused[page.part][page.key] = page

    def forget(self, pages: Sequence[Page]) -> None:
        """Takes from `find` what these pages hold: numbers that are not finite, say."""
        for page in pages:
            if page.key is None:
                continue
            if page.users == 0:
                del self._unused[page.part][page.key]
                self._free[page.part].append(page)
            self._remove_key(page)
