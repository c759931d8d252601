"""Lower bounds of a training step's time, by arithmetic: products, bytes to and from HBM, and messages of a device.

As everywhere in plans, the longest of the three bounds the step, as if everything overlapped and nothing waited. The
optimizer's products count, and so do those that the gradient computes again.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kimi_jax.plan.job import Parameter
from kimi_jax.plan.train_job import TrainJob, active_parameters, counted
from kimi_jax.plan.train_traffic import Messages
from kimi_jax.training import treatment
from sharding.topologies import Topology

NEWTON_SCHULZ_STEPS = 5
# Bytes of HBM for each parameter of a device, with masters and momentum in float32 and all else in bf16: its master is
# read and rounded (4 + 2), read by the forward and by the backward pass (2 + 2); its gradient is written, and read for
# the norm and for the update (2 + 2 + 2); momentum and master are read and written (8 + 8).
STATE_TRAFFIC = 32
# And for each parameter of Muon: its direction is written and read (2 + 2), and a step of Newton-Schulz reads it for
# the Gram matrix and for the product, and writes it.
MUON_TRAFFIC = 4 + NEWTON_SCHULZ_STEPS * 6


@dataclasses.dataclass(frozen=True)
class TrainBound:
    """A device's share of a step. `model_flops` are six for each token and parameter that it meets, without attention's
    own; `flops` are all that the step computes, `optimizer_flops` of them Newton-Schulz's. `hop_bytes` are the bytes
    sent, each as often as it passes a link."""

    model_flops: float
    flops: float
    optimizer_flops: float
    hbm_bytes: float
    sent_bytes: float
    hop_bytes: float
    model_seconds: float
    flops_seconds: float
    hbm_seconds: float
    sent_seconds: float

    @property
    def lower_bound_seconds(self) -> float:
        return max(self.flops_seconds, self.hbm_seconds, self.sent_seconds)

    @property
    def bound_by(self) -> str:
        times = {"FLOPs": self.flops_seconds, "HBM": self.hbm_seconds, "links": self.sent_seconds}
        return max(times, key=times.__getitem__)

    @property
    def mfu(self) -> float:
        """The largest share of the chip's bf16 peak that the model's products can reach (model FLOPs utilisation)."""
        return self.model_seconds / self.lower_bound_seconds


def bound(job: TrainJob, sent: Sequence[Messages]) -> TrainBound:
    """Computes the bounds of a step that sends these messages."""
    chip = job.topology.chip
    model = 6 * active_parameters(job.config) * job.tokens_per_device
    optimizer = newton_schulz_flops(job)
    products = computed_flops(job) + optimizer
    read = hbm_bytes(job, sent)
    sent_bytes = sum(one.sent for one in sent)
    hops = sum(one.sent * _hops(one, job) for one in sent)
    peak = chip.bf16 * chip.cores
    return TrainBound(
        model_flops=model,
        flops=products,
        optimizer_flops=optimizer,
        hbm_bytes=read,
        sent_bytes=sent_bytes,
        hop_bytes=hops,
        model_seconds=model / peak,
        flops_seconds=products / peak,
        hbm_seconds=read / (chip.hbm * chip.cores),
        sent_seconds=hops / chip.links,
    )


def computed_flops(job: TrainJob) -> float:
    """Counts a device's products: forward, forward again layer by layer, and backward.

    Of experts the forward pass in the gradient is the one that runs again, so that they count four times, as all other
    layers do; the last projection three times. Attention's blocks compute their scores once more than that.
    """
    text, tokens = job.config.text, job.tokens_per_device
    head = text.vocab_size * text.hidden_size
    products = (8 * (active_parameters(job.config) - head) + 6 * head) * tokens
    return products + 5 * attention_flops(job) * tokens


def attention_flops(job: TrainJob) -> float:
    """Counts the products of attention's forward pass for a token: scores of the tokens before it and their values in
    MLA, two products with the state and its update in KDA."""
    text = job.config.text
    mla = text.num_attention_heads * (text.qk_head_dim + text.v_head_dim) * (job.tokens + 1)
    linear = text.linear_attn
    kda = 0 if linear is None else linear.num_heads * 6 * linear.head_dim**2
    kinds = text.layer_kinds
    return float(kinds.count("mla") * mla + kinds.count("kda") * kda)


def newton_schulz_flops(job: TrainJob) -> float:
    """Counts a device's products of Muon's iteration: of X [m, n] in each step X Xᵀ, its square, and one with X."""
    total = 0.0
    for one, count in counted(job.config):
        if _is_muon(one):
            *stack, out, in_ = one.shape
            m, n = sorted((out, in_))
            matrices = count * math.prod(stack)
            total += matrices * NEWTON_SCHULZ_STEPS * (4 * m * m * n + 2 * m**3)
    return total / job.topology.devices


def hbm_bytes(job: TrainJob, sent: Sequence[Messages]) -> float:
    """Counts bytes to and from HBM: `STATE_TRAFFIC` and `MUON_TRAFFIC`, the stream that the gradient keeps, and what
    messages read and write."""
    partition, total = job.partition, 0.0
    for one, count in counted(job.config):
        if one.kind != "vision":
            local = count * partition.local_size(one.shape, partition.spec(one.axes, one.shape))
            total += local * (STATE_TRAFFIC + (MUON_TRAFFIC if _is_muon(one) else 0))
    total += 2 * stream_bytes(job)
    grow = {"all-gather": lambda one: one.group, "reduce-scatter": lambda one: 1 / one.group}
    for message in sent:
        total += message.nbytes * (1 + grow.get(message.kind, lambda _: 1)(message))
    return total


def stream_bytes(job: TrainJob) -> float:
    """Computes the bytes of the residual stream before each layer, in bf16, which a device keeps for the gradient."""
    text = job.config.text
    return text.num_hidden_layers * job.tokens_per_device * text.hidden_size * 2


def _is_muon(one: Parameter) -> bool:
    name = one.path.replace("model.layers.", "model.layers.0.")
    return one.kind != "vision" and treatment(name, jax.ShapeDtypeStruct(one.shape, jnp.float32)) == "muon"


def _hops(one: Messages, job: TrainJob) -> float:
    """Returns the links that a byte passes on its way.

    In an all-to-all of half the devices or more this is the mean distance of two chips; other messages are taken to go
    from neighbour to neighbour.
    """
    far = "all-to-all" in one.kind and 2 * one.group >= job.topology.devices
    return mean_distance(job.topology) if far else 1.0


def mean_distance(topology: Topology) -> float:
    """Returns the mean distance of two chips, in links, where each dimension of four or more chips is a ring.

    GPUs are one link apart.
    """
    if topology.is_gpu:
        return 1.0
    total = 0.0
    for size in map(int, topology.name.split(":")[1].split("x")):
        apart = [min(n, size - n) if size >= 4 else n for n in range(size)]
        total += sum(apart) / size if size >= 4 else (size * size - 1) / (3 * size)
    return max(1.0, total)
