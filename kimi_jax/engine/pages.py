"""Records which sequences use which pages of the device's pools, and which pages hold the start of a text that may
come again.

A pool belongs to one data shard. On a mesh with a `sequence` axis a sequence's page i is on part i mod S of the pool
(`model.context`), so that each part has its own numbers. Pages are shared by content: the key of a full page is a hash
of the key before it, its token ids, and the digests of the pictures whose placeholders stand in it, since all
placeholders have one token id.
"""

import bisect
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kimi_jax.model.context import PAGE

Key = bytes


@dataclass(eq=False)
class Page:
    """A page of `part` of the pool. `users` counts the sequences whose tables name it; `key` says what it holds, once
    it is full."""

    part: int
    number: int
    users: int = 0
    key: Key | None = None


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
        content = hashlib.blake2b(keys[-1] if keys else b"", digest_size=16)
        content.update(np.asarray(tokens[first : first + PAGE], np.int32).tobytes())
        for item in media:
            if item.start < first + PAGE and item.stop > first:
                content.update(item.digest)
        keys.append(content.digest())


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
            key, page = self._unused[part].popitem(last=False)
            del self._by_key[key]
        else:
            return None
        page.users, page.key = 1, None
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
            del self._by_key[page.key]
            if page.users == 0:
                del self._unused[page.part][page.key]
                self._free[page.part].append(page)
            page.key = None
