"""Strict dtypes: an implicit promotion, such as of bf16 messages to float32, is an error here."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def strict_dtypes():
    with jax.numpy_dtype_promotion("strict"):
        yield
