"""Copies of KDA states at page boundaries, by the key of the last page before the boundary.

A page of latents can be read from any token on; a recurrent state is only of use where it was copied. Copies are few
and large (43 MB in Kimi Linear, as much as 42 pages), so that the scheduler places them by meaning, or guesses. A guess
never takes the place of a copy that has a meaning or was used, and these never take the last quarter of the places.
"""

from collections import OrderedDict
from collections.abc import Iterable

from kimi_jax.engine.pages import Key

# Of the places, for guesses: one that is used stays, and so a new prompt's beginning always has a chance.
GUESSES = 1 / 4


class SnapshotPool:
    """The places for copies of one data shard. Of each kind, the copy used longest ago makes room for a new one."""

    def __init__(self, places: int):
        self.places, self._most_kept = places, places - int(places * GUESSES)
        self._free = list(reversed(range(places)))
        self._kept: OrderedDict[Key, int] = OrderedDict()
        self._guesses: OrderedDict[Key, int] = OrderedDict()

    @property
    def free(self) -> int:
        """The number of places without a copy."""
        return len(self._free)

    @property
    def copies(self) -> int:
        """The number of copies that `find` can return."""
        return len(self._kept) + len(self._guesses)

    @property
    def guessable(self) -> int:
        """The number of places that guesses can have."""
        return len(self._free) + len(self._guesses)

    def find(self, key: Key) -> int | None:
        """Returns the place of the copy at `key`, None where there is none."""
        place = self._kept.get(key)
        return self._guesses.get(key) if place is None else place

    def use(self, key: Key) -> int:
        """Returns the place of the copy at `key`, which counts as used now and is no guess any more."""
        place = self._kept.pop(key) if key in self._kept else self._guesses.pop(key)
        self._keep(key, place)
        return place

    def allocate(self, *, guess: bool) -> int | None:
        """Returns a place for a copy, evicting another if need be; None where no place is left for this kind. The
        caller gives it back by `publish` or `discard`."""
        if self._free:
            return self._free.pop()
        if self._guesses and (guess or len(self._kept) < self._most_kept):
            return self._guesses.popitem(last=False)[1]
        if self._kept and not guess:
            return self._kept.popitem(last=False)[1]
        return None

    def publish(self, key: Key, place: int, *, guess: bool) -> None:
        """Lets `find` return the copy at `place`, unless there is one at this key already."""
        if self.find(key) is not None:
            self.discard(place)
        elif guess:
            self._guesses[key] = place
        else:
            self._keep(key, place)

    def discard(self, place: int) -> None:
        """Frees a place that was allocated and never published."""
        self._free.append(place)

    def forget(self, keys: Iterable[Key]) -> None:
        """Frees the places of the copies at `keys`, where there are any."""
        for key in keys:
            for copies in (self._kept, self._guesses):
                if key in copies:
                    self._free.append(copies.pop(key))

    def _keep(self, key: Key, place: int) -> None:
        self._kept[key] = place
        if len(self._kept) > self._most_kept:
            oldest, freed = self._kept.popitem(last=False)
            self._guesses[oldest] = freed
