"""Writes toys as published folders."""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.files.new_folder import new_folder, was_finished
from checkpoints.files.pipeline import ByteCounter, Progress
from checkpoints.files.place import identity
from checkpoints.published.shards import SHARD_BYTES, ShardWriter, TensorHeader, split_into_shards
from checkpoints.published.spellings import open_published
from checkpoints.stored.companions import copy_companions
from checkpoints.toy.configs import SPECIAL_SLOTS, preprocessor, slots
from checkpoints.toy.draw import copy_blocks, draw_blocks
from checkpoints.toy.weights import ToyWeight, weights
from kimi_jax.config_json import is_eagle
from kimi_jax.families import text_fields
from kimi_jax.text.tiny import write_tiny_tokenizer

WORKERS = 2


def write_toy(folder: str | Path, config: Mapping[str, Any], *, seed: int = 0, shards: int = 3) -> Path:
    """Writes the random checkpoint of `config` and `seed` to `folder` and returns the folder.

    Leaves config.json, generation_config.json, safetensors shards of about equal size with their index, for a model
    with vision preprocessor_config.json, and for a vocabulary of 512 or more the synthetic tokenizer. Weights are drawn
    whole, with all their bits, and always the same; for large models there is `make_toy`.

    Raises FileExistsError if `folder` holds anything, ValueError if there are fewer tensors than shards.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder}: is not empty, and a toy checkpoint is only written to a new or empty folder")
    found = list(weights(config))
    if not 1 <= shards <= len(found):
        raise ValueError(f"write_toy: shards={shards}, expected 1 to {len(found)}, the number of weights")
    folder.mkdir(parents=True, exist_ok=True)

    ends = np.cumsum([weight.nbytes for weight in found])
    cuts = [0, *np.searchsorted(ends, ends[-1] * np.arange(1, shards) / shards), len(found)]
    # Each shard has at least one tensor, however large its neighbour's are.
    for i in range(1, shards):
        cuts[i] = min(max(cuts[i], cuts[i - 1] + 1), len(found) - shards + i)
    with ShardWriter(folder, [list(_headers(found[start:stop])) for start, stop in pairwise(cuts)]) as writer:
        for weight in found:
            for name, array in weight.published(seed):
                writer.write(name, array)
    _write_rest(folder, config)
    return folder


def make_toy(
    folder: str | Path,
    config: Mapping[str, Any],
    *,
    seed: int = 0,
    source: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Path:
    """Writes a toy of any size, in bounded memory (some 150 MB): weights are drawn by rows, from fewer bits than those
    of `write_toy` (`draw`), or copied from the first layers, experts and rows of the published folder `source`.

    One that was killed goes on with the shards that are not whole.

    Raises FileExistsError if `folder` holds anything or another process is writing it, FileNotFoundError and
    CheckpointError where `source` does not hold what `config` asks for, OSError where the disk has too little room.
    """
    found = list(weights(config))
    original = None if source is None else open_published(source)
    settings = {"toy": dict(config), "seed": seed, "shard_bytes": shard_bytes}
    if original is not None:
        settings["source"] = {str(file): identity(file) for file in original.files}
    if was_finished(Path(folder), settings):
        return Path(folder)
    with new_folder(Path(folder), settings) as partial:
        with (
            ShardWriter(partial, split_into_shards(_headers(found), shard_bytes)) as writer,
            ThreadPoolExecutor(WORKERS) as pool,
        ):
            todo = [weight for weight in found if not writer.finished.issuperset(e.name for e in weight.headers)]
            total, left = (sum(weight.nbytes for weight in some) for some in (found, todo))
            count = ByteCounter(total, progress, total - left)

            def write(weight: ToyWeight) -> None:
                blocks = draw_blocks(weight, seed) if original is None else copy_blocks(weight, original)
                for name, row, block in blocks:
                    writer.write(name, block, row)
                    count(block.nbytes)

            for _ in pool.map(write, todo):
                pass
        if original is None:
            _write_rest(partial, config)
        else:
            copy_companions(original.folder, partial, lambda _: dict(config))
    return Path(folder)


def _headers(found: Sequence[ToyWeight]) -> Iterator[TensorHeader]:
    for weight in found:
        yield from weight.headers


def _write_rest(folder: Path, config: Mapping[str, Any]) -> None:
    _write_json(folder / "config.json", config)
    if is_eagle(config):
        return
    text = text_fields(config)
    im_end = text["vocab_size"] - 254
    longest = text["model_max_length" if "model_max_length" in text else "max_position_embeddings"]
    _write_json(folder / "generation_config.json", {"eos_token_id": im_end, "max_length": longest})
    if "vision_config" in config:
        _write_json(folder / "preprocessor_config.json", preprocessor(config))
    if text["vocab_size"] >= 2 * SPECIAL_SLOTS:  # else there are not ids for all bytes
        write_tiny_tokenizer(folder, base_ranks=text["vocab_size"] - SPECIAL_SLOTS, slots=slots(config))


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
