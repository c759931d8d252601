"""Checks the sizes in a config.json against the tensors that are there, before anything is made for each layer."""

import re
from collections.abc import Mapping, Sequence

from checkpoints.published.safetensors import CheckpointError
from kimi_jax.config import KimiConfig

_STACKED = ".experts."


def check_sizes(config: KimiConfig, shapes: Mapping[str, Sequence[int]], where: str) -> None:
    """Raises `CheckpointError`, which `where` opens, where `config` has more layers or experts than there are tensors
    for. `shapes` has the tensors' shapes by name; an expert is a tensor, or an index of one's leading axis. A `config`
    with too few of them is left to the comparison of names."""
    names = "\n".join(shapes)  # a release has 200,000, which are searched in one piece
    layers, blocks, numbered = (_numbers(kind, names) for kind in ("layers", "blocks", "experts"))
    stacked = [] if numbered else [shape[0] for name, shape in shapes.items() if _STACKED in name and shape]
    text, vision = config.text, config.vision
    counts = [("num_hidden_layers", text.num_hidden_layers, len(set(layers)), "layers")]
    if vision is not None:
        counts.append(("vt_num_hidden_layers", vision.vt_num_hidden_layers, len(set(blocks)), "vision layers"))
    if mixtures := sum(map(text.is_moe, range(text.num_hidden_layers))):
        experts = max(stacked) if stacked else len(set(numbered))
        counts.append(("n_routed_experts", text.n_routed_experts, experts, "experts"))
        if not stacked:
            asked = mixtures * text.n_routed_experts
            counts.append(("n_routed_experts of all layers", asked, len(numbered), "tensors of experts"))
    for field, asked, there, kind in counts:
        if asked > there:
            raise CheckpointError(f"{where}: config.json has {field} {asked}, but there are {there} {kind}")


def _numbers(kind: str, names: str) -> list[str]:
    """Returns the number behind every `.kind.`, as published names and the paths of stored leaves have it."""
    return re.findall(rf"\.{kind}\.([0-9]+)(?=\.)", names)
