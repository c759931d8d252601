"""The TPU kernel of MXFP4, interpreted, against float64: few rows, one window, several, and extreme numbers."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import grouped_glu, grouped_matmul, matmul
from pallas_kernels.formats import Mxfp4, mxfp4
from pallas_kernels.grouped_matmul import mxfp4_product
from pallas_kernels.hardware import CHIPS


def weight(seed: int, groups: int, N: int, K: int, low: int, high: int) -> tuple[Mxfp4, np.ndarray]:
    """Returns any codes with scales from 2^low to 2^high, and the numbers in float64."""
    random = np.random.RandomState(seed)
    codes = random.randint(0, 256, (groups, N, K // 2)).astype(np.uint8)
    scales = random.randint(127 + low, 128 + high, (groups, N, K // 32)).astype(np.uint8)
    numbers = mxfp4.dequantize(codes, scales, np.float64)
    return Mxfp4.from_stored(jnp.asarray(codes), jnp.asarray(scales)), numbers


def rows(seed: int, tokens: int, K: int, dtype=ml_dtypes.bfloat16) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal((tokens, K)).astype(dtype)


def product(x: np.ndarray, numbers: np.ndarray, sizes: list[int]) -> np.ndarray:
    out, first = np.zeros((x.shape[0], numbers.shape[1])), 0
    for group, size in enumerate(sizes):
        out[first : first + size] = x[first : first + size].astype(np.float64) @ numbers[group].T
        first += size
    return out


def assert_near(found, right: np.ndarray, dtype) -> None:
    bound = 2.0**-8 if dtype == ml_dtypes.bfloat16 else 2.0**-20
    found = np.asarray(found, np.float64)
    assert np.isfinite(found).all()
    assert np.abs(found - right).max() <= bound * np.abs(right).max()


@pytest.fixture(params=["v5e", "v6e", "tpu7x"])
def decoding(request, monkeypatch):
    """Decodes codes by words of four bytes, scales them in float32 or bf16, or decodes as a chip does that converts
    float4_e2m1fn itself."""
    monkeypatch.setattr(mxfp4_product, "chip", lambda: CHIPS[request.param].facts)


@pytest.mark.usefixtures("decoding")
@pytest.mark.parametrize(
    ("sizes", "K", "dtype"),
    [
        ([8, 0, 5], 512, ml_dtypes.bfloat16),  # few rows
        ([3, 30, 9], 512, ml_dtypes.bfloat16),  # in one window, and in several
        ([6, 7], 64, ml_dtypes.bfloat16),  # fewer inputs than a block-diagonal product takes
        ([8, 5], 512, np.float32),
    ],
)
@pytest.mark.parametrize(
    ("low", "high"), [pytest.param(-100, -95, marks=pytest.mark.slow), (95, 100)], ids=["tiny", "huge"]
)
def test_products_are_those_of_float64(sizes, K, dtype, low, high):
    form, numbers = weight(0, len(sizes), 128, K, low, high)
    x = rows(1, sum(sizes) + 2, K, dtype)
    found = grouped_matmul(jnp.asarray(x), form, jnp.array(sizes, jnp.int32), implementation="mosaic_tpu")
    assert found.dtype == dtype
    assert_near(found, product(x, numbers, sizes), dtype)


@pytest.mark.usefixtures("decoding")
def test_every_code_and_input_counts():
    """Unit rows give the weights back, each code with each place of its byte."""
    K, N = 128, 128
    form, numbers = weight(2, 1, N, K, 0, 3)
    for first in range(0, K, 64):
        x = np.eye(K)[first : first + 8].astype(ml_dtypes.bfloat16)
        found = grouped_matmul(jnp.asarray(x), form, jnp.array([8], jnp.int32), implementation="mosaic_tpu")
        np.testing.assert_array_equal(np.asarray(found, np.float64), numbers[0].T[first : first + 8])


def test_a_unit_and_one_matrix():
    (gate, g), (up, u) = weight(3, 2, 128, 128, -4, -2), weight(4, 2, 128, 128, -4, -2)
    x = rows(5, 8, 128)
    sizes = [3, 5]
    found = grouped_glu(jnp.asarray(x), gate, up, jnp.array(sizes, jnp.int32), implementation="mosaic_tpu")
    a, b = product(x, g, sizes), product(x, u, sizes)
    assert_near(found, a / (1 + np.exp(-a)) * b, ml_dtypes.bfloat16)
    single = matmul(jnp.asarray(x), gate.at(1), implementation="mosaic_tpu")
    assert_near(single, x.astype(np.float64) @ g[1].T, ml_dtypes.bfloat16)


def test_what_the_kernel_cannot_take_is_said():
    form, _ = weight(6, 1, 128, 96, 0, 1)
    with pytest.raises(ValueError, match="K is 96"):
        grouped_matmul(jnp.ones((8, 96)), form, jnp.array([8], jnp.int32), implementation="mosaic_tpu")
