"""The families of releases, a module for each: nothing else in the package knows one release from another.

A file is of the family whose class its `architectures` names; where that class is nobody's, of the one that has its
`model_type`. A nested file has two: its own family's, and that of its language model. Both are kept by name in
`KimiConfig` and `TextConfig`, and looked up here. docs/add-a-family.md says how to add one.
"""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from kimi_jax.config import KimiConfig
from kimi_jax.families.family import ConfigSpelling, Family, SavedSpelling, TensorNames
from kimi_jax.families.k2 import K2
from kimi_jax.families.k3 import K3
from kimi_jax.families.k25 import K25
from kimi_jax.families.kimi_linear import KIMI_LINEAR

__all__ = [
    "FAMILIES",
    "ConfigSpelling",
    "Family",
    "SavedSpelling",
    "TensorNames",
    "by_name",
    "family_of",
    "prefix_of",
    "published_name",
    "text_families",
    "text_fields",
]

_Object = TypeVar("_Object", bound=Mapping[str, Any])

# The first that recognises a file is its family.
FAMILIES: tuple[Family, ...] = (K2, KIMI_LINEAR, K25, K3)


def text_families() -> tuple[Family, ...]:
    """Returns the families whose files hold a language model at the top, as a nested file's inner object does."""
    return tuple(family for family in FAMILIES if family.config.text_config is None)


def family_of(config: Mapping[str, Any], families: Iterable[Family] | None = None) -> Family | None:
    """Returns the family, among `families` or all, of a parsed config.json; None where it is of none of them."""
    families = FAMILIES if families is None else tuple(families)
    by_class = (family for family in families if family.recognises(config))
    by_type = (family for family in families if config.get("model_type") in family.model_types)
    return next(by_class, None) or next(by_type, None)


def by_name(name: str) -> Family:
    """Returns the family called `name`. Raises KeyError where there is none."""
    return {family.name: family for family in FAMILIES}[name]


def text_fields(config: _Object) -> _Object:
    """Returns the object of a parsed config.json that holds the language model's fields: one inside it, or itself."""
    family = family_of(config)
    home = None if family is None else family.config.text_config
    return config if home is None else config.get(home, config)


def published_name(config: KimiConfig, path: str) -> str:
    """Returns the published name, without a prefix, of what lies at `path` in the tree of a model of `config`.

    A nested file's language model is named by its own family, and then by the family of the whole.
    """
    for name in dict.fromkeys((config.text.family, config.family)):
        path = by_name(name).tensors.published(path)
    return path


def prefix_of(names: Iterable[str]) -> str:
    """Returns the prefix that the language model's names have among published `names`, "" without one. Text models are
    also cut out of larger ones with their prefix, so it is sought whatever the family."""
    prefixes = tuple(prefix for prefix in dict.fromkeys(family.tensors.prefix for family in FAMILIES) if prefix)
    found = next((name for name in names if name.startswith(prefixes)), "")
    return next((prefix for prefix in prefixes if found.startswith(prefix)), "")
