"""Runs an engine's steps in every process of a job: process 0 plans, the others follow.

Process 0 has the requests, the scheduler, and the `Engine`. What the engine calls on its runner it first sends to the
other processes: a few numbers for each row of a step, the tokens of a prompt and its pictures once. Each of the others
has a runner like it and makes the same calls in the same order, so that the same programs run everywhere and meet in
the collectives of the model; there is no other. Every process reads a step's tokens one step late, and finds there
what went wrong on its devices. `links` carries the messages (msgpack by flax: they can only be data), and says who may
send them.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
from flax.serialization import msgpack_restore, msgpack_serialize

from kimi_jax.engine.dispatched import Dispatched
from kimi_jax.engine.pages import Page
from kimi_jax.engine.runner import Runner
from kimi_jax.engine.sequence import Piece, Sequence, Snapshot, Step
from kimi_jax.engine.sizes import free_memory, parse_bytes
from kimi_jax.links import Links
from kimi_jax.model.context import PAGE
from kimi_jax.model.eagle import EagleHead
from kimi_jax.model.kimi import Kimi
from kimi_jax.model.splice import Media
from kimi_jax.runtime.drafts import Draft
from kimi_jax.runtime.eagle import EagleDrafter
from kimi_jax.runtime.sampling import NO_PENALTIES, Sampling


def common_memory(links: Links, cache_memory: int | str | None) -> int:
    """Returns the bytes for the cache of each device: those given, or what is left where it is least of all
    processes."""
    free = [msgpack_restore(message) for message in links.receive()]
    return min([free_memory(), *free]) if cache_memory is None else parse_bytes(cache_memory)


class LeadingRunner(Runner):
    """The runner of process 0. The others have the same model and draft head, and call `follow`; `sizes` are those of
    `Runner`."""

    def __init__(self, links: Links, model: Kimi, drafter: EagleDrafter | None = None, **sizes: Any):
        self._links, self._released = links, False
        self._call("begin", {name: list(size) if isinstance(size, tuple) else size for name, size in sizes.items()})
        super().__init__(model, drafter, **sizes)

    def admit(
        self,
        sequence: Sequence,
        sampling: Sampling,
        seed: int,
        stop_ids: Iterable[int],
        *,
        banned: Iterable[int] = (),
        logprobs: bool = False,
    ) -> None:
        stop_ids, banned = tuple(stop_ids), tuple(banned)
        place = {name: getattr(sequence, name) for name in ("number", "ends", "shard", "slot", "dispatched")}
        self._call(
            "admit",
            place
            | {
                "pages": np.array([page.number for page in sequence.pages], np.int32),
                "sampling": dataclasses.asdict(sampling),
                "seed": seed,
                "stop_ids": list(stop_ids),
                "banned": list(banned),
                "logprobs": logprobs,
            }
            | _known(sequence, sampling.penalties != NO_PENALTIES),
        )
        super().admit(sequence, sampling, seed, stop_ids, banned=banned, logprobs=logprobs)

    def count(self, sequence: Sequence) -> None:
        if self.penalized[self.slot_number(sequence)]:
            self._call("count", {"number": sequence.number} | _known(sequence, True))
        super().count(sequence)

    def encode(self, sequence: Sequence, media: Media, index: np.ndarray) -> None:
        values = {"patches": np.asarray(media.patches), "grids": media.grids, "index": index}
        self._call("encode", {"number": sequence.number} | values)
        super().encode(sequence, media, index)

    def forget(self, sequence: Sequence) -> None:
        self._call("forget", {"number": sequence.number})
        super().forget(sequence)

    def run(self, step: Step) -> Dispatched:
        decode = [(one.number, one.dispatched, one.pages[(one.dispatched - 1) // PAGE].number) for one in step.decode]
        drafts = np.full((len(step.decode), self.draft_tokens), -1, np.int32)
        for row, one in enumerate(step.decode):
            draft = step.drafts.get(one, ())
            drafts[row, : len(draft)] = draft
        pages = [page.number for piece in step.pieces for page in piece.sequence.pages[_pages(piece.first, piece.stop)]]
        masks = [(one.number, mask) for one in step.choosing if (mask := self.masks.get(one.number)) is not None]
        tokens = [token for piece in step.pieces for token in piece.sequence.tokens[piece.first : piece.known]]
        self._call(
            "run",
            {
                "loads": _rows(2, [(load.sequence.number, load.place) for load in step.loads]),
                "decode": _rows(3, decode),
                "drafts": drafts,
                "pieces": _rows(4, [(one.sequence.number, one.first, one.stop, one.last) for one in step.pieces]),
                "pages": np.array(pages, np.int32),
                "tokens": np.array(tokens, np.int32),
                "saves": _rows(2, [(save.sequence.number, save.place) for save in step.saves]),
                "masked": [number for number, _ in masks],
                "masks": np.array([mask for _, mask in masks], np.uint32),
            },
        )
        return super().run(step)

    def release_followers(self) -> None:
        """Lets `follow` return in the other processes."""
        if not self._released:
            self._released = True
            self._call("return", {})

    def _call(self, call: str, arguments: dict[str, Any]) -> None:
        self._links.send(msgpack_serialize({"call": call, "arguments": arguments}))


def follow(model: Kimi, links: Links, draft: Draft | None = None) -> None:
    """Does what the engine of process 0 does on its devices, until that engine is closed.

    model, draft: like those of process 0, on the same mesh. Where `draft` is no head it does nothing here: process 0
        sends what is drafted.
    """
    drafter = EagleDrafter(draft, model) if isinstance(draft, EagleHead) else None
    links.send(msgpack_serialize(free_memory()))
    follower = _Follower(Runner(model, drafter, **_receive(links)["arguments"]))
    calls: dict[str, Any] = {
        "admit": follower.admit,
        "encode": follower.encode,
        "count": follower.count,
        "forget": follower.forget,
        "run": follower.run,
    }
    while (message := _receive(links))["call"] != "return":
        calls[message["call"]](**message["arguments"])


def _receive(links: Links) -> dict[str, Any]:
    (message,) = links.receive()
    return msgpack_restore(message)


class _Follower:
    """Makes the calls of a `LeadingRunner` on a runner, which it warms. It has the sequences that are under way, with
    no more of each than the runner reads."""

    def __init__(self, runner: Runner):
        self.runner = runner
        self.sequences: dict[int, Sequence] = {}
        self.before: Dispatched | None = None
        for _ in runner.warm():
            pass

    def admit(
        self,
        number: int,
        ends: int,
        shard: int,
        slot: int,
        dispatched: int,
        pages: np.ndarray,
        sampling: dict[str, Any],
        seed: int,
        stop_ids: list[int],
        banned: list[int],
        logprobs: bool,
        tokens: np.ndarray,
        prompt: int,
    ) -> None:
        sequence = Sequence(tokens.tolist(), ends, number, shard=shard, slot=slot, dispatched=dispatched)
        sequence.prompt = prompt
        sequence.pages = _as_pages(pages)
        self.sequences[number] = sequence
        self.runner.admit(sequence, Sampling(**sampling), seed, stop_ids, banned=banned, logprobs=logprobs)

    def count(self, number: int, tokens: np.ndarray, prompt: int) -> None:
        sequence = self.sequences[number]
        sequence.tokens, sequence.prompt = tokens.tolist(), prompt
        self.runner.count(sequence)

    def encode(self, number: int, patches: np.ndarray, grids: np.ndarray, index: np.ndarray) -> None:
        self.runner.encode(self.sequences[number], Media(patches, grids), index)

    def forget(self, number: int) -> None:
        if (sequence := self.sequences.pop(number, None)) is not None:  # (else it ended while it waited)
            self.runner.forget(sequence)

    def run(
        self,
        loads: np.ndarray,
        decode: np.ndarray,
        drafts: np.ndarray,
        pieces: np.ndarray,
        pages: np.ndarray,
        tokens: np.ndarray,
        saves: np.ndarray,
        masked: list[int],
        masks: np.ndarray,
    ) -> None:
        for number, dispatched, page in decode.tolist():
            sequence = self.sequences[number]
            sequence.dispatched = dispatched
            _put(sequence.pages, (dispatched - 1) // PAGE, [Page(part=0, number=page)])
        cut = []
        for number, first, stop, last in pieces.tolist():
            piece, here = Piece(self.sequences[number], first, stop, bool(last)), _pages(first, stop)
            cut.append(piece)
            count = here.stop - here.start
            _put(piece.sequence.tokens, first, tokens[: piece.known - first].tolist())
            _put(piece.sequence.pages, here.start, _as_pages(pages[:count]))
            tokens, pages = tokens[piece.known - first :], pages[count:]
        step = Step(
            loads=self._snapshots(loads),
            decode=tuple(self.sequences[number] for number in decode[:, 0].tolist()),
            drafts={
                self.sequences[number]: tuple(draft[draft >= 0].tolist())
                for number, draft in zip(decode[:, 0].tolist(), drafts, strict=True)
                if (draft >= 0).any()
            },
            pieces=tuple(cut),
            saves=self._snapshots(saves),
        )
        self.runner.masks = dict(zip(masked, masks, strict=True))
        dispatched_now = self.runner.run(step)
        if self.before is not None:
            for _ in self.before.read():  # waits, and raises what failed on the devices
                pass
        self.before = dispatched_now

    def _snapshots(self, rows: np.ndarray) -> tuple[Snapshot, ...]:
        return tuple(Snapshot(self.sequences[number], place) for number, place in rows.tolist())


def _rows(width: int, rows: Iterable[tuple[int, ...]]) -> np.ndarray:
    return np.array(list(rows), np.int32).reshape(-1, width)


def _known(sequence: Sequence, counted: bool) -> dict[str, Any]:
    """Returns the known tokens of a sequence, which the others need where they are counted."""
    return {"tokens": np.array(sequence.tokens if counted else [], np.int32), "prompt": sequence.prompt}


def _pages(first: int, stop: int) -> slice:
    """Returns which pages of a sequence have its tokens [first, stop)."""
    return slice(first // PAGE, -(-stop // PAGE))


def _as_pages(numbers: np.ndarray) -> list[Page]:
    return [Page(part=0, number=number) for number in numbers.tolist()]


def _put(values: list[Any], at: int, new: list[Any]) -> None:
    """Replaces the values from `at` on, before which a follower need not know all."""
    values += [None] * (at - len(values))
    values[at : at + len(new)] = new
