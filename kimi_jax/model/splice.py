"""Images and video in a prompt: the arrays that a model is given, and the embedding that each token takes."""

import dataclasses

import jax
import numpy as np

from kimi_jax.config import KimiConfig

MOST_PATCHES_A_SIDE = 512  # of the rotations that the reference implementations of the towers have


@dataclasses.dataclass(frozen=True)
class Media:
    """`patches` float32 [N, 3, 14, 14], normalised; `grids` int32 [items, (t, h, w)], in the order of the placeholders.

    Raises ValueError where the grids do not add up to the patches.
    """

    patches: np.ndarray | jax.Array
    grids: np.ndarray

    def __post_init__(self) -> None:
        grids = np.asarray(self.grids, dtype=np.int32)
        object.__setattr__(self, "grids", grids)
        if grids.ndim != 2 or grids.shape[1] != 3 or not len(grids):
            raise ValueError(
                f"media grids have shape {grids.shape}, expected [items, (t, h, w)] with at least one item"
            )
        total = int(grids.prod(axis=1).sum())
        if self.patches.ndim != 4 or len(self.patches) != total:
            raise ValueError(
                f"media patches have shape {self.patches.shape}; the grids {grids.tolist()} ask for {total} patches"
            )


def tokens_per_item(grids: np.ndarray, config: KimiConfig) -> np.ndarray:
    """Counts the media tokens of each item, whatever its number of frames: h * w over the merge kernel's cells.

    Raises ValueError for a grid that the kernel does not divide, with more frames than `init_pos_emb_time`, or with
    more than `MOST_PATCHES_A_SIDE` rows or columns.
    """
    if config.vision is None:
        raise ValueError(f"a {config.model_type} model takes no images or video")
    kh, kw = config.vision.merge_kernel_size
    for t, h, w in grids:
        fits = 0 < h <= MOST_PATCHES_A_SIDE and 0 < w <= MOST_PATCHES_A_SIDE and not (h % kh or w % kw)
        if not (0 < t <= config.vision.init_pos_emb_time and fits):
            raise ValueError(
                f"media grid (t, h, w) = {(int(t), int(h), int(w))}: expected 1 to {config.vision.init_pos_emb_time} "
                f"frames, and height and width in multiples of {kh} and {kw} patches, at most {MOST_PATCHES_A_SIDE}"
            )
    return grids[:, 1] // kh * (grids[:, 2] // kw)


def media_index(tokens: np.ndarray, media: Media | None, config: KimiConfig) -> np.ndarray | None:
    """Returns the media token that replaces each prompt token [b, t], -1 for text; None without media.

    Raises ValueError where the placeholders are not as many as the media's tokens.
    """
    placeholder = config.media_placeholder_token_id
    here = np.zeros(tokens.shape, bool) if placeholder is None else np.asarray(tokens) == placeholder
    wanted = 0 if media is None else int(tokens_per_item(media.grids, config).sum())
    if here.sum() != wanted:
        raise ValueError(
            f"the prompt holds {int(here.sum())} media placeholders (token {placeholder}), "
            f"the media given come to {wanted} tokens"
        )
    if media is None:
        return None
    return np.where(here, np.cumsum(here).reshape(tokens.shape) - 1, -1).astype(np.int32)
