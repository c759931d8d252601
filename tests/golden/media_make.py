"""Makes media.npz: the patches transformers' Kimi K2.5 processors give, as 8-bit levels, for pictures made from a seed.

Needs torch, torchvision and transformers 5.23 (the `oracle` extra, and torchvision); the tests do not. Where a picture
is not scaled the levels are exact; where it is, torchvision's bicubic filter rounds otherwise than PIL's now and then.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from transformers.models.kimi_k25.image_processing_kimi_k25 import Kimi_K25ImageProcessor
from transformers.models.kimi_k25.video_processing_kimi_k25 import Kimi_K25VideoProcessor

MEAN_STD = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


def picture(width: int, height: int, seed: int) -> np.ndarray:
    """Draws smooth colours with some noise, uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 9
    smooth = np.stack([np.sin(x + c) * np.cos(y * (c + 1) / 2) for c in range(3)], axis=-1)
    return (127.5 + 90 * smooth + rng.uniform(-37, 37, smooth.shape)).astype(np.uint8)


def levels(patches: np.ndarray) -> np.ndarray:
    found = np.round((patches * 0.5 + 0.5) * 255)
    assert np.abs((found / 255 - 0.5) / 0.5 - patches).max() < 1e-6
    return found.astype(np.uint8)


def main() -> None:
    out: dict[str, np.ndarray] = {}
    for name, size, limit in (("plain", (53, 37), 16384), ("scaled", (97, 61), 12)):
        processor = Kimi_K25ImageProcessor(max_patches=limit, **MEAN_STD)
        out[f"{name}_pixels"] = picture(*size, seed=1)
        found = processor(Image.fromarray(out[f"{name}_pixels"]), return_tensors="np")
        out[f"{name}_patches"] = levels(found["pixel_values"])
        out[f"{name}_grid"] = found["image_grid_thw"].reshape(3)
    frames = np.stack([picture(40, 30, seed=s) for s in range(5)])
    out["video_pixels"] = frames
    found = Kimi_K25VideoProcessor(do_sample_frames=False, **MEAN_STD)(frames, return_tensors="np")
    out["video_patches"] = levels(np.asarray(found["pixel_values_videos"]))
    out["video_grids"] = np.asarray(found["video_grid_thw"])
    np.savez_compressed(Path(__file__).with_name("media.npz"), **out)


if __name__ == "__main__":
    main()
