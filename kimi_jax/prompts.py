"""A conversation made ready for a model: token ids with every media placeholder expanded, and the media themselves."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kimi_jax import media as media_files
from kimi_jax.config import KimiConfig
from kimi_jax.model.splice import Media
from kimi_jax.text import Tokenizer, chat
from kimi_jax.text.folder_template import has_template


@dataclasses.dataclass(frozen=True)
class Prompt:
    """`tokens` int32 [1, t]; `media` belongs to the placeholders in them."""

    tokens: np.ndarray
    media: Media | None


def template_for(folder: str | Path, config: KimiConfig) -> str:
    """The chat template of the checkpoint in `folder`: K2.5's is built in; a text model's own, where it has one."""
    if config.model_type == "kimi_k25":
        return "k2.5"
    return str(folder) if has_template(folder) else "k2"


def prepare(
    folder: str | Path,
    config: KimiConfig,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool = True,
) -> Prompt:
    """The prompt of a chat in OpenAI's schema, with its images and videos opened and cut in patches.

    `folder` is the checkpoint's, for its preprocessor_config.json and chat template.
    Raises ValueError or OSError naming the message, field or file that is wrong.
    """
    parts = chat.media_parts(messages)
    if parts and config.vision is None:
        raise ValueError(f"the messages hold {len(parts)} images or videos; a {config.model_type} model takes none")
    patches, grids, videos = [], [], []
    settings = media_files.MediaConfig.from_folder(folder) if parts else None
    for part in parts:
        assert settings is not None
        if part.kind == "image":
            items = [media_files.image_patches(media_files.open_image(part.source), settings)]
        else:
            chunks = media_files.video_patches(*media_files.open_video(part.source), settings)
            videos.append(chunks)
            items = [(chunk.patches, chunk.grid) for chunk in chunks]
        patches += [item[0] for item in items]
        grids += [item[1] for item in items]
    model = template_for(folder, config)
    ids = chat.encode(tokenizer, messages, tools, thinking, model, videos=videos)
    if not grids:
        return Prompt(np.array([ids], np.int32), None)
    assert config.vision is not None and config.media_placeholder_token_id is not None
    ids = media_files.expand(
        ids,
        grids,
        placeholder_id=config.media_placeholder_token_id,
        merge_kernel_size=config.vision.merge_kernel_size[0],
    )
    return Prompt(np.array([ids], np.int32), Media(np.concatenate(patches), np.array(grids, np.int32)))
