"""Expert parallelism, in two ways that give the same sums; weights never move, and no token is dropped in either.

*Replicated*, for few tokens: every device has the tokens of all and adds up what its own experts give them; a sum over
the mesh is all that follows (`Residual.everyone`, `Residual.back`).

*Exchanged*, for many: each device routes a part of the tokens and sends each once to every device with one of its
experts, which sends back what its experts give. Where the compiler has it, `ragged_all_to_all` sends exactly the tokens
there are into room for all tokens of all devices, the most that can come. Elsewhere blocks of `capacity` tokens go
between any two devices, in as many rounds as the fullest pair needs: memory is bounded whatever the imbalance.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from sharding.collectives import index, size, split
from sharding.mesh import AXES
from sharding.rules import WEIGHTS, divided

# compute(tokens [n, *d], their experts [n, j], their weights [n, j]) -> the part of their sums that is made here
Compute = Callable[[Array, Array, Array], Float32[Array, "n *d"]]

# What an exchange must save a device, in bytes, to be worth its further messages and the layouts that they ask for. A
# layer of K2.5 on a v6e:8x8 takes about as long either way with some 2,000 tokens: messages, HBM and the compiler's
# cycles of the rest. benchmarks/expert_exchange.py compares the estimates below with what programs send.
WORTH_EXCHANGING = 2**26
# A TPU sends rows one by one, and lays out anew what does not have them in one piece each: these numbers are a tile.
SUBLANES, LANES = 8, 128
# Tokens of a block over those that a pair of devices exchanges on average.
SLACK = 1.25


def first_expert(held: int, experts: int) -> Array | int:
    """The number of the first of the `held` experts that this device has of `experts`."""
    return held * index(_expert_axes(experts))


def _expert_axes(experts: int) -> tuple[str, ...]:
    return tuple(divided(list(split(WEIGHTS["expert"])), experts, jax.sharding.get_abstract_mesh())[0])


def bytes_replicated(tokens: int, width: int) -> float:
    """What a device receives for the tokens of all, in bf16, and their sums in float32."""
    return tokens * width * (2.0 + 4.0)


def bytes_exchanged(tokens: int, width: int, chosen: int, devices: int, alike: int) -> float:
    """What a device receives where `alike` of them have the same tokens: blocks of its share of the tokens, once for
    each of the devices with its experts if these are spread evenly, and the results of those alike."""
    reached = devices * share(chosen, devices)
    return tokens / devices * width * (SLACK * reached * (2 + 4) + 2 * (alike - 1))


def worth_exchanging(tokens: int, width: int, chosen: int, devices: int, alike: int) -> bool:
    """Whether an exchange saves more than its further messages cost."""
    saved = bytes_replicated(tokens, width) - bytes_exchanged(tokens, width, chosen, devices, alike)
    return saved > WORTH_EXCHANGING


class Routes(NamedTuple):
    """This device's tokens for each device and each device's for this one: which of the sender's, those that go first;
    and how many go. With the experts and weights of all devices' tokens."""

    sent: Int32[Array, "devices n"]
    sending: Int32[Array, "devices"]
    received: Int32[Array, "devices n"]
    receiving: Int32[Array, "devices"]
    chosen: Int32[Array, "devices n j"]
    weights: Float32[Array, "devices n j"]


def exchanged(
    x: Float[Array, "n d"],
    chosen: Int32[Array, "n j"],
    weights: Float32[Array, "n j"],
    compute: Compute,
    held: int,
    experts: int,
) -> Float32[Array, "n d"]:
    """The sums for tokens that this device alone has, `compute` being every device's part of any tokens' sums."""
    names = split(AXES)
    here = routes(chosen, weights, names, held, experts)
    copies = size(names) // size(_expert_axes(experts))
    return lax.platform_dependent(
        x, here, tpu=partial(by_ragged, names, compute, copies), default=partial(in_rounds, names, compute, copies)
    )


def routes(
    chosen: Int32[Array, "n j"], weights: Float32[Array, "n j"], names: tuple[str, ...], held: int, experts: int
) -> Routes:
    """Who sends what to whom, after one message of all tokens' experts and weights."""
    # the number of the experts' part that every device has: several have the same where an expert's width is split too
    part = index(_expert_axes(experts))
    parts = lax.all_gather(jnp.asarray(part, jnp.int32), names)
    all_chosen, all_weights = lax.all_gather(chosen, names), lax.all_gather(weights, names)
    sent, sending = _listed((chosen[:, :, None] // held == parts).any(axis=1).T)
    received, receiving = _listed((all_chosen // held == part).any(axis=-1))
    return Routes(sent, sending, received, receiving, all_chosen, all_weights)


def _listed(wanted: Bool[Array, "devices n"]) -> tuple[Int32[Array, "devices n"], Int32[Array, "devices"]]:
    return jnp.argsort(~wanted, axis=1, stable=True).astype(jnp.int32), jnp.sum(wanted, axis=1, dtype=jnp.int32)


def share(chosen: int, parts: int) -> float:
    """How many of the tokens want a device, if their experts are spread evenly over `parts` devices."""
    return 1 - (1 - 1 / parts) ** chosen


def capacity(tokens: int, chosen: int, parts: int) -> int:
    """Tokens of a block: what a pair exchanges on average, and a quarter more."""
    return min(tokens, -(-math.ceil(SLACK * tokens * share(chosen, parts)) // 8) * 8)


def in_rounds(names: tuple[str, ...], compute: Compute, copies: int, x: Array, here: Routes) -> Float32[Array, "n d"]:
    """By `all_to_all` of blocks, as often as the fullest pair of devices needs."""
    (devices, tokens), block = here.sent.shape, capacity(len(x), here.chosen.shape[-1], size(names) // copies)
    padding = ((0, 0), (0, -tokens % block))
    sent, received = jnp.pad(here.sent, padding), jnp.pad(here.received, padding)
    sender = jnp.arange(devices)[:, None]

    def exchange(rows: Array) -> Array:
        return lax.all_to_all(rows, names, 0, 0)

    def one_round(i: Array, y: Array) -> Array:
        number = i * block + jnp.arange(block)
        mine, theirs = (lax.dynamic_slice_in_dim(listed, i * block, block, axis=1) for listed in (sent, received))
        goes, comes = (number < count[:, None] for count in (here.sending, here.receiving))
        rows = exchange(jnp.where(goes[:, :, None], x[mine], 0))
        chosen = jnp.where(comes[:, :, None], here.chosen[sender, theirs], -1)
        routed = (chosen, here.weights[sender, theirs])
        part = compute(rows.reshape(-1, x.shape[1]), *(array.reshape(devices * block, -1) for array in routed))
        back = exchange(part.reshape(devices, block, -1))
        return y.at[mine].add(jnp.where(goes[:, :, None], back, 0))

    fullest = lax.pmax(jnp.max(here.sending), names)
    return lax.fori_loop(0, -(-fullest // block), one_round, jnp.zeros(x.shape, jnp.float32))


def by_ragged(names: tuple[str, ...], compute: Compute, copies: int, x: Array, here: Routes) -> Float32[Array, "n d"]:
    """By `ragged_all_to_all`: exactly what is wanted, there and back."""
    devices, tokens = here.sent.shape
    me = index(names)
    # counts[s, r]: how many tokens device s sends to device r
    counts = lax.all_gather(here.sending, names)
    before_of_sender = jnp.cumsum(counts, axis=1) - counts  # where in s's list those for r begin
    before_at_receiver = jnp.cumsum(counts, axis=0) - counts  # where in r's room those of s begin
    number = jnp.arange(tokens, dtype=jnp.int32)

    def packed(listed: Array, begin: Array, count: Array, room: int) -> Array:
        """The listed numbers of all devices, one device's after another's; the rest of the room is `tokens`."""
        place = jnp.where(number < count[:, None], begin[:, None] + number, room)
        return jnp.full(room, tokens, jnp.int32).at[place].set(listed, mode="drop")

    def exchange(rows: Array, room: int, begin: Array, count: Array, at: Array, coming: Array) -> Array:
        target = jnp.zeros((room, *rows.shape[1:]), rows.dtype)
        return lax.ragged_all_to_all(rows, target, begin, count, at, coming, axis_name=names)

    leaving = tokens * min(devices, here.chosen.shape[-1] * copies)
    mine = packed(here.sent, before_of_sender[me], here.sending, leaving)
    flat = here.received + tokens * jnp.arange(devices, dtype=jnp.int32)[:, None]
    theirs = packed(flat, before_at_receiver[:, me], here.receiving, devices * tokens)
    comes = jnp.arange(devices * tokens) < jnp.sum(here.receiving)

    if x.shape[1] % (SUBLANES * LANES) == 0:
        x = x.reshape(len(x), SUBLANES, -1)
    sent = x.at[mine].get(mode="fill", fill_value=0)
    rows = exchange(sent, devices * tokens, before_of_sender[me], here.sending, before_at_receiver[me], here.receiving)
    of_all = (array.reshape(devices * tokens, -1) for array in (here.chosen, here.weights))
    chosen, weights = (array[jnp.where(comes, theirs, 0)] for array in of_all)
    part = compute(rows, jnp.where(comes[:, None], chosen, -1), weights)
    back = exchange(part, leaving, before_at_receiver[:, me], here.receiving, before_of_sender[:, me], here.sending)
    return jnp.zeros(x.shape, jnp.float32).at[mine].add(back, mode="drop").reshape(len(x), -1)
