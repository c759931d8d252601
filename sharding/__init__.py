"""Meshes, and how logical axes lie on them."""

from sharding.mesh import AXES, make_mesh
from sharding.rules import RULES, spec

__all__ = ["AXES", "RULES", "make_mesh", "spec"]
