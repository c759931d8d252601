"""Reads whole configurations: config.json and generation_config.json, from a folder, a preset or parsed objects."""

import difflib
import re
import warnings
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from kimi_jax import families, json_reader
from kimi_jax.config import KimiConfig, TextConfig, VisionConfig
from kimi_jax.config_json.fields import ConfigError, Fields, same, shown
from kimi_jax.config_json.keys import (
    HARMLESS_GENERATION,
    HARMLESS_TEXT,
    HARMLESS_TOP,
    HARMLESS_VISION,
    MAX_VOCAB,
    NEUTRAL_SAMPLING,
    TEXT_ALIASES,
    TOP_ALIASES,
)
from kimi_jax.config_json.quantization import quantization
from kimi_jax.config_json.text import DTYPES, text
from kimi_jax.config_json.vision import vision
from kimi_jax.families import Family
from kimi_jax.printable import printable


@runtime_checkable
class Folder(Protocol):
    """Is what `from_folder` needs of a folder: a Path has it, and so has a folder behind a URL."""

    def __truediv__(self, name: str) -> Any: ...


def from_folder(folder: str | Folder) -> KimiConfig:
    """Reads the configuration of the checkpoint in `folder`: `config.json`, and `generation_config.json` if there is
    one.

    Raises `ConfigError` naming the file and the field for anything missing, impossible, contradictory or not
    supported, and warns of unknown keys.
    """
    folder = Path(folder) if isinstance(folder, str) else folder
    path, beside = folder / "config.json", folder / "generation_config.json"
    try:
        config = json_reader.read_object(path, error=ConfigError)
    except FileNotFoundError:
        raise ConfigError(f"{path}: not found") from None
    generation = json_reader.read_object(beside, error=ConfigError) if beside.exists() else None
    return from_dict(config, generation, where=str(path), generation_where=str(beside))


def preset(name: str) -> KimiConfig:
    """Returns a published model's configuration by name, which `preset_name` reads."""
    with resources.as_file(resources.files("kimi_jax") / "presets" / preset_name(name)) as folder:
        return from_folder(folder)


def preset_name(name: str) -> str:
    """Returns the whole name of a preset, whose `kimi-` and size may be left out: "k2.5", "kimi-linear".

    Raises `ConfigError` for any other, with the nearest one.
    """
    spellings = {spelling: full for full in preset_names() for spelling in _spellings(full)}
    if name not in spellings:
        near = difflib.get_close_matches(name, spellings, 1)
        meant = f"; did you mean {spellings[near[0]]}?" if near else ""
        raise ConfigError(f"no preset {shown(name)}; there are {', '.join(preset_names())}{meant}")
    return spellings[name]


def _spellings(full: str) -> tuple[str, ...]:
    without_size = re.sub(r"-[0-9]+b$", "", full)
    return tuple({full, full.removeprefix("kimi-"), without_size})


def preset_names() -> list[str]:
    """Returns the names that `preset` takes."""
    presets = resources.files("kimi_jax") / "presets"
    return sorted(p.name for p in presets.iterdir() if (p / "config.json").is_file())


def from_dict(
    config: Mapping[str, Any],
    generation: Mapping[str, Any] | None = None,
    *,
    where: str = "config.json",
    generation_where: str = "generation_config.json",
) -> KimiConfig:
    """Returns the configuration of the parsed contents of config.json and generation_config.json.

    `where` and `generation_where` name the files in errors and warnings. Raises and warns as `from_folder` does.
    """
    where = printable(where)
    if is_eagle(config):
        raise ConfigError(f"{where}: is that of an Eagle3 draft head, which runs beside a model; expected a model's")
    unread: list[str] = []
    family = _family(Fields(config, where), config, families.FAMILIES)
    if family.config.text_config is not None:
        language, seen, placeholder, stops = _nested(config, family, where, unread)
    else:
        fields = Fields(config, where, _text_keys(family))
        language = text(fields, family, quantization(fields, None, unread))
        seen, placeholder, stops = None, None, language.eos_token_ids
        unread += fields.unread(HARMLESS_TEXT)
    stops += tuple(token for token in family.stop_ids if token < language.vocab_size)
    if generation is not None:
        stops += _generation_stops(Fields(generation, printable(generation_where)), language.vocab_size, unread)
    if unread:
        more = f" and {len(unread) - 20} more" if len(unread) > 20 else ""
        names = ", ".join(printable(name) for name in unread[:20])
        # With this line as its place, so that Python shows it once although processor and model both read the file
        warnings.warn(f"{where}: has keys that are not known, or not acted on: {names}{more}", stacklevel=1)
    return KimiConfig(
        Fields(config, where).raw("model_type"), family.name, language, tuple(sorted(set(stops))), seen, placeholder
    )


def is_eagle(config: Mapping[str, Any]) -> bool:
    """Says whether a parsed config.json is that of an Eagle3 head, of a form that is known here or of another."""
    named = config.get("architectures")
    return isinstance(named, list) and any(isinstance(name, str) and "eagle3" in name.lower() for name in named)


def _family(fields: Fields, config: Mapping[str, Any], choices: Sequence[Family]) -> Family:
    """Returns the family of `config`, the object of `fields`, among `choices`. Raises `ConfigError` for a `model_type`
    that is none of theirs."""
    fields.word("model_type", [name for family in choices for name in family.model_types])
    family = families.family_of(config, choices)
    assert family is not None  # one has the model_type
    return family


def _text_keys(*own: Family) -> dict[str, str]:
    """Returns the spellings of the language model's keys. Tools mix the families', so those of all are read; where two
    families mean different things by a key, the file's `own`, the last before the first, decide."""
    keys = dict(TEXT_ALIASES)
    for family in (*families.FAMILIES, *own):
        keys |= family.config.text_keys
    return keys


def _nested(
    config: Mapping[str, Any], family: Family, where: str, unread: list[str]
) -> tuple[TextConfig, VisionConfig | None, int | None, tuple[int, ...]]:
    """Returns the language model, the vision tower, the id that stands for media, and the ids that end a text, of a
    file that holds the language model in an object of its own."""
    home, keys = family.config.text_config, family.config
    assert home is not None
    top = Fields(config, where, {**TOP_ALIASES, **keys.top_keys})
    tower = None if keys.vision_config is None else _object(top, keys.vision_config, keys.vision_keys)
    if tower is not None:
        tower.adopt(top, keys.projector_keys)
    inner_family = _family(_object(top, home, {}), top.raw(home), families.text_families())
    inner_keys = _text_keys(inner_family, family)
    inner = _object(top, home, inner_keys)
    language = text(inner, inner_family, quantization(inner, top, unread))
    top.only("tie_word_embeddings", False)
    top.word("dtype", DTYPES, "bfloat16")
    for name in ("bos_token_id", "pad_token_id"):
        top.token_id(name, language.vocab_size)
    placeholder = None if tower is None else _placeholder(top, language.vocab_size)
    stops = (*language.eos_token_ids, *top.token_ids("eos_token_id", language.vocab_size))
    seen = None if tower is None else vision(tower, language)
    for spelling in top.unread(HARMLESS_TOP):
        name = inner_keys.get(spelling, spelling)
        if inner.knows(name):
            top.check(
                same(top.raw(spelling), inner.raw(name)),
                f"{spelling} {shown(top.raw(spelling))} stands beside {home}, which has {shown(inner.raw(name))}",
            )
    unread += top.unread(HARMLESS_TOP)
    unread += [f"{name} of {home}" for name in inner.unread(HARMLESS_TEXT)]
    unread += [] if tower is None else [f"{name} of {keys.vision_config}" for name in tower.unread(HARMLESS_VISION)]
    return language, seen, placeholder, stops


def _object(fields: Fields, name: str, aliases: Mapping[str, str]) -> Fields:
    found = fields.object(name, aliases)
    if found is None:
        raise ConfigError(f"{fields.where}: {name} is missing")
    return found


def _placeholder(fields: Fields, vocab_size: int) -> int:
    """Returns the token that stands for media."""
    placeholder = fields.integer("media_placeholder_token_id", most=MAX_VOCAB)
    fields.check(
        placeholder < vocab_size, f"media_placeholder_token_id {placeholder} is outside vocab_size {vocab_size}"
    )
    return placeholder


def _generation_stops(fields: Fields, vocab_size: int, unread: list[str]) -> tuple[int, ...]:
    fields.neutral(NEUTRAL_SAMPLING)
    for name in ("bos_token_id", "pad_token_id"):
        fields.token_id(name, vocab_size)
    stops = fields.token_ids("eos_token_id", vocab_size)
    unread += [f"{name} of {fields.where}" for name in fields.unread(HARMLESS_GENERATION)]
    return stops
