"""The stored leaves of a draft head, under the names that its two forms are published with, and its map of words."""

import dataclasses
from collections.abc import Collection

import jax.numpy as jnp
import numpy as np
from flax import nnx

from checkpoints.published.safetensors import CheckpointError, Published
from checkpoints.stored.names import Contents, Leaf, check_names, check_tensors
from kimi_jax.config import EagleConfig
from kimi_jax.model.eagle import EagleHead, abstract_head

_EMBEDDING, _MAP, _CHOSEN = "embed_tokens.weight", "d2t", "t2d"
# The layer's own name in the tree and in one form's files, and that of the other's; servers read either in both.
_LAYER, _FIRST_LAYER = "midlayer.", "layers.0."


def eagle_contents(config: EagleConfig, published: Published) -> Contents:
    """Returns the contents of a published folder of a head, every tensor of it accounted for.

    Raises `CheckpointError` naming tensors that are missing, unknown, or not of the shape or dtype that the
    configuration asks for, and a map of words whose values do not fit the target's vocabulary.
    """
    tensors = {name: t for name, t in published.tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    head, leaves = expect(config, tensors)
    check_names(published.folder, leaves, tensors)
    leaves = [check_tensors(leaf, tensors) for leaf in leaves]
    if head.config.vocab_map:
        chosen = published.read(_CHOSEN) if _CHOSEN in tensors else None
        check_map(head.config, published.read(_MAP), chosen, str(tensors[_MAP].file))
    return Contents(head, tuple(leaves), ())


def expect(config: EagleConfig, names: Collection[str]) -> tuple[EagleHead, list[Leaf]]:
    """Returns the abstract head of a checkpoint that publishes `names`, and its leaves.

    The names decide whether it has embeddings and a map of words of its own, and what its layer is called.
    """
    mapped = config.vocab_map or _MAP in names
    config = dataclasses.replace(config, own_embedding=_EMBEDDING in names, vocab_map=mapped)
    head = abstract_head(config, jnp.bfloat16)
    layer = _FIRST_LAYER if any(name.startswith(_FIRST_LAYER) for name in names) else _LAYER
    leaves = []
    for path, variable in nnx.to_flat_state(nnx.state(head)):
        name = ".".join(map(str, path))
        dtype = np.dtype(np.int64 if name == _MAP else variable.dtype)
        published = layer + name.removeprefix(_LAYER) if name.startswith(_LAYER) else name
        leaves.append(Leaf(name, tuple(variable.shape), dtype, published, variable.get_metadata()["axes"]))
    if _CHOSEN in names:  # says of each of the target's words whether it is mapped to; kept, and not read
        leaves.append(Leaf(_CHOSEN, (config.layer.vocab_size,), np.dtype(np.bool_), _CHOSEN, (None,)))
    return head, leaves


def check_map(config: EagleConfig, d2t: np.ndarray, t2d: np.ndarray | None, where: str) -> None:
    """Raises `CheckpointError`, which `where` opens, for a map of words that does not fit the target's vocabulary.

    Word i of the head is word i + d2t[i] of the target: no two may be one, and `t2d` has to say the same.
    """
    vocab = config.layer.vocab_size
    ids = np.arange(len(d2t)) + d2t
    if (bad := np.flatnonzero((ids < 0) | (ids >= vocab))).size:
        raise CheckpointError(
            f"{where}: tensor {_MAP} maps word {bad[0]} to {ids[bad[0]]}, outside the target's vocabulary of {vocab}"
        )
    if len(np.unique(ids)) < len(ids):
        raise CheckpointError(f"{where}: tensor {_MAP} maps two words to one of the target's")
    if t2d is not None and not np.array_equal(np.flatnonzero(t2d), np.sort(ids)):
        raise CheckpointError(f"{where}: tensor {_CHOSEN} chooses other words than {_MAP} maps to")
