"""The golden models cut to two layers, a dense one and one of experts: a test of the loop compiles half as much.

Both fixtures replace those of the folder above, since `model` is cached for the session with the checkpoint that it
first had.
"""

import pytest


@pytest.fixture(scope="session")
def checkpoint(two_layer_checkpoint):
    """Returns a function from a name to the folder of that golden's published checkpoint without its later layers."""
    return two_layer_checkpoint


@pytest.fixture(scope="session")
def model(two_layer_model):
    """Returns a function from a name to its model in float32, on one device."""
    return two_layer_model
