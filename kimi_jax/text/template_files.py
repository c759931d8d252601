"""Finds the chat templates in a checkpoint's folder and chooses one of them by the rules of transformers 5.

`chat_template.jinja` (with `additional_chat_templates/*.jinja` beside it) wins over `chat_template.json`, which older
processors wrote, and that over `chat_template` in `tokenizer_config.json`. Templates may have names: `tool_use` is
the one for conversations with tools, `default` for all others.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_jax import json_reader
from kimi_jax.printable import printable
from kimi_jax.text.files import read_bounded, read_text
from kimi_jax.text.tokenizer_files import read_config, token_content

MAX_TEMPLATE_BYTES = 2**20  # the longest published ones have 20 KB
_MAX_TEMPLATES = 16


@dataclass(frozen=True)
class TemplateFiles:
    """Holds chat templates, name -> source, and the tokenizer's named tokens (`bos_token`, ...), which they print."""

    templates: dict[str, str]
    tokens: dict[str, str]

    @classmethod
    def from_folder(cls, folder: Path) -> "TemplateFiles":
        """Reads the files of `folder`; there may be none.

        Raises ValueError, naming the file, where one cannot be read or is not what it should be.
        """
        config_file = folder / "tokenizer_config.json"
        config = read_config(config_file) if config_file.exists() else {}
        named = {key: token_content(value) for key, value in config.items() if key.endswith("_token")}
        tokens = {key: value for key, value in named.items() if isinstance(value, str)}
        templates = _jinja_files(folder) or _named(*_stored(folder, config, config_file))
        for name, source in templates.items():
            if len(source) > MAX_TEMPLATE_BYTES:
                raise ValueError(
                    f"{printable(folder)}: the chat template {printable(name, 60)} has {len(source):,} characters, "
                    f"expected at most {MAX_TEMPLATE_BYTES:,}"
                )
        return cls(templates, tokens)

    def source(self, with_tools: bool) -> str | None:
        """Returns the template for a conversation, or None where there is none for it."""
        if with_tools and "tool_use" in self.templates:
            return self.templates["tool_use"]
        return self.templates.get("default")


def has_template(folder: str | Path) -> bool:
    """Says whether `folder` has a chat template. Raises what `TemplateFiles.from_folder` raises."""
    return bool(TemplateFiles.from_folder(Path(folder)).templates)


def _jinja_files(folder: Path) -> dict[str, str]:
    files = {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").exists():
        files["default"] = folder / "chat_template.jinja"
    if len(files) > _MAX_TEMPLATES:
        raise ValueError(f"{printable(folder)}: has {len(files)} chat templates, expected at most {_MAX_TEMPLATES}")
    return {name: read_text(file, MAX_TEMPLATE_BYTES) for name, file in files.items()}


def _stored(folder: Path, config: Mapping[str, Any], config_file: Path) -> tuple[Any, Path]:
    """Returns the value of `chat_template` in the first JSON file that has it, or None, and that file."""
    file = folder / "chat_template.json"
    if file.exists():
        stored = json_reader.parse_object(read_bounded(file, _MAX_TEMPLATES * MAX_TEMPLATE_BYTES), str(file))
        if "chat_template" not in stored:
            raise ValueError(f"{printable(file)}: has no chat_template")
        return stored["chat_template"], file
    return config.get("chat_template"), config_file


def _named(stored: Any, file: Path) -> dict[str, str]:
    if stored is None:
        return {}
    if isinstance(stored, str):
        return {"default": stored}
    pairs = list(stored.items()) if isinstance(stored, Mapping) else []
    if isinstance(stored, list):
        pairs = [(one.get("name"), one.get("template")) if isinstance(one, Mapping) else (None, None) for one in stored]
    if not pairs or not all(isinstance(name, str) and isinstance(source, str) for name, source in pairs):
        raise ValueError(
            f"{printable(file)}: chat_template is neither a string, nor an object of strings, nor a list of objects "
            f"with a name and a template"
        )
    if len(named := dict(pairs)) < len(pairs):
        raise ValueError(f"{printable(file)}: chat_template gives a name twice")
    return named
