"""Continues prompts: prefill in chunks, then a decode step for each token, whose result is read one step later, or a
verification step for each few tokens, where a drafter proposes some."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike

from kimi_jax.config import KimiConfig
from kimi_jax.model.eagle import EagleHead
from kimi_jax.model.kimi import Kimi
from kimi_jax.model.splice import Media, media_index
from kimi_jax.model.token_ids import integers, token_ids
from kimi_jax.runtime.batch import Batch, Chosen, Finish, padded_stop_ids, pages_in_order, prompts
from kimi_jax.runtime.cache import Cache
from kimi_jax.runtime.choose import occurred
from kimi_jax.runtime.drafts import DRAFT_TOKENS, Draft, DraftCounts, check_draft_tokens
from kimi_jax.runtime.eagle import EagleDrafter
from kimi_jax.runtime.program import Program
from kimi_jax.runtime.sampling import NO_PENALTIES, Sampling, checked_seeds

PREFILL_CHUNK = 2048


def generate(
    model: Kimi,
    tokens: ArrayLike,
    max_new_tokens: int = 24,
    temperature: float = 0.0,
    lengths: ArrayLike | None = None,
    media: Media | None = None,
    stop_ids: Iterable[int] | None = None,
    seed: int | ArrayLike = 0,
    *,
    sampling: Sampling | None = None,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    prefill_chunk: int = PREFILL_CHUNK,
    draft: Draft | None = None,
    draft_tokens: int = DRAFT_TOKENS,
) -> np.ndarray:
    """Continues prompts, token ids [b, t] right-padded, and returns the new tokens, int32 [b, max_new_tokens].

    lengths: [b], the tokens of each row; None is the whole width.
    media: belong to the placeholders in `tokens`, which are already expanded (`kimi_jax.media.expand`).
    stop_ids: end a row, and are part of the answer; the rest of the row is config.json's `pad_token_id`. None stands
        for the model's own, () never stops.
    seed: from 0 to 2**63 - 1, one for all rows or one for each [b]. A prompt and seed draw the same tokens in any place
        of any batch.
    sampling: how tokens are drawn; None is greedy. `temperature`, `top_k`, `top_p` and `min_p` are short for a
        `Sampling` of these values.
    prefill_chunk: the most tokens of a row in a prefill step.
    draft, draft_tokens: makes a drafter for each row, such as `PromptLookup`, or is a head from `load_head`; it
        proposes at most so many tokens at a time, 1 to 7. The answer is the same, in fewer steps where drafts are
        right. With penalties nobody drafts.

    Raises ConfigError for a head that was made for another model, and ValueError for a `sampling` beside values of
    another, tokens that are no integers of the vocabulary, lengths that do not fit `tokens`, media that do not match
    the placeholders, prompts that leave no room for `max_new_tokens` within `max_position_embeddings`, and (at the end)
    for rows whose logits were not finite; `stream` yields the tokens of the other rows all the same.
    """
    values = Sampling(temperature, top_k, top_p, min_p)
    if sampling is not None and values != Sampling():
        raise ValueError(f"both sampling={sampling} and values of another are given: {values}; give one of them")
    columns = list(
        stream(
            model,
            tokens,
            max_new_tokens=max_new_tokens,
            sampling=values if sampling is None else sampling,
            lengths=lengths,
            media=media,
            stop_ids=stop_ids,
            seed=seed,
            prefill_chunk=prefill_chunk,
            draft=draft,
            draft_tokens=draft_tokens,
        )
    )
    if (failed := np.flatnonzero(columns[-1].finish == Finish.NOT_FINITE)).size:
        raise ValueError(f"the logits of rows {failed.tolist()} are not finite (NaN or infinity)")
    pad = np.full_like(columns[0].tokens, model.config.text.pad_token_id)
    return np.stack([column.tokens for column in columns] + [pad] * (max_new_tokens - len(columns)), axis=1)


class Column(NamedTuple):
    """One new token of every row, `tokens` int32 [b], and the row's `Finish` so far, `finish` int32 [b].

    A row that was finished before, or whose logits were not finite, has config.json's `pad_token_id`.
    """

    tokens: np.ndarray
    finish: np.ndarray


def stream(
    model: Kimi,
    tokens: ArrayLike,
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    lengths: ArrayLike | None = None,
    media: Media | None = None,
    stop_ids: Iterable[int] | None = None,
    seed: int | ArrayLike = 0,
    prefill_chunk: int = PREFILL_CHUNK,
    draft: Draft | None = None,
    draft_tokens: int = DRAFT_TOKENS,
    draft_counts: DraftCounts | None = None,
) -> Iterator[Column]:
    """Yields a column of new tokens for each place until every row is finished. Its arguments are those of `generate`;
    to `draft_counts` is added what was drafted.

    Raises `generate`'s errors for arguments at once, before the first column is asked for.
    """
    if sampling.penalties != NO_PENALTIES:
        draft = None
    check_draft_tokens(draft_tokens)
    drafter = EagleDrafter(draft, model) if isinstance(draft, EagleHead) else None
    config, program = model.config, Program(model, drafter, draft_tokens)
    ids = token_ids(tokens, config.text.vocab_size)
    lengths = checked_lengths(config, ids, lengths, max_new_tokens)
    if prefill_chunk < 1:
        raise ValueError(f"prefill_chunk is {prefill_chunk}, expected at least 1")
    index = media_index(np.where(np.arange(ids.shape[1]) < lengths[:, None], ids, -1), media, config)
    rows, padding = len(ids), -len(ids) % program.data  # rows without tokens, so that `data` divides the batch
    seeds = np.pad(checked_seeds(seed, rows), (0, padding))
    stops = padded_stop_ids(config.stop_ids if stop_ids is None else stop_ids, rows + padding, config.text.vocab_size)
    table = pages_in_order(rows + padding, int(lengths.max()) + max_new_tokens, program.data, program.sequence)
    steps = prompts(
        np.pad(ids, [(0, padding), (0, 0)]),
        np.pad(lengths, (0, padding)),
        table,
        chunk=prefill_chunk,
        max_new_tokens=max_new_tokens,
        sampling=[sampling] * (rows + padding),
        seeds=seeds,
        stop_ids=stops,
        media_index=None if index is None else np.pad(index, [(0, padding), (0, 0)], constant_values=-1),
        media_tokens=None if media is None else model.encode_media_padded(media),
        following=drafter is not None,
    )
    counts = None
    if sampling.penalties != NO_PENALTIES:
        counts = program.counts(rows + padding)
        for row, (prompt, length) in enumerate(zip(ids, lengths, strict=True)):
            counts = program.set_counts(counts, row, occurred(prompt[:length], (), config.text.vocab_size))
    if draft is not None:
        known = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
        made = DraftCounts() if draft_counts is None else draft_counts
        return _columns_with_drafts(program, steps, table, known, max_new_tokens, draft, draft_tokens, made)
    return _columns(program, steps, table, lengths, max_new_tokens, counts)


def _columns(
    program: Program,
    steps: Iterator[Batch],
    table: np.ndarray,
    lengths: np.ndarray,
    max_new_tokens: int,
    counts: jax.Array | None,
) -> Iterator[Column]:
    cache, chosen = program.cache(table.size, len(table)), program.nothing_chosen(len(table))
    for batch in steps:
        cache, chosen, counts = _step(program, cache, dataclasses.replace(batch, previous=chosen), counts)
    rows, positions = len(lengths), np.pad(lengths, (0, len(table) - len(lengths)), constant_values=-max_new_tokens)
    finished = np.zeros(rows, bool)
    for i in range(max_new_tokens):
        previous = chosen
        if i + 1 < max_new_tokens:  # dispatched first, so that the device works while its last tokens are read
            batch = batch.next_token(np.maximum(positions + i, -1), previous)
            cache, chosen, counts = _step(program, cache, batch, counts)
        new, finish = (np.asarray(array)[:rows] for array in (previous.tokens, previous.finish))
        unusable = finished | (finish == Finish.NOT_FINITE)
        yield Column(np.where(unusable, program.config.text.pad_token_id, new).astype(np.int32), finish)
        finished = finish != Finish.NOT_YET
        if finished.all():
            return


def _columns_with_drafts(
    program: Program,
    steps: Iterator[Batch],
    table: np.ndarray,
    known: list[list[int]],
    max_new_tokens: int,
    draft: Draft,
    draft_tokens: int,
    draft_counts: DraftCounts,
) -> Iterator[Column]:
    """Yields columns as `_columns` does. `known` has the tokens of each row, to which the new ones are added; rows that
    are ahead wait for the others."""
    cache, chosen = program.cache(table.size, len(table)), program.nothing_chosen(len(table))
    for batch in steps:
        cache, chosen = program.step(cache, dataclasses.replace(batch, previous=chosen))
    pad, lengths = program.config.text.pad_token_id, [len(row) for row in known]
    drafters = None if isinstance(draft, EagleHead) else [draft() for _ in known]
    ends = np.zeros(len(known), np.int32)
    new, counts = np.asarray(chosen.tokens)[:, None], np.ones(len(table), np.int32)
    for i in range(max_new_tokens):
        while any(not end and len(row) == length + i for row, length, end in zip(known, lengths, ends, strict=True)):
            finish = np.asarray(chosen.finish)
            guessed = None if chosen.drafts is None else np.asarray(chosen.drafts)  # (a prefill drafts nothing)
            for row, tokens in enumerate(known):
                tokens += new[row, : counts[row]].tolist()
                ends[row] = finish[row]
            drafts = np.full((len(table), draft_tokens), -1, np.int32)
            positions = np.full(len(table), -1, np.int32)
            for row in np.flatnonzero(ends == Finish.NOT_YET).tolist():
                room = lengths[row] + max_new_tokens - len(known[row]) - 1
                count, positions[row] = max(0, min(draft_tokens, room)), len(known[row]) - 1
                if drafters is not None:
                    proposed = drafters[row].propose(known[row], count) if count else ()
                    drafts[row, : len(proposed)] = proposed
                elif guessed is not None:
                    drafts[row, :count] = guessed[row, :count]
            if (drafts >= 0).any():
                cache, verified = program.verify(cache, batch.verification(positions, drafts, chosen.plain))
                chosen, new, counts = verified.chosen, np.asarray(verified.tokens), np.asarray(verified.counts)
                draft_counts.drafts += int((drafts[:, 0] >= 0).sum())
                draft_counts.tokens += int((drafts >= 0).sum())
                draft_counts.accepted += int(np.maximum(counts - 1, 0).sum())
            elif (positions >= 0).any():
                cache, chosen = program.step(cache, batch.next_token(positions, chosen.plain))
                new, counts = np.asarray(chosen.tokens)[:, None], (positions >= 0).astype(np.int32)
        last = np.array([len(row) - length - 1 for row, length in zip(known, lengths, strict=True)])
        token = [row[length + i] if at >= i else pad for row, length, at in zip(known, lengths, last, strict=True)]
        finish = np.where(last <= i, ends, Finish.NOT_YET)
        unusable = (finish == Finish.NOT_FINITE) & (last == i)
        yield Column(np.where(unusable, pad, token).astype(np.int32), finish.astype(np.int32))
        if finish.all():
            return


def _step(
    program: Program, cache: Cache, batch: Batch, counts: jax.Array | None
) -> tuple[Cache, Chosen, jax.Array | None]:
    """Runs a step, and counts the tokens that it chose where there are penalties."""
    cache, chosen = program.step(cache, dataclasses.replace(batch, counts=counts))
    if counts is not None:
        counts = program.count_tokens(counts, chosen.tokens, batch.choosing)
    return cache, chosen, counts


def checked_lengths(
    config: KimiConfig, tokens: ArrayLike, lengths: ArrayLike | None, max_new_tokens: int
) -> np.ndarray:
    """Returns `lengths` as int32 [b], for None the whole width. Raises `generate`'s errors for tokens and lengths."""
    rows, width = token_ids(tokens, config.text.vocab_size).shape
    found = np.full(rows, width) if lengths is None else integers("lengths", lengths)
    if found.shape != (rows,) or found.min() < 1 or found.max() > width:
        raise ValueError(f"lengths are {found.tolist()}, expected {rows} of them between 1 and {width}")
    room, longest = config.text.max_position_embeddings, int(found.max())
    if max_new_tokens < 1 or longest + max_new_tokens > room:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones: expected at least 1 new token, "
            f"and at most max_position_embeddings = {room} in all"
        )
    return found.astype(np.int32)
