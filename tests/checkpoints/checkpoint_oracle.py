"""Reads checkpoints as the published formats define them, without the code under test, and lists small
configurations."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import deserialize

from checkpoints.published import quantization_config
from checkpoints.toy import toy_config

BF16 = np.dtype(ml_dtypes.bfloat16)
SMALL = {"hidden_size": 128, "intermediate_size": 96, "moe_intermediate_size": 64}
LINEAR = toy_config("kimi-linear")["linear_attn_config"] | {"kda_layers": [1, 2], "full_attn_layers": [3]}
K3_LINEAR = toy_config("k3")["text_config"]["linear_attn_config"] | {"kda_layers": [1], "full_attn_layers": [2]}
# INT4 experts and vision; dense experts without prefix; Kimi Linear with experts after both of its mixers; Kimi K3.
CONFIGS = {
    "k2.5": toy_config("k2.5", num_hidden_layers=2, vt_num_hidden_layers=1, n_routed_experts=8, **SMALL),
    "k2": toy_config("k2", num_hidden_layers=2, n_routed_experts=8, quantization_config=None, **SMALL),
    "kimi-linear": toy_config("kimi-linear", num_hidden_layers=3, linear_attn_config=LINEAR, num_experts=8, **SMALL),
    "k3": toy_config(
        "k3", num_hidden_layers=2, vt_num_hidden_layers=1, linear_attn_config=K3_LINEAR, first_k_dense_replace=0
    ),
}

# A format of weights each; widths that the blocks of FP8 do not divide, in the last block and in the only one.
ODD = {"num_hidden_layers": 2, "n_routed_experts": 6, "hidden_size": 192, "moe_intermediate_size": 160}
FORMS = {
    "int4": toy_config("k2.5", vt_num_hidden_layers=1, **ODD),
    "fp8": toy_config("k2", quantization_config=quantization_config.fp8(), **ODD),
    "bf16": toy_config("k2", quantization_config=None, **ODD),
}


# safetensors' own reader of arrays does not know e4m3.
_DTYPES = {"BF16": BF16, "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F16": np.dtype(np.float16)}
_DTYPES |= {"U8": np.dtype(np.uint8), "F32": np.dtype(np.float32), "I32": np.dtype(np.int32), "I64": np.dtype(np.int64)}
_DTYPES |= {"BOOL": np.dtype(np.bool_)}


def read_all(folder: Path) -> dict[str, np.ndarray]:
    """Returns every tensor of a published folder, read by the safetensors library."""
    return {
        name: np.frombuffer(bytearray(found["data"]), _DTYPES[found["dtype"]]).reshape(found["shape"])
        for file in sorted(folder.glob("*.safetensors"))
        for name, found in deserialize(file.read_bytes())
    }


def in_tree(tree: dict[str, Any], name: str) -> np.ndarray:
    """Returns the published tensor `name` from a restored tree. The nested keys are the parts of the name without its
    prefix, with DeepSeek-V3's names for Kimi Linear's experts; an expert's number is the index of the leading axis."""
    name = name.removeprefix("language_model.").replace("block_sparse_moe", "mlp")
    for published, stored in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
        name = name.replace(f".{published}.", f".{stored}.")
    expert = re.search(r"\.experts\.(\d+)\.", name)
    node: Any = tree
    for key in re.sub(r"(\.experts)\.\d+\.", r"\1.", name).split("."):
        node = node[key]
    return np.asarray(node[int(expert[1])] if expert else node)


def same_bytes(found: Any, expected: np.ndarray) -> bool:
    found = np.asarray(found)
    return found.dtype == expected.dtype and found.shape == expected.shape and found.tobytes() == expected.tobytes()


def same_folders(one: Path, other: Path) -> bool:
    """Says whether two checkpoints have the same files with the same bytes."""
    a, b = (
        {file.relative_to(root): file.read_bytes() for file in root.rglob("*") if file.is_file()}
        for root in (one, other)
    )
    return a == b


def leaves(tree: dict[str, Any]) -> Iterator[np.ndarray]:
    for value in tree.values():
        yield from leaves(value) if isinstance(value, dict) else (value,)


def codes(words: np.ndarray) -> np.ndarray:
    """Unpacks compressed-tensors' INT4, int32 [out, in/8], to int8 [in, out]: low nibble first along the inputs, offset
    8."""
    out, columns = words.shape
    result = np.empty((columns * 8, out), np.int8)
    for j in range(8):
        result[j::8] = (((words.view(np.uint32) >> np.uint32(4 * j)) & np.uint32(15)).astype(np.int8) - 8).T
    return result
