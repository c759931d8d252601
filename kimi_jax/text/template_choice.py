"""Decides whether a K2.5 folder's own chat template says the same as the one that is built in.

K2.6, K2.7-Code and the community's corrections bring templates that write other prompts. Texts of templates change
without their meaning (comments, white space), so the prompts are compared: of a few conversations that hold everything
on which the published revisions agree. Left out is what they print differently from revision to revision though K2.5's
own rules are built in: calls without an id, and what follows a video.
"""

import functools
from pathlib import Path
from typing import Any

from kimi_jax.text import templates
from kimi_jax.text.folder_template import FolderTemplate
from kimi_jax.text.messages import read_messages


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


def follows_k25(folder: str | Path) -> bool:
    """Returns whether the chat template in `folder` writes the prompts of the built-in one.

    Raises ValueError where its files cannot be read; a template that does not take a conversation writes another.
    """
    with_tools, without = FolderTemplate(folder, with_tools=True), FolderTemplate(folder)
    return _follows_k25(str(folder), with_tools.source, without.source)


@functools.lru_cache(maxsize=32)
def _follows_k25(folder: str, *sources: str) -> bool:
    """Keeps the answer for `sources`, which stand in `folder` now."""
    for messages, tools in _CONVERSATIONS:
        template = FolderTemplate(folder, with_tools=bool(tools))
        for thinking in (True, False):
            options = {"thinking": thinking, "preserve_thinking": False, "add_generation_prompt": True}
            read = read_messages(messages)
            expected = templates.k25(read, tools, **options)
            try:
                if template.render(read, tools, **options) != "".join(segment.text for segment in expected):
                    return False
            except ValueError:
                return False
    return True
