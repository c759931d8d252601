"""Losses of reinforcement learning on vectors computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.training import group_advantages, k2_rl_loss, kimi_rl_loss

# Two responses of one prompt; the second is a token shorter
LOGP = jnp.asarray([[-1.0, -2.0, -0.5], [-0.7, -3.0, 0.0]])
OLD = jnp.asarray([[-1.1, -1.9, -1.5], [-0.7, -2.0, 0.0]])
MASK = jnp.asarray([[True, True, True], [True, True, False]])
REWARDS = jnp.asarray([1.0, 0.0])
BOUNDS = {"alpha": -0.5, "beta": 0.5, "tau": 0.1}


@jax.jit
def loss_and_gradient(logp=LOGP, rewards=REWARDS, mask=MASK, old=OLD):
    advantages = group_advantages(rewards, 2)
    return jax.value_and_grad(lambda logp: kimi_rl_loss(logp, old, advantages, mask, **BOUNDS), has_aux=True)(logp)


def test_the_loss_of_two_responses():
    (loss, metrics), gradient = loss_and_gradient()
    assert float(loss) == pytest.approx(-0.1648198947, abs=1e-7)
    expected = [[-0.1065170918, -0.0944837418, 0.04], [0.1, -0.04, 0.0]]
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-7)
    # Tokens 3 and 5 are clipped, of log-ratios .1, -.1, 1, 0, -1
    assert [float(x) for x in metrics] == pytest.approx([2 / 5, 0.0, 2.02 / 5], abs=1e-6)


def test_the_gradient_is_the_formula_s_at_the_bounds_too():
    log_ratio = np.asarray([[-1.0, -0.5, 0.0, 0.5, 0.75]] * 2)
    (_, _), gradient = loss_and_gradient(
        jnp.asarray(log_ratio - 1, jnp.float32), mask=jnp.ones(log_ratio.shape, bool), old=-jnp.ones(log_ratio.shape)
    )
    for row, advantage in zip(gradient, (0.5, -0.5), strict=True):
        inside = (log_ratio[0] >= -0.5) & (log_ratio[0] <= 0.5)
        expected = -(inside * np.exp(log_ratio[0]) * advantage - 2 * 0.1 * log_ratio[0]) / log_ratio.size
        np.testing.assert_allclose(row, expected, rtol=0, atol=1e-7)


def test_equal_rewards_leave_the_square_alone():
    (loss, _), gradient = loss_and_gradient(rewards=jnp.ones(2))
    log_ratio = np.where(MASK, LOGP - OLD, 0)
    assert float(loss) == pytest.approx(0.1 * np.sum(log_ratio**2) / 5, abs=1e-7)
    np.testing.assert_allclose(gradient, 0.2 * log_ratio / 5, rtol=0, atol=1e-7)


def test_on_policy_it_is_reinforce_with_a_mean_baseline():
    (_, metrics), gradient = loss_and_gradient(OLD)
    np.testing.assert_allclose(gradient, np.where(MASK, [[-0.5], [0.5]], 0) / 5, rtol=0, atol=1e-7)
    assert [float(x) for x in metrics] == [0, 0, 0]


def test_masked_tokens_may_be_anything():
    # Prompts, results of tools
    (expected, _), wanted = loss_and_gradient()
    (loss, _), gradient = loss_and_gradient(LOGP.at[1, 2].set(jnp.nan), old=OLD.at[1, 2].set(-jnp.inf))
    assert loss == expected
    np.testing.assert_array_equal(gradient, wanted)
    (nothing, _), gradient = loss_and_gradient(mask=jnp.zeros_like(MASK))
    assert nothing == 0 and not np.any(gradient)


def test_it_is_computed_in_float32_for_numbers_and_bf16():
    (loss, _), gradient = loss_and_gradient(LOGP.astype(jnp.bfloat16))
    assert loss.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    found, _ = kimi_rl_loss(*map(np.asarray, (LOGP, OLD, group_advantages(REWARDS, 2), MASK)), **BOUNDS)
    assert float(found) == pytest.approx(-0.1648198947, abs=1e-7)


def test_k2_s_loss_is_of_whole_responses():
    advantages = group_advantages(REWARDS, 2)
    expected = ((0.5 - 0.1 * 1.0) ** 2 + (-0.5 - 0.1 * -1.0) ** 2) / 2
    found, gradient = jax.value_and_grad(k2_rl_loss)(LOGP, OLD, advantages, MASK, tau=0.1)
    assert float(found) == pytest.approx(expected, abs=1e-7)
    # -tau (A - tau L) of the response for each of its tokens
    np.testing.assert_allclose(gradient, np.where(MASK, [[-0.04], [0.04]], 0), rtol=0, atol=1e-7)


def test_advantages_are_of_groups():
    rewards = jnp.asarray([1.0, 0.0, 0.0, 3.0, 3.0, 0.0])
    np.testing.assert_allclose(group_advantages(rewards, 3), [2 / 3, -1 / 3, -1 / 3, 1, 1, -2], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="6 rewards do not divide into groups of 4"):
        group_advantages(rewards, 4)
