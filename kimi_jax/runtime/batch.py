"""Builds one step's instructions on the host with numpy: the tokens, their positions, pages and slots, the sampling of
the next tokens and the limits that end a sequence. New values never compile anything; shapes come from few buckets."""

import dataclasses
import enum
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from kimi_jax.model.context import PAGE, Context, Phase
from kimi_jax.model.token_ids import integers
from kimi_jax.runtime.sampling import Sampling, SamplingRows, sampling_rows

# In `Batch.tokens`, stands for the token that the previous step chose, which the host need not know.
CHOSEN_BEFORE = -1
# In `Batch.following`, stands for the token that this step chooses.
CHOSEN_HERE = -1
# The least width of `Batch.stop_ids`, and the engine's: with one width both may run the same programs.
STOP_IDS = 16
# The width of `Batch.banned`.
BANNED = 4


# The most tokens of a sequence in a verification, its own and the drafts after it.
MOST_VERIFIED = 8


class Finish(enum.IntEnum):
    """Says why a sequence ended, or that it has not ended."""

    NOT_YET = 0
    STOP = 1  # its last token is one of its stop ids
    LENGTH = 2  # it reached its length in `Batch.ends`
    NOT_FINITE = 3  # its logits had NaN or infinity, so no token can be chosen


class Chosen(NamedTuple):
    """A step's result for each of its sequences: the last token chosen, and its `Finish`, int32 [b] each;
    `choose.Logprobs` where the batch has `logprobs`; and what a draft head drafts after the token, int32 [b, k], padded
    with -1."""

    tokens: Any
    finish: Any
    logprobs: Any = None
    drafts: Any = None

    @property
    def plain(self) -> "Chosen":
        """Returns the tokens and `Finish` alone, which the next step takes."""
        return Chosen(self.tokens, self.finish)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Describes one step for b sequences, in rows of t tokens.

    tokens: int32 [rows, t]; CHOSEN_BEFORE stands for the sequence's token in `previous`.
    positions, page_table, slots, segments, phase: documented in `model.context.Context`. A sequence with
        `previous.finish` set does not change its pages and states, whatever its positions say.
    sampling: the sampling values of each sequence, [b].
    stop_ids: int32 [b, n], padded with -1.
    ends: int32 [b], the number of tokens, prompt included, at which a sequence is finished.
    choosing: bool [b], False where this step has no token to choose: a prompt with more tokens to come, or no tokens.
    previous: the last step's `Chosen.plain`, on the device; None where all tokens are given and no sequence has ended.
    mask: uint32 [b, words / 32], a bit for each token that may be chosen, the lowest first; None allows all.
    banned: int32 [b, BANNED], tokens that are never chosen, padded with -1; None bans none.
    counts: int32 [slots, words] on the device, for penalties: how often each token was generated in the sequence of
        each slot, and `choose.IN_PROMPT` more for those in its prompt; None applies no penalties.
    logprobs: bool [b], True for sequences that ask for `Chosen.logprobs`; None computes them for nobody.
    following: int32 [rows, t], the token after each one of a prefill, which a draft head takes; CHOSEN_HERE stands for
        the one that this step chooses.
    media_index, media_tokens: int32 [rows, t] and [m, d], from `splice.media_index` and `Kimi.encode_media_padded`.

    On a mesh rows and sequences are sharded over `data`, which must divide their numbers. A program is compiled for
    each combination of shapes, `phase` and fields that are None, and for nothing else.
    """

    tokens: Any
    positions: Any
    page_table: Any
    sampling: SamplingRows
    stop_ids: Any
    ends: Any
    choosing: Any
    previous: Chosen | None = None
    slots: Any = None
    segments: Any = None
    mask: Any = None
    banned: Any = None
    counts: Any = None
    logprobs: Any = None
    following: Any = None
    media_index: Any = None
    media_tokens: Any = None
    phase: Phase = dataclasses.field(default="prefill", metadata={"static": True})

    @property
    def context(self) -> Context:
        return Context(self.positions, self.page_table, self.slots, self.segments, self.phase)

    def next_token(self, positions: np.ndarray, previous: Chosen | None) -> "Batch":
        """Returns the decode step that runs each sequence's token in `previous` at `positions` [b]; -1 runs none."""
        return dataclasses.replace(
            self,
            tokens=np.full((len(positions), 1), CHOSEN_BEFORE, np.int32),
            positions=positions[:, None].astype(np.int32),
            choosing=positions >= 0,
            previous=previous,
            segments=None,
            following=None,
            media_index=None,
            media_tokens=None,
            phase="decode",
        )

    def verification(self, positions: np.ndarray, drafts: np.ndarray, previous: Chosen | None) -> "Batch":
        """Returns the step that runs each sequence's token in `previous` at `positions` [b], -1 running none, and after
        it the sequence's `drafts`, int32 [b, k], which are padded with -1."""
        before = [(0, 0), (1, 0)]
        present = np.pad(drafts >= 0, before, constant_values=True) & (positions >= 0)[:, None]
        at = positions[:, None] + np.arange(1 + drafts.shape[1])
        return dataclasses.replace(
            self.next_token(positions, previous),
            tokens=np.pad(np.maximum(drafts, 0), before, constant_values=CHOSEN_BEFORE).astype(np.int32),
            positions=np.where(present, at, -1).astype(np.int32),
            phase="verify",
        )


def bucket(count: int, least: int = 1) -> int:
    """Rounds `count` up to one of four sizes an octave, multiples of `least`, so that few sizes are ever compiled."""
    step = max(least, 1 << max(0, (count - 1).bit_length() - 3))
    return -(-count // step) * step


def pages_in_order(rows: int, tokens: int, data: int = 1, sequence: int = 1) -> np.ndarray:
    """Returns the page table of a cache that only these rows use, each the next pages: int32 [rows, row_pages], for at
    least `tokens` tokens each. On a mesh rows are sharded over `data`, and pages over `sequence` (see `Context`)."""
    row_pages = bucket(-(-tokens // (PAGE * sequence)))
    part = np.arange(rows // data * row_pages, dtype=np.int32).reshape(rows // data, row_pages)
    return np.tile(part, (data, sequence))


def padded_stop_ids(stop_ids: Iterable[int], rows: int, vocab_size: int) -> np.ndarray:
    """Returns the stop ids, repeated for every row and padded with -1: int32 [rows, n], n a power of two, at least
    STOP_IDS.

    Raises ValueError for anything but token ids.
    """
    ids = sorted(set(stop_ids))
    if ids and not 0 <= integers("stop_ids", ids).min() <= max(ids) < vocab_size:
        raise ValueError(f"stop_ids are {ids}, expected token ids from 0 to {vocab_size - 1}")
    padded = np.full(max(STOP_IDS, 1 << (len(ids) - 1).bit_length()), -1, np.int32)
    padded[: len(ids)] = ids
    return np.tile(padded, (rows, 1))


def prompts(
    tokens: np.ndarray,
    lengths: np.ndarray,
    page_table: np.ndarray,
    *,
    chunk: int,
    max_new_tokens: int,
    sampling: Sequence[Sampling],
    seeds: np.ndarray,
    stop_ids: np.ndarray,
    media_index: np.ndarray | None = None,
    media_tokens: jax.Array | None = None,
    following: bool = False,
) -> Iterator[Batch]:
    """Yields the prefill steps of prompts, int32 [b, t] right-padded, `chunk` tokens at a time; row i has slot i.

    A row of length 0 runs no tokens. Batches have the tokens `following` where they are asked for. The caller fills in
    `previous`, the result of the step before.
    """
    chunk = min(chunk, bucket(tokens.shape[1], 16))
    padding = [(0, 0), (0, -tokens.shape[1] % chunk)]
    tokens = np.pad(tokens, padding)
    index = None if media_index is None else np.pad(media_index, padding, constant_values=-1)
    values = sampling_rows(sampling, seeds)
    is_last = np.arange(tokens.shape[1]) == lengths[:, None] - 1
    after = np.where(is_last, CHOSEN_HERE, np.pad(tokens[:, 1:], [(0, 0), (0, 1)])).astype(np.int32)
    for first in range(0, tokens.shape[1], chunk):
        columns = np.arange(first, first + chunk, dtype=np.int32)
        yield Batch(
            tokens=tokens[:, first : first + chunk],
            positions=np.where(columns < lengths[:, None], columns, -1).astype(np.int32),
            page_table=page_table,
            sampling=values,
            stop_ids=stop_ids,
            ends=(lengths + max_new_tokens).astype(np.int32),
            choosing=(first < lengths) & (lengths <= first + chunk),
            following=after[:, first : first + chunk] if following else None,
            media_index=None if index is None else index[:, first : first + chunk],
            media_tokens=media_tokens,
        )
