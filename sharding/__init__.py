"""Meshes, how logical axes lie on them, and what devices send each other: all that a model's code calls is here."""

from sharding.collectives import gathered, over, over_mesh, part_of, parts
from sharding.experts import exchanged, first_expert
from sharding.mesh import AXES, default_shape, make_mesh, mesh_of, mesh_sizes, using
from sharding.pages import from_all, held, longest, merged, own_positions, page_numbers
from sharding.recurrence import from_left, of_last, passed_on
from sharding.residual import ALONE, Residual
from sharding.rules import DECODE, EVERYWHERE, PREFILL, TRAIN, Rules, spec, specs_of

__all__ = [
    "ALONE",
    "AXES",
    "DECODE",
    "EVERYWHERE",
    "PREFILL",
    "TRAIN",
    "Residual",
    "Rules",
    "default_shape",
    "exchanged",
    "first_expert",
    "from_all",
    "from_left",
    "gathered",
    "held",
    "longest",
    "make_mesh",
    "merged",
    "mesh_of",
    "mesh_sizes",
    "of_last",
    "over",
    "over_mesh",
    "own_positions",
    "page_numbers",
    "part_of",
    "parts",
    "passed_on",
    "spec",
    "specs_of",
    "using",
]
