"""Chat templates that lie in a checkpoint's folder: rendered in jinja2's sandbox, and taken apart into safe segments.

A rendered template is one string in which people's text and the template's own markers look alike. To tell them
apart the template is rendered twice, the second time with every character of people's text that occurs in any special
token shifted into a private-use block. Special tokens found in the second rendering are the template's own; the rest
is shifted back. Covered are all strings in messages and tools, keys included, but for roles and the fixed words of
the two schemas (`_SCHEMA_WORDS`). A template whose output depends on the shifted characters (it searches or changes
people's text, or escapes it as ASCII) gives another text the second time; that is refused, so what is encoded is
always what `render` shows.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kimi_jax.text.messages import Message
from kimi_jax.text.templates import VIDEO_PLACEHOLDER, Segment
from kimi_jax.text.tokenizer import read_config, token_content
from kimi_jax.text.tools import declare_tools, deep_sorted

_PRIVATE_USE = range(0xF0000, 0x10F000, 0x1000)
_SCHEMA_WORDS = frozenset(
    {"content", "type", "text", "name", "function", "arguments", "id", "index", "tool_calls", "tool_call_id"}
    | {"reasoning_content", "image", "image_url", "video", "video_url", "url", "path", "detail", "role"}
    | {"description", "parameters", "strict", "properties", "required", "items", "enum", "default", "title", "format"}
    | {"anyOf", "oneOf", "allOf", "$ref", "$defs", "additionalProperties", "pattern", "minimum", "maximum"}
    | {"minLength", "maxLength", "minItems", "maxItems"}
    | {"object", "array", "string", "number", "integer", "boolean", "null"}
)


def _read(folder: Path) -> tuple[str, dict[str, str]]:
    """The template and the tokenizer's named tokens (`bos_token` and the like), which templates may print."""
    config_file = folder / "tokenizer_config.json"
    config = read_config(config_file) if config_file.is_file() else {}
    named = {key: token_content(value) for key, value in config.items() if key.endswith("_token")}
    tokens = {key: value for key, value in named.items() if isinstance(value, str)}
    template_file = folder / "chat_template.jinja"
    if template_file.is_file():
        return template_file.read_text(encoding="utf-8"), tokens
    template = config.get("chat_template")
    if not isinstance(template, str):
        raise ValueError(
            f"{folder}: neither 'k2.5' nor 'k2', nor a folder with chat_template.jinja or a chat_template in "
            f"tokenizer_config.json"
        )
    return template, tokens


def has_template(folder: str | Path) -> bool:
    """Whether a chat template lies in `folder`."""
    config_file = Path(folder) / "tokenizer_config.json"
    config = read_config(config_file) if config_file.is_file() else {}
    return (Path(folder) / "chat_template.jinja").is_file() or "chat_template" in config


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, **options: Any) -> str:
    # jinja2's own filter escapes HTML and sorts keys; transformers replaces it by this one
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


class FolderTemplate:
    """The chat template in `folder`; `chat_template.jinja` wins over `tokenizer_config.json`.

    ValueError naming the folder where there is none, where it does not compile, and where it refuses the messages.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        source, self._tokens = _read(self.folder)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        # read the clock once, or two renderings could differ
        environment.globals.update(raise_exception=_raise_exception, strftime_now=datetime.now().strftime)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"{self.folder}: the chat template does not compile: {error}") from error

    def _render(self, messages: Any, tools: Any, tools_ts_str: str, **options: bool) -> str:
        # the variable is undefined, not empty, where no tools are declared
        declared = {"tools_ts_str": tools_ts_str} if tools_ts_str else {}
        try:
            return self._template.render(messages=messages, tools=tools, **declared, **self._tokens, **options)
        except (jinja2.TemplateError, TypeError, AttributeError, LookupError, ValueError) as error:
            raise ValueError(f"{self.folder}: the chat template does not take these messages: {error}") from error

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, **options: bool) -> str:
        """The prompt. Tools are deep-sorted first and also given as `tools_ts_str`, as Kimi's tokenizer does."""
        return self._render(list(messages), _sorted(tools), declare_tools(tools or []), **options)

    def segments(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        special_tokens: Collection[str],
        **options: bool,
    ) -> list[Segment]:
        """The same prompt in segments, of which only what the template itself wrote are markers."""
        markers = sorted([*special_tokens, VIDEO_PLACEHOLDER], key=len, reverse=True)
        declared = declare_tools(tools or [])
        plain = self._render(list(messages), _sorted(tools), declared, **options)
        base = next(start for start in _PRIVATE_USE if not any(start <= ord(c) < start + 0x1000 for c in plain))
        alphabet = sorted(set("".join(markers)))
        shift = {ord(c): chr(base + i) for i, c in enumerate(alphabet)}
        back = {base + i: c for i, c in enumerate(alphabet)}
        people = [{**_shifted(message, shift), "role": message["role"]} for message in messages]
        shifted = self._render(people, _shifted(_sorted(tools), shift), declared.translate(shift), **options)
        if shifted.translate(back) != plain:
            raise ValueError(
                f"{self.folder}: the chat template looks into or changes people's text, so its own markers cannot be "
                f"told from theirs; if you trust the text, encode what `render` gives with allow_special=True"
            )
        parts = re.split("(" + "|".join(map(re.escape, markers)) + ")", shifted)
        return [Segment(part.translate(back), index % 2 == 1) for index, part in enumerate(parts)]


def _sorted(tools: Sequence[Mapping[str, Any]] | None) -> list[Any] | None:
    return deep_sorted(list(tools)) if tools else None


def _shifted(value: Any, shift: Mapping[int, str]) -> Any:
    if isinstance(value, str):
        return value if value in _SCHEMA_WORDS else value.translate(shift)
    if isinstance(value, Mapping):
        return {_shifted(key, shift): _shifted(one, shift) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_shifted(one, shift) for one in value]
    return value
