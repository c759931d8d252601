"""Copies of KDA states at page boundaries, by the key of the last page before the boundary.

A page of latents can be read from any token on; a recurrent state is only of use where it was copied. Copies are few
and large (43 MB in Kimi Linear, as much as 42 pages), so that the scheduler places them by meaning.
"""

from collections import OrderedDict
from collections.abc import Iterable

from kimi_jax.engine.pages import Key


class SnapshotPool:
    """The places for copies of one data shard; the copy used longest ago makes room for a new one."""

    def __init__(self, places: int):
        self._free = list(reversed(range(places)))
        self._places: OrderedDict[Key, int] = OrderedDict()

    @property
    def free(self) -> int:
        """The number of places without a copy."""
        return len(self._free)

    def find(self, key: Key) -> int | None:
        """Returns the place of the copy at `key`, None where there is none."""
        return self._places.get(key)

    def use(self, key: Key) -> int:
        """Returns the place of the copy at `key`, which counts as used now."""
        self._places.move_to_end(key)
        return self._places[key]

    def add(self, key: Key) -> int | None:
        """Returns the place for a copy at `key`, evicting another if need be; None where one is there already or the
        pool has no places."""
        if key in self._places:
            self._places.move_to_end(key)
            return None
        if self._free:
            place = self._free.pop()
        elif self._places:
            _, place = self._places.popitem(last=False)
        else:
            return None
        self._places[key] = place
        return place

    def forget(self, keys: Iterable[Key]) -> None:
        """Frees the places of the copies at `keys`, where there are any."""
        self._free += [self._places.pop(key) for key in keys if key in self._places]
