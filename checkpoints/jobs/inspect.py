"""Summarises a checkpoint: layers, experts, dtypes, parameters and bytes by part."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from checkpoints.jobs.sizes import Kind, PartSizes, Summary
from checkpoints.published.endings import PACKED, is_scales
from checkpoints.stored.folder import Converted
from checkpoints.stored.names import Leaf, stored_leaves
from checkpoints.stored.source import open_source
from kimi_jax.config import EagleConfig, KimiConfig
from kimi_jax.model.kimi import abstract

# A path's part is the first of these that it contains.
_PARTS = (
    ("vision_tower.", "vision"),
    ("mm_projector.", "projector"),
    (".self_attn.", "attention"),
    (".mlp.experts.", "routed experts"),
    (".mlp.shared_experts.", "shared experts"),
    (".mlp.gate.", "router"),
    (".mlp.routed_expert_", "latent projections"),
    (".mlp.", "dense mlp"),
    ("_res_norm.", "attention residuals"),
    ("_res_proj.", "attention residuals"),
    ("norm.", "norms"),
    ("fc_norm.", "norms"),
    ("fc.", "target's layers"),
    ("d2t", "map of words"),
    ("t2d", "map of words"),
    ("embed_tokens.", "embeddings"),
    ("lm_head.", "embeddings"),
)


def summary(path: str | Path) -> Summary:
    """Returns the summary of the checkpoint in folder `path`: one that `convert` wrote, or a published folder.

    Reads names and shapes only. Raises what `checkpoints.load` raises for a damaged one.
    """
    source = open_source(path)
    kind: Kind = "orbax" if isinstance(source, Converted) else "safetensors"
    return _summary(kind, source.contents.config, source.contents.leaves)


def summary_of_config(config: KimiConfig) -> Summary:
    """Returns the summary that a published checkpoint of `config` would have, off the abstract model: nothing is
    allocated."""
    return _summary("configuration", config, stored_leaves(abstract(config)))


def _summary(kind: Kind, config: KimiConfig | EagleConfig, leaves: Iterable[Leaf]) -> Summary:
    parts: defaultdict[str, list[Leaf]] = defaultdict(list)
    dtypes: Counter[str] = Counter()
    for leaf in leaves:
        parts[next(part for mark, part in _PARTS if mark in leaf.path)].append(leaf)
        part = leaf.weight
        packed = part is not None and part.is_first and part.format in PACKED
        dtypes[part.format.__name__.lower() if part and packed else leaf.dtype.name] += leaf.nbytes
    if isinstance(config, EagleConfig):
        text, vision = config.layer, None
        layers = Counter([f"{config.form} draft head + dense"])
    else:
        text, vision = config.text, config.vision
        kinds = enumerate(text.layer_kinds)
        layers = Counter(f"{mixer} + {'moe' if text.is_moe(i) else 'dense'}" for i, mixer in kinds)
    return Summary(
        kind=kind,
        model_type=config.model_type,
        layers=dict(layers),
        vision_layers=0 if vision is None else vision.vt_num_hidden_layers,
        n_routed_experts=text.n_routed_experts,
        num_experts_per_tok=text.num_experts_per_tok,
        dtypes=dict(dtypes.most_common()),
        parts=tuple(_part(name, parts[name]) for name in dict.fromkeys(part for _, part in _PARTS) if name in parts),
    )


def _part(name: str, leaves: list[Leaf]) -> PartSizes:
    return PartSizes(
        name,
        sum(leaf.shape[0] if leaf.stacked else 1 for leaf in leaves),
        sum(_parameters(leaf) for leaf in leaves),
        sum(leaf.nbytes for leaf in leaves),
    )


def _parameters(leaf: Leaf) -> int:
    if is_scales(leaf.path):
        return 0
    return math.prod(leaf.shape if leaf.weight is None else leaf.weight.part.weight_shape(leaf.shape))
