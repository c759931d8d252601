"""Meshes, how logical axes lie on them, and experts split over them."""

from sharding.experts import over_experts
from sharding.mesh import AXES, make_mesh, mesh_of, using
from sharding.rules import RULES, spec

__all__ = ["AXES", "RULES", "make_mesh", "mesh_of", "over_experts", "spec", "using"]
