"""From prompts to tokens: prefill in chunks, then one jitted step per token.

`generate` answers a batch at once, `stream` token by token. Under them lies `Runner`, for jobs of one's own.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, NamedSharding
from numpy.typing import ArrayLike

from kimi_jax import state as states
from kimi_jax.axes import Array, Int32, LastLogits
from kimi_jax.config import KimiConfig
from kimi_jax.model.kimi import Kimi
from kimi_jax.model.splice import Media, media_index
from kimi_jax.sampling import Sampling, sample
from kimi_jax.state import State
from sharding import use_mesh

PREFILL_CHUNK = 2048


def generate(
    model: Kimi,
    tokens: ArrayLike,
    max_new_tokens: int = 24,
    temperature: float = 0.0,
    lengths: ArrayLike | None = None,
    media: Media | None = None,
    stop_ids: Iterable[int] | None = None,
    seed: int = 0,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    prefill_chunk: int = PREFILL_CHUNK,
) -> np.ndarray:
    """Continues prompts: tokens int32 [b, t], right-padded, row i holding `lengths[i]` -> int32 [b, max_new_tokens].

    After one of `stop_ids` (which is part of the answer) a row goes on with config.json's `pad_token_id`; None never
    stops early. `media` belongs to the placeholders in `tokens`, already expanded. The other arguments are
    `sampling.Sampling`'s; the same `seed` draws the same tokens.
    Raises ValueError for lengths that do not fit `tokens`, media that do not match the placeholders, and prompts that
    leave no room for `max_new_tokens` within `max_position_embeddings`.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p)
    new = stream(
        model,
        tokens,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        lengths=lengths,
        media=media,
        stop_ids=stop_ids,
        seed=seed,
        prefill_chunk=prefill_chunk,
    )
    columns = list(new)
    pad = np.full_like(columns[0], model.config.text.pad_token_id)
    return np.stack(columns + [pad] * (max_new_tokens - len(columns)), axis=1)


def stream(
    model: Kimi,
    tokens: ArrayLike,
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    lengths: ArrayLike | None = None,
    media: Media | None = None,
    stop_ids: Iterable[int] | None = None,
    seed: int = 0,
    prefill_chunk: int = PREFILL_CHUNK,
) -> Iterator[np.ndarray]:
    """`generate`'s columns, int32 [b], as they come; ends when every row has stopped."""
    tokens = np.asarray(tokens, np.int32)
    lengths = checked_lengths(model.config, tokens, lengths, max_new_tokens)
    index = media_index(np.where(np.arange(tokens.shape[1]) < lengths[:, None], tokens, -1), media, model.config)
    embeds = None if media is None else model.encode_media_padded(media)
    runner = Runner(model)
    # rows of one token make the batch divide by the mesh's data axis
    rows, more = len(tokens), -len(tokens) % runner.data
    tokens, lengths = np.pad(tokens, [(0, more), (0, 0)]), np.pad(lengths, (0, more), constant_values=1)
    index = None if index is None else np.pad(index, [(0, more), (0, 0)], constant_values=-1)
    state = runner.start(len(tokens), int(lengths.max()) + max_new_tokens)
    logits, state = runner.prefill(state, tokens, lengths, index, embeds, chunk=prefill_chunk)
    keys = jax.random.split(jax.random.key(seed), rows)[np.minimum(np.arange(rows + more), rows - 1)]
    stops = jnp.asarray(sorted(stop_ids or ()), jnp.int32)
    pad = model.config.text.pad_token_id
    column, done = _choose(logits, keys, 0, jnp.arange(rows + more) >= rows, stops, pad, sampling)
    yield _on_host(column)[:rows]
    for i in range(1, max_new_tokens):
        if stop_ids is not None and bool(done.all()):
            return
        column, done, state = _advance(
            runner.program, runner.arrays, state, column, done, keys, i, stops, pad, sampling
        )
        yield _on_host(column)[:rows]


class _Program:
    """What of a model is not an array. One object per structure (see `_program`), so that `jit` compares identities."""

    def __init__(self, graph: nnx.GraphDef, tree: jax.tree_util.PyTreeDef, mesh: AbstractMesh | None):
        self.graph, self.tree, self.mesh = graph, tree, mesh

    def extend(self, arrays: list[jax.Array], *arguments: Any) -> tuple[LastLogits, State]:
        """`Kimi.extend` of the model with these arrays, on its mesh."""
        model = nnx.merge(self.graph, jax.tree.unflatten(self.tree, arrays))
        with use_mesh(self.mesh):
            return model.extend(*arguments)


_program = functools.lru_cache(maxsize=16)(_Program)


class Runner:
    """A model taken apart once (which takes as long as a step of a small model), ready for jitted calls.

    The state given to `prefill` or `step` is donated: keep only the one that comes back.
    """

    def __init__(self, model: Kimi):
        graph, params = nnx.split(model)
        self.config, self.dtype = model.config, model.dtype
        self.arrays, tree = jax.tree.flatten(params)
        self.program = _program(graph, tree, model.mesh)
        self.placement = model.model.embed_tokens.weight.get_value().sharding
        self.mesh = self.placement.mesh if isinstance(self.placement, NamedSharding) else None

    @property
    def data(self) -> int:
        """What a batch must divide by."""
        return 1 if self.mesh is None else self.mesh.shape["data"]

    def start(self, batch: int, capacity: int) -> State:
        """An empty state for `batch` rows of up to `capacity` tokens, laid out on the model's own devices.

        Raises ValueError for a batch that does not divide by the mesh's `data` axis.
        """
        make = functools.partial(states.empty, self.config, batch, capacity, self.dtype, self.mesh)
        return jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, self.state_shapes(batch, capacity)))()

    def state_shapes(self, batch: int, capacity: int) -> State:
        """`start`'s shapes, dtypes and shardings."""
        mesh = self.mesh
        shapes = jax.eval_shape(functools.partial(states.empty, self.config, batch, capacity, self.dtype, mesh))
        lies = jax.tree.map(lambda _: self.placement, shapes)
        if mesh is not None:
            lies = jax.tree.map(lambda spec: NamedSharding(mesh, spec), states.specs(shapes, mesh))
        return jax.tree.map(lambda x, lies: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies), shapes, lies)

    def prefill(
        self,
        state: State,
        tokens: np.ndarray | jax.Array,
        lengths: np.ndarray | jax.Array,
        index: np.ndarray | None = None,
        media: jax.Array | None = None,
        *,
        chunk: int = PREFILL_CHUNK,
    ) -> tuple[LastLogits, State]:
        """Takes prompts in, `chunk` tokens at a time: float32 logits [b, vocab_size] after each row's last token.

        tokens int32 [b, t], right-padded, `lengths` [b]; `index` and `media` as `splice.media_index` and
        `Kimi.encode_media` give them.
        """
        tokens, lengths = np.asarray(tokens, np.int32), np.asarray(lengths, np.int32)
        chunk = min(chunk, _bucket(tokens.shape[1]))
        padding = [(0, 0), (0, -tokens.shape[1] % chunk)]
        tokens = np.pad(tokens, padding)
        index = None if index is None else np.pad(index, padding, constant_values=-1)
        logits = None
        for at in range(0, tokens.shape[1], chunk):
            counts = np.clip(lengths - at, 0, chunk).astype(np.int32)
            part = None if index is None else index[:, at : at + chunk]
            new, state = _extend(self.program, self.arrays, state, tokens[:, at : at + chunk], counts, part, media)
            logits = new if logits is None else jnp.where((counts > 0)[:, None], new, logits)
        assert logits is not None
        return logits, state

    def step(self, state: State, tokens: Int32[Array, "b"]) -> tuple[LastLogits, State]:
        """One more token for every row, [b]: float32 logits [b, vocab_size] after it, and the state."""
        return _step(self.program, self.arrays, state, tokens)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _extend(program, arrays, state, tokens, counts, index, media):
    return program.extend(arrays, state, tokens, counts, index, media)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _step(program, arrays, state, tokens):
    return program.extend(arrays, state, tokens[:, None], jnp.ones_like(tokens))


@functools.partial(jax.jit, static_argnums=6)
def _choose(logits, keys, i, done, stops, pad, sampling):
    """The i-th new token of each row, and which rows have stopped with it."""
    token = sample(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, i), sampling)
    token = jnp.where(done, pad, token)
    return token, done | (token[:, None] == stops).any(axis=1)


@functools.partial(jax.jit, static_argnums=(0, 9), donate_argnums=2)
def _advance(program, arrays, state, column, done, keys, i, stops, pad, sampling):
    counts = jnp.where(done, 0, 1).astype(jnp.int32)
    logits, state = program.extend(arrays, state, column[:, None], counts)
    column, done = _choose(logits, keys, i, done, stops, pad, sampling)
    return column, done, state


def _on_host(column: jax.Array) -> np.ndarray:
    """The whole column, whichever processes' devices its rows lie on."""
    if not column.is_fully_addressable and not column.is_fully_replicated:
        column = multihost_utils.process_allgather(column, tiled=True)
    return np.asarray(column)


def _bucket(tokens: int) -> int:
    """The next of four lengths per octave, in multiples of 16, so that few prompt lengths are ever compiled."""
    step = max(16, 1 << max(0, (tokens - 1).bit_length() - 3))
    return -(-tokens // step) * step


def checked_lengths(
    config: KimiConfig, tokens: np.ndarray, lengths: ArrayLike | None, max_new_tokens: int
) -> np.ndarray:
    """`lengths` int32 [b], the whole width where None; raises what `generate` raises of tokens and lengths."""
    if tokens.ndim != 2 or not tokens.size:
        raise ValueError(f"tokens have shape {tokens.shape}, expected [batch, length] with at least one token")
    lengths = np.full(len(tokens), tokens.shape[1]) if lengths is None else np.asarray(lengths)
    if lengths.shape != tokens.shape[:1] or lengths.min() < 1 or lengths.max() > tokens.shape[1]:
        raise ValueError(
            f"lengths are {lengths.tolist()}, expected {len(tokens)} of them between 1 and {tokens.shape[1]}"
        )
    room = config.text.max_position_embeddings
    if max_new_tokens < 1 or lengths.max() + max_new_tokens > room:
        raise ValueError(
            f"a prompt of {lengths.max()} tokens and {max_new_tokens} new ones: expected at least 1 new token, "
            f"and at most max_position_embeddings = {room} in all"
        )
    vocab = config.text.vocab_size
    if tokens.min() < 0 or tokens.max() >= vocab:
        raise ValueError(f"token ids lie between {tokens.min()} and {tokens.max()}, expected 0 to {vocab - 1}")
    return lengths.astype(np.int32)
