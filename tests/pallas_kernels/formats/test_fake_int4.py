"""Fake-quantised weights have the numbers of published INT4, bit for bit, and gradients pass straight through."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from pallas_kernels.formats import FakeInt4, Int4, fake_quantize_int4, int4_codec, straight_through
from sharding import make_mesh

# Kimi-K2.6, layer 1, expert 0, gate_proj, row 0, columns 0 to 63, as published: the words, and bits of bf16.
# fmt: off
WORDS = [1467423512, -1771734362, 1525177177, -1138393451, -1984456792, 2020181896, -1733860218, 2136586633]
SCALES = [15328, 15450]
NUMBERS = [
    0, 48452, 15528, 48452, 48096, 48096, 48096, 48296, 48224, 15456, 15456, 48096, 48296, 48224, 48224, 15328, 15328,
    48296, 15528, 48296, 0, 15656, 15456, 48296, 48296, 15328, 15656, 48096, 48296, 48424, 15584, 15528, 0, 15578,
    48218, 15450, 48218, 15652, 15450, 0, 0, 0, 48218, 0, 15450, 48346, 0, 48218, 48346, 0, 48474, 48346, 48218, 15578,
    0, 15450, 15450, 0, 15450, 15652, 15450, 48420, 15807, 48218,
]
# fmt: on


def bf16(bits):
    return np.asarray(bits, np.uint16).view(ml_dtypes.bfloat16)


def masters(*shape, dtype=jnp.float32, seed=0):
    """Returns weights of many magnitudes, with a group of zeros."""
    random = np.random.RandomState(seed)
    values = random.standard_normal(shape) * np.exp(random.uniform(-9, 2, shape))
    values[..., 0, :32] = 0
    return jnp.asarray(values, dtype)


def assert_same_bits(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.dtype == expected.dtype and found.tobytes() == expected.tobytes()


def test_published_numbers_are_a_fixed_point_with_the_published_codes():
    published = bf16(NUMBERS)[None]
    for dtype in (jnp.bfloat16, jnp.float32):
        assert_same_bits(fake_quantize_int4(jnp.asarray(published, dtype)), published.astype(dtype))
    words, scales = Int4.from_dense(jnp.asarray(published)).to_stored()
    assert words.tolist() == [WORDS] and np.asarray(scales).view(np.uint16).tolist() == [SCALES]


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (jnp.float32, (48, 64)),
        (jnp.bfloat16, (3, 5, 96)),
        (jnp.float32, (2, 2, 2, 32)),
        pytest.param(jnp.bfloat16, (48, 64), marks=pytest.mark.slow),
        pytest.param(jnp.float32, (3, 5, 96), marks=pytest.mark.slow),
        pytest.param(jnp.bfloat16, (2, 2, 2, 32), marks=pytest.mark.slow),
    ],
)
def test_numbers_are_those_of_the_quantised_weight_bit_for_bit(dtype, shape):
    weight = masters(*shape, dtype=dtype)
    rounded = fake_quantize_int4(weight)
    assert_same_bits(rounded, Int4.from_dense(weight).dequantize(dtype))
    assert_same_bits(fake_quantize_int4(rounded), rounded)
    assert_same_bits(jax.jit(fake_quantize_int4)(weight), rounded)
    assert_same_bits(FakeInt4(weight).dequantize(), rounded)
    assert np.any(np.asarray(rounded != weight)) and not np.any(np.asarray(rounded[..., 0, :32]))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 2**16 - 1), min_size=32, max_size=32))
def test_any_group_is_rounded_to_a_fixed_point(bits):
    # Given magnitudes whose sevenths are normal numbers, and whose scale times 7 is finite
    group = bf16(bits).astype(np.float32)
    group = jnp.asarray(np.where((np.abs(group) > 1e-30) & (np.abs(group) < 1e38), group, 0)[None])
    rounded = fake_quantize_int4(group)
    expected = int4_codec.dequantize(*int4_codec.quantize(np.asarray(group)), np.float32)
    assert_same_bits(rounded, expected)
    assert_same_bits(fake_quantize_int4(rounded), rounded)


def test_the_derivative_is_the_identity():
    # Given a group of zeros, and in every other group its largest number
    weight, direction = masters(4, 64), masters(4, 64, seed=1)
    by_row = jax.vmap(lambda row: fake_quantize_int4(row[None])[0])
    for function in (fake_quantize_int4, jax.jit(fake_quantize_int4), jax.jit(by_row)):
        value, tangent = jax.jvp(function, (weight,), (direction,))
        assert_same_bits(value, fake_quantize_int4(weight))
        assert_same_bits(tangent, direction)
        assert_same_bits(jax.vjp(function, weight)[1](direction)[0], direction)


@pytest.mark.parametrize("spec", [("expert", None, None), (None, None, "tensor"), ("expert", "data", "tensor")])
def test_shards_are_rounded_as_the_whole_is(spec):
    weight, direction = masters(4, 8, 128), masters(4, 8, 128, seed=1)
    spec = PartitionSpec(*spec)
    sharded = jax.shard_map(fake_quantize_int4, mesh=make_mesh("2x2x2x1"), in_specs=spec, out_specs=spec)
    found, pull = jax.vjp(jax.jit(sharded), weight)
    assert_same_bits(found, fake_quantize_int4(weight))
    assert_same_bits(pull(direction)[0], direction)


def test_any_rounding_can_be_passed_through():
    rint = straight_through(jnp.rint)
    assert (float(rint(2.6)), float(jax.grad(rint)(2.6))) == (3.0, 1.0)


def test_what_has_no_groups_is_refused():
    for weight, message in (
        (jnp.ones((4, 48)), r"weight has shape \(4, 48\), expected \[..., out, in\] with in a multiple of 32"),
        (jnp.ones(32), r"weight has shape \(32,\), expected"),
        (jnp.ones((4, 32), jnp.int32), "weight is int32, expected floating"),
    ):
        with pytest.raises(ValueError, match=f"fake_quantize_int4: {message}"):
            fake_quantize_int4(weight)
