"""What a config.json says of the stored form of the weights: `quantization_config`, and `dtype` of the rest."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, Literal

from checkpoints.published.numerics import BLOCK, GROUP_SIZE
from pallas_kernels.formats import Dense, Fp8, Int4, Weight

Form = Literal["int4", "fp8", "bf16"]
FORMATS: dict[Form, type[Weight]] = {"int4": Int4, "fp8": Fp8, "bf16": Dense}
FORMS: tuple[Form, ...] = tuple(FORMATS)

# Kimi-K2.6's list, which names the vision tower too. Only routed experts are INT4.
IGNORE = (
    *("re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*", "re:.*lm_head.*"),
    *("re:vision_tower.*", "re:mm_projector.*"),
)


def int4(ignore: Sequence[str] = IGNORE) -> dict[str, Any]:
    """compressed-tensors: routed experts in groups of 32, everything that `ignore` matches as it is."""
    weights = {
        **{"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP_SIZE},
        **{"dynamic": False, "actorder": None, "observer": "minmax", "block_structure": None},
    }
    group = {"targets": ["Linear"], "input_activations": None, "output_activations": None, "weights": weights}
    return {
        **{"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed"},
        **{"kv_cache_scheme": None, "config_groups": {"group_0": group}, "ignore": list(ignore)},
    }


def fp8(not_converted: Sequence[str] = ()) -> dict[str, Any]:
    """DeepSeek-V3's blocks. `not_converted` are the full names of the Linears that are not in FP8."""
    values = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    return values | ({"modules_to_not_convert": list(not_converted)} if not_converted else {})


def form_of(config: Mapping[str, Any]) -> Form:
    """What `config` says of the experts."""
    values = config.get("text_config", config).get("quantization_config") or config.get("quantization_config")
    if values is None:
        return "bf16"
    return "fp8" if values.get("quant_method") == "fp8" else "int4"


def described(config: Mapping[str, Any], form: Form, not_converted: Sequence[str] = ()) -> dict[str, Any]:
    """`config` with the `quantization_config` of `form`, or none for bf16. It stands where the releases have it: in
    text_config where there is one."""
    result = deepcopy(dict(config))
    text = result.get("text_config", result)
    for part in (result, text):
        part.pop("quantization_config", None)
    if form != "bf16":
        text["quantization_config"] = int4() if form == "int4" else fp8(not_converted)
    return result
