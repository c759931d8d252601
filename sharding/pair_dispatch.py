"""Expert parallelism for training: each pair of a token and one of its experts travels as a row of its own.

A row goes to one device with a shard of its expert, over the mesh axes that shard experts by number; devices along the
others, which share these experts' widths, gather each other's rows, and reduce-scatter their partial results. Blocks of
`block_rows` rows go between any two devices, in as many rounds as the fullest pair of devices needs, so that memory is
bounded whatever the imbalance, and no token is dropped. A round's messages are its rows to their experts and back; in
the gradient the rows once more, the cotangents of their results, and those of the rows back. Weights never move. Every
row has one expert, which the receiver sorts by, and one place on either side: what one direction gathers, the other
gathers back, and nothing is scattered.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int32, Shaped

from sharding.collectives import all_gather, reduce_scatter
from sharding.expert_dispatch import SLACK
from sharding.partition import Partition

# compute(weights, rows [m, d], their experts [m] among those here, -1 for none) -> [m, d], this device's part of each
# row's result
ComputeRows = Callable[[Any, Array, Array], Array]


@dataclass(frozen=True)
class _Exchange:
    """Exchanges blocks of rows: `expert_axes` shard experts by number, in `shards`, `copy_axes` their widths."""

    compute: ComputeRows
    expert_axes: tuple[str, ...]
    copy_axes: tuple[str, ...]
    shards: int
    num_local: int
    block: int

    def send(self, rows: Shaped[Array, "m ..."]) -> Shaped[Array, "received ..."]:
        """Sends a block to each shard of the experts, and returns those that arrive at any device with this shard."""
        return all_gather(self._swap(rows), self.copy_axes, axis=0)

    def send_back(self, results: Shaped[Array, "received ..."]) -> Shaped[Array, "m ..."]:
        """Sums the devices' parts of results for the rows that `send` returned, and sends them where these came
        from."""
        return self._swap(reduce_scatter(results, self.copy_axes, axis=0))

    def _swap(self, rows: Array) -> Array:
        if not self.expert_axes:
            return rows
        blocks = rows.reshape(self.shards, self.block, *rows.shape[1:])
        return lax.all_to_all(blocks, self.expert_axes, 0, 0).reshape(rows.shape)


class _Pairs(NamedTuple):
    """Pairs of a token and one of its experts, sorted by the expert's shard, and where they are in this order.

    `place` counts from the first pair of the same shard. `local` is the expert's number in its shard.
    """

    order: Int32[Array, "pairs"]
    place: Int32[Array, "n j"]
    shard: Int32[Array, "n j"]
    local: Int32[Array, "n j"]
    begin: Int32[Array, "shards"]
    counts: Int32[Array, "shards"]
    rounds: Int32[Array, ""]


class _Round(NamedTuple):
    """One round's rows on this device.

    pair: the pair that each row to send is of, -1 for none. row: the row of each pair, -1 in other rounds.
    """

    pair: Int32[Array, "m"]
    row: Int32[Array, "n j"]


def block_rows(pairs: int, shards: int) -> int:
    """Returns a block's rows: those that a pair of devices exchanges if experts are chosen evenly, and a quarter
    more."""
    return min(pairs, -(-math.ceil(SLACK * pairs / shards) // 8) * 8)


def dispatch_pairs(
    x: Float[Array, "n d"],
    experts: Int32[Array, "n j"],
    weights: Float32[Array, "n j"],
    matrices: Any,
    compute: ComputeRows,
    num_local: int,
    num_experts: int,
    partition: Partition,
) -> Float32[Array, "n d"]:
    """Returns the weighted sums over `experts` of tokens x that no other device has.

    `compute` gives this device's part of any rows' results, by `matrices` of the `num_local` of all `num_experts`
    experts that it has. It is differentiable, with respect to x, weights and the floating-point arrays of `matrices`;
    `compute` is a function of its arguments alone.
    """
    expert_axes = partition.axis_names("expert", num_experts)
    copy_axes = tuple(name for name in partition.mesh_axes if name not in expert_axes)
    shards = num_experts // num_local
    exchange = _Exchange(compute, expert_axes, copy_axes, shards, num_local, block_rows(experts.size, shards))
    return _sums(exchange, x, weights, matrices, experts)


def _sort_pairs(exchange: _Exchange, experts: Int32[Array, "n j"]) -> _Pairs:
    shard = experts // exchange.num_local
    flat = shard.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    numbers = jnp.arange(exchange.shards, dtype=jnp.int32)
    begin = jnp.sum(flat[:, None] < numbers, axis=0, dtype=jnp.int32)
    count = jnp.sum(flat[:, None] == numbers, axis=0, dtype=jnp.int32)
    place = jnp.argsort(order).astype(jnp.int32) - begin[flat]
    fullest, names = jnp.max(count), exchange.expert_axes + exchange.copy_axes
    rounds = -(-(lax.pmax(fullest, names) if names else fullest) // exchange.block)
    return _Pairs(order, place.reshape(shard.shape), shard, experts % exchange.num_local, begin, count, rounds)


def _round(exchange: _Exchange, pairs: _Pairs, number: Array) -> _Round:
    first = number * exchange.block
    rank = first + jnp.arange(exchange.block, dtype=jnp.int32)
    at = jnp.minimum(pairs.begin[:, None] + rank, pairs.order.size - 1)
    pair = jnp.where(rank < pairs.counts[:, None], pairs.order[at], -1)
    place = pairs.place - first
    is_now = (place >= 0) & (place < exchange.block)
    return _Round(pair.reshape(-1), jnp.where(is_now, pairs.shard * exchange.block + place, -1))


def _take(array: Array, index: Int32[Array, "..."]) -> Array:
    """Gathers rows; those of index -1 are zero."""
    rows = array[jnp.maximum(index, 0)]
    return jnp.where((index >= 0).reshape(*index.shape, *(1,) * (array.ndim - 1)), rows, 0)


def _send(exchange: _Exchange, pairs: _Pairs, pair: Int32[Array, "m"], x: Array) -> tuple[Array, Array]:
    """Sends the pairs' tokens, and returns the rows that arrive with their experts' numbers here, -1 for none."""
    local = jnp.where(pair >= 0, pairs.local.reshape(-1)[jnp.maximum(pair, 0)], -1)
    return exchange.send(_take(x, _token(pair, pairs))), exchange.send(local)


def _token(pair: Int32[Array, "m"], pairs: _Pairs) -> Int32[Array, "m"]:
    return pair // pairs.place.shape[1]  # (-1 stays)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(exchange: _Exchange, x: Array, weights: Array, matrices: Any, experts: Array) -> Float32[Array, "n d"]:
    pairs = _sort_pairs(exchange, experts)

    def one(state: tuple[Array, Array]) -> tuple[Array, Array]:
        number, total = state
        now = _round(exchange, pairs, number)
        rows, local = _send(exchange, pairs, now.pair, x)
        results = exchange.send_back(exchange.compute(matrices, rows, local))
        taken = _take(results, now.row).astype(jnp.float32)
        return number + 1, total + jnp.sum(weights[:, :, None] * taken, axis=1)

    start = jnp.zeros((), jnp.int32), jnp.zeros(x.shape, jnp.float32)
    return lax.while_loop(lambda state: state[0] < pairs.rounds, one, start)[1]


def _forward(exchange: _Exchange, x: Array, weights: Array, matrices: Any, experts: Array) -> tuple[Array, Any]:
    return _sums(exchange, x, weights, matrices, experts), (x, weights, matrices, experts)


def _backward(exchange: _Exchange, saved: Any, gradient: Float32[Array, "n d"]) -> tuple[Any, ...]:
    x, weights, matrices, experts = saved
    pairs = _sort_pairs(exchange, experts)
    leaves, tree = jax.tree.flatten(matrices)
    trained = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    def one(state: tuple[Any, ...]) -> tuple[Any, ...]:
        number, dx, dweights, dleaves = state
        now = _round(exchange, pairs, number)
        rows, local = _send(exchange, pairs, now.pair, x)
        dy = exchange.send(_take(gradient.astype(x.dtype), _token(now.pair, pairs)))
        share = exchange.send(_take(weights.reshape(-1), now.pair))

        def multiply(floating: list[Array], rows: Array) -> Array:
            used = list(leaves)
            for i, leaf in zip(trained, floating, strict=True):
                used[i] = leaf
            return exchange.compute(jax.tree.unflatten(tree, used), rows, local)

        results, pull = jax.vjp(multiply, [leaves[i] for i in trained], rows)
        wide = dy.astype(jnp.float32)
        dshare = exchange.send_back(jnp.sum(wide * results.astype(jnp.float32), axis=1))
        found, drows = pull((share[:, None] * wide).astype(results.dtype))
        taken = _take(exchange.send_back(drows), now.row).astype(jnp.float32)
        dx, dweights = dx + jnp.sum(taken, axis=1), dweights + _take(dshare, now.row)
        return number + 1, dx, dweights, [a + b.astype(a.dtype) for a, b in zip(dleaves, found, strict=True)]

    start = (
        jnp.zeros((), jnp.int32),
        jnp.zeros(x.shape, jnp.float32),
        jnp.zeros(weights.shape, jnp.float32),
        [jnp.zeros(leaves[i].shape, jnp.float32) for i in trained],
    )
    _, dx, dweights, dleaves = lax.while_loop(lambda state: state[0] < pairs.rounds, one, start)
    cotangents: list[Any] = [np.zeros(leaf.shape, jax.dtypes.float0) for leaf in leaves]
    for i, found in zip(trained, dleaves, strict=True):
        cotangents[i] = found.astype(leaves[i].dtype)
    return dx.astype(x.dtype), dweights, jax.tree.unflatten(tree, cotangents), None


_sums.defvjp(_forward, _backward)
