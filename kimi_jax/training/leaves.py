"""Names of a model's parameters, and what an optimizer does with each.

A name is the path in the model's tree with dots, which is that of the published tensor without a family's spelling:
"model.layers.1.mlp.experts.gate_proj.weight". Trees are what `flax.nnx.split` or `flax.nnx.state` return, or dicts of
arrays.
"""

import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.tree_util import DictKey, KeyPath, SequenceKey

# "muon": matrices [..., out, in] inside layers. "decayed": other matrices, by AdamW with weight decay. "plain": the
# rest, by AdamW without. "constant": no part of the optimizer.
Treatment = Literal["muon", "decayed", "plain", "constant"]

ROUTER_BIAS = "e_score_correction_bias"
_MATRIX = re.compile(
    r"model\.layers\.\d+\.(?!.*conv1d\.).*\.weight"
    r"|vision_tower\.encoder\.blocks\.\d+\.(wqkv|wo|mlp\.fc[01])\.weight"
    r"|mm_projector\.proj\.[02]\.weight"
)
_VOCABULARY = re.compile(r"(model\.embed_tokens|lm_head)\.weight")


def leaf_name(path: KeyPath) -> str:
    """Returns the dotted name of a leaf, given its path as `jax.tree_util` spells it."""
    keys = (entry.key if isinstance(entry, DictKey) else entry.idx for entry in path if _is_step(entry))
    return ".".join(map(str, keys))


def _is_step(entry: Any) -> bool:
    return isinstance(entry, DictKey | SequenceKey)  # else it leads from a variable to its array


def map_leaves(change: Callable[[str, Any], Any], params: Any) -> Any:
    """Replaces every array of a tree by `change(name, array)`."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: change(leaf_name(path), leaf), params)


def named_leaves(params: Any) -> dict[str, Any]:
    """Returns a tree's arrays by name, in the tree's order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {leaf_name(path): leaf for path, leaf in leaves}


def treatment(name: str, leaf: Any) -> Treatment:
    """Returns what an optimizer does with a parameter, an array or its shape.

    Muon takes matrices of layers: projections, experts, routers. Vocabulary tables are AdamW's with weight decay;
    norms, biases, taps of convolutions, KDA's decays, and embeddings of patches and their places are AdamW's without.
    (This division is that of Moonlight, arXiv 2502.16982; the reports on K2 and K2.5 give none.) The router's
    correction bias has a rule of its own (`router_bias`), and the parts of quantised weights stay as they are.
    """
    if name.endswith(ROUTER_BIAS) or not jnp.issubdtype(leaf.dtype, jnp.floating) or name.endswith(".scales"):
        return "constant"
    if leaf.ndim >= 2 and _MATRIX.fullmatch(name):
        return "muon"
    return "decayed" if _VOCABULARY.fullmatch(name) else "plain"


def everything(name: str) -> bool:
    """Selects every parameter."""
    return True


def split_trained(model: nnx.Module, trainable: Callable[[str], bool] = everything) -> tuple[Any, Any, Any]:
    """Splits a model into its `nnx.GraphDef`, the `nnx.State` that is trained, and that of all others.

    `nnx.merge` joins the three.

    `trainable` takes a parameter's name. Never trained are the router's correction bias, and weights that are quantised
    (INT4 codes and scales), whatever it says: gradients and an optimizer's state are made of the second result alone.

    Raises:
      ValueError: nothing is left to train.
    """

    def is_trained(path: tuple[Any, ...], variable: Any) -> bool:
        name = ".".join(map(str, path))
        return issubclass(variable.type, nnx.Param) and not name.endswith(ROUTER_BIAS) and trainable(name)

    graph, state = nnx.split(model)
    trained, frozen = nnx.split_state(state, is_trained, ...)
    if not jax.tree.leaves(trained):
        raise ValueError("no parameter is trained, expected `trainable` to be true of one name at least")
    return graph, trained, frozen
