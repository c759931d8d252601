"""Reads `quantization_config`: compressed-tensors' INT4 or MXFP4 in groups, or DeepSeek-V3's FP8 in blocks."""

from typing import Any, Literal

from kimi_jax.config import QuantizationConfig
from kimi_jax.config_json.fields import Fields, shown
from kimi_jax.config_json.keys import (
    HARMLESS_QUANTIZATION,
    HARMLESS_QUANTIZATION_GROUP,
    HARMLESS_QUANTIZATION_WEIGHTS,
)
from kimi_jax.printable import printable

GROUP_SIZE = 32
_METHODS = ("compressed-tensors", "fp8")
_PACKED: dict[str, Literal["int4", "mxfp4"]] = {"pack-quantized": "int4", "mxfp4-pack-quantized": "mxfp4"}


def quantization(fields: Fields, outer: Fields | None, unread: list[str]) -> QuantizationConfig | None:
    """Returns the packed format of the routed experts, None where they are not packed.

    `quantization_config` is in text_config, at the top of the file (`outer`), or in both, which then have to agree. FP8
    is a format of stored tensors only, of all Linears alike, so the model of such a file is dense. Appends unknown keys
    to `unread`. Raises `ConfigError` for any other format.
    """
    found = [
        _form(inner, unread)
        for home in (fields, outer)
        if home is not None and (inner := home.object("quantization_config")) is not None
    ]
    fields.check(len(found) < 2 or found[0] == found[1], "quantization_config differs from the one of the whole file")
    return found[0][1] if found else None


def _form(fields: Fields, unread: list[str]) -> tuple[str, QuantizationConfig | None]:
    fields.only("kv_cache_scheme")
    for name in ("sparsity_config", "transform_config"):
        fields.only(name, {})
    fields.only("quant_method", *_METHODS)
    method = fields.word("quant_method", _METHODS)
    if method == "fp8":
        fields.only("fmt", "e4m3")
        fields.only("activation_scheme", "dynamic")
        fields.only("weight_block_size", [128, 128])
        unread += _named(fields, HARMLESS_QUANTIZATION)
        return method, None
    fields.only("format", *_PACKED)
    packed = fields.raw("format") or "pack-quantized"
    groups = fields.raw("config_groups")
    fields.check(groups is not None, "config_groups is missing")
    fields.check(isinstance(groups, dict) and len(groups) == 1, f"config_groups is {shown(groups)}, expected one group")
    unread += _named(fields, HARMLESS_QUANTIZATION)
    ((name, values),) = groups.items()
    return method, _group(Fields(values, f"{fields.where}: {printable(name)}"), packed, unread)


def _group(group: Fields, packed: str, unread: list[str]) -> QuantizationConfig:
    for name in ("input_activations", "output_activations"):
        group.only(name)
    group.only("format", packed)
    values: Any = group.raw("weights")
    group.check(values is not None, "weights is missing")
    weights = Fields(values, f"{group.where}.weights")
    form = _PACKED[packed]
    weights.only("type", "float" if form == "mxfp4" else "int")
    if form == "mxfp4":
        weights.only("scale_dtype", "torch.uint8")
    weights.only("strategy", "group")
    weights.only("symmetric", True)
    weights.only("num_bits", 4)
    weights.only("dynamic", False)
    weights.only("block_structure")
    weights.only("actorder", "weight", "static")  # other values store the order of columns as tensors
    size = weights.integer("group_size", least=1, most=2**31 - 1)
    weights.check(size == GROUP_SIZE, f"group_size is {size}; only {GROUP_SIZE} is supported")
    unread += [*_named(group, HARMLESS_QUANTIZATION_GROUP), *_named(weights, HARMLESS_QUANTIZATION_WEIGHTS)]
    return QuantizationConfig(form, size, 4)


def _named(fields: Fields, harmless: frozenset[str]) -> list[str]:
    return [f"{name} of {fields.where}" for name in fields.unread(harmless)]
