"""Describes the toy checkpoints that the goldens were made on, and the inputs of the models.

`make test` writes the same checkpoints again from their seeds (the .npz have a hash of all tensors), so the repository
keeps only the reference's outputs. Needs no torch.
"""

from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.toy import head_config, published_tensors, toy_config, write_toy

HERE = Path(__file__).parent
# The reference's top two logits differ by more than this at every greedy step: ten times the tolerance of logits.
MARGIN = 2e-3
NEW_TOKENS = 24


@dataclass(frozen=True)
class Toy:
    """One golden: the family of a toy checkpoint, the fields that differ from the family's toy, and the seed."""

    like: str
    overrides: dict[str, Any] = field(default_factory=dict)
    seed: int = 0


LINEAR_LAYERS = toy_config("kimi-linear")["linear_attn_config"] | {"kda_layers": [1, 2, 4], "full_attn_layers": [3]}
CASES = {
    # INT4 experts and the vision tower.
    "k2.5": Toy("k2.5", {"hidden_size": 128}),
    # bf16 experts, no `language_model.` prefix, YaRN of factor 32 and beta_fast 1.
    "k2": Toy("k2", {"hidden_size": 128, "num_experts_per_tok": 8}, seed=1),
    # Groups that mask half of the experts, and queries without a low rank.
    "deepseek-v3": Toy(
        "k2",
        {"model_type": "deepseek_v3", "hidden_size": 128, "n_group": 4, "topk_group": 2, "q_lora_rank": None},
        seed=2,
    ),
    # KDA before and after NoPE MLA, which is layer 3 (counted from 1).
    "kimi-linear": Toy(
        "kimi-linear", {"hidden_size": 128, "num_hidden_layers": 4, "linear_attn_config": LINEAR_LAYERS}, seed=3
    ),
}

# Those whose golden k3_make.py makes, since transformers has no such model.
OWN = {
    # Every feature of Kimi K3: KDA with a bounded decay before gated MLA, latent experts, residuals with snapshots, and
    # the second vision tower.
    "k3": Toy("k3", seed=6),
}
TOYS = CASES | OWN
K3_LAYERS = toy_config("k3")["text_config"]["linear_attn_config"] | {"kda_layers": [1], "full_attn_layers": [2]}

# The draft heads whose golden eagle_make.py makes, of each kind, and the target that they are made for.
EAGLE_TARGET = toy_config(
    "k2", vocab_size=288, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=4
)
EAGLE_POSITIONS = np.array([0, 1, 2, 7, 15, 16, 31, 38, 39], np.int32)
EAGLE_LENGTHS = (40, 1, 17, 6)  # of the rows that draft
EAGLE_SEEDS = {"eagle3-mla": 7, "eagle3.1-mla": 8, "eagle3-llama": 9}

# YaRN as transformers 5 spells it, for the checkpoint of "k2": the release's values, and keys that no release has.
_YARN = toy_config("k2")["rope_scaling"] | {"rope_type": "yarn", "rope_theta": toy_config("k2")["rope_theta"]}
ROPE_PARAMETERS = {
    "released": _YARN,
    "attention_factor": _YARN | {"attention_factor": 1.5},
    "not truncated": _YARN | {"truncate": False, "beta_fast": 32.0},
    "default": {"rope_type": "default", "rope_theta": _YARN["rope_theta"]},
}

# The toys whose tensors saved.json names: their fields that differ from the family's toy.
_SMALL = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32}
SAVED: dict[str, dict[str, Any]] = {
    "k2.5": _SMALL | {"num_hidden_layers": 2, "n_routed_experts": 4, "vt_num_hidden_layers": 1},
    "k2": _SMALL | {"num_hidden_layers": 2, "n_routed_experts": 4, "quantization_config": None},
    "kimi-linear": _SMALL
    | {"num_hidden_layers": 3, "num_experts": 4}
    | {"linear_attn_config": LINEAR_LAYERS | {"kda_layers": [1, 2], "full_attn_layers": [3]}},
}

# The toys whose gradients gradients.npz has: as small as they can be with every kind of weight, and dense experts.
_TINY = {
    "vocab_size": 288, "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 16,
    "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4, "v_head_dim": 4,
}  # fmt: skip
_TINY_KDA = LINEAR_LAYERS | {"kda_layers": [1], "full_attn_layers": [2], "head_dim": 8, "num_heads": 4}
_TINY_VISION = {f"vt_{name}": 8 for name in ("hidden_size", "intermediate_size")} | {"vt_num_attention_heads": 2}
GRADIENTS = {
    "k2.5": Toy(
        "k2.5",
        _TINY
        | _TINY_VISION
        | {"num_hidden_layers": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "q_lora_rank": 16}
        | {"vt_num_hidden_layers": 1, "quantization_config": None},
        seed=4,
    ),
    "kimi-linear": Toy(
        "kimi-linear",
        _TINY | {"num_hidden_layers": 2, "num_experts": 4, "num_experts_per_token": 2, "linear_attn_config": _TINY_KDA},
        seed=5,
    ),
}

# Grids of patches: of the position table's own size in "k2.5", 8 x 8, larger, smaller, and larger in one direction.
IMAGE_GRIDS = np.array([[1, 8, 8], [1, 12, 10], [1, 4, 6], [1, 6, 12]], np.int32)
# Of the position table's own size in "k3", smaller and larger in one direction each, and of three frames.
K3_GRIDS = np.array([[1, 8, 8], [1, 6, 10], [3, 4, 6]], np.int32)
VIDEO_GRIDS = np.array([[3, 8, 6], [4, 6, 10]], np.int32)
# The rows of IMAGE_GRIDS that the image prompt shows, in this order.
PROMPT_IMAGES = (1, 2)


def config(name: str) -> dict[str, Any]:
    """Returns the published-format config.json of a case."""
    case = TOYS[name]
    return toy_config(case.like, **case.overrides)


def checkpoint(name: str, folder: Path) -> Path:
    """Writes the checkpoint of a case to `folder / name`, and returns that folder."""
    return write_toy(folder / name, config(name), seed=TOYS[name].seed)


def two_layers(name: str, folder: Path) -> Path:
    """Writes a case's checkpoint without its later layers to `folder / name`: one layer is dense and one has experts.

    Kimi Linear and Kimi K3 keep a KDA layer and an MLA layer, Kimi K3 with a snapshot before each. For tests that hold
    one way of running a model to another.
    """
    overrides = TOYS[name].overrides | {"num_hidden_layers": 2}
    if name == "kimi-linear":
        overrides["linear_attn_config"] = LINEAR_LAYERS | {"kda_layers": [1], "full_attn_layers": [2]}
    if name == "k3":
        overrides |= {"linear_attn_config": K3_LAYERS, "attn_res_block_size": 1}
    return write_toy(folder / name, toy_config(TOYS[name].like, **overrides), seed=TOYS[name].seed)


def gradient_documents(name: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns what the gradients of a toy of GRADIENTS are of: documents, int32 [t], each with the grids of its images.

    The documents of Kimi Linear end between the borders of the delta rule's chunks, which those of K2.5 do not have.
    """
    toy = GRADIENTS[name]
    fields = toy_config(toy.like, **toy.overrides)
    random = np.random.RandomState(toy.seed)
    first, second = (random.randint(0, 32, length).astype(np.int32) for length in ((20, 9), (70, 37))["linear" in name])
    none = np.zeros((0, 3), np.int32)
    if "vision_config" not in fields:
        return [(first, none), (second, none)]
    grids = IMAGE_GRIDS[2:3]
    image = np.full(int(np.prod(grids)) // 4, fields["media_placeholder_token_id"], np.int32)
    return [(np.concatenate([first[:4], image, first[4:]]), grids), (second, none)]


def golden(name: str) -> dict[str, np.ndarray]:
    """Returns the arrays that make.py or k3_make.py stored for a case; their docstrings list them."""
    with np.load(HERE / f"{name}.npz") as file:
        return dict(file)


def gradients(name: str) -> dict[str, np.ndarray]:
    """Returns the loss of a toy of GRADIENTS, "loss", and its gradients under the checkpoint's names."""
    with np.load(HERE / "gradients.npz") as file:
        return {key.removeprefix(f"{name}/"): array for key, array in file.items() if key.startswith(f"{name}/")}


def media(grid: np.ndarray) -> np.ndarray:
    """Draws patches, float32 [t * h * w, 3, 14, 14] in [-1, 1), of the test item with this (t, h, w)."""
    random = np.random.RandomState([7, *grid])
    return random.uniform(-1.0, 1.0, (int(np.prod(grid)), 3, 14, 14)).astype(np.float32)


def eagle_config(kind: str) -> dict[str, Any]:
    """Returns the config.json of a draft head of EAGLE_SEEDS."""
    return head_config(EAGLE_TARGET, kind, max_position_embeddings=512)


def eagle_inputs(kind: str, draw: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws what a head of EAGLE_SEEDS is given: for 40 positions its target's outputs, float32 [40, 3 * 64], and the
    tokens after them, int32 [40]; and the target's embeddings, float32 [288, 64]."""
    random = np.random.RandomState([EAGLE_SEEDS[kind], draw])
    tokens = random.randint(0, 288, 40).astype(np.int32)
    return random.standard_normal((40, 192)).astype(np.float32), tokens, random.standard_normal((288, 64)).astype("f4")


def fingerprint(name: str) -> str:
    """Returns the sha256 of the names, dtypes, shapes and bytes of all published tensors of a case."""
    fields, seed = (eagle_config(name), EAGLE_SEEDS[name]) if name in EAGLE_SEEDS else (config(name), TOYS[name].seed)
    digest = sha256()
    for tensor, array in published_tensors(fields, seed):
        digest.update(f"{tensor} {array.dtype.name} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()
