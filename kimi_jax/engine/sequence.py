"""A request on its way through the engine: which of its tokens are known, computed, and where."""

import dataclasses
import enum
from collections.abc import Mapping

from kimi_jax.engine.pages import Key, Page, Placeholders, extend_keys
from kimi_jax.model.context import PAGE


class Status(enum.Enum):
    """WAITING has neither pages nor slot; PREFILL and DECODE have both; LEAVING was preempted, and waits for the result
    of a step that it is still part of; DONE has an end."""

    WAITING = enum.auto()
    PREFILL = enum.auto()
    DECODE = enum.auto()
    LEAVING = enum.auto()
    DONE = enum.auto()


@dataclasses.dataclass(eq=False)
class Sequence:
    """`tokens` are the known ones: the prompt's, then those generated and read. Of these and the one not yet read, the
    first `dispatched` have been given to the device. `ends` is the length at which it is full. A `stepwise` sequence's
    token is read before its next step, whose mask depends on it. `boundaries` are lengths of beginnings that other
    sequences may share, None where nothing is known of them."""

    tokens: list[int]
    ends: int
    number: int
    priority: int = 0
    stepwise: bool = False
    media: tuple[Placeholders, ...] = ()
    boundaries: tuple[int, ...] | None = ()
    status: Status = Status.WAITING
    arrived: int = 0
    prompt: int = 0
    begin: int = 0  # the number of tokens not computed at its last admission, since pages were found
    prefill: int = 0  # the number of tokens known when prefill began: it ends with the last of them
    dispatched: int = 0
    unread: int = 0  # steps dispatched whose token for this sequence is not read yet
    cached: int | None = None  # `begin` of its first admission
    shard: int = 0
    slot: int = -1
    pages: list[Page] = dataclasses.field(default_factory=list)
    keys: list[Key] = dataclasses.field(default_factory=list)
    # Where prefill pieces end so that the state can be copied: True where the place has a meaning, False for a guess
    cuts: dict[int, bool] = dataclasses.field(default_factory=dict)
    # Proposed tokens after the known ones; with any the next step waits until all known tokens are read
    draft: tuple[int, ...] = ()
    # Places of copies made while decoding, by the number of tokens before, until these are read
    unpublished: dict[int, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.prompt = len(self.tokens)

    @property
    def computed(self) -> int:
        """The number of its first tokens that are known and computed, or will be before any later step."""
        return min(self.dispatched, max(self.prefill, len(self.tokens) - 1))

    @property
    def has_more(self) -> bool:
        """True while a decode step is left to dispatch: the token at `ends - 1` is chosen, never computed."""
        return self.dispatched < self.ends - 1

    @property
    def needed_pages(self) -> int:
        """The number of pages that hold the known tokens."""
        return -(-len(self.tokens) // PAGE)

    @property
    def sharable_pages(self) -> int:
        """The number of full pages before the last known token, which is computed in any case: to choose the next."""
        return (len(self.tokens) - 1) // PAGE

    def update_keys(self) -> list[Key]:
        """Returns the keys of all full pages of the known tokens."""
        extend_keys(self.keys, self.tokens, self.media)
        return self.keys

    def full_pages(self) -> int:
        """Returns the number of pages filled with computed tokens."""
        return self.computed // PAGE


@dataclasses.dataclass(frozen=True)
class Piece:
    """Tokens [first, stop) of a sequence's prefill; the `last` piece chooses the token after them."""

    sequence: Sequence
    first: int
    stop: int
    last: bool

    @property
    def known(self) -> int:
        """The number of the sequence's tokens that the step reads: the one after a piece too, which a draft head takes,
        but for the last one's."""
        return self.stop + (not self.last)


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Copies a KDA state between a sequence's slot and a place for snapshots, both of one data shard."""

    sequence: Sequence
    place: int


@dataclasses.dataclass(frozen=True)
class Step:
    """Work of the device, in this order: fill slots from snapshots, decode one token of each of `decode`, the
    pieces of prefill, and copy the states after them. `admitted` have new slots and pages. Some of `decode` have
    `drafts`, which are verified: what is right of them is computed and chosen too."""

    admitted: tuple[Sequence, ...] = ()
    loads: tuple[Snapshot, ...] = ()
    decode: tuple[Sequence, ...] = ()
    drafts: Mapping[Sequence, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    pieces: tuple[Piece, ...] = ()
    saves: tuple[Snapshot, ...] = ()

    @property
    def empty(self) -> bool:
        return not (self.decode or self.pieces)

    @property
    def choosing(self) -> tuple[Sequence, ...]:
        """The sequences that this step chooses a token for."""
        return (*self.decode, *(piece.sequence for piece in self.pieces if piece.last))

    def without(self, sequence: Sequence) -> "Step":
        """Returns the step without what it does for a sequence."""
        return Step(
            tuple(one for one in self.admitted if one is not sequence),
            tuple(load for load in self.loads if load.sequence is not sequence),
            tuple(one for one in self.decode if one is not sequence),
            {one: draft for one, draft in self.drafts.items() if one is not sequence},
            tuple(piece for piece in self.pieces if piece.sequence is not sequence),
            tuple(save for save in self.saves if save.sequence is not sequence),
        )
