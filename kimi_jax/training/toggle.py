"""Toggle (Kimi K2.5, arXiv 2602.02276): phases in which long answers earn nothing alternate with free ones.

In a budgeted phase an answer keeps its reward if it is within its task's budget of tokens, or if the task is not yet
solved often enough for its length to matter. The report gives no values; lam = 0.8, the 50th percentile and phases of
10 updates are ours.
"""

from collections.abc import Sequence

import numpy as np


def is_budgeted(update: int, period: int = 10) -> bool:
    """Tells whether update number `update`, from 0, is in a budgeted phase: the first of two phases of `period`."""
    return update // period % 2 == 0


def length_budget(lengths: Sequence[int], correct: Sequence[bool], percentile: float | int = 50) -> float | None:
    """Returns a task's budget, a percentile of its correct answers' lengths before training; None if none is correct.

    Raises:
      ValueError: there are not as many lengths as verdicts.
    """
    chosen = [length for length, right in zip(lengths, correct, strict=True) if right]
    return float(np.percentile(chosen, percentile)) if chosen else None


def toggle_rewards(
    rewards: Sequence[float | int],
    lengths: Sequence[int],
    budget: float | int | None,
    budgeted: bool,
    lam: float | int = 0.8,
) -> list[float]:
    """Returns the rewards of a task's answers in this phase.

    In a budgeted phase an answer longer than `budget` gets 0, unless the mean reward is below `lam`. Without a budget
    (None), and in a free phase, rewards stay as they are.

    Raises:
      ValueError: there are not as many lengths as rewards.
    """
    pairs = list(zip(rewards, lengths, strict=True))
    if not budgeted or budget is None or not pairs or sum(rewards) / len(rewards) < lam:
        return [float(reward) for reward in rewards]
    return [float(reward) if length <= budget else 0.0 for reward, length in pairs]
