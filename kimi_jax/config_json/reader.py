"""Reads whole configurations: config.json and generation_config.json, from a folder, a preset or parsed objects."""

import warnings
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from kimi_jax import json_reader
from kimi_jax.config import KimiConfig, TextConfig, VisionConfig
from kimi_jax.config_json.fields import ConfigError, Fields, same, shown
from kimi_jax.config_json.keys import (
    HARMLESS_GENERATION,
    HARMLESS_TEXT,
    HARMLESS_TOP,
    HARMLESS_VISION,
    MAX_VOCAB,
    NEUTRAL_SAMPLING,
    PROJECTOR_ALIASES,
    TEXT_ALIASES,
    TOP_ALIASES,
    VISION_ALIASES,
)
from kimi_jax.config_json.quantization import quantization
from kimi_jax.config_json.text import DTYPES, text
from kimi_jax.config_json.vision import vision
from kimi_jax.printable import printable

TEXT_MODEL_TYPES = ("kimi_k2", "deepseek_v3", "kimi_linear")
MODEL_TYPES = (*TEXT_MODEL_TYPES, "kimi_k25")


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
    """Returns a published model's configuration by name; `preset_names()` lists them."""
    if name not in preset_names():
        raise ConfigError(f"no preset {shown(name)}; there are {', '.join(preset_names())}")
    with resources.as_file(resources.files("kimi_jax") / "presets" / name) as folder:
        return from_folder(folder)


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
    unread: list[str] = []
    model_type = Fields(config, where).word("model_type", MODEL_TYPES)
    if model_type == "kimi_k25":
        language, seen, placeholder, stops = _with_vision(config, where, unread)
    else:
        fields = Fields(config, where, TEXT_ALIASES)
        language = text(fields, model_type, quantization(fields, None, unread))
        seen, placeholder, stops = None, None, language.eos_token_ids
        unread += fields.unread(HARMLESS_TEXT)
    if generation is not None:
        stops += _generation_stops(Fields(generation, printable(generation_where)), language.vocab_size, unread)
    if unread:
        more = f" and {len(unread) - 20} more" if len(unread) > 20 else ""
        names = ", ".join(printable(name) for name in unread[:20])
        # With this line as its place, so that Python shows it once although processor and model both read the file
        warnings.warn(f"{where}: has keys that are not known, or not acted on: {names}{more}", stacklevel=1)
    return KimiConfig(model_type, language, tuple(sorted(set(stops))), seen, placeholder)


def _with_vision(
    config: Mapping[str, Any], where: str, unread: list[str]
) -> tuple[TextConfig, VisionConfig, int, tuple[int, ...]]:
    """Returns the language model, the vision tower, the id of the media placeholder, and the ids that end a text."""
    top = Fields(config, where, TOP_ALIASES)
    inner, tower = top.object("text_config", TEXT_ALIASES), top.object("vision_config", VISION_ALIASES)
    if inner is None or tower is None:
        raise ConfigError(f"{where}: {'text_config' if inner is None else 'vision_config'} is missing")
    tower.adopt(top, PROJECTOR_ALIASES)
    language = text(inner, inner.word("model_type", TEXT_MODEL_TYPES), quantization(inner, top, unread))
    top.only("tie_word_embeddings", False)
    top.word("dtype", DTYPES, "bfloat16")
    for name in ("bos_token_id", "pad_token_id"):
        top.token_id(name, language.vocab_size)
    placeholder = top.integer("media_placeholder_token_id", most=MAX_VOCAB)
    top.check(
        placeholder < language.vocab_size,
        f"media_placeholder_token_id {placeholder} is outside vocab_size {language.vocab_size}",
    )
    stops = (*language.eos_token_ids, *top.token_ids("eos_token_id", language.vocab_size))
    seen = vision(tower, language)
    for spelling in top.unread(HARMLESS_TOP):
        name = TEXT_ALIASES.get(spelling, spelling)
        if inner.knows(name):
            top.check(
                same(top.raw(spelling), inner.raw(name)),
                f"{spelling} {shown(top.raw(spelling))} stands beside text_config, which has {shown(inner.raw(name))}",
            )
    unread += top.unread(HARMLESS_TOP)
    unread += [f"{name} of text_config" for name in inner.unread(HARMLESS_TEXT)]
    unread += [f"{name} of vision_config" for name in tower.unread(HARMLESS_VISION)]
    return language, seen, placeholder, stops


def _generation_stops(fields: Fields, vocab_size: int, unread: list[str]) -> tuple[int, ...]:
    fields.neutral(NEUTRAL_SAMPLING)
    for name in ("bos_token_id", "pad_token_id"):
        fields.token_id(name, vocab_size)
    stops = fields.token_ids("eos_token_id", vocab_size)
    unread += [f"{name} of {fields.where}" for name in fields.unread(HARMLESS_GENERATION)]
    return stops
