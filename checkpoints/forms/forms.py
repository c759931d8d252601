"""Recipes of conversions: the reads and the pure function that make each stored chunk, a chunk or a few at a time.

`make_recipe` says which leaves a conversion stores, and `Recipe.tasks` cuts the work into tasks that know nothing of
each other. `convert` reads `ChunkTask.reads`, calls `ChunkTask.make` with those arrays, and writes the results as the
chunks `ChunkTask.makes`. A task may make chunks of several leaves (quantising rows gives words and scales). Chunks are
those of `chunk_grid`.

Weights that keep their form are copied word for word. All others are read as bf16 and put in their new form, some rows
at a time (`transform`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from checkpoints.forms.transform import SCRATCH_BYTES, transform
from checkpoints.published import quantization_config
from checkpoints.published.endings import PACKED, bad_scales, is_scales
from checkpoints.published.numerics import BF16, BLOCK, FP8, GROUP_SIZE
from checkpoints.published.quantization_config import FORMATS, Form
from checkpoints.published.safetensors import CheckpointError, Published
from checkpoints.stored.chunk_grid import chunk_grid
from checkpoints.stored.names import Contents, Leaf, in_format
from kimi_jax.families import text_fields
from kimi_jax.model.eagle import EagleHead
from pallas_kernels.formats import Dense

Rest = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class RowRange:
    """RowRange `start` to `stop` of the published tensor `name`, all of it by default."""

    name: str
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class ChunkId:
    """ChunkId `number`, in C order of the grid, of the stored leaf at `path`."""

    path: str
    number: int


@dataclass(frozen=True)
class ChunkTask:
    """One independent piece of a conversion. `make(*arrays)` takes the arrays of `reads` in their order, and returns
    those of the chunks `makes` in theirs, in C order and of the chunk's shape. It is pure, may return its arguments or
    views of them, and runs in a thread among others. `nbytes` is the memory that the task needs at its worst: for the
    arrays that it reads, those that it makes, and those in between.

    `make` raises CheckpointError naming file and tensor for values that cannot be (a scale that is not finite).
    """

    reads: tuple[RowRange, ...]
    makes: tuple[ChunkId, ...]
    make: Callable[..., tuple[np.ndarray, ...]]
    nbytes: int


@dataclass(frozen=True)
class Recipe:
    """The `leaves` that a conversion stores. `form` has the arguments that decide them besides the source, as JSON: it
    is recorded so that a conversion is only resumed as it was begun. `tasks` returns a fresh iterator over all tasks,
    equal at every call, in about the order of the source's bytes, each chunk made once. `config` changes the source's
    config.json to the one that describes the result; it is None where they are the same."""

    leaves: tuple[Leaf, ...]
    form: dict[str, str]
    tasks: Callable[[], Iterator[ChunkTask]]
    config: Callable[[dict[str, Any]], dict[str, Any]] | None = None


def make_recipe(
    published: Published, contents: Contents, experts: Form | None = None, dtype: Rest | None = None
) -> Recipe:
    """Returns the recipe that stores routed experts in the form `experts`, and all other weights in `dtype`.

    Without `experts`, these stay as published, except that FP8 becomes bf16. Without `dtype`, the others stay as
    published, except that FP8 becomes bf16 unless `experts="fp8"`. Parameters that a model of any dtype has in float32
    (the router's bias, `A_log`, `dt_bias`) are never narrowed, and whole numbers (a draft head's map of words) stay as
    they are. Raises CheckpointError where the experts' inputs do not divide into the groups of INT4 and MXFP4, and for
    a draft head, which has no experts, where `experts` is given.
    """
    if experts is not None and isinstance(contents.model, EagleHead):
        raise CheckpointError(f"{published.folder}: is a draft head without experts; experts={experts} is for models")
    order = {name: i for i, name in enumerate(published.tensors)}
    kept = set() if dtype == "float32" else contents.float32_paths
    kept |= {leaf.path for leaf in contents.leaves if leaf.weight is None and leaf.dtype.kind in "ib"}
    pairs: list[tuple[tuple[Leaf, ...], tuple[Leaf, ...]]] = []
    for source in _weights(contents.leaves):
        first = source[0]
        if ".mlp.experts." in first.path:
            pairs.append(
                (source, source if experts is None and first.dtype != FP8 else _in_form(source, experts or "bf16"))
            )
        elif first.path in kept or (dtype is None and (experts == "fp8" or first.dtype != FP8)):
            pairs.append((source, source))
        else:
            pairs.append((source, (replace(first, dtype=np.dtype(dtype or BF16)),)))
    pairs.sort(key=lambda pair: order[pair[0][0].names[0]])

    def tasks() -> Iterator[ChunkTask]:
        for source, target in pairs:
            if [(leaf.path, leaf.dtype) for leaf in source] == [(leaf.path, leaf.dtype) for leaf in target]:
                for leaf in source:
                    yield from _verbatim(published, leaf)
            else:
                yield from _transform(published, source, target)

    leaves = tuple(leaf for _, target in pairs for leaf in target)
    settings: dict[str, str] = {"experts": experts or "as published", "dtype": dtype or "as published"}
    if all(source == target for source, target in pairs):
        return Recipe(leaves, settings, tasks)
    return Recipe(leaves, settings, tasks, lambda config: _described(config, leaves, dtype))


def _weights(leaves: Sequence[Leaf]) -> Iterator[tuple[Leaf, ...]]:
    """Yields words or e4m3 with their scales, all others by themselves."""
    by_path = {leaf.path: leaf for leaf in leaves}
    for leaf in leaves:
        if leaf.weight is None:
            yield (leaf,)
        elif leaf.weight.is_first:
            yield tuple(by_path[path] for path in leaf.weight.names)


def _in_form(source: Sequence[Leaf], form: Form) -> tuple[Leaf, ...]:
    """Returns the leaves of the experts' weight `source` in another form."""
    first = source[0]
    assert first.weight is not None
    if first.weight.format in PACKED and first.weight.format is FORMATS[form]:
        return tuple(source)
    *outer, out, in_ = first.weight.part.weight_shape(first.shape)
    if FORMATS[form] in PACKED and in_ % GROUP_SIZE:
        raise CheckpointError(f"{first.pattern} has {in_} inputs, which are no groups of {GROUP_SIZE}")
    return in_format(replace(first, shape=(*outer, out, in_), dtype=BF16), FORMATS[form])


def _described(config: Mapping[str, Any], leaves: Sequence[Leaf], dtype: Rest | None) -> dict[str, Any]:
    found = {leaf.weight.format for leaf in leaves if leaf.weight is not None}
    form = next(form for form, weight_format in FORMATS.items() if weight_format in found)
    plain = [leaf for leaf in leaves if leaf.weight and leaf.weight.format is Dense and len(leaf.shape) > 1]
    not_converted = [name.removesuffix(".weight") for leaf in plain for name in leaf.names]
    described = quantization_config.describe_form(config, form, not_converted)
    for part in (described, text_fields(described)):
        part.update({name: dtype for name in ("dtype", "torch_dtype") if dtype and name in part})
    return described


def _verbatim(published: Published, leaf: Leaf) -> Iterator[ChunkTask]:
    """Yields tasks that copy a leaf. A chunk of a stacked one is an expert's tensor, of another rows of its tensor."""
    cut = chunk_grid(leaf)
    for number in range(cut.chunks):
        read = _rows(leaf, number)
        make = _finite(published, read, cut.chunk) if is_scales(leaf.path) else _reshaped(cut.chunk)
        # twice: a cut along columns copies the chunk
        yield ChunkTask((read,), (ChunkId(leaf.path, number),), make, 2 * cut.chunk_bytes)


def _rows(leaf: Leaf, number: int) -> RowRange:
    """Returns the published rows that are chunk `number` of a leaf."""
    cut = chunk_grid(leaf)
    if leaf.stacked:
        return RowRange(leaf.pattern.format(number))
    if cut.chunks == 1:
        return RowRange(leaf.pattern)
    return RowRange(leaf.pattern, number * cut.chunk[0], (number + 1) * cut.chunk[0])


def _transform(published: Published, source: Sequence[Leaf], target: Sequence[Leaf]) -> Iterator[ChunkTask]:
    """Yields tasks that each make all leaves of a weight, for one expert or for the rows of one chunk."""
    cuts = [chunk_grid(leaf) for leaf in target]
    for number in range(cuts[0].chunks):
        rows = _rows(target[0], number)
        reads = tuple(RowRange(leaf.pattern.format(number), rows.start, rows.stop) for leaf in source)
        if source[0].dtype == FP8 and rows.stop is not None:
            reads = (reads[0], replace(reads[1], start=rows.start // BLOCK, stop=-(-rows.stop // BLOCK)))
        shapes, dtypes = [cut.chunk for cut in cuts], [leaf.dtype for leaf in target]
        made = sum(cut.chunk_bytes for cut in cuts)
        share = made / sum(leaf.nbytes for leaf in target)
        read = int(sum(leaf.nbytes for leaf in source) * share) + source[-1].nbytes // source[-1].shape[0]
        columns = shapes[0][-1] if target[0].weight is None else target[0].weight.part.weight_shape(shapes[0])[-1]
        makes = tuple(ChunkId(leaf.path, number) for leaf in target)
        # results twice: in blocks of rows, then put together
        nbytes = read + 2 * made + SCRATCH_BYTES * columns
        yield ChunkTask(reads, makes, _made(published, reads, shapes, dtypes), nbytes)


def _made(
    published: Published, reads: Sequence[RowRange], shapes: Sequence[tuple[int, ...]], dtypes: Sequence[np.dtype]
) -> Callable[..., tuple[np.ndarray, ...]]:
    def make(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        _check(published, reads, arrays)
        try:
            made = transform(arrays, dtypes, skip=reads[0].start % BLOCK)
        except ValueError as error:
            raise CheckpointError(f"{published.tensors[reads[0].name].file}: tensor {reads[0].name} {error}") from None
        return tuple(array.reshape(shape) for array, shape in zip(made, shapes, strict=True))

    return make


def _reshaped(shape: tuple[int, ...]) -> Callable[[np.ndarray], tuple[np.ndarray, ...]]:
    return lambda array: (array.reshape(shape),)


def _finite(
    published: Published, read: RowRange, shape: tuple[int, ...]
) -> Callable[[np.ndarray], tuple[np.ndarray, ...]]:
    def make(scales: np.ndarray) -> tuple[np.ndarray, ...]:
        _check(published, (read,), (scales,))
        return (scales.reshape(shape),)

    return make


def _check(published: Published, reads: Sequence[RowRange], arrays: Sequence[np.ndarray]) -> None:
    for read, scales in zip(reads, arrays, strict=True):
        if (bad := bad_scales(read.name, scales)) is not None:
            file = published.tensors[read.name].file
            raise CheckpointError(f"{file}: tensor {read.name} has a scale in row {read.start + bad[0]} {bad[1]}")
