"""Expert parallelism, in two ways that give the same sums; in either, weights never move and no token is dropped.

*Replicated*, for few tokens: every device has the tokens of all devices and computes what its own experts give them; a
sum over the mesh follows (`StreamLayout.gather_all`, `reduce_all`).

*Dispatched*, for many: each device routes its share of the tokens and sends each token once to every device with one of
its experts; that device sends back what its experts give, and the sender combines. Where the compiler has it,
`ragged_all_to_all` sends exactly the tokens that are wanted, into room for all tokens of all devices, the most that can
arrive. Elsewhere blocks of `block_capacity` tokens go between any two devices, in as many rounds as the fullest pair
needs: memory is bounded whatever the imbalance.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.hardware import LANES, SUBLANES
from sharding.collectives import device_index, num_devices
from sharding.partition import Partition

# compute(tokens [n, *d], their experts [n, j], their weights [n, j]) -> this device's part of their weighted sums
Compute = Callable[[Array, Array, Array], Float32[Array, "n *d"]]

# Bytes that dispatching must save a device, to pay for its further messages and for the layouts that these ask for. A
# layer of K2.5 on a v6e:8x8 takes about as long either way with some 2,000 tokens: messages, HBM and the compiler's
# cycles of the rest. benchmarks/expert_exchange.py compares the estimates below with what programs send.
MIN_BYTES_SAVED = 2**26
# A block's capacity over the tokens that a pair of devices exchanges on average.
SLACK = 1.25


def first_local_expert(num_local: int, num_experts: int, partition: Partition) -> Array | int:
    """Returns the number, among `num_experts`, of the first of the `num_local` experts on this device."""
    return num_local * device_index(partition.axis_names("expert", num_experts))


def replicate_bytes(tokens: int, width: int) -> float:
    """Estimates the bytes that a device receives without dispatching: all tokens in bf16, and their sums in float32."""
    return tokens * width * (2.0 + 4.0)


def dispatch_bytes(tokens: int, width: int, chosen: int, devices: int, copies: int) -> float:
    """Estimates the bytes that a device receives by dispatching, with every token on `copies` devices at first.

    These are blocks of its share of the tokens, once for each device that has experts of theirs (experts spread
    evenly), and the results for the other copies.
    """
    reached = devices * reached_share(chosen, devices)
    return tokens / devices * width * (SLACK * reached * (2 + 4) + 2 * (copies - 1))


def dispatch_pays(tokens: int, width: int, chosen: int, devices: int, copies: int) -> bool:
    """Tells whether dispatching saves more than its further messages cost."""
    saved = replicate_bytes(tokens, width) - dispatch_bytes(tokens, width, chosen, devices, copies)
    return saved > MIN_BYTES_SAVED


class Routes(NamedTuple):
    """The tokens that this device sends to each device and receives from each device.

    A row of `send` lists numbers of this device's tokens, a row of `receive` numbers of the other device's. Tokens that
    travel come first, as many as the counts say. `experts` and `weights` are those of all devices' tokens.
    """

    send: Int32[Array, "devices n"]
    send_counts: Int32[Array, "devices"]
    receive: Int32[Array, "devices n"]
    receive_counts: Int32[Array, "devices"]
    experts: Int32[Array, "devices n j"]
    weights: Float32[Array, "devices n j"]


def dispatch_and_combine(
    x: Float[Array, "n d"],
    experts: Int32[Array, "n j"],
    weights: Float32[Array, "n j"],
    compute: Compute,
    num_local: int,
    num_experts: int,
    partition: Partition,
) -> Float32[Array, "n d"]:
    """Returns the weighted sums over `experts` of tokens x that no other device has.

    `compute` gives a device's part of any tokens' sums, by the `num_local` of all `num_experts` experts that it has.
    """
    names, expert_axes = partition.mesh_axes, partition.axis_names("expert", num_experts)
    routes = make_routes(experts, weights, names, expert_axes, num_local)
    copies = num_devices(names) // num_devices(expert_axes)
    return lax.platform_dependent(
        x,
        routes,
        tpu=partial(combine_ragged, names, compute, copies),
        default=partial(combine_in_rounds, names, compute, copies),
    )


def make_routes(
    experts: Int32[Array, "n j"],
    weights: Float32[Array, "n j"],
    names: tuple[str, ...],
    expert_axes: tuple[str, ...],
    num_local: int,
) -> Routes:
    """Works out who sends what to whom, after gathering all tokens' experts and weights.

    Experts are sharded over the mesh axes `expert_axes`, `num_local` of them to a device; tokens travel over `names`.
    """
    # The number of each device's shard of the experts: several have the same where an expert's width is sharded too.
    shard = device_index(expert_axes)
    shards = lax.all_gather(jnp.asarray(shard, jnp.int32), names)
    all_experts, all_weights = lax.all_gather(experts, names), lax.all_gather(weights, names)
    send, send_counts = _list_true((experts[:, :, None] // num_local == shards).any(axis=1).T)
    receive, receive_counts = _list_true((all_experts // num_local == shard).any(axis=-1))
    return Routes(send, send_counts, receive, receive_counts, all_experts, all_weights)


def _list_true(mask: Bool[Array, "devices n"]) -> tuple[Int32[Array, "devices n"], Int32[Array, "devices"]]:
    """Lists each row's columns, those where the mask is true first, and counts these."""
    return jnp.argsort(~mask, axis=1, stable=True).astype(jnp.int32), jnp.sum(mask, axis=1, dtype=jnp.int32)


def reached_share(chosen: int, shards: int) -> float:
    """Returns the share of tokens that go to a given shard of the experts, if these are chosen evenly."""
    return 1 - (1 - 1 / shards) ** chosen


def block_capacity(tokens: int, chosen: int, shards: int) -> int:
    """Returns a block's size in tokens: the number that a pair of devices exchanges on average, and a quarter more."""
    return min(tokens, -(-math.ceil(SLACK * tokens * reached_share(chosen, shards)) // 8) * 8)


def combine_in_rounds(
    names: tuple[str, ...], compute: Compute, copies: int, x: Array, routes: Routes
) -> Float32[Array, "n d"]:
    """Dispatches and combines by `all_to_all` of blocks, as often as the fullest pair of devices needs."""
    (devices, tokens), choices = routes.send.shape, routes.experts.shape[-1]
    block = block_capacity(len(x), choices, num_devices(names) // copies)
    padding = ((0, 0), (0, -tokens % block))
    send, receive = jnp.pad(routes.send, padding), jnp.pad(routes.receive, padding)
    sender = jnp.arange(devices)[:, None]

    def exchange(rows: Array) -> Array:
        return lax.all_to_all(rows, names, 0, 0)

    @jax.checkpoint
    def one_round(i: Array | int, y: Array) -> Array:
        number = i * block + jnp.arange(block)
        sent, received = (lax.dynamic_slice_in_dim(listed, i * block, block, axis=1) for listed in (send, receive))
        is_sent, is_received = (number < count[:, None] for count in (routes.send_counts, routes.receive_counts))
        rows = exchange(jnp.where(is_sent[:, :, None], x[sent], 0))
        experts = jnp.where(is_received[:, :, None], routes.experts[sender, received], -1)
        routed = (experts, routes.weights[sender, received])
        partial_sums = compute(rows.reshape(-1, x.shape[1]), *(array.reshape(devices * block, -1) for array in routed))
        returned = exchange(partial_sums.reshape(devices, block, -1))
        return y.at[sent].add(jnp.where(is_sent[:, :, None], returned, 0))

    rounds = -(-lax.pmax(jnp.max(routes.send_counts), names) // block)

    # A scan over all rounds that there could be has a gradient, unlike a loop whose length is not known.
    def further_round(y: Array, i: Array) -> tuple[Array, None]:
        return lax.cond(i < rounds, one_round, lambda _, y: y, i, y), None

    most = -(-tokens // block)
    return lax.scan(further_round, one_round(0, jnp.zeros(x.shape, jnp.float32)), jnp.arange(1, most))[0]


def combine_ragged(
    names: tuple[str, ...], compute: Compute, copies: int, x: Array, routes: Routes
) -> Float32[Array, "n d"]:
    """Dispatches and combines by `ragged_all_to_all`: exactly the tokens that are wanted go there and back."""
    devices, tokens = routes.send.shape
    here = device_index(names)
    # counts[s, r]: how many tokens device s sends to device r
    counts = lax.all_gather(routes.send_counts, names)
    send_begin = jnp.cumsum(counts, axis=1) - counts  # where in s's list the tokens for r begin
    receive_begin = jnp.cumsum(counts, axis=0) - counts  # where in r's room the tokens of s begin
    number = jnp.arange(tokens, dtype=jnp.int32)

    def pack(listed: Array, begin: Array, count: Array, room: int) -> Array:
        """Packs the listed numbers of all devices one after another; the rest of the room is `tokens`."""
        place = jnp.where(number < count[:, None], begin[:, None] + number, room)
        return jnp.full(room, tokens, jnp.int32).at[place].set(listed, mode="drop")

    def exchange(rows: Array, room: int, begin: Array, count: Array, place: Array, received: Array) -> Array:
        target = jnp.zeros((room, *rows.shape[1:]), rows.dtype)
        return lax.ragged_all_to_all(rows, target, begin, count, place, received, axis_name=names)

    send_room = tokens * min(devices, routes.experts.shape[-1] * copies)
    sent = pack(routes.send, send_begin[here], routes.send_counts, send_room)
    flat = routes.receive + tokens * jnp.arange(devices, dtype=jnp.int32)[:, None]
    received = pack(flat, receive_begin[:, here], routes.receive_counts, devices * tokens)
    is_received = jnp.arange(devices * tokens) < jnp.sum(routes.receive_counts)

    # A TPU sends rows one by one, and first copies any that are not contiguous in memory: a row of whole tiles is.
    if x.shape[1] % (SUBLANES * LANES) == 0:
        x = x.reshape(len(x), SUBLANES, -1)
    rows = exchange(
        x.at[sent].get(mode="fill", fill_value=0),
        devices * tokens,
        send_begin[here],
        routes.send_counts,
        receive_begin[here],
        routes.receive_counts,
    )
    flattened = (array.reshape(devices * tokens, -1) for array in (routes.experts, routes.weights))
    experts, weights = (array[jnp.where(is_received, received, 0)] for array in flattened)
    partial_sums = compute(rows, jnp.where(is_received[:, None], experts, -1), weights)
    returned = exchange(
        partial_sums,
        send_room,
        receive_begin[:, here],
        routes.receive_counts,
        send_begin[:, here],
        routes.send_counts,
    )
    return jnp.zeros(x.shape, jnp.float32).at[sent].add(returned, mode="drop").reshape(len(x), -1)
