"""Reasons why there is no plan for a slice."""

from typing import Any

from sharding.topologies import Topology

GB = 10**9


class TooSmallError(ValueError):
    """A device of the slice has too little memory.

    need: the bytes that the device would need. available: those that it has. enough: the smallest slice of the same
        chips that would do, None where none does. int4: the bytes that it would need with its experts in INT4, None
        where they are INT4 or that is too much as well.
    """

    def __init__(self, message: str, need: int, available: int, enough: str | None, int4: int | None = None):
        super().__init__(message)
        self.need, self.available, self.enough, self.int4 = need, available, enough, int4

    @property
    def short(self) -> str:
        """The reason in some fifty characters."""
        would = [] if self.enough is None else [self.enough]
        would += [] if self.int4 is None else [f"--experts int4 ({self.int4 / GB:.1f})"]
        end = f"take {' or '.join(would)}" if would else "no slice would do"
        return f"needs {self.need / GB:.1f} of {self.available / GB:.1f} GB; {end}"


def as_json(topology: Topology, error: ValueError) -> dict[str, Any]:
    """Returns what `kimi-jax plan --json` prints of a slice without a plan."""
    record = {"topology": topology.name, "chips": topology.chips, "error": str(error), "short": str(error)}
    if isinstance(error, TooSmallError):
        needs = {"bytes": error.need, "available": error.available, "smallest": error.enough, "int4": error.int4}
        return record | {"short": error.short, "needs": needs}
    return record | {"needs": None}
