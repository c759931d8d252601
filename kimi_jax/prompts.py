"""A conversation made ready for a model: token ids with every media placeholder expanded, and the media themselves."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kimi_jax import media as media_files
from kimi_jax.config import KimiConfig
from kimi_jax.model.splice import Media
from kimi_jax.printable import printable
from kimi_jax.text import Tokenizer, chat
from kimi_jax.text.template_choice import follows_k25
from kimi_jax.text.template_files import has_template


@dataclasses.dataclass(frozen=True)
class Prompt:
    """`tokens` int32 [1, t]; `media` belongs to the placeholders in them."""

    tokens: np.ndarray
    media: Media | None


def template_for(folder: str | Path, config: KimiConfig) -> str:
    """Returns the name of the chat template for the checkpoint in `folder`: "k2.5", "k2", or `folder` for its own.

    A text model's own is used where it has one, K2.5's where it writes other prompts than the one built in, with a
    warning. Raises ValueError, naming the file, where a template cannot be read.
    """
    if not has_template(folder):
        return "k2.5" if config.model_type == "kimi_k25" else "k2"
    if config.model_type == "kimi_k25":
        if follows_k25(folder):
            return "k2.5"
        warnings.warn(f"{printable(folder)}: its own chat template is used, which differs from K2.5's", stacklevel=2)
    return str(folder)


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
