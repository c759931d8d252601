"""Chooses the chat template of a checkpoint: its folder's own, or its family's built-in one."""

import warnings
from pathlib import Path

from kimi_jax.config import KimiConfig
from kimi_jax.families import by_name
from kimi_jax.printable import printable
from kimi_jax.text.template_choice import follows
from kimi_jax.text.template_files import has_template
from kimi_jax.text.templates import BUILT_IN


def template_for(folder: str | Path, config: KimiConfig) -> str:
    """Returns what `chat.encode` takes as `model` for the checkpoint in `folder`: a built-in template's name, or the
    folder.

    A folder's own template wins where it writes other prompts than its family's built-in one; a warning says so. Where
    both write the same, the built-in one is used, which needs no process of its own. Raises ValueError, naming the
    file, where a template cannot be read.
    """
    name = by_name(config.family).template
    if not has_template(folder) or follows(folder, name):
        return name
    title = BUILT_IN[name].title
    warnings.warn(f"{printable(folder)}: its own chat template is used, which differs from {title}'s", stacklevel=2)
    return str(folder)
