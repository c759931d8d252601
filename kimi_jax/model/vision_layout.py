"""Places of the patches of a batch of images and video chunks: the grid arithmetic of MoonViT, in numpy.

All items are packed into one row of patches, padded to a few sizes, and everything that depends on their grids becomes
an array here. The tower itself then depends on the padded size alone, and is compiled once per size, not per grid.
"""

from typing import NamedTuple

import numpy as np

from kimi_jax.config import VisionConfig

ROPE_THETA = 10000.0
CUBIC_A = -0.75


class PatchLayout(NamedTuple):
    """Per patch p (of the padded row) and per media token m; padding belongs to segment -1.

    taps_index, taps_weight [p, taps]: the cells of the position table that a patch blends, 16 where they are blended
        bicubically (a = -0.75), 4 bilinearly.
    time [p, width]: the temporal embedding; zero for single images.
    angles [p, head_dim / 2]: 2-D RoPE, column and row interleaved.
    segment [p]: the item a patch belongs to.
    merge_index, merge_weight [m, kh * kw, frames]: the patches that a media token averages, per cell of the kernel.
    """

    taps_index: np.ndarray
    taps_weight: np.ndarray
    time: np.ndarray
    angles: np.ndarray
    segment: np.ndarray
    merge_index: np.ndarray
    merge_weight: np.ndarray


def padded_size(patches: int) -> int:
    """Returns the next of four sizes per octave, in multiples of 64, so that few sizes are ever compiled."""
    step = max(64, 1 << max(0, (patches - 1).bit_length() - 3))
    return -(-patches // step) * step


def lay_out_patches(grids: np.ndarray, config: VisionConfig, size: int | None = None) -> PatchLayout:
    """Lays out `grids` [items, (t, h, w)] in patches, items in the order of their patches, padded to `size` patches,
    or to `padded_size` of their number. Without items all is padding, which needs a `size`."""
    if not len(grids):
        kernel = np.array([[1, *config.merge_kernel_size]], np.int32)
        one = lay_out_patches(kernel, config, size)
        return PatchLayout(*(np.zeros_like(array) for array in one))._replace(segment=np.full_like(one.segment, -1))
    items = [_item(int(t), int(h), int(w), config) for t, h, w in grids]
    patches = sum(len(item["angles"]) for item in items)
    first = np.cumsum([0] + [len(item["angles"]) for item in items])
    joined = {name: np.concatenate([item[name] for item in items]) for name in items[0] if name != "merge_index"}
    joined["merge_index"] = np.concatenate([item["merge_index"] + at for item, at in zip(items, first, strict=False)])
    joined["segment"] = np.repeat(np.arange(len(items), dtype=np.int32), np.diff(first))
    size = padded_size(patches) if size is None else size
    cells = config.merge_kernel_size[0] * config.merge_kernel_size[1]

    def pad(name: str, values: np.ndarray) -> np.ndarray:
        rows = size // cells if name.startswith("merge") else size
        padding = [(0, rows - len(values))] + [(0, 0)] * (values.ndim - 1)
        return np.pad(values, padding, constant_values=-1 if name == "segment" else 0)

    return PatchLayout(**{name: pad(name, values) for name, values in joined.items()})


def _item(t: int, h: int, w: int, config: VisionConfig) -> dict[str, np.ndarray]:
    index, weight = _blend(h, w, config)
    rows, columns = np.divmod(np.arange(h * w), w)
    merge_index = _merge(t, h, w, config)
    merge_weight = np.zeros(merge_index.shape, np.float32)
    merge_weight[:, :, :t] = 1.0 / t
    return {
        "taps_index": np.tile(index, (t, 1)),
        "taps_weight": np.tile(weight, (t, 1)),
        "time": np.repeat(_time(t, config), h * w, axis=0),
        "angles": np.tile(_angles(rows, columns, config), (t, 1)),
        "merge_index": merge_index,
        "merge_weight": merge_weight,
    }


def _blend(h: int, w: int, config: VisionConfig) -> tuple[np.ndarray, np.ndarray]:
    """Cells of the flattened [height, width] table and their weights, for each patch of the grid: [h * w, taps]."""
    taps = _cubic_taps if config.pos_emb_interpolation_mode == "bicubic" else _linear_taps
    rows, row_weights = taps(config.init_pos_emb_height, h)
    columns, column_weights = taps(config.init_pos_emb_width, w)
    index = rows[:, None, :, None] * config.init_pos_emb_width + columns[None, :, None, :]
    weight = row_weights[:, None, :, None] * column_weights[None, :, None, :]
    return index.reshape(h * w, -1).astype(np.int32), weight.reshape(h * w, -1).astype(np.float32)


def _cubic_taps(size: int, out: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the four source cells of each of `out` positions and their cubic convolution weights [out, 4], corners
    not aligned, not antialiased, clamped at the border. Where `out` equals `size` the weights are 0, 1, 0, 0."""
    src = (np.arange(out) + 0.5) * size / out - 0.5
    base = np.floor(src)
    distance = np.abs(src[:, None] - (base[:, None] + np.arange(-1, 3)))
    near = ((CUBIC_A + 2) * distance - (CUBIC_A + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * distance * CUBIC_A - 4 * CUBIC_A
    cells = np.clip(base[:, None] + np.arange(-1, 3), 0, size - 1).astype(np.int32)
    return cells, np.where(distance <= 1, near, far)


def _linear_taps(size: int, out: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the two source cells of each of `out` positions and their linear weights [out, 2], corners not aligned,
    not antialiased, clamped at the border. Where `out` equals `size` the weights are 1, 0."""
    src = np.maximum((np.arange(out) + 0.5) * size / out - 0.5, 0)
    first = np.minimum(np.floor(src).astype(np.int32), size - 1)
    second = src - first
    return np.stack([first, np.minimum(first + 1, size - 1)], axis=1), np.stack([1 - second, second], axis=1)


def _time(t: int, config: VisionConfig) -> np.ndarray:
    """Returns [sin | cos] of the frame's number, but zeros for a single image, which gets not even frame 0's."""
    width = config.vt_hidden_size
    if t == 1:
        return np.zeros((1, width), np.float32)
    omega = 10000.0 ** -(np.arange(width // 2) / (width / 2))
    phase = np.arange(t)[:, None] * omega
    return np.concatenate([np.sin(phase), np.cos(phase)], axis=1).astype(np.float32)


def _angles(rows: np.ndarray, columns: np.ndarray, config: VisionConfig) -> np.ndarray:
    """Returns the angles of RoPE: pair 2i turns by column * θ^(-4i/head_dim), pair 2i+1 by row * θ^(-4i/head_dim)."""
    head_dim = config.attention_width // config.vt_num_attention_heads
    freq = ROPE_THETA ** -(np.arange(0, head_dim, 4) / head_dim)
    angles = np.stack([columns[:, None] * freq, rows[:, None] * freq], axis=-1)
    return angles.reshape(len(rows), -1).astype(np.float32)


def _merge(t: int, h: int, w: int, config: VisionConfig) -> np.ndarray:
    """Patches of each media token, [h/kh * w/kw, kh * kw, frames]; missing frames repeat patch 0 with no weight."""
    kh, kw = config.merge_kernel_size
    patch = np.arange(t * h * w).reshape(t, h // kh, kh, w // kw, kw)
    merged = patch.transpose(1, 3, 2, 4, 0).reshape(-1, kh * kw, t)
    return np.pad(merged, ((0, 0), (0, 0), (0, config.init_pos_emb_time - t))).astype(np.int32)
