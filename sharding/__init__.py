"""Meshes, the rules that shard arrays over them, and the messages that devices send each other.

A model's code imports everything that it needs of these from here.
"""

from sharding.collectives import gather_columns, mesh_axes, num_shards, shard_index, shard_over_mesh
from sharding.expert_dispatch import dispatch_and_combine, first_local_expert
from sharding.layouts import SINGLE_DEVICE, StreamLayout
from sharding.mesh import AXES, array_mesh, default_shape, make_mesh, mesh_sizes, use_mesh
from sharding.page_ring import (
    gather_pages,
    local_lengths,
    local_positions,
    longest_length,
    merge_shards,
    ring_page_numbers,
)
from sharding.rules import DECODE, PREFILL, REPLICATED, TRAIN, Rules, spec, tree_specs
from sharding.shard_scan import scan_shards, select_last, shift_right

__all__ = [
    "AXES",
    "DECODE",
    "PREFILL",
    "REPLICATED",
    "SINGLE_DEVICE",
    "TRAIN",
    "Rules",
    "StreamLayout",
    "array_mesh",
    "default_shape",
    "dispatch_and_combine",
    "first_local_expert",
    "gather_columns",
    "gather_pages",
    "local_lengths",
    "local_positions",
    "longest_length",
    "make_mesh",
    "merge_shards",
    "mesh_axes",
    "mesh_sizes",
    "num_shards",
    "ring_page_numbers",
    "scan_shards",
    "select_last",
    "shard_index",
    "shard_over_mesh",
    "shift_right",
    "spec",
    "tree_specs",
    "use_mesh",
]
