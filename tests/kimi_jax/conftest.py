"""Writes and loads the golden checkpoints, each once."""

import functools

import cases
import jax.numpy as jnp
import pytest

import kimi_jax


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """Returns a function from a golden's name to the folder of its published checkpoint."""
    folder = tmp_path_factory.mktemp("goldens")
    return functools.cache(lambda name: cases.checkpoint(name, folder))


@pytest.fixture(scope="session")
def model(checkpoint):
    """Returns a function from a golden's name to its model in float32, on one device."""
    return functools.cache(lambda name: kimi_jax.load(checkpoint(name), dtype=jnp.float32))


@pytest.fixture(scope="session")
def two_layer_checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """Returns a function from a golden's name to a checkpoint with one of each of its kinds of layers: programs of its
    model compile in half the time."""
    folder = tmp_path_factory.mktemp("two_layer_models")
    return functools.cache(lambda name: cases.two_layers(name, folder))


@pytest.fixture(scope="session")
def two_layer_model(two_layer_checkpoint):
    """Returns a function from a golden's name to the model of its two-layer checkpoint, in float32, on one device."""
    return functools.cache(lambda name: kimi_jax.load(two_layer_checkpoint(name), dtype=jnp.float32))
