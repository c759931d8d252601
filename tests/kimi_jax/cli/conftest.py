"""Makes a small K2.5 for the command, whole, loaded and damaged."""

import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import checkpoints
import kimi_jax
from checkpoints.toy import toy_config, write_toy

SIZES = {
    "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "vt_num_hidden_layers": 1, "vt_intermediate_size": 32, "max_position_embeddings": 128,
}  # fmt: skip


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Returns a K2.5 of two layers in the published layout."""
    return write_toy(tmp_path_factory.mktemp("cli") / "k2.5", toy_config("k2.5", **SIZES))


@pytest.fixture(scope="module")
def kimi(published):
    return kimi_jax.load(published, dtype=jnp.float32)


@pytest.fixture
def loads(kimi, monkeypatch):
    """Replaces `checkpoints.load` by one that records its arguments and returns a loaded model, so that nothing
    compiles twice."""
    asked = []

    def load(path, mesh, dtype, verify, progress):
        asked.append((path, mesh, dtype))
        return kimi

    monkeypatch.setattr(checkpoints, "load", load)
    return asked


@pytest.fixture
def damaged(published, tmp_path):
    """Returns a copy of the checkpoint, to damage."""
    return Path(shutil.copytree(published, tmp_path / "damaged"))


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (56, 84, 3)).astype(np.uint8)).save(path)
    return path
