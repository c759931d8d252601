"""Losses of reinforcement learning: that of Kimi K2.5 (arXiv 2602.02276) and that of K2 (arXiv 2507.20534).

Responses y_j of a prompt are drawn from an older policy. l is a token's log-probability now minus its log-probability
then; an advantage is the reward minus the mean reward of the prompt's responses, not divided by their deviation.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from kimi_jax.axes import AnyArray


class LossMetrics(NamedTuple):
    """Means over the generated tokens: the share whose ratio is clipped, of l, and of l²."""

    clipped_fraction: Float[Array, ""]
    mean_log_ratio: Float[Array, ""]
    mean_squared_log_ratio: Float[Array, ""]


def group_advantages(rewards: Float[AnyArray, "b"], group: int) -> Float[Array, "b"]:
    """Returns rewards minus the mean of their prompt's; each prompt has `group` responses, one after another.

    Raises:
      ValueError: `group` does not divide the number of rewards.
    """
    if group < 1 or len(rewards) % group:
        raise ValueError(f"group_advantages: {len(rewards)} rewards do not divide into groups of {group}")
    groups = jnp.asarray(rewards, jnp.float32).reshape(-1, group)
    return (groups - jnp.mean(groups, axis=1, keepdims=True)).reshape(-1)


def kimi_rl_loss(
    logp: Float[AnyArray, "b t"],
    old_logp: Float[AnyArray, "b t"],
    advantages: Float[AnyArray, "b"],
    mask: Shaped[AnyArray, "b t"],
    *,
    alpha: float,
    beta: float,
    tau: float,
) -> tuple[Float[Array, ""], LossMetrics]:
    """Computes K2.5's loss, the mean over generated tokens of `tau l² - clip(exp(l)) A`, in float32.

    The ratio exp(l) is clipped to l in [alpha, beta]: beyond them it is constant, so that it has no gradient, whatever
    the sign of A (PPO clips one side). The square always has one, which pulls a token back.

    Args:
      logp: log-probabilities of the responses' tokens, through which gradients flow.
      old_logp: those of the policy that generated them.
      advantages: A of each response (`group_advantages`).
      mask: true for generated tokens. Prompts, results of tools and outputs of sub-agents are masked: they are neither
        in the sum nor in its divisor. Masked log-probabilities may be anything.
      alpha, beta: bounds of l; tau: the weight of the square. Kimi's values are not published.

    Returns:
      The loss, 0 where nothing is generated, and metrics.
    """
    generated, log_ratio = _log_ratio(logp, old_logp, mask)
    inside = (log_ratio >= alpha) & (log_ratio <= beta)
    # (jnp.clip has half a gradient at its bounds)
    ratio = jnp.exp(jnp.where(inside, log_ratio, lax.stop_gradient(jnp.clip(log_ratio, alpha, beta))))
    terms = tau * log_ratio**2 - ratio * jnp.asarray(advantages, jnp.float32)[:, None]
    count = jnp.maximum(jnp.sum(generated), 1)

    def mean(x: Array) -> Array:
        return jnp.sum(jnp.where(generated, x, 0)) / count

    metrics = LossMetrics(mean(~inside), mean(log_ratio), mean(log_ratio**2))
    return mean(terms), metrics


def k2_rl_loss(
    logp: Float[AnyArray, "b t"],
    old_logp: Float[AnyArray, "b t"],
    advantages: Float[AnyArray, "b"],
    mask: Shaped[AnyArray, "b t"],
    *,
    tau: float,
) -> Float[Array, ""]:
    """Computes K2's loss, the mean over responses of (A - tau * sum of l over the response's tokens)², in float32.

    Arguments are those of `kimi_rl_loss`.
    """
    _, log_ratio = _log_ratio(logp, old_logp, mask)
    return jnp.mean((jnp.asarray(advantages, jnp.float32) - tau * jnp.sum(log_ratio, axis=1)) ** 2)


def _log_ratio(logp: AnyArray, old_logp: AnyArray, mask: AnyArray) -> tuple[Array, Array]:
    """Returns which tokens are generated, and l of these, float32, 0 elsewhere."""
    generated = jnp.asarray(mask, bool)
    apart = [jnp.where(generated, jnp.asarray(x, jnp.float32), 0) for x in (logp, old_logp)]
    return generated, apart[0] - lax.stop_gradient(apart[1])
