"""Makes small published folders once, and damaged copies of them."""

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_oracle import CONFIGS, read_all
from safetensors.numpy import save_file

from checkpoints import convert
from checkpoints.stored import names
from checkpoints.toy import write_toy


@pytest.fixture(scope="session", autouse=True)
def abstract_once() -> Iterator[None]:
    """Caches abstract models: to trace one takes a second, and these tests ask for few of them often."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(names, "abstract", functools.cache(names.abstract))
        yield


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Returns a published folder of every family in `CONFIGS`."""
    root = tmp_path_factory.mktemp("published")
    return {like: write_toy(root / like, config) for like, config in CONFIGS.items()}


@pytest.fixture(scope="session")
def converted(published: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Returns the folders of `published` converted to Orbax checkpoints."""
    root = tmp_path_factory.mktemp("converted")
    return {like: convert(folder, root / like).destination for like, folder in published.items()}


Spoil = Callable[..., Path]


@pytest.fixture
def spoiled(published: dict[str, Path], tmp_path: Path) -> Spoil:
    """Returns `spoil(like, change)`, which writes a copy in a single file after `change(tensors)` has changed the
    arrays by name; `config` replaces fields at the top of config.json."""

    def spoil(like: str, change: Callable[[dict[str, Any]], Any], **config: Any) -> Path:
        folder = tmp_path / "source" / like
        folder.mkdir(parents=True)
        tensors = read_all(published[like])
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        values = json.loads((published[like] / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | config))
        return folder

    return spoil


@pytest.fixture
def copy(published: dict[str, Path], tmp_path: Path) -> Spoil:
    """Returns `copy(like)`, which copies all files of a converted checkpoint, to damage them."""

    def copied(like: str) -> Path:
        return shutil.copytree(published[like], tmp_path / "source" / like)

    return copied
