"""Publishes weights in memory, trained ones say, as a folder of safetensors in the layout of the releases."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from checkpoints.files.new_folder import new_folder
from checkpoints.published.endings import PACKED, shape_name
from checkpoints.published.quantization_config import FORMATS, Form, describe_form, form_of
from checkpoints.published.shards import SHARD_BYTES, ShardWriter, TensorHeader, split_into_shards
from checkpoints.stored.companions import copy_companions
from checkpoints.stored.names import Contents, Leaf, abstract_of_form, stored_leaves, variable_path, with_prefix
from checkpoints.stored.source import open_source
from kimi_jax.config import KimiConfig
from kimi_jax.families import prefix_of
from kimi_jax.model.kimi import Kimi
from pallas_kernels.formats import Dense, Weight

# One shape in INT4 is published for every expert; compressed-tensors writes int32.
_SHAPE_DTYPE = np.dtype(np.int32)
# Of a sharded array, as many are gathered on every device at a time.
_GATHERED_BYTES = 2**28


def publish(
    params: Any, like: str | Path, folder: str | Path, *, form: Form = "int4", shard_bytes: int = SHARD_BYTES
) -> Path:
    """Writes a model's weights to a new `folder` as they would be published, and returns the folder.

    Routed experts become INT4 by the rule of the releases, MXFP4 with `form="mxfp4"`, or stay bf16 with `form="bf16"`.
    All others become bf16; the router's correction bias, `A_log` and `dt_bias` stay float32. Names, config.json,
    tokenizer and other files are those of the checkpoint in `like`. The folder appears whole or not at all.

    Args:
      params: the `nnx.State` of a `Kimi`, or a `Kimi`, with dense or packed experts. Where its arrays are sharded over
        several processes, all of them call this, and the first one writes.
      like: the folder of the checkpoint that the model was made from, converted or published.

    Raises ValueError where the weights are not of the model in `like` or `form` is "fp8", FileExistsError for a folder
    that holds anything, and OSError naming the file where the disk is full.
    """
    if form not in ("int4", "mxfp4", "bf16"):
        raise ValueError(f"publish: form is {form!r}, expected int4, mxfp4 or bf16")
    source = open_source(like)
    if not isinstance(source.contents.model, Kimi):
        raise ValueError(f"publish: {source.folder} is a draft head, expected a model")
    leaves = _leaves(source.contents, source.contents.model.config, form)
    state = nnx.state(params) if isinstance(params, nnx.Module) else params
    arrays = {path: variable.get_value() for path, variable in nnx.to_flat_state(state)}
    if jax.process_index() and not all(array.is_fully_addressable for array in arrays.values()):
        for leaf in leaves:
            _stored(leaf, arrays)  # the first process gathers this one's shards
        return Path(folder)
    headers = [header for leaf in leaves for header in _headers(leaf)]
    settings = {"published": hashlib.sha256(repr(headers).encode()).hexdigest(), "new": np.random.bytes(8).hex()}
    with new_folder(Path(folder), settings) as partial:
        with ShardWriter(partial, split_into_shards(headers, shard_bytes)) as writer:
            for leaf in leaves:
                for name, array in _tensors(leaf, _stored(leaf, arrays)):
                    writer.write(name, array)
        copy_companions(
            source.folder, partial, lambda config: config if form_of(config) == form else describe_form(config, form)
        )
    return Path(folder)


def _leaves(contents: Contents, config: KimiConfig, form: Form) -> Sequence[Leaf]:
    """Returns the stored leaves of a model in a form; those of `contents` where it has this form."""
    formats = {leaf.weight.format for leaf in contents.leaves if leaf.weight is not None}
    if formats <= {Dense, FORMATS[form]} and FORMATS[form] in formats:
        return contents.leaves
    packed = FORMATS[form] if FORMATS[form] in PACKED else None
    prefix = prefix_of(name for leaf in contents.leaves for name in leaf.names)
    return [with_prefix(leaf, prefix) for leaf in stored_leaves(abstract_of_form(config, packed))]


def _headers(leaf: Leaf) -> Iterator[TensorHeader]:
    shape = leaf.shape[1:] if leaf.stacked else leaf.shape
    for name in leaf.names:
        yield TensorHeader(name, leaf.dtype, shape)
        if (beside := shape_name(name, leaf.dtype)) is not None:
            yield TensorHeader(beside, _SHAPE_DTYPE, (2,))


def _tensors(leaf: Leaf, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    for name, one in zip(leaf.names, array if leaf.stacked else array[None], strict=True):
        yield name, one
        if (beside := shape_name(name, leaf.dtype)) is not None:
            yield beside, np.array(leaf.weight_shape, _SHAPE_DTYPE)


def _stored(leaf: Leaf, arrays: Mapping[Any, jax.Array]) -> np.ndarray:
    """Returns what a leaf stores of a model's arrays. Raises ValueError where they are not the leaf's."""
    part = leaf.weight
    if part is None:
        array = _find(arrays, leaf.path)
    elif part.format is Dense and variable_path(part.name) in arrays:  # a vector, or a matrix as it is
        array = _find(arrays, part.name)
    else:
        weight = _weight(part.stem, arrays)
        if part.format is Dense:
            array = weight.dequantize(leaf.dtype)
        else:
            quantized = weight if isinstance(weight, part.format) else part.format.from_dense(weight.dequantize())
            array = quantized.to_stored()[part.names.index(leaf.path)]
    size = math.prod(leaf.shape)
    if leaf.path.endswith(".A_log") and array.size < size:  # padded in releases with a bounded decay
        array = jnp.pad(array, (0, size - array.size))
    if array.size != size:  # (`A_log` is published as [H] or [1, 1, H, 1])
        raise ValueError(f"publish: {leaf.path} has shape {list(array.shape)}, expected {list(leaf.shape)}")
    return _on_host(jnp.asarray(array, leaf.dtype)).reshape(leaf.shape)


def _on_host(array: jax.Array) -> np.ndarray:
    """Returns the whole of an array, of which other processes may have shards; devices hold a piece of it at a time."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    rows = max(1, _GATHERED_BYTES * len(array) // array.nbytes)
    pieces = (array[first : first + rows] for first in range(0, len(array), rows))
    return np.concatenate([multihost_utils.process_allgather(piece, tiled=True) for piece in pieces])


def _weight(stem: str, arrays: Mapping[Any, jax.Array]) -> Weight:
    """Returns the weight that the parts of this stem hold, plain or packed."""
    if variable_path(f"{stem}.{PACKED[0].stored[0].name}") in arrays:
        packed = [_find(arrays, f"{stem}.{part.name}") for part in PACKED[0].stored]
        return next(form(*packed) for form in PACKED if form.parts[0].dtype == packed[0].dtype)
    return Dense(_find(arrays, f"{stem}.{Dense.stored[0].name}"))


def _find(arrays: Mapping[Any, jax.Array], path: str) -> jax.Array:
    if (found := arrays.get(variable_path(path))) is None:
        raise ValueError(f"publish: the weights have no {path}")
    return found
