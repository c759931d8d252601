"""Reads folders that transformers saved as published ones: renames their tensors, and cuts fused ones.

`save_pretrained` of transformers 5 undoes the renaming that loading did, not all of it (seen with 5.23: Kimi-K2.5 and
Kimi Linear). With `save_original_format=False`, and for offloaded models, it keeps the names of its own modules, and a
layer's experts are one tensor: `gate_up_proj` [experts, 2 * inner, hidden] and `down_proj` [experts, hidden, inner].

A part of a tensor whose bytes are contiguous is a tensor too: a file, an offset and a shape say where it is. Experts
are therefore cut here, before anything is read, and nothing else in this package knows of fused tensors.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from checkpoints.files.place import Remote
from checkpoints.published.safetensors import CheckpointError, Published, Tensor
from kimi_jax.printable import printable

_MOST_EXPERTS = 2**16  # of a layer; a header that claims more is damaged, and each would be an entry in a table
_ORIGINAL = "save it again with save_pretrained(..., save_original_format=True), from a model that is not offloaded"


@dataclass(frozen=True)
class Spelling:
    """The names of one kind of folder, recognised by a tensor that `mark` matches, and the published ones: the first
    match of each pattern in `renames` is replaced."""

    mark: re.Pattern[str]
    renames: tuple[tuple[re.Pattern[str], str], ...]


_SPELLINGS = (
    # Kimi-K2.5
    Spelling(
        re.compile(r"language_model\.model\.blocks\.\d"),
        (
            (re.compile(r"^language_model\.model\.blocks\."), "language_model.model.layers."),
            (re.compile(r"^model\.mm_projector\."), "mm_projector."),
            (re.compile(r"^vision_tower\.encoder\.patch_embed\."), "vision_tower.patch_embed."),
        ),
    ),
    # Kimi Linear: the dense layers too are called block_sparse_moe.
    Spelling(
        re.compile(r"\.block_sparse_moe\.gate_proj\."),
        ((re.compile(r"\.block_sparse_moe\.(?=(gate|up|down)_proj\.)"), ".mlp."),),
    ),
    # Kimi Linear, save_original_format=False
    Spelling(
        re.compile(r"\.self_attn\.forget_gate\."),
        (
            (re.compile(r"\.forget_gate\."), "."),
            (re.compile(r"\.mlp\.(?=gate\.|experts\.|shared_experts\.)"), ".block_sparse_moe."),
        ),
    ),
)
# Kimi-K2.5, save_original_format=False: rows of the vision tower's queries and keys are in another order.
_UNREADABLE = re.compile(r"model\.(language_model|vision_tower)\.")

_FUSED = re.compile(r"(.*\.(mlp|block_sparse_moe)\.experts)\.(gate_up_proj|down_proj)(.*)")
_EXPERT_NAMES = {"mlp": ("gate_proj", "up_proj", "down_proj"), "block_sparse_moe": ("w1", "w3", "w2")}
_CONV = ".self_attn.conv1d.weight"  # of queries, keys and values
_FLOATS = ("bfloat16", "float16", "float32")


def open_published(folder: str | Path | Remote) -> Published:
    """Opens a folder like `Published.open`, with the published names, whatever names transformers saved it under.

    Raises what `Published.open` raises, and CheckpointError for a spelling that cannot be read (the message says how
    to save the model again), for fused tensors that are quantised or of another rank, and for two tensors that have
    the same published name.
    """
    published = Published.open(folder)
    return dataclasses.replace(published, tensors=_published_tensors(published))


def _published_tensors(published: Published) -> dict[str, Tensor]:
    """Returns the tensors by their published names, in the order of the files and their bytes."""
    names = published.tensors
    if any(_UNREADABLE.match(name) for name in names):
        raise CheckpointError(
            f"{published.folder}: has tensors under the names of transformers' own modules, in another order of rows "
            f"than Kimi-K2.5 is published in; {_ORIGINAL}"
        )
    renames = next((s.renames for s in _SPELLINGS if any(s.mark.search(name) for name in names)), ())
    tensors: dict[str, Tensor] = {}
    for stored in names.values():
        name = stored.name
        for pattern, replacement in renames:
            name = pattern.sub(replacement, name, count=1)
        for tensor in _parts(stored if name == stored.name else dataclasses.replace(stored, name=name)):
            if tensor.name in tensors:
                theirs, ours = printable(stored.name), printable(tensor.name)
                raise CheckpointError(f"{stored.file}: tensor {theirs} stands for {ours}, which is there already")
            tensors[tensor.name] = tensor
    return tensors


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yields the published tensors that `tensor` consists of: itself, or several where it is fused."""
    if found := _FUSED.fullmatch(tensor.name):
        yield from _experts(found, tensor)
    elif tensor.name.endswith(_CONV) and tensor.shape and tensor.shape[0] % 3 == 0:
        rows = tensor.shape[0] // 3
        for i, letter in enumerate("qkv"):
            name = tensor.name.replace(".conv1d.", f".{letter}_conv1d.")
            yield _part(tensor, name, i * rows, (rows, *tensor.shape[1:]))
    else:
        yield tensor


def _experts(found: re.Match[str], tensor: Tensor) -> Iterator[Tensor]:
    experts, block, kind, ending = found.groups()
    where = f"{tensor.file}: tensor {printable(tensor.name)}"
    if ending or tensor.dtype.name not in _FLOATS:
        raise CheckpointError(
            f"{where} is of a layer's fused experts, quantised; only {', '.join(_FLOATS)} can be read: {_ORIGINAL}"
        )
    shape, halves = tensor.shape, 2 if kind == "gate_up_proj" else 1
    if len(shape) != 3 or not 0 < shape[0] <= _MOST_EXPERTS or min(shape) < 1 or shape[1] % halves:
        inner = "2 * moe_intermediate_size, hidden_size" if halves == 2 else "hidden_size, moe_intermediate_size"
        raise CheckpointError(f"{where} has shape {list(shape)}, expected [experts, {inner}]")
    gate, up, down = _EXPERT_NAMES[block]
    rows = shape[1] // halves
    for expert in range(shape[0]):
        for half, part in enumerate((gate, up) if halves == 2 else (down,)):
            name = f"{experts}.{expert}.{part}.weight"
            yield _part(tensor, name, expert * shape[1] + half * rows, (rows, shape[2]))


def _part(tensor: Tensor, name: str, row: int, shape: tuple[int, ...]) -> Tensor:
    """Returns the tensor `name` of `shape` from `row` on, where rows are counted through all leading axes."""
    offset = tensor.offset + row * math.prod(shape[1:]) * tensor.dtype.itemsize
    return Tensor(name, tensor.dtype, shape, tensor.file, offset)
