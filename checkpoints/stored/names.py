"""Maps published tensor names to paths of the model's tree and back; `kimi_jax.families` has each family's rules.

A *stored leaf* is what an Orbax checkpoint of ours holds: published words, shapes and orientation, with a layer's
experts stacked on a leading axis. Its path is the tree's own, except that packed experts keep their published endings
(`weight_packed`, `weight_scale`), since the tree's `codes` and `scales` are in the kernels' layout, and that an FP8
`weight` has its `weight_scale_inv` beside it. What leaves a model has is read off the abstract model, so that there is
one truth.
"""

import dataclasses
import re
import warnings
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx

from checkpoints.files.place import Place
from checkpoints.published.endings import PACKED, WeightPart, packed_format, shape_name, weight_part
from checkpoints.published.numerics import FP8
from checkpoints.published.safetensors import CheckpointError, Published, Tensor
from checkpoints.published.sizes import check_sizes
from kimi_jax.config import EagleConfig, KimiConfig, QuantizationConfig
from kimi_jax.families import prefix_of, published_name
from kimi_jax.model.eagle import EagleHead
from kimi_jax.model.kimi import Kimi, abstract
from pallas_kernels.formats import Fp8, Int4, Mxfp4, Part, Weight

# The parts of the model's packed weights, by name and dtype (of which INT4's scales may have any), and the stored ones.
_PACKED = {
    (part.name, part.dtype and np.dtype(part.dtype)): (part, stored)
    for weight_format in PACKED
    for part, stored in zip(weight_format.parts, weight_format.stored, strict=True)
}
_ENDINGS = {stored.name: part.name for part, stored in _PACKED.values()}
_TEXT = ("model.", "lm_head.")
_MTP = "eh_proj.weight"  # joins the last hidden state and the next token's embedding
_FLOATS = ("bfloat16", "float32", "float16")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One stored leaf: published shape and dtype (a leading axis of experts where there are `names` of several), and
    the logical `axes` of its dimensions. `pattern` is the published name, with {} for the expert's number."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    pattern: str
    axes: tuple[str | None, ...]

    @property
    def stacked(self) -> bool:
        """True where the leading axis counts experts."""
        return "{}" in self.pattern

    @property
    def names(self) -> tuple[str, ...]:
        """The published tensors, one per expert or one."""
        return tuple(self.pattern.format(e) for e in range(self.shape[0])) if self.stacked else (self.pattern,)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def weight(self) -> WeightPart | None:
        """The part of a weight that this is."""
        return weight_part(self.path, self.dtype)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The weight's [out, in], which is published beside INT4 words."""
        part = Int4.stored[0] if self.weight is None else self.weight.part
        return part.weight_shape(self.shape)[-2:]


@dataclasses.dataclass(frozen=True)
class Contents:
    """The contents of a checkpoint: the abstract model or draft head that it fills (experts are packed as the tensors
    are, whatever config.json says), its leaves, and the published tensors that are `skipped`."""

    model: Kimi | EagleHead
    leaves: tuple[Leaf, ...]
    skipped: tuple[str, ...]

    @property
    def config(self) -> KimiConfig | EagleConfig:
        return self.model.config

    @property
    def float32_paths(self) -> set[str]:
        """The leaves that a model of any dtype has in float32."""
        if isinstance(self.model, EagleHead):
            return set()
        return {leaf.path for leaf in stored_leaves(self.model) if leaf.dtype == np.float32}


def stored_leaves(model: Kimi) -> list[Leaf]:
    """Returns the leaves that a checkpoint of `model` must have, with the published names of a text-only checkpoint."""
    flat = nnx.to_flat_state(nnx.state(model))
    return [_leaf(model.config, tuple(map(str, path)), variable) for path, variable in flat]


def with_fp8(leaves: Iterable[Leaf], names: Callable[[Leaf], str], known: Container[str]) -> list[Leaf]:
    """Returns `leaves`, those in FP8 whose scales are `known` by the name that goes with the leaf's own of `names`."""
    scales = Fp8.stored[1].name
    result: list[Leaf] = []
    for leaf in leaves:
        stem, _, ending = names(leaf).rpartition(".")
        is_fp8 = ending == Fp8.stored[0].name and len(leaf.shape) > 1 and f"{stem}.{scales}" in known
        result += in_format(leaf, Fp8) if is_fp8 else [leaf]
    return result


def in_format(leaf: Leaf, weight_format: type[Weight]) -> tuple[Leaf, ...]:
    """Returns the leaves that hold the plain weight of `leaf` in a format."""
    path, pattern = (name.rpartition(".")[0] for name in (leaf.path, leaf.pattern))
    return tuple(
        Leaf(
            f"{path}.{part.name}",
            part.shape(leaf.shape),
            leaf.dtype if part.dtype is None else np.dtype(part.dtype),
            f"{pattern}.{part.name}",
            part.axes(leaf.axes),
        )
        for part in weight_format.stored
    )


def variable_path(path: str) -> tuple[str | int, ...]:
    """Returns the path, in the model's state, of the variable that the stored leaf at `path` fills."""
    *stem, ending = path.split(".")
    ending = _ENDINGS.get(ending, ending)
    return tuple(int(part) if part.isdecimal() else part for part in (*stem, ending))


def _leaf(config: KimiConfig, path: tuple[str, ...], variable: nnx.Variable) -> Leaf:
    *parents, ending = path
    part, stored = _packed_part(ending, np.dtype(variable.dtype))
    name = ".".join([*parents, ending if stored is None else stored.name])
    shape, dtype, axes = tuple(variable.shape), np.dtype(variable.dtype), variable.get_metadata()["axes"]
    if ending == "A_log" and config.text.linear_attn is not None:
        padded = config.text.linear_attn.stored_decays
        if padded != shape[0]:
            shape, axes = (padded,), (None,)
    if ".mlp.experts." not in name:
        return Leaf(name, shape, dtype, published_name(config, name), axes)
    pattern = published_name(config, name.replace(".experts.", ".experts.{}."))
    if part is None or stored is None:
        return Leaf(name, shape, dtype, pattern, axes)
    whole, whole_axes = part.weight_shape(shape), part.weight_axes(axes)
    return Leaf(name, stored.shape(whole), np.dtype(stored.dtype), pattern, stored.axes(whole_axes))


def _packed_part(name: str, dtype: np.dtype) -> tuple[Part, Part] | tuple[None, None]:
    return _PACKED.get((name, dtype)) or _PACKED.get((name, None)) or (None, None)


def contents(config: KimiConfig, published: Published) -> Contents:
    """Returns the contents of a published folder, every tensor of it accounted for.

    `rotary_emb.inv_freq` is ignored; tensors of the MTP layers that `num_nextn_predict_layers` announces are left out
    with a warning. Raises `CheckpointError` naming tensors that are missing, unknown, or not of the shape or dtype
    that the configuration asks for, a `weight_shape` that contradicts its weight, and more layers or experts in the
    configuration than in the tensors.
    """
    tensors = {name: t for name, t in published.tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    skipped = _mtp(config, tensors, published)
    for name in skipped:
        del tensors[name]
    if skipped:
        warnings.warn(f"{published.folder}: {len(skipped)} tensors of MTP layers are left out", stacklevel=2)
    check_sizes(config, {name: tensor.shape for name, tensor in tensors.items()}, str(published.folder))
    model = abstract_of_form(config, packed_format((name, tensor.dtype) for name, tensor in tensors.items()))
    prefix = prefix_of(tensors)
    leaves = [with_prefix(leaf, prefix) for leaf in stored_leaves(model)]
    leaves = with_fp8(leaves, lambda leaf: leaf.names[0], tensors)
    check_names(published.folder, leaves, tensors)
    leaves = [check_tensors(leaf, tensors) for leaf in leaves]
    for leaf in leaves:
        _check_weight_shapes(leaf, published)
    return Contents(model, tuple(leaves), skipped)


def abstract_of_form(config: KimiConfig, packed: type[Weight] | None) -> Kimi:
    """Returns the abstract bf16 model of `config`, its experts in the `packed` format, dense where it is None."""
    if packed is None:
        return abstract(config.dense(), jnp.bfloat16)
    quantization = QuantizationConfig(format="mxfp4" if packed is Mxfp4 else "int4")
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, quantization=quantization))
    return abstract(config, jnp.bfloat16)


def as_stored(leaf: Leaf, shape: tuple[int, ...], dtype: np.dtype, where: str) -> Leaf:
    """Returns `leaf` with the shape and dtype that were found. `A_log` is published as [H] or [1, 1, H, 1].

    Raises `CheckpointError`, which `where` opens, for any other shape or kind of number than the model asks for.
    """
    expected, axes = leaf.shape, leaf.axes
    if leaf.path.endswith(".A_log") and shape == (1, 1, *leaf.shape, 1):
        expected, axes = shape, (None, None, *leaf.axes, None)
    if shape != expected:
        raise CheckpointError(f"{where} has shape {list(shape)}, expected {list(expected)}")
    is_float = leaf.dtype.name in _FLOATS
    as_is = not is_float or (leaf.weight is not None and leaf.weight.part.dtype is not None)
    kinds = (leaf.dtype.name,) if as_is else _FLOATS
    if dtype.name not in kinds:
        scales = f" (no {Fp8.stored[1].name} lies beside it)" if dtype == FP8 else ""
        raise CheckpointError(f"{where} has dtype {dtype.name}, expected {' or '.join(kinds)}{scales}")
    return dataclasses.replace(leaf, shape=shape, dtype=dtype, axes=axes)


def with_prefix(leaf: Leaf, prefix: str) -> Leaf:
    """Returns `leaf` under the published name that it has where the text model's names begin with `prefix`."""
    return dataclasses.replace(leaf, pattern=prefix + leaf.pattern) if leaf.path.startswith(_TEXT) else leaf


def _mtp(config: KimiConfig, tensors: Mapping[str, Tensor], published: Published) -> tuple[str, ...]:
    """Returns the tensors of the announced layers for predicting further tokens, which come after the model's own.
    Raises `CheckpointError` where one of these layers has no `eh_proj`: then it is one of the model's own."""
    first = config.text.num_hidden_layers
    layers = range(first, first + config.text.num_nextn_predict_layers)
    if not layers:
        return ()
    before, joint = published_name(config, f"model.layers.{{}}.{_MTP}").split("{}.")
    layer = re.compile(rf"(?:{re.escape(prefix_of(tensors))})?{re.escape(before)}(\d+)\.(.*)")
    found = [(name, int(match[1]), match[2]) for name in tensors if (match := layer.match(name))]
    skipped = {name: number for name, number, _ in found if number in layers}
    joined = {number for _, number, rest in found if rest == joint}
    for number in sorted(set(skipped.values()) - joined):
        raise CheckpointError(
            f"{published.folder}: layer {number} has no {joint}, so it is no MTP layer; "
            f"config.json has num_hidden_layers {first}"
        )
    return tuple(skipped)


def check_names(folder: Place, leaves: Sequence[Leaf], tensors: Collection[str]) -> None:
    """Raises `CheckpointError`, naming the first of them, where `tensors`, published names, are not those of
    `leaves`."""
    expected = {name for leaf in leaves for name in leaf.names}
    expected |= {shape for leaf in leaves for name in leaf.names if (shape := shape_name(name, leaf.dtype))}
    for kind, names in (
        ("are missing", expected - set(tensors)),
        ("belong to no part of this model", set(tensors) - expected),
    ):
        if names:
            first = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise CheckpointError(f"{folder}: {len(names)} tensors {kind}: {first}")


def check_tensors(leaf: Leaf, tensors: Mapping[str, Tensor]) -> Leaf:
    """Returns the leaf with the shape and dtype of its tensors, on which all experts must agree. Raises what
    `as_stored` raises."""
    one = dataclasses.replace(leaf, shape=leaf.shape[1:], axes=leaf.axes[1:]) if leaf.stacked else leaf
    first = tensors[leaf.names[0]]
    for name in leaf.names:
        tensor = tensors[name]
        where = f"{tensor.file}: tensor {name}"
        found = as_stored(one, tensor.shape, tensor.dtype, where)
        if tensor.dtype != first.dtype:
            raise CheckpointError(f"{where} has dtype {tensor.dtype}, but {first.name} has {first.dtype}")
    return dataclasses.replace(leaf, dtype=first.dtype) if leaf.stacked else found


def _check_weight_shapes(leaf: Leaf, published: Published) -> None:
    names = [shape for name in leaf.names if (shape := shape_name(name, leaf.dtype))]
    for name in names:
        first = published.tensors[names[0]]
        tensor = published.tensors[name]
        where = f"{tensor.file}: tensor {name}"
        if tensor.dtype.name not in ("int32", "int64") or tensor.shape != (2,):
            raise CheckpointError(f"{where} is {tensor.dtype} {list(tensor.shape)}, expected int32 or int64 [2]")
        if (value := tuple(published.read(name).tolist())) != leaf.weight_shape:
            raise CheckpointError(f"{where} says {list(value)}, expected {list(leaf.weight_shape)}")
        if tensor.dtype != first.dtype:
            raise CheckpointError(f"{where} has dtype {tensor.dtype}, but {first.name} has {first.dtype}")
