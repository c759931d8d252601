"""The golden models cut to two layers, a dense one and one of experts: a test of the loop compiles half as much.

Both fixtures replace those of the folder above, since `model` is cached for the session with the checkpoint that it
first had.
"""

import functools

import cases
import jax.numpy as jnp
import pytest

import kimi_jax


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """Returns a function from a name to the folder of that golden's published checkpoint without its later layers."""
    folder = tmp_path_factory.mktemp("two_layers")
    return functools.cache(lambda name: cases.two_layers(name, folder))


@pytest.fixture(scope="session")
def model(checkpoint):
    """Returns a function from a name to its model in float32, on one device."""
    return functools.cache(lambda name: kimi_jax.load(checkpoint(name), dtype=jnp.float32))
