"""Tables from logical axes of weights and activations to mesh axes: `SERVE` and `TRAIN`.

A logical axis that a table does not name is replicated. `Partition` reads the tables and knows no axis by name.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Rule:
    """Shards the logical axis `axis` over `mesh_axes`, the first outermost.

    uneven: handles mesh axes by which a dimension does not divide. "refuse" raises ValueError, "skip" leaves these mesh
        axes to rules further down, "replicate" shards the dimension over none.
    taken: handles mesh axes that an earlier rule uses for another dimension of the array: "refuse" or "skip".
    gathered: the axis is sharded in memory only, and gathered before the model computes with the array.
    """

    axis: str
    mesh_axes: tuple[str, ...]
    uneven: Literal["refuse", "skip", "replicate"] = "refuse"
    taken: Literal["refuse", "skip"] = "refuse"
    gathered: bool = False


# An array's dimensions are sharded in the order of these rules, not in the order of the dimensions.
Rules = tuple[Rule, ...]

# One copy of the weights serves prefill and decoding, so that one table says how it is sharded for both.
SERVE: Rules = (
    # Experts are sharded over the whole mesh. Axes that their number does not divide by shard each expert's width.
    Rule("expert", ("data", "expert", "tensor", "sequence"), uneven="skip"),
    Rule("expert_mlp", ("data", "expert", "tensor", "sequence"), taken="skip"),
    Rule("shared_mlp", ("data", "expert", "tensor", "sequence")),
    Rule("mlp", ("expert", "tensor", "sequence")),
    Rule("vocab", ("expert", "tensor", "sequence")),
    Rule("heads", ("tensor", "sequence")),
    # The columns of the low-rank projections, gathered before their norm.
    Rule("latent", ("tensor", "sequence"), uneven="replicate"),
    # Not over `sequence`, which shards a prompt's tokens: the state passes from one device to the next.
    Rule("kda_heads", ("tensor",)),
    Rule("batch", ("data",)),
    Rule("tokens", ("sequence",)),
    Rule("pages", ("data", "sequence")),
    Rule("row_pages", ("sequence",)),
)

# Gradients and an optimiser's state take several times a weight's memory, so that what serving replicates over `data`
# and `expert` is sharded over them too (ZeRO, arXiv 1910.02054, stage 3), and gathered a layer at a time.
TRAIN: Rules = (
    *SERVE,
    Rule("embed", ("data", "expert"), uneven="skip", taken="skip", gathered=True),
    Rule("rank", ("data", "expert"), uneven="skip", taken="skip", gathered=True),
)
