"""Reads a published config.json into `config`'s dataclasses.

No release has code of its own here. Each key is read, is known to change nothing (`keys`), or is refused by the name
of its file and field where it asks for another model; a warning names unknown keys. A missing value gets the default of
the reference implementation. The spellings of transformers 5 are read beside those of the releases, and two spellings
of one value have to agree.
"""

from kimi_jax.config_json.eagle import eagle_from_dict, fit_target, read_config
from kimi_jax.config_json.fields import ConfigError
from kimi_jax.config_json.reader import (
    Folder,
    from_dict,
    from_folder,
    is_eagle,
    preset,
    preset_name,
    preset_names,
)

__all__ = [
    "ConfigError",
    "Folder",
    "eagle_from_dict",
    "fit_target",
    "from_dict",
    "from_folder",
    "is_eagle",
    "preset",
    "preset_name",
    "preset_names",
    "read_config",
]
