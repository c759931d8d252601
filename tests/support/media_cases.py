"""The published preprocessor_config.json, the goldens, and small pictures for the tests of media."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PUBLISHED: dict[str, Any] = {
    "media_proc_cfg": {
        "in_patch_limit": 16384,
        "patch_size": 14,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "merge_kernel_size": 2,
        "fixed_output_tokens": None,
        "patch_limit_on_one_side": 512,
        "in_patch_limit_each_frame": 4096,
        "in_patch_limit_video": None,
        "sample_fps": 2.0,
        "max_num_frames_each_video": None,
        "temporal_merge_kernel_size": 4,
        "timestamp_mode": "hh:mm:ss.fff",
    }
}
GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "media.npz")
ULP = 2.4e-7  # two steps of float32 just below 2: the rounding of dividing and scaling


def config(**changes: Any) -> dict[str, Any]:
    return {"media_proc_cfg": PUBLISHED["media_proc_cfg"] | changes}


def normalised(levels: np.ndarray) -> np.ndarray:
    return (levels.astype(np.float64) / 255 - 0.5) / 0.5


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Returns the bytes of `image` as a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def data_url(image: Image.Image, kind: str = "PNG", **options: Any) -> str:
    return f"data:image/{kind.lower()};base64," + base64.b64encode(encode(image, kind, **options)).decode()
