"""The toy checkpoints that the goldens were made on, and the inputs they were given.

`make test` writes the same checkpoints again from their seeds (the .npz hold a hash of every tensor), so only the
reference's outputs are kept in the repository. Nothing here needs torch.
"""

from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.toy import published_tensors, toy_config, write_toy

HERE = Path(__file__).parent
# The reference's top two logits differ by this much at every greedy step: ten times what logits may be off by.
MARGIN = 2e-3
NEW_TOKENS = 24


@dataclass(frozen=True)
class Case:
    """One golden: a toy checkpoint, by its family, the fields that differ from the family's toy, and its seed."""

    like: str
    overrides: dict[str, Any] = field(default_factory=dict)
    seed: int = 0


LINEAR_LAYERS = toy_config("kimi-linear")["linear_attn_config"] | {"kda_layers": [1, 2, 4], "full_attn_layers": [3]}
CASES = {
    # INT4 experts and the vision tower.
    "k2.5": Case("k2.5", {"hidden_size": 128}),
    # bf16 experts, no `language_model.` prefix, YaRN of factor 32 and beta_fast 1.
    "k2": Case("k2", {"hidden_size": 128, "num_experts_per_tok": 8}, seed=1),
    # Groups that mask half of the experts, and queries without a low rank.
    "deepseek-v3": Case(
        "k2",
        {"model_type": "deepseek_v3", "hidden_size": 128, "n_group": 4, "topk_group": 2, "q_lora_rank": None},
        seed=2,
    ),
    # KDA before and after NoPE MLA, which is layer 3 (counted from 1).
    "kimi-linear": Case(
        "kimi-linear", {"hidden_size": 128, "num_hidden_layers": 4, "linear_attn_config": LINEAR_LAYERS}, seed=3
    ),
}

# YaRN as transformers 5 spells it, for the checkpoint of "k2": its own, and with keys that no release has.
_YARN = toy_config("k2")["rope_scaling"] | {"rope_type": "yarn", "rope_theta": toy_config("k2")["rope_theta"]}
ROPE_PARAMETERS = {
    "released": _YARN,
    "attention_factor": _YARN | {"attention_factor": 1.5},
    "not truncated": _YARN | {"truncate": False, "beta_fast": 32.0},
    "default": {"rope_type": "default", "rope_theta": _YARN["rope_theta"]},
}

# The toys whose tensors are named in saved.json, in their family's fields that differ.
_SMALL = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32}
SAVED: dict[str, dict[str, Any]] = {
    "k2.5": _SMALL | {"num_hidden_layers": 2, "n_routed_experts": 4, "vt_num_hidden_layers": 1},
    "k2": _SMALL | {"num_hidden_layers": 2, "n_routed_experts": 4, "quantization_config": None},
    "kimi-linear": _SMALL
    | {"num_hidden_layers": 3, "num_experts": 4}
    | {"linear_attn_config": LINEAR_LAYERS | {"kda_layers": [1, 2], "full_attn_layers": [3]}},
}

# Patches of the position table in "k2.5": 8 x 8. Its own size, larger, smaller, and one of each.
IMAGE_GRIDS = np.array([[1, 8, 8], [1, 12, 10], [1, 4, 6], [1, 6, 12]], np.int32)
VIDEO_GRIDS = np.array([[3, 8, 6], [4, 6, 10]], np.int32)
# The rows of IMAGE_GRIDS that stand, in this order, in the image prompt.
PROMPT_IMAGES = (1, 2)


def config(name: str) -> dict[str, Any]:
    """The published-format config.json of a case."""
    case = CASES[name]
    return toy_config(case.like, **case.overrides)


def checkpoint(name: str, folder: Path) -> Path:
    """Write the checkpoint of a case to `folder / name`, and return that."""
    return write_toy(folder / name, config(name), seed=CASES[name].seed)


def two_layers(name: str, folder: Path) -> Path:
    """Write a case's checkpoint without its later layers to `folder / name`: one layer is dense and one has experts.

    Kimi Linear keeps a KDA layer and an MLA layer. For tests that hold one way of running a model to another.
    """
    overrides = CASES[name].overrides | {"num_hidden_layers": 2}
    if name == "kimi-linear":
        overrides["linear_attn_config"] = LINEAR_LAYERS | {"kda_layers": [1], "full_attn_layers": [2]}
    return write_toy(folder / name, toy_config(CASES[name].like, **overrides), seed=CASES[name].seed)


def golden(name: str) -> dict[str, np.ndarray]:
    """What make.py stored for a case; its docstring says what the arrays are."""
    with np.load(HERE / f"{name}.npz") as file:
        return dict(file)


def media(grid: np.ndarray) -> np.ndarray:
    """Patches float32 [t * h * w, 3, 14, 14] in [-1, 1) of the one test item with this (t, h, w)."""
    random = np.random.RandomState([7, *grid])
    return random.uniform(-1.0, 1.0, (int(np.prod(grid)), 3, 14, 14)).astype(np.float32)


def fingerprint(name: str) -> str:
    """sha256 of the names, dtypes, shapes and bytes of all published tensors of a case."""
    digest = sha256()
    for tensor, array in published_tensors(config(name), CASES[name].seed):
        digest.update(f"{tensor} {array.dtype.name} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()
