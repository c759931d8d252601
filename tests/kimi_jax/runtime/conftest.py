"""The golden models cut to two layers, a dense one and one of experts: a test of the loop compiles half as much."""

from pathlib import Path

import cases
import pytest


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """name -> the folder of that golden's published checkpoint without its later layers; `model` loads from it."""
    folder, written = tmp_path_factory.mktemp("two_layers"), {}

    def write(name: str) -> Path:
        if name not in written:
            written[name] = cases.two_layers(name, folder)
        return written[name]

    return write
