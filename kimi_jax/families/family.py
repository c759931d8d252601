"""The description of a family: how its config.json is spelt, how its tensors are named, which chat template it has."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

Rename = tuple[re.Pattern[str], str]  # a pattern, and what stands in its place, as `re.sub` takes it
Keys = Mapping[str, str]  # spelling in the file -> the name that this package reads it by


@dataclasses.dataclass(frozen=True)
class ConfigSpelling:
    """The spelling of a family's config.json.

    text_config, vision_config: the keys of the objects that hold the language model and the vision tower. Without
        `text_config` the language model's fields stand at the top of the file, without `vision_config` there is no
        tower; a tower needs a `text_config` beside it.
    text_keys: other spellings of the language model's keys -> DeepSeek-V3's, which `config.TextConfig` has.
    top_keys, vision_keys: the like for the keys beside the two objects, and for those of the tower.
    projector_keys: keys beside the two objects -> the tower's keys that they stand for.
    no_rotation: MLA does not rotate its channels where the file does not say (`mla_use_nope`).
    needs_kda: a file that names no layers of Kimi Delta Attention is refused.
    """

    text_config: str | None = None
    vision_config: str | None = None
    text_keys: Keys = dataclasses.field(default_factory=dict)
    top_keys: Keys = dataclasses.field(default_factory=dict)
    vision_keys: Keys = dataclasses.field(default_factory=dict)
    projector_keys: Keys = dataclasses.field(default_factory=dict)
    no_rotation: bool = False
    needs_kda: bool = False


@dataclasses.dataclass(frozen=True)
class SavedSpelling:
    """The names that transformers gives a family's tensors when it saves them. A folder has them if `mark` is found in
    the name of any tensor; the first match of each pattern in `renames` is then replaced to get the published name."""

    mark: re.Pattern[str]
    renames: tuple[Rename, ...]


@dataclasses.dataclass(frozen=True)
class TensorNames:
    """The names of a family's published tensors.

    renames: path in the model's tree -> published name, applied in order. A path has `{}` for an expert's number, and
        no `prefix`.
    prefix: the beginning of the language model's names, where its tensors are published with one.
    saved: transformers' spellings of the names, which are read too.
    unreadable: matches names in transformers' spelling of a model that cannot be read.
    """

    renames: tuple[Rename, ...] = ()
    prefix: str = ""
    saved: tuple[SavedSpelling, ...] = ()
    unreadable: re.Pattern[str] | None = None

    def published(self, path: str) -> str:
        """Returns the published name, without the prefix, of what lies at `path` in the model's tree."""
        for pattern, replacement in self.renames:
            path = pattern.sub(replacement, path)
        return path


@dataclasses.dataclass(frozen=True)
class Family:
    """Releases that spell their files alike.

    name: the family's own, by which `KimiConfig` and `TextConfig` refer to it.
    title: the name in messages.
    architectures, model_types: the values of config.json's `architectures` and `model_type`.
    template: the built-in chat template (a key of `text.templates.BUILT_IN`), for a folder that has none.
    stop_ids: ids that end a text although no file names them, where the vocabulary has them.
    """

    name: str
    title: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    template: str
    config: ConfigSpelling = ConfigSpelling()
    tensors: TensorNames = TensorNames()
    stop_ids: tuple[int, ...] = ()

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Says whether `config`, a parsed config.json, names a class of this family in `architectures` and has its
        language model where the family has it."""
        named = config.get("architectures")
        home = self.config.text_config
        return (
            isinstance(named, list)
            and any(name in self.architectures for name in named)
            and (home in config if home is not None else "num_hidden_layers" in config)
        )
