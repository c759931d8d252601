"""Rows of packed documents, as one training step takes them."""

import dataclasses
from typing import Any

import jax
import numpy as np

from kimi_jax.model.context import Context


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Holds b rows of t tokens, each with up to `documents` documents one after another and padding last.

    tokens: int32 [b, t].
    positions: int32 [b, t], from 0 on in each document; -1 is padding.
    segments: int32 [b, t], the number of each token's document in its row; -1 is padding.
    columns: int32 [b, n], the columns at which the next token is predicted; -1 fills up a row.
    labels: int32 [b, n], the token to predict at each of `columns`.
    media_index: int32 [b, t], the media token of its row that takes a token's place, -1 for text; None without media.
    patches: float [b, p, 3, 14, 14], the patches of each row's images and videos; `patch_layout` has their places, a
        `PatchLayout` whose arrays have a row axis before the others.

    Media belong to their row, so that a device encodes those of its own rows only.
    """

    tokens: Any
    positions: Any
    segments: Any
    columns: Any
    labels: Any
    media_index: Any = None
    patches: Any = None
    patch_layout: Any = None
    documents: int = dataclasses.field(default=1, metadata={"static": True})

    @classmethod
    def whole(cls, tokens: np.ndarray) -> "Rows":
        """Returns rows of one document each, tokens int32 [b, t], every token of which predicts the next."""
        tokens = np.asarray(tokens, np.int32)
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        return cls(tokens, positions, np.zeros_like(tokens), positions[:, :-1], tokens[:, 1:])

    @property
    def context(self) -> Context:
        """Returns the description of the tokens that a model's layers take."""
        return Context(self.positions, segments=self.segments, num_segments=self.documents)
