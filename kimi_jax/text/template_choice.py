"""Decides whether a K2.5 folder's own chat template writes the prompts of the built-in one.

K2.6, K2.7-Code and the community's corrections bring templates that write other prompts. The text of a template may
change without its meaning (comments, white space), so prompts are compared instead: those of a few conversations with
everything on which the published revisions of K2.5's template agree. The conversations leave out the two things on
which they differ: calls without an id, and the text after a video.
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
    """Says whether the chat template in `folder` writes the prompts of the built-in one.

    Returns False for a template that refuses a conversation. Raises ValueError where its files cannot be read.
    """
    return _follows_k25(str(folder), *(FolderTemplate(folder, with_tools=tools).source for tools in (True, False)))


@functools.lru_cache(maxsize=32)
def _follows_k25(folder: str, *sources: str) -> bool:
    """Compares prompts, once for each `folder` and `sources`, the texts of its templates with tools and without."""
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
