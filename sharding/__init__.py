"""Meshes, the rules that shard arrays over them, and the messages that devices send each other.

A model's code imports everything that it needs of these from here.
"""

from sharding.collectives import all_gather, all_reduce, gather_blocks, gather_columns
from sharding.expert_dispatch import dispatch_and_combine, first_local_expert
from sharding.layouts import ReplicatedStream, StreamLayout, choose_layout
from sharding.matrix_homes import MatrixHomes
from sharding.mesh import AXES, array_mesh, default_shape, make_mesh, mesh_sizes
from sharding.page_ring import (
    exchange_partials,
    gather_pages,
    local_lengths,
    local_positions,
    longest_length,
    ring_page_numbers,
)
from sharding.pair_dispatch import dispatch_pairs
from sharding.partition import REPLICATED, SINGLE_DEVICE, Partition
from sharding.rules import SERVE, TRAIN, Rule, Rules
from sharding.shard_scan import scan_shards, select_last, shift_right

__all__ = [
    "AXES",
    "REPLICATED",
    "SERVE",
    "SINGLE_DEVICE",
    "TRAIN",
    "MatrixHomes",
    "Partition",
    "ReplicatedStream",
    "Rule",
    "Rules",
    "StreamLayout",
    "all_gather",
    "all_reduce",
    "array_mesh",
    "choose_layout",
    "default_shape",
    "dispatch_and_combine",
    "dispatch_pairs",
    "exchange_partials",
    "first_local_expert",
    "gather_blocks",
    "gather_columns",
    "gather_pages",
    "local_lengths",
    "local_positions",
    "longest_length",
    "make_mesh",
    "mesh_sizes",
    "ring_page_numbers",
    "scan_shards",
    "select_last",
    "shift_right",
]
