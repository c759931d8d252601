"""What is read of a published folder to make each stored chunk, and how: pure functions, a chunk or a few at a time.

`plan` says which leaves a conversion stores, and `Plan.jobs` cuts the work into jobs that know nothing of each other.
`convert` reads `Job.reads`, calls `Job.make` with those arrays, and writes what it gives as the chunks `Job.makes`. A
job may make chunks of several leaves (quantising rows gives words and scales). Chunks are those of `layout`.

Weights that keep their form are copied word for word. All others go through bf16, which every form is read as, some
rows at a time (`transform`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from checkpoints.forms.transform import SCRATCH_BYTES, transformed
from checkpoints.published import quantization_config
from checkpoints.published.endings import is_scales
from checkpoints.published.numerics import BF16, BLOCK, F32, FP8, GROUP_SIZE
from checkpoints.published.quantization_config import FORMATS, Form
from checkpoints.published.safetensors import CheckpointError, Published
from checkpoints.stored.layout import layout
from checkpoints.stored.names import Contents, Leaf, in_format, stored
from pallas_kernels.formats import Dense, Fp8, Int4

Rest = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class Rows:
    """Rows `start` to `stop` of the published tensor `name`, all of it by default."""

    name: str
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Chunk:
    """Chunk `number`, in C order of the grid, of the stored leaf at `path`."""

    path: str
    number: int


@dataclass(frozen=True)
class Job:
    """`make(*arrays)` gives, for the arrays of `reads` in their order, those of the chunks `makes` in theirs, in C
    order and of the chunk's shape. It is pure, may give back its arguments or views of them, and runs in a thread among
    others. `nbytes` is the memory that the job needs at its worst: what it reads, what it makes, and what `make` holds
    between.

    `make` raises CheckpointError naming file and tensor for values that cannot be (a scale that is not finite).
    """

    reads: tuple[Rows, ...]
    makes: tuple[Chunk, ...]
    make: Callable[..., tuple[np.ndarray, ...]]
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """The `leaves` that a conversion stores, `form` (what else than the source decides them, as JSON, recorded so that
    a conversion is only resumed as it was begun), `jobs`, a fresh iterator over all jobs, alike at every call: in
    about the order of the source's bytes, each chunk made once; and `config`, from the source's config.json to the one
    that describes the result, None where that is the same."""

    leaves: tuple[Leaf, ...]
    form: dict[str, str]
    jobs: Callable[[], Iterator[Job]]
    config: Callable[[dict[str, Any]], dict[str, Any]] | None = None


def plan(published: Published, contents: Contents, experts: Form | None = None, dtype: Rest | None = None) -> Plan:
    """Routed experts in the form `experts`, everything else in `dtype`.

    Without `experts`, they stay as published, but FP8 becomes bf16. Without `dtype`, so does everything else; the FP8
    Linears outside the experts stay FP8 only with `experts="fp8"`. What the model has in float32 whatever its dtype
    (the router's bias, `A_log`, `dt_bias`) is never narrowed. Raises CheckpointError where the experts' inputs do not
    divide into groups of INT4.
    """
    order = {name: i for i, name in enumerate(published.tensors)}
    kept = {leaf.path for leaf in stored(contents.model) if leaf.dtype == F32 and dtype != "float32"}
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

    def jobs() -> Iterator[Job]:
        for source, target in pairs:
            if [(leaf.path, leaf.dtype) for leaf in source] == [(leaf.path, leaf.dtype) for leaf in target]:
                for leaf in source:
                    yield from _verbatim(published, leaf)
            else:
                yield from _transform(published, source, target)

    leaves = tuple(leaf for _, target in pairs for leaf in target)
    settings: dict[str, str] = {"experts": experts or "as published", "dtype": dtype or "as published"}
    if all(source == target for source, target in pairs):
        return Plan(leaves, settings, jobs)
    return Plan(leaves, settings, jobs, lambda config: _described(config, leaves, dtype))


def _weights(leaves: Sequence[Leaf]) -> Iterator[tuple[Leaf, ...]]:
    """Words or e4m3 with their scales, all others alone."""
    by_path = {leaf.path: leaf for leaf in leaves}
    for leaf in leaves:
        if leaf.weight is None:
            yield (leaf,)
        elif leaf.weight.is_first:
            yield tuple(by_path[path] for path in leaf.weight.names)


def _in_form(source: Sequence[Leaf], form: Form) -> tuple[Leaf, ...]:
    """The leaves of experts' weight `source` in another form."""
    first = source[0]
    assert first.weight is not None
    if first.weight.format is Int4 and form == "int4":
        return tuple(source)
    *outer, out, in_ = first.weight.part.weight_shape(first.shape)
    if form == "int4" and in_ % GROUP_SIZE:
        raise CheckpointError(f"{first.pattern} has {in_} inputs, which are no groups of {GROUP_SIZE} for INT4")
    return in_format(replace(first, shape=(*outer, out, in_), dtype=BF16), FORMATS[form])


def _described(config: Mapping[str, Any], leaves: Sequence[Leaf], dtype: Rest | None) -> dict[str, Any]:
    found = {leaf.weight.format for leaf in leaves if leaf.weight is not None}
    form: Form = "int4" if Int4 in found else "fp8" if Fp8 in found else "bf16"
    plain = [leaf for leaf in leaves if leaf.weight and leaf.weight.format is Dense and len(leaf.shape) > 1]
    not_converted = [name.removesuffix(".weight") for leaf in plain for name in leaf.names]
    described = quantization_config.described(config, form, not_converted)
    for part in (described, described.get("text_config", {})):
        part.update({name: dtype for name in ("dtype", "torch_dtype") if dtype and name in part})
    return described


def _verbatim(published: Published, leaf: Leaf) -> Iterator[Job]:
    """A chunk of a stacked leaf is an expert's tensor, of another one rows of its only tensor."""
    cut = layout(leaf)
    for number in range(cut.chunks):
        read = _rows(leaf, number)
        make = _finite(published, read, cut.chunk) if is_scales(leaf.path) else _reshaped(cut.chunk)
        # twice, since a cut along columns is copied
        yield Job((read,), (Chunk(leaf.path, number),), make, 2 * cut.chunk_bytes)


def _rows(leaf: Leaf, number: int) -> Rows:
    """What of the published tensors chunk `number` of a leaf is."""
    cut = layout(leaf)
    if leaf.stacked:
        return Rows(leaf.pattern.format(number))
    if cut.chunks == 1:
        return Rows(leaf.pattern)
    return Rows(leaf.pattern, number * cut.chunk[0], (number + 1) * cut.chunk[0])


def _transform(published: Published, source: Sequence[Leaf], target: Sequence[Leaf]) -> Iterator[Job]:
    """All of a weight's leaves for one expert, or for the rows of one chunk."""
    cuts = [layout(leaf) for leaf in target]
    for number in range(cuts[0].chunks):
        rows = _rows(target[0], number)
        reads = tuple(Rows(leaf.pattern.format(number), rows.start, rows.stop) for leaf in source)
        if source[0].dtype == FP8 and rows.stop is not None:
            reads = (reads[0], replace(reads[1], start=rows.start // BLOCK, stop=-(-rows.stop // BLOCK)))
        shapes, dtypes = [cut.chunk for cut in cuts], [leaf.dtype for leaf in target]
        made = sum(cut.chunk_bytes for cut in cuts)
        share = made / sum(leaf.nbytes for leaf in target)
        read = int(sum(leaf.nbytes for leaf in source) * share) + source[-1].nbytes // source[-1].shape[0]
        columns = shapes[0][-1] if target[0].weight is None else target[0].weight.part.weight_shape(shapes[0])[-1]
        makes = tuple(Chunk(leaf.path, number) for leaf in target)
        # made twice: in blocks of rows, then in one
        nbytes = read + 2 * made + SCRATCH_BYTES * columns
        yield Job(reads, makes, _made(published, reads, shapes, dtypes), nbytes)


def _made(
    published: Published, reads: Sequence[Rows], shapes: Sequence[tuple[int, ...]], dtypes: Sequence[np.dtype]
) -> Callable[..., tuple[np.ndarray, ...]]:
    def make(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        _check(published, reads, arrays)
        try:
            made = transformed(arrays, dtypes, skip=reads[0].start % BLOCK)
        except ValueError as error:
            raise CheckpointError(f"{published.tensors[reads[0].name].file}: tensor {reads[0].name} {error}") from None
        return tuple(array.reshape(shape) for array, shape in zip(made, shapes, strict=True))

    return make


def _reshaped(shape: tuple[int, ...]) -> Callable[[np.ndarray], tuple[np.ndarray, ...]]:
    return lambda array: (array.reshape(shape),)


def _finite(published: Published, read: Rows, shape: tuple[int, ...]) -> Callable[[np.ndarray], tuple[np.ndarray, ...]]:
    def make(scales: np.ndarray) -> tuple[np.ndarray, ...]:
        _check(published, (read,), (scales,))
        return (scales.reshape(shape),)

    return make


def _check(published: Published, reads: Sequence[Rows], arrays: Sequence[np.ndarray]) -> None:
    for read, scales in zip(reads, arrays, strict=True):
        if is_scales(read.name) and not (finite := np.isfinite(scales.astype(np.float32))).all():
            row = read.start + int(np.argwhere(~finite)[0][0])
            raise CheckpointError(
                f"{published.tensors[read.name].file}: tensor {read.name} has a scale in row {row} that is not finite"
            )
