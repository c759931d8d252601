"""Renders chat templates of checkpoints' folders in a bounded process, and takes the prompt apart into safe segments.

A rendered template is one string in which people's text and the template's own markers look alike. To tell them
apart the template is rendered twice, the second time with every character of people's text that occurs in any special
token exchanged for a private-use character that occurs nowhere else. Special tokens found in the second rendering are
the template's own; then the rest is exchanged back. This covers all strings in messages and tools, keys included,
except roles, the schemas' keys (`_SCHEMA_KEYS`) and the values of `type` (`_SCHEMA_TYPES`). A template whose output
depends on the exchanged characters (it searches or changes people's text, or escapes it as ASCII) gives another text
the second time; such a template is refused, so `encode` always encodes the text that `render` shows.
"""

import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from kimi_jax.printable import printable
from kimi_jax.text import template_process
from kimi_jax.text.messages import Message
from kimi_jax.text.segments import Segment
from kimi_jax.text.template_files import TemplateFiles
from kimi_jax.text.templates import BUILT_IN, VIDEO_PLACEHOLDER
from kimi_jax.text.tools import declare_tools, deep_sorted

_PRIVATE_USE = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE), range(0xE000, 0xF900))
_SCHEMA_KEYS = frozenset(
    {"content", "type", "text", "name", "function", "arguments", "id", "index", "tool_calls", "tool_call_id"}
    | {"reasoning_content", "reasoning", "thinking", "image", "image_url", "video", "video_url", "url", "path"}
    | {"detail", "role", "description", "parameters", "strict", "properties", "required", "items", "enum"}
    | {"default", "title", "format", "anyOf", "oneOf", "allOf", "$ref", "$defs", "additionalProperties"}
    | {"pattern", "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems"}
)
_SCHEMA_TYPES = frozenset(
    {"text", "image", "image_url", "video", "video_url", "function"}
    | {"object", "array", "string", "number", "integer", "boolean", "null"}
)


class FolderTemplate:
    """Renders the chat template in `folder` for a conversation `with_tools` or without, as `template_files` chooses it.

    Raises ValueError, naming the folder or file, where there is none and where it cannot be read. Rendering raises
    ValueError where it does not compile, refuses the messages, or meets a limit on time, memory or depth.
    """

    def __init__(self, folder: str | Path, *, with_tools: bool = False) -> None:
        self.folder = Path(folder)
        files = TemplateFiles.from_folder(self.folder)
        source = files.source(with_tools)
        if source is None:
            raise ValueError(
                f"{printable(folder)}: none of {', '.join(map(repr, BUILT_IN))}, nor a folder with "
                f"chat_template.jinja, chat_template.json, or a chat_template in tokenizer_config.json"
                + (f"; it has templates of the names {printable(sorted(files.templates))}" if files.templates else "")
            )
        self.source = source
        self._tokens = files.tokens
        self._now = datetime.now().isoformat()  # read the clock once, or two renderings could differ

    def _render(self, messages: Any, tools: Any, tools_ts_str: str, options: Mapping[str, bool]) -> str:
        # without tools the variable is undefined, not empty: templates ask whether it is defined
        declared = {"tools_ts_str": tools_ts_str} if tools_ts_str else {}
        variables = {"messages": messages, "tools": tools, **declared, **self._tokens, **options}
        try:
            return template_process.shared.render(self.source, variables, self._now)
        except template_process.RenderError as error:
            raise ValueError(f"{printable(self.folder)}: the chat template {printable(error)}") from None

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, **options: bool) -> str:
        """Returns the prompt. Tools are deep-sorted first and also given as `tools_ts_str`, as Kimi's tokenizer does.

        messages, tools: from `read_messages` and `read_tools`.
        """
        return self._render(messages, _sorted(tools), declare_tools(tools), options)

    def segments(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        special_tokens: Collection[str],
        **options: bool,
    ) -> list[Segment]:
        """Returns the prompt of `render` in segments; only markers that the template itself wrote are marked so.

        Raises ValueError where `render` does, and where the template's markers cannot be told from people's text.
        """
        markers = sorted([*special_tokens, VIDEO_PLACEHOLDER], key=len, reverse=True)
        tools, declared = _sorted(tools), declare_tools(tools)
        plain = self._render(messages, tools, declared, options)
        alphabet = sorted(set("".join(markers)))
        used = set(plain).union(alphabet, self.source, declared, *_strings(messages), *_strings(tools))
        shift = str.maketrans(dict(zip(alphabet, _private(len(alphabet), used), strict=True)))
        restore = str.maketrans({private: chr(code) for code, private in shift.items()})
        exchange = _Exchange(shift, _without(markers, _SCHEMA_KEYS), _without(markers, _SCHEMA_TYPES))
        people = [{**exchange(message), "role": message["role"]} for message in messages]
        shifted = self._render(people, exchange(tools), declared.translate(shift), options)
        if shifted.translate(restore) != plain:
            raise ValueError(
                f"{printable(self.folder)}: the chat template looks into or changes people's text, so its own markers "
                f"cannot be told from theirs; if you trust the text, encode what `render` gives with allow_special=True"
            )
        parts = re.split("(" + "|".join(map(re.escape, markers)) + ")", shifted)
        return [Segment(part.translate(restore), index % 2 == 1) for index, part in enumerate(parts)]


@dataclass(frozen=True)
class _Exchange:
    """Translates all strings in a JSON value by `table`, except the keys `keys` and the values `types` of `type`."""

    table: Mapping[int, str]
    keys: frozenset[str]
    types: frozenset[str]

    def __call__(self, value: Any, key: str = "") -> Any:
        if isinstance(value, str):
            return value if key == "type" and value in self.types else value.translate(self.table)
        if isinstance(value, Mapping):
            return {k if k in self.keys else k.translate(self.table): self(one, k) for k, one in value.items()}
        if isinstance(value, list | tuple):
            return [self(one, key) for one in value]
        return value


def _private(count: int, used: set[str]) -> list[str]:
    unused = (chr(code) for block in _PRIVATE_USE for code in block if chr(code) not in used)
    found = list(itertools.islice(unused, count))
    if len(found) < count:
        raise ValueError(
            f"the messages leave fewer than {count} private-use characters, by which markers are told apart"
        )
    return found


def _without(markers: Sequence[str], words: frozenset[str]) -> frozenset[str]:
    """Returns the `words` that spell no marker."""
    return frozenset(word for word in words if not any(marker in word for marker in markers))


def _sorted(tools: Sequence[Mapping[str, Any]] | None) -> list[Any] | None:
    return deep_sorted(list(tools)) if tools else None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from value
        for one in value.values():
            yield from _strings(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _strings(one)
