"""Toggle and PARL: rewards, budgets and critical steps by hand."""

import pytest

from kimi_jax.training import (
    critical_steps,
    finish_reward,
    is_budgeted,
    length_budget,
    parallel_reward,
    parl_reward,
    parl_reward_report,
    toggle_rewards,
)


def test_phases_alternate():
    assert [is_budgeted(update, 2) for update in range(6)] == [True, True, False, False, True, True]
    assert [is_budgeted(update) for update in (0, 9, 10, 19, 20)] == [True, True, False, False, True]


def test_long_answers_earn_nothing_in_a_budgeted_phase():
    rewards, lengths = [1.0, 1.0, 0.0, 1.0], [10, 40, 20, 30]
    assert toggle_rewards(rewards, lengths, 25.0, True, lam=0.5) == [1, 0, 0, 0]
    # But where the task is not solved often enough, in a free phase, or without a budget, they do
    assert toggle_rewards(rewards, lengths, 25.0, True) == rewards  # 0.75 < 0.8
    assert toggle_rewards(rewards, lengths, 25.0, False, lam=0.5) == rewards
    assert toggle_rewards(rewards, lengths, None, True, lam=0.5) == rewards
    # At the bounds: a mean of lam is enough, a length of the budget is within it
    assert toggle_rewards([1.0, 1.0], [25, 26], 25.0, True, lam=1.0) == [1, 0]
    assert toggle_rewards([], [], 25.0, True) == []
    with pytest.raises(ValueError):
        toggle_rewards(rewards, [1], 25.0, True)


def test_a_budget_is_a_percentile_of_correct_answers():
    assert length_budget([10, 20, 30, 1000], [True, True, True, False]) == 20
    assert length_budget([10, 20, 30], [True, False, True], percentile=100.0) == 30
    assert length_budget([10, 20], [False, False]) is None


def test_critical_steps_are_those_of_the_longest_chain():
    assert critical_steps([(1, [3, 5, 2]), (1, []), (2, [4])]) == 13
    serial, parallel = [(1, [4])] * 3, [(1, [4, 4, 4])]
    assert (critical_steps(serial), critical_steps(parallel)) == (15, 5)
    assert critical_steps([]) == 0


def test_parallel_work_is_rewarded_by_its_widest_stage():
    assert parallel_reward([(1, [4])] * 3, tasks=3) == 0
    assert parallel_reward([(1, [4, 4]), (1, [4])], tasks=3) == 0.5
    assert parallel_reward([(1, [4, 4, 4])], tasks=3) == 1
    assert parallel_reward([(1, [4] * 9)], tasks=3) == 1
    assert parallel_reward([(1, [4])], tasks=1) == parallel_reward([], tasks=2) == 0


def test_a_launch_that_finishes_nothing_costs_steps_and_earns_nothing():
    assert (finish_reward(0, 0), finish_reward(0, 2), finish_reward(1, 2), finish_reward(2, 2)) == (0, 0, 0.5, 1)
    assert critical_steps([(1, [7])]) == critical_steps([(1, [])]) + 7


def test_the_reward_of_parallel_work_fades():
    assert parl_reward(1.0, False, 0.0, 0, until=100) == pytest.approx(0.1)
    assert parl_reward(1.0, True, 0.5, 0, until=100) == pytest.approx(0.1 + 0.45)
    assert parl_reward(1.0, True, 0.5, 50, until=100) == pytest.approx(0.05 + 0.95 * 0.5)
    for episode in (100, 1000):
        assert parl_reward(1.0, True, 0.5, episode, until=100) == 0.5
        assert parl_reward(1.0, False, 0.5, episode, until=100) == 0
    assert parl_reward(1.0, False, 0.0, 0, peak=0.3, until=1) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="until is 0, expected more than 0"):
        parl_reward(1.0, True, 1.0, 0, until=0)


def test_the_report_s_reward_is_a_weighted_sum():
    assert parl_reward_report(1.0, 0.5, 0.25, lam1=0.1, lam2=0.2) == pytest.approx(0.45)
