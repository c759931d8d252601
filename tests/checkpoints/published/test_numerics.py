"""INT4 and FP8 bit by bit: real weights, examples by hand, and derivations in float64 that share no code with ours."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from number_oracle import bf16, codes_of, fp8_of, from_fp8, from_int4, int4_of

from checkpoints.published.numerics import BF16, FP8, dequantize_fp8, dequantize_int4, quantize_fp8, quantize_int4

# Kimi-K2.6, layer 1, expert 0, gate_proj, row 0, the first 64 columns (as bf16 bits).
REAL_PACKED = [1467423512, -1771734362, 1525177177, -1138393451, -1984456792, 2020181896, -1733860218, 2136586633]
REAL_SCALE = [15328, 15450]
REAL_WEIGHT = """
    0 48452 15528 48452 48096 48096 48096 48296 48224 15456 15456 48096 48296 48224 48224 15328
    15328 48296 15528 48296 0 15656 15456 48296 48296 15328 15656 48096 48296 48424 15584 15528
    0 15578 48218 15450 48218 15652 15450 0 0 0 48218 0 15450 48346 0 48218
    48346 0 48474 48346 48218 15578 0 15450 15450 0 15450 15652 15450 48420 15807 48218
"""


def test_dequantize_reads_real_weights():
    packed, scale = np.array([REAL_PACKED], np.int32), np.array([REAL_SCALE], np.uint16).view(BF16)
    weight = dequantize_int4(packed, scale)
    # -0.0 does not occur: a code of zero times a positive scale is +0.0.
    np.testing.assert_array_equal(weight.view(np.uint16)[0], [int(bits) for bits in REAL_WEIGHT.split()])
    requantized, rescaled = quantize_int4(weight.astype(np.float32))
    np.testing.assert_array_equal(requantized, packed)
    np.testing.assert_array_equal(rescaled.view(np.uint16), scale.view(np.uint16))


def test_quantize_by_hand():
    """A largest weight of 3.5 gives the scale 0.5 exactly; halves round to even, and codes start at the low nibble."""
    row = np.zeros(32, np.float32)
    row[:8] = [3.5, -3.5, 0.25, 0.75, -0.25, -0.75, 0.5, -1.0]  # 7 -7 0.5 1.5 -0.5 -1.5 1 -2
    packed, scale = quantize_int4(row[None])
    assert scale.astype(np.float32).tolist() == [[0.5]]
    codes = [7, -7, 0, 2, 0, -2, 1, -2]
    word = sum((code + 8) << (4 * place) for place, code in enumerate(codes))
    zeros = sum(8 << (4 * place) for place in range(8))
    assert packed.view(np.uint32).tolist() == [[word, zeros, zeros, zeros]]
    assert dequantize_int4(packed, scale).astype(np.float32)[0, :8].tolist() == [3.5, -3.5, 0, 1, 0, -1, 0.5, -1]


def test_quantize_leaves_a_group_of_zeros_zero_and_refuses_a_part_of_a_group():
    packed, scale = quantize_int4(np.zeros((2, 64), np.float32))
    assert not dequantize_int4(packed, scale).any() and not scale.any()
    with pytest.raises(ValueError, match=r"\[2, 48\].*multiple of 32"):
        quantize_int4(np.zeros((2, 48), np.float32))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-20, 20))
def test_quantize_is_within_half_a_step_and_its_result_a_fixed_point(seed, exponent):
    weight = (np.random.RandomState(seed).standard_normal((3, 96)) * 2.0**exponent).astype(BF16)
    packed, scale = quantize_int4(weight)
    read = dequantize_int4(packed, scale)
    step = np.repeat(scale.astype(np.float32), 32, axis=1)
    # Rounding q * s to bf16 adds up to 7/256 of a step.
    assert (np.abs(read.astype(np.float32) - weight.astype(np.float32)) <= step * (0.5 + 7 / 256)).all()
    requantized, rescaled = quantize_int4(read.astype(np.float32))
    np.testing.assert_array_equal(requantized, packed)
    np.testing.assert_array_equal(rescaled, scale)


def test_every_bf16_scale_that_a_group_can_have_is_found_again():
    """The largest weight of a group has each of 128 mantissas, over a few exponents."""
    largest = np.arange(0x3C80, 0x4080, dtype=np.uint16).view(BF16)
    groups = np.zeros((largest.size, 32), BF16)
    groups[:, 3] = largest
    packed, scale = quantize_int4(groups)
    assert ((packed[:, 0].view(np.uint32) >> 12) & 0xF == 15).all()  # 7 + 8
    requantized, rescaled = quantize_int4(dequantize_int4(packed, scale))
    np.testing.assert_array_equal(requantized, packed)
    np.testing.assert_array_equal(rescaled, scale)


def weights(seed: int, shape: tuple[int, int]) -> np.ndarray:
    """Draws bf16 weights of many magnitudes."""
    random = np.random.RandomState(seed)
    return (random.standard_normal(shape) * np.exp(random.uniform(-9, 2, shape))).astype(BF16)


@pytest.mark.parametrize("source", [np.float32, BF16])
def test_int4_is_the_float64_derivation(source):
    """Weights of float32 are rounded to bf16 first, and their quotient by the scale, in float32, to a code."""
    weight = weights(1, (37, 192)).astype(source) * np.array(1.001, source)
    packed, scale = quantize_int4(weight)
    codes, scales = int4_of(weight)
    np.testing.assert_array_equal(codes_of(packed), codes)
    np.testing.assert_array_equal(scale.astype(np.float64), scales)
    np.testing.assert_array_equal(dequantize_int4(packed, scale).astype(np.float64), from_int4(codes, scales))


@pytest.mark.parametrize("shape", [(128, 128), (300, 392), (1, 1), (129, 64), (576, 256)])
def test_fp8_is_the_float64_derivation_with_partial_last_blocks(shape):
    weight = weights(2, shape)
    weight[: min(128, shape[0]), 128:256] = 0
    found, scale = quantize_fp8(weight)
    right, scales = fp8_of(weight)
    assert found.dtype == FP8 and scale.shape == (math.ceil(shape[0] / 128), math.ceil(shape[1] / 128))
    np.testing.assert_array_equal(found.astype(np.float64), right)
    np.testing.assert_array_equal(scale.astype(np.float64), scales)
    product = from_fp8(right, scales)
    np.testing.assert_array_equal(dequantize_fp8(found, scale).astype(np.float64), bf16(product))
    np.testing.assert_array_equal(dequantize_fp8(found, scale, np.dtype(np.float32)).astype(np.float64), product)


def test_fp8_rounds_every_kind_of_number_as_the_library_does():
    """The numbers are all halves between two neighbours of e4m3, and a float32 step to either side, with scale 1."""
    values = np.arange(127, dtype=np.uint8).view(FP8).astype(np.float32)
    halves = (values[1:] + values[:-1]) / 2
    row = np.concatenate(
        [values, halves, np.nextafter(halves, 0, dtype=np.float32), np.nextafter(halves, 999, dtype=np.float32)]
    )
    row = np.concatenate([row, -row])
    for start in range(0, row.size, 127):
        block = np.append(row[start : start + 127], np.float32(448))
        found, scale = quantize_fp8(block[None])
        assert scale.tolist() == [[1.0]]
        assert found[0].tobytes() == block.astype(FP8).tobytes()


def test_fp8_of_a_slice_of_rows_is_that_of_the_whole():
    weight = weights(3, (384, 200))
    whole, scale = quantize_fp8(weight)
    part, scale_of_part = quantize_fp8(weight[128:])
    assert part.tobytes() == whole[128:].tobytes() and scale_of_part.tobytes() == scale[1:].tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(bad):
    weight = np.ones((256, 256), np.float32)
    e4m3s, scale_inv = quantize_fp8(weight)
    packed, scale = quantize_int4(weight)
    weight[200, 3] = scale_inv[1, 1] = scale[200, 3] = bad
    nan = e4m3s.copy()
    nan.view(np.uint8)[200, 3] = 0x7F if bad is np.nan else 0xFF
    for call in (
        lambda: quantize_int4(weight),
        lambda: quantize_fp8(weight),
        lambda: dequantize_int4(packed, scale),
        lambda: dequantize_fp8(e4m3s, scale_inv),
        lambda: dequantize_fp8(nan, np.ones((2, 2), np.float32)),
    ):
        with pytest.raises(ValueError, match="NaN or infinity"):
            call()
