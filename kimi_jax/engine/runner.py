"""Carries out the scheduler's steps on the device: the arrays of each, and what the device keeps between them.

A few programs do everything: decode for one or a few numbers of rows, prefill for a few lengths of a piece (with
media and without), three that move values between slots, places for snapshots and steps, and two that count tokens
for penalties. All are compiled by `warm`; nothing that a request chooses compiles another.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kimi_jax.engine.dispatched import Dispatched
from kimi_jax.engine.sequence import Piece, Snapshot, Step
from kimi_jax.engine.sequence import Sequence as Running
from kimi_jax.model.context import PAGE
from kimi_jax.model.kimi import Kimi
from kimi_jax.model.splice import Media
from kimi_jax.runtime.batch import BANNED, CHOSEN_HERE, STOP_IDS, Batch, Chosen
from kimi_jax.runtime.cache import states_alone
from kimi_jax.runtime.choose import occurred
from kimi_jax.runtime.eagle import EagleDrafter
from kimi_jax.runtime.program import Program
from kimi_jax.runtime.sampling import NO_PENALTIES, Sampling, SamplingRows, sampling_rows

# The most prompts in one row of a prefill step.
PACKED = 8


@dataclasses.dataclass(frozen=True)
class MediaTokens:
    """The media embeddings of a prompt, [m, d], and for each of its tokens the embedding that it takes, -1 for text."""

    embeddings: jax.Array
    index: np.ndarray


class Runner:
    """`slots` sequences over all data shards, `pages` and `places` (for snapshots) as well; a sequence has at most
    `row_pages` pages. `chunks` are the lengths of a step's prefill, ascending, `decode_rows` the numbers of rows of a
    decode step, ascending, of which the last is `slots`. `draft_tokens` is the most drafts of a sequence in a step;
    with a `drafter` each step takes its tokens in there too."""

    def __init__(
        self,
        model: Kimi,
        drafter: EagleDrafter | None = None,
        *,
        slots: int,
        pages: int,
        places: int,
        row_pages: int,
        chunks: Sequence[int],
        decode_rows: Sequence[int],
        draft_tokens: int = 0,
    ):
        self.model, self.program = model, Program(model, drafter, draft_tokens)
        self.chunks, self.decode_rows, self.draft_tokens = tuple(chunks), tuple(decode_rows), draft_tokens
        self.packed_chunks = self.chunks[1:]  # in the shortest there is hardly room for two
        self.data, self.slots = self.program.data, slots
        self.cache = self.program.cache(pages, slots)
        self.snapshots = states_alone(self.program.cache(0, places)) if places else None
        self.chosen = self.program.nothing_chosen(slots)
        self.take, self.place, self.slice, self.concatenate = _moves(self.chosen.tokens.sharding)
        # A row for each slot, filled when it is taken over
        self.table = np.zeros((slots, row_pages), np.int32)
        self.stop_ids = np.full((slots, STOP_IDS), -1, np.int32)
        self.banned = np.full((slots, BANNED), -1, np.int32)
        self.ends = np.zeros(slots, np.int32)
        self.sampling = sampling_rows([Sampling()] * slots, np.zeros(slots, np.uint64))
        self.logprobs = np.zeros(slots, bool)
        self.penalized = np.zeros(slots, bool)
        self.counts = self.program.counts(slots)
        self.media: dict[int, MediaTokens] = {}
        self.no_masks: dict[int, jax.Array] = {}
        self.masks: dict[int, np.ndarray | None] = {}  # of the next token, by a sequence's number
        self.compiled = 0  # programs: those that `warm` made ready, and any that a step should have found ready

    def slot_number(self, sequence: Running) -> int:
        """Returns a sequence's slot, counted over all data shards."""
        return sequence.shard * (self.slots // self.data) + sequence.slot

    def admit(
        self,
        sequence: Running,
        sampling: Sampling,
        seed: int,
        stop_ids: Sequence[int],
        *,
        banned: Sequence[int] = (),
        logprobs: bool = False,
    ) -> None:
        """Fills the values of a sequence's slot."""
        slot = self.slot_number(sequence)
        self.stop_ids[slot], self.ends[slot] = -1, sequence.ends
        self.stop_ids[slot, : len(stop_ids)] = stop_ids
        self.banned[slot] = -1
        self.banned[slot, : len(banned)] = banned
        for values, new in zip(self.sampling, sampling_rows([sampling], np.array([seed], np.uint64)), strict=True):
            np.asarray(values)[slot] = new[0]
        self.logprobs[slot] = logprobs
        self.penalized[slot] = sampling.penalties != NO_PENALTIES
        self._count(sequence)
        self.table[slot] = 0
        for index in range(len(sequence.pages)):
            self._enter_page(slot, sequence, index)

    def count(self, sequence: Running) -> None:
        """Counts the known tokens of a sequence anew, if it has penalties."""
        self._count(sequence)

    def encode(self, sequence: Running, media: Media, index: np.ndarray) -> None:
        """Computes the media embeddings of a sequence, and keeps them until its prefill ends. `index` says for each of
        its tokens which embedding it takes, -1 for text."""
        self.media[sequence.number] = MediaTokens(self.model.encode_media_padded(media), index)

    def forget(self, sequence: Running) -> None:
        """Drops what is kept of a sequence that has ended."""
        self.media.pop(sequence.number, None)
        self.masks.pop(sequence.number, None)

    def run(self, step: Step) -> Dispatched:
        """Sends a step to the device, and returns without waiting for it."""
        before = self._cached()
        dispatched = self._run(step)
        self.compiled += self._cached() - before
        return dispatched

    def _run(self, step: Step) -> Dispatched:
        for load in step.loads:
            self._copy_states(load, into_slot=True)
        parts = [self._decode(step.decode, drafts=step.drafts or None)] if step.decode else []
        if step.pieces:
            shards = {piece.sequence.shard for piece in step.pieces}
            run = self._prefill if len(shards) == len(step.pieces) else self._prefill_packed
            parts.append(run(step.pieces))
        for save in step.saves:
            self._copy_states(save, into_slot=False)
        self._count_chosen([self.slot_number(sequence) for sequence in step.choosing])
        for _, _, result in parts:
            for array in jax.tree.leaves(result):
                array.copy_to_host_async()
        return Dispatched(tuple(parts))

    def warm(self) -> Iterator[str]:
        """Compiles every program, and names each before; the steps have no tokens and change nothing."""
        for rows in self.decode_rows:
            self.compiled += 1
            yield f"decode, {rows} rows"
            self._decode((), rows)
            if self.draft_tokens:
                self.compiled += 1
                yield f"verification of drafts, {rows} rows"
                self._decode((), rows, drafts={})
        for tokens in self.chunks:
            for media in (False, True) if self.model.config.vision is not None else (False,):
                self.compiled += 1
                yield f"prefill, {tokens} tokens{' with media' if media else ''}"
                self._prefill((), tokens, media)
        for tokens in self.packed_chunks:
            self.compiled += 1
            yield f"prefill, {tokens} tokens of several prompts"
            self._prefill_packed((), tokens)
        if self.snapshots is not None:
            for into_slot in (True, False):
                self.compiled += 1
                yield f"copies of states {'from' if into_slot else 'to'} snapshots"
                self._copy_states(None, into_slot=into_slot)
        self.compiled += 2
        yield "counts of tokens"
        self.counts = self.program.set_counts(self.counts, 0, occurred((), (), self.counts.shape[1]))
        self._count_chosen([], warm=True)

    def _count(self, sequence: Running) -> None:
        slot = self.slot_number(sequence)
        if self.penalized[slot]:
            prompt, generated = sequence.tokens[: sequence.prompt], sequence.tokens[sequence.prompt :]
            row = occurred(prompt, generated, self.model.config.text.vocab_size)
            self.counts = self.program.set_counts(self.counts, slot, row)

    def _count_chosen(self, slots: Sequence[int], *, warm: bool = False) -> None:
        """Counts the tokens that a step has chosen for slots with penalties."""
        counted = np.zeros(self.slots, bool)
        counted[slots] = self.penalized[slots]
        if counted.any() or warm:
            self.counts = self.program.count_tokens(self.counts, self.chosen.tokens, counted)

    def _mask(self, sequences: Sequence[Running], places: Sequence[int], rows: int) -> jax.Array:
        """Returns the masks of a step's rows, which are made anew only where a sequence has one."""
        found = {row: self.masks.get(sequence.number) for sequence, row in zip(sequences, places, strict=True)}
        if all(mask is None for mask in found.values()):
            if rows not in self.no_masks:
                self.no_masks[rows] = self.program.replicate(self._all_words(rows))
            return self.no_masks[rows]
        masks = self._all_words(rows)
        for row, mask in found.items():
            if mask is not None:
                masks[row] = mask
        return self.program.replicate(masks)

    def _all_words(self, rows: int) -> np.ndarray:
        return np.full((rows, -(-self.model.config.text.vocab_size // 32)), 2**32 - 1, np.uint32)

    def _step(self, batch: Batch, sequences: Sequence[Running], places: Sequence[int]) -> Any:
        """Runs a step that chooses for these sequences in these rows. Returns `Chosen`, or `Verified` of drafts, with
        logprobs if one asks."""
        batch = dataclasses.replace(batch, mask=self._mask(sequences, places, len(batch.ends)))
        asked = any(self.logprobs[self.slot_number(sequence)] for sequence in sequences)
        if batch.phase == "verify":
            self.cache, verified = self.program.verify(self.cache, batch)
            return verified if asked else verified._replace(chosen=verified.chosen._replace(logprobs=None))
        self.cache, chosen = self.program.step(self.cache, batch)
        return chosen if asked else chosen._replace(logprobs=None)

    def _cached(self) -> int:
        return self.program.compiled + self.take._cache_size() + self.place._cache_size()

    def _enter_page(self, slot: int, sequence: Running, index: int) -> None:
        parts = self.program.sequence
        column = index % parts * (self.table.shape[1] // parts) + index // parts
        self.table[slot, column] = sequence.pages[index].number

    def _enter_pages(self, piece: Piece) -> None:
        """Enters the pages of a piece's tokens, some of which its sequence may have been given since admission."""
        for index in range(piece.first // PAGE, -(-piece.stop // PAGE)):
            self._enter_page(self.slot_number(piece.sequence), piece.sequence, index)

    def _decode(
        self,
        sequences: tuple[Running, ...],
        rows: int | None = None,
        drafts: Mapping[Running, Sequence[int]] | None = None,
    ) -> Any:
        """Dispatches a token of each sequence, and where there are `drafts`, those after it. All slots are rows where
        there are many, else rows are gathered."""
        numbers = [self.slot_number(sequence) for sequence in sequences]
        rows = rows or next(count for count in self.decode_rows if count >= len(sequences))
        for slot, sequence in zip(numbers, sequences, strict=True):
            page, place = divmod(sequence.dispatched - 1, PAGE)
            if place == 0:  # the first token of a page that the sequence has got for it
                self._enter_page(slot, sequence, page)
        full = rows == self.slots
        slots = np.arange(rows) if full else np.array(numbers + [-1] * (rows - len(numbers)), np.int32)
        places = numbers if full else list(range(len(numbers)))
        positions = np.full(rows, -1, np.int32)
        positions[places] = [sequence.dispatched - 1 for sequence in sequences]
        batch = dataclasses.replace(self._rows(slots), slots=None if full else self._local(slots))
        previous = self.chosen if full else self.take(self.chosen, slots)
        if drafts is None:
            batch = batch.next_token(positions, previous)
        else:
            proposed = np.full((rows, self.draft_tokens), -1, np.int32)
            for sequence, place in zip(sequences, places, strict=True):
                draft = drafts.get(sequence, ())
                proposed[place, : len(draft)] = draft
            batch = batch.verification(positions, proposed, previous)
        result = self._step(batch, sequences, places)
        plain = (result if drafts is None else result.chosen).plain
        self.chosen = plain if full else self.place(self.chosen, plain, slots)
        return sequences, tuple(places), result

    def _prefill(self, pieces: tuple[Piece, ...], tokens: int | None = None, media: bool = False) -> Any:
        """Dispatches a piece of each data shard that has one; row i is data shard i's."""
        longest = max((piece.stop - piece.first for piece in pieces), default=0)
        tokens = tokens or next(count for count in self.chunks if count >= longest)
        ids, following = np.zeros((2, self.data, tokens), np.int32)
        positions = np.full((self.data, tokens), -1, np.int32)
        index, slots = np.full((self.data, tokens), -1, np.int32), np.full(self.data, -1, np.int32)
        choosing, embeddings = np.zeros(self.data, bool), {}
        for piece in pieces:
            sequence, row, count = piece.sequence, piece.sequence.shard, piece.stop - piece.first
            ids[row, :count], following[row, :count] = _tokens(piece)
            positions[row, :count] = np.arange(piece.first, piece.stop)
            slots[row], choosing[row] = self.slot_number(sequence), piece.last
            self._enter_pages(piece)
            if (own := self.media.get(sequence.number)) is not None:
                here = own.index[piece.first : piece.stop]
                if (here >= 0).any():
                    start = int(here[here >= 0].min())
                    index[row, :count] = np.where(here >= 0, here - start + row * tokens, -1)
                    embeddings[row] = self.slice(own.embeddings, start, tokens)
                if piece.last:
                    del self.media[sequence.number]
        media = media or bool(embeddings)
        batch = dataclasses.replace(
            self._rows(slots),
            tokens=ids,
            following=following if self.program.drafter is not None else None,
            positions=positions,
            choosing=choosing,
            slots=self._local(slots),
            media_index=index if media else None,
            media_tokens=self._side_by_side(embeddings, tokens) if media else None,
        )
        chosen_for = tuple(piece.sequence for piece in pieces if piece.last)
        places = tuple(sequence.shard for sequence in chosen_for)
        chosen = self._step(batch, chosen_for, places)
        last = np.where(choosing, slots, -1)
        self.chosen = self.place(self.chosen, chosen.plain, last)
        return chosen_for, places, chosen

    def _prefill_packed(self, pieces: tuple[Piece, ...], tokens: int | None = None) -> Any:
        """Dispatches several pieces of a data shard, one after another in a row; row i is data shard i's. None
        has media."""
        assert not any(piece.sequence.media for piece in pieces)
        rows: list[list[Piece]] = [[] for _ in range(self.data)]
        for piece in pieces:
            rows[piece.sequence.shard].append(piece)
        longest = max(sum(piece.stop - piece.first for piece in row) for row in rows)
        tokens = tokens or next(count for count in self.packed_chunks if count >= longest)
        ids, following = np.zeros((2, self.data, tokens), np.int32)
        positions = np.full((self.data, tokens), -1, np.int32)
        segments, slots = np.full((self.data, tokens), -1, np.int32), np.full((self.data, PACKED), -1, np.int32)
        choosing, chosen_for, places = np.zeros((self.data, PACKED), bool), [], []
        for number, row in enumerate(rows):
            begin = 0
            for nth, piece in enumerate(row):
                end = begin + piece.stop - piece.first
                ids[number, begin:end], following[number, begin:end] = _tokens(piece)
                positions[number, begin:end] = np.arange(piece.first, piece.stop)
                segments[number, begin:end] = nth
                slots[number, nth], choosing[number, nth] = self.slot_number(piece.sequence), piece.last
                self._enter_pages(piece)
                if piece.last:
                    chosen_for.append(piece.sequence)
                    places.append(number * PACKED + nth)
                begin = end
        batch = dataclasses.replace(
            self._rows(slots.reshape(-1)),
            tokens=ids,
            following=following if self.program.drafter is not None else None,
            positions=positions,
            segments=segments,
            choosing=choosing.reshape(-1),
            slots=self._local(slots.reshape(-1)),
        )
        chosen = self._step(batch, chosen_for, places)
        self.chosen = self.place(self.chosen, chosen.plain, np.where(choosing, slots, -1).reshape(-1))
        return tuple(chosen_for), tuple(places), chosen

    def _side_by_side(self, embeddings: dict[int, jax.Array], tokens: int) -> jax.Array:
        """Returns the media embeddings of a piece of each data shard, [data * tokens, d]."""
        shape = (tokens, self.model.config.text.hidden_size)
        zeros = np.zeros(shape, self.program.dtype)
        none = jax.make_array_from_callback(shape, self.chosen.tokens.sharding, zeros.__getitem__)
        return self.concatenate([embeddings.get(row, none) for row in range(self.data)])

    def _rows(self, slots: np.ndarray) -> Batch:
        """Returns a batch with the values of these slots; -1 is a row of its own without any."""
        at = np.maximum(slots, 0)  # (indexing copies: what the device reads is not changed by the next step)
        nothing: Any = None
        return Batch(
            tokens=nothing,
            positions=nothing,
            page_table=self.table[at],
            sampling=SamplingRows(*(np.asarray(values)[at] for values in self.sampling)),
            stop_ids=self.stop_ids[at],
            ends=self.ends[at],
            choosing=nothing,
            banned=self.banned[at],
            counts=self.counts,
            logprobs=self.logprobs[at],
        )

    def _local(self, slots: np.ndarray) -> np.ndarray:
        """Returns slots as numbered within their data shard."""
        return np.where(slots >= 0, slots % (self.slots // self.data), -1).astype(np.int32)

    def _copy_states(self, snapshot: Snapshot | None, *, into_slot: bool) -> None:
        """Copies a state between a slot and a place for snapshots."""
        assert self.snapshots is not None
        slots, places = np.full((2, self.data), -1, np.int32)
        if snapshot is not None:
            sequence = snapshot.sequence
            slots[sequence.shard], places[sequence.shard] = sequence.slot, snapshot.place
        if into_slot:
            self.cache = self.program.copy_slots(self.cache, places, slots, origin=self.snapshots)
        else:
            self.snapshots = self.program.copy_slots(self.snapshots, slots, places, origin=self.cache)


def _tokens(piece: Piece) -> tuple[list[int], list[int]]:
    """Returns a piece's tokens, and the one after each of them."""
    tokens = piece.sequence.tokens[piece.first : piece.stop + 1]
    return tokens[: piece.stop - piece.first], [*tokens[1:], *[CHOSEN_HERE] * piece.last]


def _slice(embeddings: jax.Array, start: jax.Array | int, tokens: int) -> jax.Array:
    """Returns `tokens` embeddings from `start` on, zeros past the last."""
    return jax.lax.dynamic_slice_in_dim(jnp.pad(embeddings, [(0, tokens), (0, 0)]), start, tokens)


def _take(chosen: Chosen, slots: jax.Array) -> Chosen:
    return jax.tree.map(lambda x: x[jnp.maximum(slots, 0)], chosen)


def _place(chosen: Chosen, new: Chosen, slots: jax.Array) -> Chosen:
    """Returns `chosen` [slots] with `new` of some slots; a negative slot is nobody's."""
    at = jnp.where(slots >= 0, slots, len(chosen.tokens))
    return jax.tree.map(lambda x, y: x.at[at].set(y, mode="drop"), chosen, new)


@functools.lru_cache(maxsize=16)
def _moves(placement: jax.sharding.Sharding) -> tuple[Any, Any, Any, Any]:
    """Returns `_take`, `_place`, `_slice` and a concatenation jitted, with results on all devices, where a step leaves
    its own: a result that is placed otherwise would compile the next step again."""
    jitted = functools.partial(jax.jit, out_shardings=placement)
    return jitted(_take), jitted(_place), jitted(_slice, static_argnums=2), jitted(jnp.concatenate)
