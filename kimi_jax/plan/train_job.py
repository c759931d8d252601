"""A training step that a plan is for, and the arithmetic of its states: what they take, and which slices hold them."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from typing import Literal

from jax.sharding import AbstractMesh, AxisType

from kimi_jax.config import KimiConfig
from kimi_jax.plan.job import Parameter, Sizes, parameters
from sharding import AXES, TRAIN, Partition
from sharding.topologies import Topology, topologies

# Of a device's memory: the rest is for activations and gathered weights.
STATES_SHARE = 0.75
# A layer's token mixer; all but the first layers of a model have a mixture of experts.
LayerKind = Literal["mla", "kda"]


@dataclasses.dataclass(frozen=True)
class StateForm:
    """Bytes of a trained parameter's states: its master, the optimizer's moments, and its gradient."""

    name: str
    master: int
    moments: int
    gradient: int

    @property
    def nbytes(self) -> int:
        return self.master + self.moments + self.gradient


# Muon has one moment, AdamW two. A bf16 master needs stochastic rounding: at a learning rate of 2e-6 most updates are
# less than half a step of it.
FORMS = (
    StateForm("bf16 master, bf16 momentum", 2, 2, 2),
    StateForm("float32 master, bf16 momentum", 4, 2, 2),
    StateForm("float32 master, float32 momentum", 4, 4, 2),
    StateForm("AdamW: float32 master and two float32 moments", 4, 8, 2),
)
# That of `training.Trainer` with float32 masters and `Recipe(dtype=bfloat16)`
TRAINED = FORMS[2]


@dataclasses.dataclass(frozen=True)
class TrainJob:
    """A step of quantisation-aware training by MuonClip for `rows` rows of `tokens` tokens, on the devices of
    `topology` in a mesh of `sizes`.

    `config` is that of what is published; its vision tower is left out.
    """

    config: KimiConfig
    topology: Topology
    sizes: Sizes
    rows: int
    tokens: int

    @property
    def mesh(self) -> dict[str, int]:
        return dict(zip(AXES, self.sizes, strict=True))

    @property
    def partition(self) -> Partition:
        mesh = AbstractMesh(self.sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))
        return Partition(mesh, TRAIN)

    @property
    def tokens_per_device(self) -> float:
        return self.rows * self.tokens / self.topology.devices

    def with_layers(self, dense: int, kinds: tuple[LayerKind, ...]) -> "TrainJob":
        """Returns the job of a model with the first `dense` layers, and then layers with experts of these kinds."""
        text = self.config.text
        mixers = (*text.layer_kinds[:dense], *kinds)
        kda, mla = (tuple(i + 1 for i, mixer in enumerate(mixers) if mixer == kind) for kind in ("kda", "mla"))
        linear = text.linear_attn
        if linear is not None:
            linear = dataclasses.replace(linear, kda_layers=kda, full_attn_layers=mla)
        short = dataclasses.replace(
            text, num_hidden_layers=len(mixers), first_k_dense_replace=dense, linear_attn=linear
        )
        return dataclasses.replace(self, config=dataclasses.replace(self.config, text=short, vision=None))


def layers_with_experts(config: KimiConfig) -> tuple[int, Counter[LayerKind]]:
    """Returns the number of layers without experts, which come first, and that of those with experts by kind.

    Raises ValueError where layers of the two alternate, or none has experts.
    """
    text = config.text
    moe = [text.is_moe(number) for number in range(text.num_hidden_layers)]
    dense = moe.index(True) if True in moe else len(moe)
    if dense == len(moe) or not all(moe[dense:]):
        raise ValueError("a plan of training wants layers with experts after those without, found another order")
    return dense, Counter(text.layer_kinds[dense:])


def counted(config: KimiConfig) -> Iterator[tuple[Parameter, int]]:
    """Yields the parameters that training has, with dense experts, and how many of each there are."""
    yield from parameters(config.dense())


def num_parameters(config: KimiConfig, kind: str | None = None) -> int:
    """Counts the parameters, or those of one `kind` ("experts", say)."""
    return sum(count * math.prod(one.shape) for one, count in counted(config) if kind in (None, one.kind))


def active_parameters(config: KimiConfig) -> float:
    """Counts the parameters of the text model that multiply a token: of the routed experts those that it chooses, and
    of the embeddings the last projection."""
    text, total = config.text, 0.0
    for one, count in counted(config):
        if one.kind == "experts":
            total += count * math.prod(one.shape) * text.num_experts_per_tok / text.n_routed_experts
        elif one.kind != "vision" and "embed_tokens" not in one.path:
            total += count * math.prod(one.shape)
    return total


def state_bytes(config: KimiConfig, form: StateForm, devices: int = 1) -> float:
    """Computes the bytes of all states, or of a device's even share of them."""
    return num_parameters(config) * form.nbytes / devices


def smallest_slice(config: KimiConfig, form: StateForm, chip: str) -> Topology | None:
    """Finds the smallest slice whose devices hold their share of the states in `STATES_SHARE` of their memory; None
    where none does."""
    for slice_ in topologies(chip):
        if state_bytes(config, form, slice_.devices) <= STATES_SHARE * slice_.chip.memory:
            return slice_
    return None
