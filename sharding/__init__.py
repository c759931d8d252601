"""Meshes, how logical axes lie on them, and experts and rows split over them."""

from sharding.experts import over_experts
from sharding.mesh import AXES, make_mesh, mesh_of, using
from sharding.rows import everywhere, over_rows
from sharding.rules import RULES, spec

__all__ = ["AXES", "RULES", "everywhere", "make_mesh", "mesh_of", "over_experts", "over_rows", "spec", "using"]
