"""Writes and loads the golden checkpoints, each once."""

from pathlib import Path

import cases
import jax.numpy as jnp
import pytest

import kimi_jax


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """Returns a function from a golden's name to the folder of its published checkpoint."""
    folder, written = tmp_path_factory.mktemp("goldens"), {}

    def write(name: str) -> Path:
        if name not in written:
            written[name] = cases.checkpoint(name, folder)
        return written[name]

    return write


@pytest.fixture(scope="session")
def model(checkpoint):
    """Returns a function from a golden's name to its model in float32, on one device."""
    loaded = {}

    def load(name: str) -> kimi_jax.Kimi:
        if name not in loaded:
            loaded[name] = kimi_jax.load(checkpoint(name), dtype=jnp.float32)
        return loaded[name]

    return load
