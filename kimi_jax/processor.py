"""Conversations to what a model reads, and its token ids back to text, as the files of one checkpoint's folder say."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import numpy as np

from kimi_jax import config_json, media
from kimi_jax.config import KimiConfig
from kimi_jax.families.chat import template_for
from kimi_jax.media.conversation import read_all
from kimi_jax.model.splice import Media
from kimi_jax.printable import printable
from kimi_jax.text import Tokenizer, chat
from kimi_jax.text.messages import Messages


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A conversation as a model takes it: `tokens` int32 [1, t] with every media placeholder expanded, and the images
    and videos of these placeholders, None where there are none."""

    tokens: np.ndarray
    media: Media | None


@dataclasses.dataclass(frozen=True)
class Processor:
    """Makes prompts for the model in `folder`, and text of the ids that it answers. Build it with `from_folder`.

    template: the chat template as `chat.encode` takes it: "k2.5" or "k2", which are built in, or a folder for its own.
    """

    folder: Path
    config: KimiConfig
    tokenizer: Tokenizer
    template: str

    @classmethod
    def from_folder(cls, path: str | Path) -> "Processor":
        """Reads the tokenizer, config.json and chat template of a checkpoint's folder, converted or published.

        Raises FileNotFoundError where a file is missing and ValueError where one is damaged, each naming the file, and
        ValueError for a URL. Warns where the folder brings a chat template that writes other prompts than the built-in
        one of its family.
        """
        if "://" in str(path):
            url = printable(path)
            raise ValueError(
                f"{url}: the tokenizer is read from a folder on this machine; `kimi-jax convert {url} FOLDER` brings "
                "the checkpoint here"
            )
        folder = Path(path)
        tokenizer, config = Tokenizer.from_folder(folder), config_json.from_folder(folder)
        return cls(folder, config, tokenizer, template_for(folder, config))

    def __call__(
        self,
        messages: Messages,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = True,
        *,
        preserve_thinking: bool = False,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        files: str | Path | None = None,
        thinking_effort: str | None = None,
        tool_choice: str | None = None,
        response_format: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """Returns the prompt of a conversation, with its images and videos opened and cut into patches.

        messages: a list in OpenAI's schema, or a text: the message of one user.
        tools, thinking, preserve_thinking, thinking_effort, tool_choice, response_format: as `chat.render` has them.
        images, videos: shown before the text where `messages` is one. They are the program's own: each a path, `data:`
            URL or bytes, an image also a uint8 array or PIL image; a video is an animation.
        files: the folder whose files a list of messages may name in strings (relative paths begin there); None allows
            none, so that messages of strangers open nothing. Path, bytes, array and PIL objects in messages are the
            program's own and are taken.

        Raises ValueError or OSError naming the message, field or file that is wrong.
        """
        own = isinstance(messages, str)  # then the program itself, not a stranger, says what is shown
        messages, parts = _with_parts(messages, images, videos)
        encode = functools.partial(
            chat.encode,
            self.tokenizer,
            messages,
            tools,
            thinking,
            self.template,
            preserve_thinking=preserve_thinking,
            thinking_effort=thinking_effort,
            tool_choice=tool_choice,
            response_format=response_format,
        )
        if not parts:
            return Prompt(np.array([encode()], np.int32), None)
        vision, placeholder = self.config.vision, self.config.media_placeholder_token_id
        if vision is None or placeholder is None:
            raise ValueError(
                f"the messages hold {len(parts)} images or videos; a {self.config.model_type} model takes none"
            )
        folder = None if files is None else Path(files)
        sources = [(part.kind, part.source if own else media.from_message(part.source, folder)) for part in parts]
        patches, grids, chunks, sizes = read_all(sources, self.media_config)
        ids = encode(videos=chunks, image_sizes=sizes)
        ids = media.expand(ids, grids, placeholder_id=placeholder, merge_kernel_size=vision.merge_kernel_size[0])
        return Prompt(np.array([ids], np.int32), Media(patches, np.array(grids, np.int32)))

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Returns the text of an answer's ids, up to the first that ends a text or pads a row.

        Other special tokens (`</think>`, those around calls of tools) stand in the text by their names. Raises
        ValueError for an id beyond the vocabulary.
        """
        return self.tokenizer.decode(self._until_end(ids))

    def parse(
        self,
        ids: Iterable[SupportsIndex],
        thinking: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        finish: Literal["stop", "length"] = "stop",
        *,
        prompt: Sequence[SupportsIndex] | np.ndarray | None = None,
    ) -> chat.Parsed:
        """Returns the reasoning, content and calls of tools of an answer's ids, up to the first that ends a text or
        pads a row.

        thinking, tools: those of the prompt.
        finish: "length" where the tokens ran out.
        prompt: the prompt's ids; where given, they say instead of `thinking` whether the answer begins in reasoning.

        Raises ValueError for an id beyond the vocabulary.
        """
        starts_in = None if prompt is None else chat.answer_starts_in(self.tokenizer, prompt)
        return chat.parse(
            self.tokenizer, self._until_end(ids), thinking, tools, self.template, finish, starts_in=starts_in
        )

    def _until_end(self, ids: Iterable[SupportsIndex]) -> Iterator[int]:
        ends = {*self.config.stop_ids, self.config.text.pad_token_id}
        return takewhile(lambda token: token not in ends, map(int, ids))

    @functools.cached_property
    def media_config(self) -> media.MediaConfig:
        """The numbers of preprocessor_config.json, read when an image or video first needs them.

        Raises FileNotFoundError where there is no such file, and ValueError where it is damaged or has other sizes than
        the vision tower.
        """
        settings = media.MediaConfig.from_folder(self.folder)
        assert self.config.vision is not None
        found = (settings.patch_size, (settings.merge_kernel_size,) * 2)
        expected = (self.config.vision.patch_size, tuple(self.config.vision.merge_kernel_size))
        if found != expected:
            raise ValueError(
                f"{printable(self.folder)}/preprocessor_config.json: patch_size and merge_kernel_size are {found}, "
                f"but vision_config in config.json has {expected}"
            )
        return settings


def _with_parts(
    messages: Messages, images: Sequence[Any], videos: Sequence[Any]
) -> tuple[Messages, list[chat.MediaPart]]:
    """Returns the conversation as a list of messages, with its images and videos in the order of the prompt."""
    for name, given in (("images", images), ("videos", videos)):
        if not isinstance(given, list | tuple):
            raise ValueError(f"{name} is {type(given).__name__}, expected a list")
    if not isinstance(messages, str):
        if images or videos:
            raise ValueError("images and videos go with a text; in a list of messages they are parts of a message")
        return messages, chat.media_parts(messages)
    parts = [chat.MediaPart("image", one) for one in images] + [chat.MediaPart("video", one) for one in videos]
    if not parts:
        return [{"role": "user", "content": messages}], []
    shown = [{"type": f"{part.kind}_url", f"{part.kind}_url": ""} for part in parts]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": messages}]}], parts
