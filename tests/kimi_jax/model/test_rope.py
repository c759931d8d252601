"""RoPE and YaRN against numbers worked out from their formulas and the published configurations, and against float64
complex numbers."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.config import YarnConfig
from kimi_jax.config_json import preset
from kimi_jax.model import rope

K2, K25, LINEAR = (preset(name).text for name in ("kimi-k2", "kimi-k2.5", "kimi-linear-48b"))
BASE = 50000.0 ** (-np.arange(32) / 32)


@pytest.mark.parametrize(("config", "low", "high", "factor"), [(K25, 8, 20, 64.0), (K2, 19, 20, 32.0)])
def test_yarn_ramps_between_the_published_pairs(config, low, high, factor):
    # corr(beta_fast = 32) = 8.9145 rounds down to 8, corr(beta_fast = 1) = corr(beta_slow = 1) = 19.1646 to (19, 20)
    freq = rope.inv_freq(config)
    assert freq.dtype == np.float32 and freq.shape == (32,)
    slowed = (1 - freq / BASE) / (1 - 1 / factor)
    np.testing.assert_allclose(slowed, np.clip((np.arange(32) - low) / (high - low), 0, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("beta", "corr"), [(1.0, 19.1646), (32.0, 8.9145)])
def test_yarn_corrections_are_the_published_numbers(beta, corr):
    # With a context of 4096 * 2^x the corrections move by x * 64 ln 2 / (2 ln 50000), so the number says at which x it
    # reaches the next whole number, where `low` jumps.
    per_doubling = 64 * np.log(2) / (2 * np.log(50000.0))
    to_next = (np.ceil(corr) - corr) / per_doubling

    def first_slowed(doublings):
        length = 4096 * 2**doublings
        yarn = dataclasses.replace(
            K25.rope_scaling or YarnConfig(1.0, 1), beta_fast=beta, original_max_position_embeddings=int(length)
        )
        freq = rope.inv_freq(dataclasses.replace(K25, rope_scaling=yarn))
        return int(np.argmax(freq < BASE * (1 - 1e-6)))

    margin = 5e-4  # of a pair: the numbers have four decimals, and lengths are whole
    assert first_slowed(to_next - margin) == np.floor(corr) + 1
    assert first_slowed(to_next + margin) == np.ceil(corr) + 1


def test_without_yarn_the_frequencies_are_plain():
    plain = dataclasses.replace(K25, rope_scaling=None)
    np.testing.assert_allclose(rope.inv_freq(plain), BASE, rtol=1e-7)


@pytest.mark.parametrize(("config", "scale"), [(K2, 0.13086080), (K25, 0.14467963), (LINEAR, 192**-0.5)])
def test_softmax_scale(config, scale):
    assert rope.softmax_scale(config) == pytest.approx(scale, rel=0, abs=5e-9)


def test_nope_ignores_yarn_in_the_softmax_scale():
    both = dataclasses.replace(LINEAR, rope_scaling=K25.rope_scaling)
    assert rope.softmax_scale(both) == pytest.approx(192**-0.5, rel=1e-12)


def test_amplitude_is_one_for_published_models_and_a_ratio_otherwise():
    assert [rope.amplitude(config.rope_scaling) for config in (K2, K25, LINEAR)] == [1.0, 1.0, 1.0]
    # m(64) = 1.4158883 with mscale 1, 1 + (1.4158883 - 1) / 2 with mscale 1/2
    yarn = YarnConfig(factor=64.0, original_max_position_embeddings=4096, mscale=0.5, mscale_all_dim=1.0)
    assert rope.amplitude(yarn) == pytest.approx(1.20794415 / 1.4158883, rel=1e-7)


def complex_rotation(x, angles):
    """Rotates interleaved pairs as complex numbers in float64: [real parts | imaginary parts]."""
    z = (x[..., 0::2].astype(np.float64) + 1j * x[..., 1::2]) * np.exp(1j * angles.astype(np.float64))
    return np.concatenate([z.real, z.imag], axis=-1)


def test_rotate_is_a_complex_product_of_interleaved_pairs():
    random = np.random.RandomState(0)
    x = random.standard_normal((2, 5, 3, 16)).astype(np.float32)
    angles = random.uniform(-3, 3, (2, 5, 3, 8)).astype(np.float32)
    turned = rope.rotate(jnp.asarray(x), jnp.asarray(angles))
    np.testing.assert_allclose(turned, complex_rotation(x, angles), rtol=0, atol=1e-6)
    scaled = rope.rotate(jnp.asarray(x), jnp.asarray(angles), 1.5)
    np.testing.assert_allclose(scaled, 1.5 * complex_rotation(x, angles), rtol=0, atol=2e-6)
    assert rope.rotate(jnp.asarray(x, jnp.bfloat16), jnp.asarray(angles)).dtype == jnp.bfloat16


def test_apply_turns_every_head_by_position_times_frequency():
    random = np.random.RandomState(1)
    x = random.standard_normal((2, 3, 2, 64)).astype(np.float32)
    positions = np.array([[0, 1, 7], [40, 3, 100]], np.int32)
    angles = positions[:, :, None, None] * rope.inv_freq(K25).astype(np.float64)
    turned = rope.apply(jnp.asarray(x), jnp.asarray(positions), K25)
    # an angle of 100 radians is known to 4e-6 in float32
    np.testing.assert_allclose(turned, complex_rotation(x, angles), rtol=0, atol=3e-5)
    np.testing.assert_array_equal(turned[0, 0], np.concatenate([x[0, 0, :, 0::2], x[0, 0, :, 1::2]], axis=-1))


def test_apply_multiplies_by_the_amplitude():
    yarn = dataclasses.replace(K25.rope_scaling or YarnConfig(1.0, 1), mscale=0.5)
    x, positions = jnp.ones((1, 1, 1, 64)), jnp.array([[5]], jnp.int32)
    one = rope.apply(x, positions, K25)
    other = rope.apply(x, positions, dataclasses.replace(K25, rope_scaling=yarn))
    np.testing.assert_allclose(other, np.asarray(one) * (1.20794415 / 1.4158883), rtol=1e-6)


def test_scores_depend_on_the_distance_alone():
    random = np.random.RandomState(2)
    q, k = random.standard_normal((2, 64)).astype(np.float32)
    starts = np.array([[0, 1, 50, 200]], np.int32)

    def at(x, positions):
        heads = jnp.broadcast_to(jnp.asarray(x), (1, positions.shape[1], 1, 64))
        return np.asarray(rope.apply(heads, jnp.asarray(positions), K25), np.float64)[0, :, 0]

    for distance in (0, 1, 13):
        scores = np.sum(at(q, starts + distance) * at(k, starts), axis=-1)
        np.testing.assert_allclose(scores, scores[0], rtol=0, atol=2e-4)
    near, far = (np.sum(at(q, starts + d) * at(k, starts), axis=-1)[0] for d in (1, 13))
    assert abs(near - far) > 0.1


def test_nope_leaves_its_channels_alone():
    x = jnp.asarray(np.random.RandomState(3).standard_normal((1, 4, 2, 64)), jnp.float32)
    np.testing.assert_array_equal(rope.apply(x, jnp.arange(4, dtype=jnp.int32)[None], LINEAR), x)
