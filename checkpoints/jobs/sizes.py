"""Holds the sizes of a checkpoint by part, and shows them. Those of a preset are in a file, which needs no JAX."""

import dataclasses
from importlib import resources
from typing import Any, Literal

from rich.table import Table

from kimi_jax import json_reader
from kimi_jax.config_json import preset_name

Kind = Literal["orbax", "safetensors", "configuration"]


@dataclasses.dataclass(frozen=True)
class PartSizes:
    """The sizes of one part of the model. `parameters` are weights: an INT4 word counts 8, a scale none. `nbytes` are
    as stored."""

    name: str
    tensors: int
    parameters: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """The sizes of a checkpoint, or of one that a configuration would have. `layers` counts text layers by kind
    ("mla + moe"), `dtypes` bytes by stored dtype ("int4" for packed words), `tensors` the published ones without
    `weight_shape`."""

    kind: Kind
    model_type: str
    layers: dict[str, int]
    vision_layers: int
    n_routed_experts: int
    num_experts_per_tok: int
    dtypes: dict[str, int]
    parts: tuple[PartSizes, ...]

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


def summary_of_preset(name: str) -> Summary:
    """Returns `summary_of_config` of a published model, by a name that `config_json.preset_name` reads, as it was
    written down. Raises `ConfigError` for another name."""
    with resources.as_file(resources.files("kimi_jax") / "presets" / preset_name(name) / "sizes.json") as file:
        values: dict[str, Any] = json_reader.read_object(file)
    return Summary(**values | {"parts": tuple(PartSizes(**part) for part in values["parts"])})


def table(summary: Summary) -> Table:
    """Returns `summary` as a table to print."""
    layers = ", ".join(f"{count} x {kind}" for kind, count in summary.layers.items())
    vision = f", {summary.vision_layers} vision layers" if summary.vision_layers else ""
    experts = f", {summary.n_routed_experts} experts, {summary.num_experts_per_tok} chosen"
    title = f"{summary.model_type} ({summary.kind}): {layers}{vision}{experts if summary.n_routed_experts else ''}"
    table = Table("part", "tensors", "parameters", "bytes", title=title, show_footer=True)
    total = PartSizes("total", sum(p.tensors for p in summary.parts), summary.parameters, summary.nbytes)
    for column, footer in zip(table.columns, _row(total), strict=True):
        column.footer = footer
        column.justify = "left" if column is table.columns[0] else "right"
    for part in summary.parts:
        table.add_row(*_row(part))
    table.caption = ", ".join(f"{size:,} bytes of {dtype}" for dtype, size in summary.dtypes.items())
    return table


def _row(part: PartSizes) -> tuple[str, ...]:
    return part.name, f"{part.tensors:,}", f"{part.parameters:,}", f"{part.nbytes:,}"
