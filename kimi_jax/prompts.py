"""A conversation made ready for a model: token ids with every media placeholder expanded, and the media themselves."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kimi_jax import media as media_files
from kimi_jax.config import KimiConfig
from kimi_jax.families.chat import template_for
from kimi_jax.model.splice import Media
from kimi_jax.printable import printable
from kimi_jax.text import Tokenizer, chat
from kimi_jax.text.messages import MediaPart


@dataclasses.dataclass(frozen=True)
class Prompt:
    """`tokens` int32 [1, t]; `media` belongs to the placeholders in them."""

    tokens: np.ndarray
    media: Media | None


def prepare(
    folder: str | Path,
    config: KimiConfig,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool = True,
    files: Path | None = None,
) -> Prompt:
    """Returns the prompt of a chat in OpenAI's schema, with its images and videos opened and cut in patches.

    folder: the checkpoint's, for its preprocessor_config.json and chat template.
    files: the folder whose files the messages may name in strings (relative paths begin there); None allows none, so
    that messages of strangers open nothing. Path, bytes, array and PIL objects are the program's own and are taken.

    Raises ValueError or OSError naming the message, field or file that is wrong.
    """
    parts = chat.media_parts(messages)
    if parts and config.vision is None:
        raise ValueError(f"the messages hold {len(parts)} images or videos; a {config.model_type} model takes none")
    media, videos = _read_media(parts, _media_config(folder, config), files) if parts else (None, [])
    model = template_for(folder, config)
    ids = chat.encode(tokenizer, messages, tools, thinking, model, videos=videos)
    if media is None:
        return Prompt(np.array([ids], np.int32), None)
    assert config.vision is not None and config.media_placeholder_token_id is not None
    ids = media_files.expand(
        ids,
        media.grids,
        placeholder_id=config.media_placeholder_token_id,
        merge_kernel_size=config.vision.merge_kernel_size[0],
    )
    return Prompt(np.array([ids], np.int32), media)


def _media_config(folder: str | Path, config: KimiConfig) -> media_files.MediaConfig:
    """Reads preprocessor_config.json and compares it with the vision tower's sizes."""
    settings = media_files.MediaConfig.from_folder(folder)
    assert config.vision is not None
    found = (settings.patch_size, (settings.merge_kernel_size,) * 2)
    expected = (config.vision.patch_size, tuple(config.vision.merge_kernel_size))
    if found != expected:
        raise ValueError(
            f"{printable(folder)}/preprocessor_config.json: patch_size and merge_kernel_size are {found}, "
            f"but vision_config in config.json has {expected}"
        )
    return settings


def _read_media(
    parts: Sequence[MediaPart], settings: media_files.MediaConfig, files: Path | None
) -> tuple[Media, list[list[media_files.VideoChunk]]]:
    """Opens images and videos, in 8 bits at first: the patches, four times larger, are allocated once for all of them.

    Returns them all, and the chunks of each video. Raises ValueError where they come to more than `MAX_PATCHES`.
    """
    pixels: list[np.ndarray] = []
    grids: list[media_files.Grid] = []
    videos: list[tuple[int, media_files.SampledVideo]] = []  # with the patches before each
    count = 0
    for part in parts:
        source = media_files.from_message(part.source, files)
        room = media_files.MAX_PATCHES - count
        if part.kind == "image":
            frames = [media_files.scale_image(media_files.open_image(source), settings)]
            new = [media_files.grid(frames, settings)]
        else:
            video = media_files.sample_video(*media_files.open_video(source), settings, max_patches=room)
            videos.append((count, video))
            frames, new = video.frames, video.grids
        count += sum(math.prod(grid) for grid in new)
        if count > media_files.MAX_PATCHES:
            raise ValueError(
                f"the messages' media come to {count:,} patches, expected at most {media_files.MAX_PATCHES:,}"
            )
        pixels += frames
        grids += new
    patches = media_files.normalize(pixels, settings)
    chunks = [video.chunks(patches[start:][: sum(map(math.prod, video.grids))]) for start, video in videos]
    return Media(patches, np.array(grids, np.int32)), chunks
