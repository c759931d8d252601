"""Rewards of an orchestrator that launches sub-agents in parallel: PARL (Kimi K2.5, arXiv 2602.02276).

An episode is a list of stages. In each the orchestrator takes some steps (one, usually), and may launch sub-agents,
which run side by side. An episode is bounded by its critical steps, so that work done in parallel costs what its
longest part does. Where the papers name no formula (`parallel_reward`, `finish_reward`, the shape of lam), it is ours.
"""

from collections.abc import Sequence

from kimi_jax.stages import Stage

Number = float | int


def parallel_reward(stages: Sequence[Stage], tasks: int) -> float:
    """Returns how parallel an episode is: (largest number launched in a stage - 1) / (tasks - 1), in [0, 1].

    It is 0 where there is one task.
    """
    most = max((len(launched) for _, launched in stages), default=0)
    return min(1.0, max(0, most - 1) / (tasks - 1)) if tasks > 1 else 0.0


def finish_reward(finished: int, launched: int) -> float:
    """Returns the share of launched sub-agents that finished, 0 where none was launched."""
    return finished / launched if launched else 0.0


def parl_reward(
    r_parallel: Number, success: bool, quality: Number, episode: int, *, peak: Number = 0.1, until: Number
) -> float:
    """Returns lam r_parallel + (1 - lam) 1[success] quality, the reward as first published.

    lam falls linearly from `peak` in the first episode (number 0) to 0 in episode `until`, and stays there: being
    parallel earns something while it is explored, and nothing for its own sake after that.

    Raises:
      ValueError: `until` is not above 0.
    """
    if until <= 0:
        raise ValueError(f"parl_reward: until is {until}, expected more than 0")
    lam = peak * max(0.0, 1 - episode / until)
    return lam * r_parallel + (1 - lam) * (quality if success else 0.0)


def parl_reward_report(r_parallel: Number, r_finish: Number, r_perf: Number, lam1: Number, lam2: Number) -> float:
    """Returns lam1 r_parallel + lam2 r_finish + r_perf, the reward of the report; lam1 and lam2 go to 0 in training."""
    return lam1 * r_parallel + lam2 * r_finish + r_perf
