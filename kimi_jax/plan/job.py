"""The job that a plan is for, and the sizes of a model's arrays on the devices of its slice; nothing is allocated."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from kimi_jax.config import EagleConfig, KimiConfig
from kimi_jax.model.eagle import abstract_head
from kimi_jax.model.kimi import Kimi, abstract
from kimi_jax.runtime.pools import row_pages
from sharding import AXES, Partition, StreamLayout
from sharding.topologies import Topology

Phase = Literal["decode", "prefill"]
Sizes = tuple[int, ...]

# The first mark that a path contains says what kind of memory a weight is.
_KINDS = (
    ("vision_tower.", "vision"),
    ("mm_projector.", "vision"),
    (".mlp.experts.", "experts"),
    (".self_attn.", "attention"),
    ("embed_tokens.", "embeddings"),
    ("lm_head.", "embeddings"),
    ("", "other weights"),
)


@dataclasses.dataclass(frozen=True)
class Drafting:
    """Drafts of a decode step: it verifies `tokens` of them beside each row's own token, and with a `head`, fitted to
    the model, it makes as many for the next step."""

    tokens: int
    head: EagleConfig | None = None

    @property
    def by(self) -> str:
        """Says in words who drafts."""
        return "looked up" if self.head is None else f"of an Eagle3 head in the {self.head.form} form"


@dataclasses.dataclass(frozen=True)
class Job:
    """A step of `phase` for `batch` rows of `context` tokens each, on the devices of `topology` in a mesh of `sizes`.

    A prefill step takes `chunk` tokens of every row, the last of its context; a decode step one, and its drafts.
    """

    config: KimiConfig
    topology: Topology
    sizes: Sizes
    phase: Phase
    batch: int
    context: int
    chunk: int = 1
    draft: Drafting | None = None

    @property
    def mesh(self) -> dict[str, int]:
        return dict(zip(AXES, self.sizes, strict=True))

    @property
    def partition(self) -> Partition:
        return _partition(self.sizes)

    @property
    def layout(self) -> StreamLayout:
        """The layout of the residual stream in this step."""
        decodes = True if self.phase == "decode" else None
        return shortened(self.config).stream_layout(self.partition, self.batch, self.chunk, decodes=decodes)

    @property
    def tokens(self) -> int:
        """The number of tokens that the step takes in."""
        return self.batch * self.chunk

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.config.text.dtype)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A weight of the model; `path` leaves out the numbers of layers, `bits` are an element's."""

    kind: str
    path: str
    axes: tuple[str | None, ...]
    shape: Sizes
    bits: int

    def local(self, sizes: Sizes) -> int:
        """Counts the elements on each device of a mesh. Raises ValueError where the mesh does not divide the shape."""
        return _local(self.axes, self.shape, sizes)

    def local_bytes(self, sizes: Sizes) -> int:
        return self.local(sizes) * self.bits // 8


@functools.cache
def _partition(sizes: Sizes) -> Partition:
    return Partition(AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES)))


@functools.cache
def _local(axes: tuple[str | None, ...], shape: Sizes, sizes: Sizes) -> int:
    partition = _partition(sizes)
    return partition.local_size(shape, partition.spec(axes, shape))


def first_alike(config: KimiConfig) -> tuple[int, ...]:
    """Returns, for every layer, the number of the first one with such a mixer and such a feed-forward layer."""
    text = config.text
    kinds = [(mixer, text.is_moe(number)) for number, mixer in enumerate(text.layer_kinds)]
    return tuple(kinds.index(kind) for kind in kinds)


@functools.cache
def shortened(config: KimiConfig) -> Kimi:
    """Makes the model's tree of shapes, without the layers after the first one of each kind."""
    layers = max(first_alike(config)) + 1
    return abstract(dataclasses.replace(config, text=dataclasses.replace(config.text, num_hidden_layers=layers)))


@functools.cache
def parameters(config: KimiConfig, layer: int | None = None) -> tuple[tuple[Parameter, int], ...]:
    """Lists the parameters of the model, or of one text layer: like ones once, with their number."""
    first = first_alike(config)
    layers = Counter([None, *first] if layer is None else [first[layer]])
    found: Counter[Parameter] = Counter()
    for number, weight in _parameters(config):
        found[weight] += layers[number]
    return tuple((weight, count) for weight, count in found.items() if count)


@functools.cache
def head_parameters(config: EagleConfig) -> tuple[Parameter, ...]:
    """Lists the parameters of a draft head."""
    _, params = nnx.split(abstract_head(config))
    return tuple(
        Parameter("draft head", _name(path), variable.get_metadata()["axes"], variable.shape, bits(variable.dtype))
        for path, variable in nnx.to_flat_state(params)
    )


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(part for part in path if isinstance(part, str))


@functools.cache
def _parameters(config: KimiConfig) -> tuple[tuple[int | None, Parameter], ...]:
    """Lists the parameters, of like layers those of the first, each with its text layer's number."""
    _, params = nnx.split(shortened(config))
    found = []
    for path, variable in nnx.to_flat_state(params):
        if (axes := variable.get_metadata().get("axes")) is None:
            continue
        name = _name(path)
        kind = next(kind for mark, kind in _KINDS if mark in name)
        layer = int(str(path[2])) if path[:2] == ("model", "layers") else None
        found.append((layer, Parameter(kind, name, axes, variable.shape, bits(variable.dtype))))
    return tuple(found)


def words(mesh: Mapping[str, int]) -> str:
    """Returns a mesh as `--mesh` takes it: the axes of several devices with their sizes."""
    return ",".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or f"{AXES[0]}=1"


def bits(dtype: Any) -> int:
    """Returns the bits of an element on a device, where an INT4 code takes half a byte (numpy says a whole one)."""
    return 4 if jnp.dtype(dtype).name in ("int4", "uint4") else 8 * jnp.dtype(dtype).itemsize


def pool_sizes(batch: int, context: int, partition: Partition) -> tuple[int, int]:
    """Computes the pages and slots of a cache for `batch` rows of `context` tokens.

    Raises ValueError where the batch does not divide by the data axis.
    """
    if batch % (parts := partition.num_shards("batch")):
        raise ValueError(f"a batch of {batch} rows cannot be sharded over a data axis of {parts}")
    return batch * row_pages(context, partition), batch
