"""Strict dtypes: an implicit promotion, such as of a bf16 activation by a float32 weight, is an error here."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def strict_dtypes():
    with jax.numpy_dtype_promotion("strict"):
        yield
