"""Checks the sizes in a config.json against the tensors that are there, before anything is made for each layer."""

import re
from collections.abc import Mapping, Sequence

from checkpoints.published.safetensors import CheckpointError
from kimi_jax.config import KimiConfig
from kimi_jax.families import published_name

_STACKED = ".experts."
# Paths in the model's tree, with {} for what is counted.
_LAYER = "model.layers.{}.input_layernorm.weight"
_BLOCK = "vision_tower.encoder.blocks.{}.norm0.weight"
_EXPERT = "model.layers.0.mlp.experts.{}.gate_proj.weight"


def check_sizes(config: KimiConfig, shapes: Mapping[str, Sequence[int]], where: str) -> None:
    """Raises `CheckpointError`, which `where` opens, where `config` has more layers or experts than the tensors of
    `shapes`, by published names or by the paths of stored leaves, are for. An expert is a tensor, or an index of one's
    leading axis. A `config` with too few of them is left to the comparison of names."""
    names = "\n".join(shapes)  # a release has 200,000, which are searched in one piece
    layers, blocks, numbered = (_numbers(config, path, names) for path in (_LAYER, _BLOCK, _EXPERT))
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


def _numbers(config: KimiConfig, path: str, names: str) -> list[str]:
    """Returns the number in every one of `names` that stands behind the word before {} in `path`, or behind the word
    that the family publishes in its place."""
    words = {one.split(".{}.")[0].rsplit(".", 1)[-1] for one in (path, published_name(config, path))}
    return re.findall(rf"\.(?:{'|'.join(map(re.escape, words))})\.([0-9]+)(?=\.)", names)
