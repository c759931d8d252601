"""Decides whether a folder's own chat template writes the prompts of a built-in one.

K2.6, K2.7-Code and the community's corrections bring templates that write other prompts. The text of a template may
change without its meaning (comments, white space), so prompts are compared instead: those of a few conversations with
everything on which the published revisions of K2.5's template agree. The conversations leave out the two things on
which they differ: calls without an id, and the text after a video.
"""

import functools
from pathlib import Path
from typing import Any

from kimi_jax.text.folder_template import FolderTemplate
from kimi_jax.text.messages import read_messages
from kimi_jax.text.template_files import TemplateFiles
from kimi_jax.text.templates import BUILT_IN


def _call(number: int, arguments: Any) -> dict[str, Any]:
    return {"id": f"functions.look:{number}", "type": "function", "function": {"name": "look", "arguments": arguments}}


def _result(number: int, content: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"functions.look:{number}", "content": content}


_TOOLS = [
    {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}},
]
_CHAIN = [
    {
        "role": "user",
        "name": "Ann",
        "content": [{"type": "image", "image": ""}, {"type": "text", "text": "What is it?"}],
    },
    {"role": "assistant", "content": "", "reasoning_content": "Look first.", "tool_calls": [_call(0, '{"at":  "it"}')]},
    _result(0, "A cat."),
    {"role": "assistant", "content": "More.", "reasoning_content": "Again.", "tool_calls": [_call(1, {"a": "é"})]},
    _result(1, None),
]
_CONVERSATIONS: list[tuple[list[dict[str, Any]], list[dict[str, Any]]]] = [
    ([{"role": "user", "content": " Hello\n"}], []),
    ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}], _TOOLS),
    (_CHAIN, _TOOLS),
    (
        [
            {"role": "system", "content": None},
            *_CHAIN,
            {"role": "assistant", "content": "A cat it is.", "reasoning_content": "Done."},
            {"role": "user", "content": "Thanks"},
        ],
        _TOOLS,
    ),
]


def follows(folder: str | Path, name: str) -> bool:
    """Says whether the chat template in `folder` writes the prompts of the built-in one called `name`.

    Raises ValueError where its files cannot be read; a folder whose template does not take a conversation, or that has
    none for it, writes another prompt.
    """
    files = TemplateFiles.from_folder(Path(folder))
    with_tools, without = files.source(with_tools=True), files.source(with_tools=False)
    return with_tools is not None and without is not None and _follows(str(folder), name, with_tools, without)


@functools.lru_cache(maxsize=32)
def _follows(folder: str, name: str, *sources: str) -> bool:
    """Compares prompts, once for each `folder`, `name` and `sources`, the texts of its templates."""
    built_in = BUILT_IN[name]
    for messages, tools in _CONVERSATIONS:
        template = FolderTemplate(folder, with_tools=bool(tools))
        read = read_messages(messages if built_in.reads_media else list(map(_without_media, messages)))
        for thinking in (True, False):
            options = {"thinking": thinking, "preserve_thinking": False, "add_generation_prompt": True}
            expected = built_in.write(read, tools, **options)
            try:
                if template.render(read, tools, **options) != "".join(segment.text for segment in expected):
                    return False
            except ValueError:
                return False
    return True


def _without_media(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    if not isinstance(content, list):
        return message
    return message | {"content": [part for part in content if part["type"] == "text"]}
