"""Turns conversations into prompts and answers into their parts.

`render` shows a prompt as text, `encode` gives its token ids; `parse` takes an answer's ids apart, and
`Parser` does so as they come.

`model` names the template: "k3", "k2.5" and "k2" are built in, anything else is a folder, whose own template is used.
Markers (`<|im_user|>`, `<think>`, ...) become special tokens only where the template wrote them: contents, names,
reasoning, tool results, tool ids, arguments and tool declarations are encoded as ordinary text whatever they spell,
so nobody forges a turn. On text that spells no special token the ids are those of the published tokenizer on the
rendered prompt.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kimi_jax.media import VideoChunk
from kimi_jax.printable import printable
from kimi_jax.text import templates
from kimi_jax.text.answers import Delta, Parsed, join
from kimi_jax.text.folder_template import FolderTemplate
from kimi_jax.text.messages import MediaPart, Messages, media_parts, read_messages, unread_keys
from kimi_jax.text.parsers import Parser, TextParser, answer_starts_in, parse, parse_text
from kimi_jax.text.segments import Segment, media_segments
from kimi_jax.text.templates import VIDEO_PLACEHOLDER
from kimi_jax.text.tokenizer import Tokenizer
from kimi_jax.text.tools import Tools, declare_tools, read_tools

__all__ = [
    "Delta",
    "MediaPart",
    "Parsed",
    "Parser",
    "TextParser",
    "answer_starts_in",
    "declare_tools",
    "encode",
    "join",
    "media_parts",
    "parse",
    "parse_text",
    "render",
]


def _segments(
    messages: Messages,
    tools: Tools,
    model: str | Path,
    tok: Tokenizer | None,
    asked: Mapping[str, Any],
    **common: bool,
) -> list[Segment]:
    """Returns the conversation in `model`'s template; without a tokenizer a folder's prompt is one piece.

    asked: values of options that not every template has, None or empty where they are not given.
    """
    messages, tools = read_messages(messages), read_tools(tools)
    built_in = templates.BUILT_IN.get(str(model))
    given = {name: value for name, value in asked.items() if value is not None and value != ()}
    for name in given.keys() - (built_in.options if built_in else ()) - {"image_sizes"}:
        value = printable(repr(given[name]), 60)
        raise ValueError(f"{name} is {value}, but the chat template of {printable(model)} has no such option")
    folder = None if built_in else FolderTemplate(model, with_tools=bool(tools))
    reads = built_in.reads if built_in else ()
    unread = [
        key
        for key in unread_keys(messages)
        if key not in reads and (folder is None or key.split(".")[-1] not in folder.source)
    ]
    if unread:
        text = f"{printable(', '.join(unread))} in messages: not read by the chat template of {printable(model)}"
        warnings.warn(text, stacklevel=3)
    if built_in is not None:
        more = {name: value for name, value in given.items() if name in built_in.options}
        return built_in.write(messages, tools, **common, **more)
    assert folder is not None
    if tok is None:
        return [Segment(folder.render(messages, tools, **common))]
    return folder.segments(messages, tools, tok.special_tokens, **common)


def render(
    messages: Messages,
    tools: Tools = None,
    thinking: bool = True,
    model: str | Path = "k2.5",
    *,
    preserve_thinking: bool = False,
    add_generation_prompt: bool = True,
    thinking_effort: str | None = None,
    tool_choice: str | None = None,
    response_format: Mapping[str, Any] | None = None,
    image_sizes: Sequence[tuple[int, int]] = (),
) -> str:
    """Returns the prompt as text, to look at or to send elsewhere; where people's text must be safe, use `encode`.

    thinking: the answer begins inside `<think>` (K2.5) or after an empty pair. preserve_thinking: keep the reasoning of
    all earlier answers (K2.6). An image is `<|media_begin|>image<|media_content|><|media_pad|><|media_end|>` and a
    newline, a video `<|kimi_k25_video_placeholder|>`.

    Only K3 has these: thinking_effort: "low", "high" or "max", its default. tool_choice: "required" or "none".
    response_format: OpenAI's object. image_sizes: the width and height of each image in pixels, which its prompts say.

    Raises ValueError naming the message, field or option that is wrong; fields that the template does not read are
    named in one warning.
    """
    options = {"thinking": thinking, "preserve_thinking": preserve_thinking}
    asked: dict[str, Any] = {"thinking_effort": thinking_effort, "tool_choice": tool_choice}
    asked |= {"response_format": response_format, "image_sizes": image_sizes}
    segments = _segments(messages, tools, model, None, asked, add_generation_prompt=add_generation_prompt, **options)
    return "".join(segment.text for segment in segments)


def _with_videos(segments: Sequence[Segment], videos: Sequence[Sequence[VideoChunk]]) -> list[Segment]:
    """Puts a video's chunks in place of its placeholder, each as the time of its first frame and one media item.

    Raises ValueError where there are not as many placeholders as `videos`.
    """
    placeholder = Segment(VIDEO_PLACEHOLDER, True)
    if (places := segments.count(placeholder)) != len(videos):
        raise ValueError(f"the prompt holds {places} videos, but the chunks of {len(videos)} are given")
    if not places:
        return [*segments]
    remaining, expanded = iter(videos), list[Segment]()
    for segment in segments:
        if segment != placeholder:
            expanded.append(segment)
            continue
        for chunk in next(remaining):
            expanded += [Segment(chunk.timestamp), *media_segments("video")]
    return expanded


def encode(
    tok: Tokenizer,
    messages: Messages,
    tools: Tools = None,
    thinking: bool = True,
    model: str | Path = "k2.5",
    *,
    preserve_thinking: bool = False,
    add_generation_prompt: bool = True,
    videos: Sequence[Sequence[VideoChunk]] = (),
    thinking_effort: str | None = None,
    tool_choice: str | None = None,
    response_format: Mapping[str, Any] | None = None,
    image_sizes: Sequence[tuple[int, int]] = (),
) -> list[int]:
    """Returns the prompt's token ids, one `<|media_pad|>` for each media item (`kimi_jax.media.expand` repeats it).

    The other arguments are those of `render`. videos: for each video of the conversation, in order, its chunks from
    `kimi_jax.media.video_patches`. Raises ValueError where `render` does, where `tok` lacks a marker, where `videos`
    are more or fewer than the conversation has, and where a folder's template does not let its own markers be told
    from people's text.
    """
    options = {"thinking": thinking, "preserve_thinking": preserve_thinking}
    asked: dict[str, Any] = {"thinking_effort": thinking_effort, "tool_choice": tool_choice}
    asked |= {"response_format": response_format, "image_sizes": image_sizes}
    segments = _segments(messages, tools, model, tok, asked, add_generation_prompt=add_generation_prompt, **options)
    built_in = templates.BUILT_IN.get(str(model))
    is_xtml = built_in is not None and built_in.is_xtml
    ids: list[int] = []
    plain = ""  # of neighbouring plain segments, which the tokenizer takes as one text, K3's by themselves
    encoded: dict[str, list[int]] = {}  # roles and the like come in every turn
    special_tokens = tok.special_tokens
    for text, is_marker in _with_videos(segments, videos):
        if not is_marker:
            plain += text
        if plain and (is_marker or is_xtml):
            if (known := encoded.get(plain)) is None:
                known = encoded[plain] = tok.encode(plain, allow_special=False)
            ids += known
            plain = ""
        if is_marker:
            if (marker := special_tokens.get(text)) is None:
                raise ValueError(
                    f"the tokenizer has no special token {text}, which the template of {printable(model)} writes"
                )
            ids.append(marker)
    return ids + tok.encode(plain, allow_special=False)
