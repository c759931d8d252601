"""The stored form of weights, as a config.json says it: `quantization_config`, and `dtype` of the rest."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, Literal

from checkpoints.published.numerics import BLOCK, GROUP_SIZE
from kimi_jax.families import text_fields
from pallas_kernels.formats import Dense, Fp8, Int4, Mxfp4, Weight

Form = Literal["int4", "mxfp4", "fp8", "bf16"]
FORMATS: dict[Form, type[Weight]] = {"int4": Int4, "mxfp4": Mxfp4, "fp8": Fp8, "bf16": Dense}
FORMS: tuple[Form, ...] = tuple(FORMATS)
_MXFP4 = "mxfp4-pack-quantized"

# Kimi-K2.6's list, which names the vision tower too. Only routed experts are packed.
IGNORE = (
    *("re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*", "re:.*lm_head.*"),
    *("re:vision_tower.*", "re:mm_projector.*"),
)


def int4(ignore: Sequence[str] = IGNORE) -> dict[str, Any]:
    """Returns that of compressed-tensors: routed experts in groups of 32, and no Linear that `ignore` matches."""
    weights = {
        **{"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP_SIZE},
        **{"dynamic": False, "actorder": None, "observer": "minmax", "block_structure": None},
    }
    group = {"targets": ["Linear"], "input_activations": None, "output_activations": None, "weights": weights}
    return {
        **{"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed"},
        **{"kv_cache_scheme": None, "config_groups": {"group_0": group}, "ignore": list(ignore)},
    }


def mxfp4(ignore: Sequence[str] = IGNORE) -> dict[str, Any]:
    """Returns that of Kimi K3: as `int4`, with numbers of four bits and scales that are powers of two."""
    described = int4(ignore) | {"format": _MXFP4, "global_compression_ratio": None}
    group = described["config_groups"]["group_0"]
    group["weights"] |= {"type": "float", "scale_dtype": "torch.uint8", "zp_dtype": None}
    group["format"] = _MXFP4
    return described


def fp8(not_converted: Sequence[str] = ()) -> dict[str, Any]:
    """Returns that of DeepSeek-V3's blocks. `not_converted` are the full names of the Linears that are not in FP8."""
    values = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    return values | ({"modules_to_not_convert": list(not_converted)} if not_converted else {})


def form_of(config: Mapping[str, Any]) -> Form:
    """Returns the form of the experts that `config` describes."""
    values = text_fields(config).get("quantization_config") or config.get("quantization_config")
    if values is None:
        return "bf16"
    return "fp8" if values.get("quant_method") == "fp8" else "mxfp4" if values.get("format") == _MXFP4 else "int4"


def describe_form(config: Mapping[str, Any], form: Form, not_converted: Sequence[str] = ()) -> dict[str, Any]:
    """Returns `config` with the `quantization_config` of `form`, or none for bf16. Like the releases' it is
    beside the language model's other fields."""
    result = deepcopy(dict(config))
    text = text_fields(result)
    for part in (result, text):
        part.pop("quantization_config", None)
    if form != "bf16":
        packed = {"int4": int4, "mxfp4": mxfp4}
        text["quantization_config"] = packed[form]() if form in packed else fp8(not_converted)
    return result
