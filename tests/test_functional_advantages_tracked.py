"""The Beta tracker: its formulas by hand, its memory, and what it converges to."""

import math

import pytest
import torch

from rl_plugins.functional.advantages.tracked import (
    forget_factor,
    initial_counts,
    policy_distance,
    tracker_update,
    tracker_value,
)

NAN = math.nan


def test_value_by_hand() -> None:
    assert tracker_value(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0])).tolist() == [0.5, 0.75]
    assert tracker_value(torch.tensor([1]), torch.tensor([3])).dtype == torch.float32


def test_update_by_hand() -> None:
    alpha, beta = torch.tensor([4.0, 4.0, 4.0]), torch.tensor([2.0, 2.0, 2.0])
    new_alpha, new_beta = tracker_update(alpha, beta, torch.tensor([1.0, 0.25, NAN]), torch.tensor([0.5, 0.75, 0.1]))
    assert new_alpha.tolist() == [3.0, 3.25, 4.0] and new_beta.tolist() == [1.0, 2.25, 2.0]
    assert alpha.tolist() == [4.0] * 3  # pure
    kept_alpha, kept_beta = tracker_update(alpha, beta, torch.ones(3), 1.0)
    assert kept_alpha.tolist() == [5.0] * 3 and kept_beta.tolist() == [2.0] * 3


def test_update_moves_the_value_towards_the_reward() -> None:
    """`v' = v + (r - v) / (rho (alpha + beta) + 1)`."""
    torch.manual_seed(0)
    alpha, beta, rewards = 5 * torch.rand(3, 20, dtype=torch.float64)
    rewards, rho = rewards / 5, torch.rand(20, dtype=torch.float64)
    value = tracker_value(alpha, beta)
    updated = tracker_value(*tracker_update(alpha, beta, rewards, rho))
    torch.testing.assert_close(updated, value + (rewards - value) / (rho * (alpha + beta) + 1))


def test_counts_come_to_rest_at_the_memory() -> None:
    alpha, beta = initial_counts(torch.tensor([0.5], dtype=torch.float64))
    torch.testing.assert_close(alpha + beta, torch.tensor([8.0], dtype=torch.float64))
    for _ in range(400):
        alpha, beta = tracker_update(alpha, beta, torch.tensor([0.3]), 0.875)
    torch.testing.assert_close(torch.cat([alpha, beta]), torch.tensor([2.4, 5.6], dtype=torch.float64))
    torch.testing.assert_close(tracker_value(alpha, beta), torch.tensor([0.3], dtype=torch.float64))


def test_forget_factor_by_hand() -> None:
    # 2^-0, clipped to 0.96; 2^(-0.0060 / 0.06) = 2^-0.1; 2^-1, clipped to 0.875.
    factors = forget_factor(torch.tensor([0.0, 0.006, 0.06, 5.0]))
    torch.testing.assert_close(factors, torch.tensor([0.96, 2**-0.1, 0.875, 0.875]))
    torch.testing.assert_close(
        forget_factor(torch.tensor([0.0, 0.5, 1.0, 2.0]), half_life=0.5, low=0.1, high=1.0),
        torch.tensor([1.0, 0.5, 0.25, 0.1]),
    )


def test_initial_counts_by_hand() -> None:
    # 6 of 8, N_0 = 8: 8 * 6.5 / 9 and 8 * 2.5 / 9. Without trials the prior.
    alpha, beta = initial_counts(torch.tensor([0.75, NAN]), trials=torch.tensor([8, 0]))
    torch.testing.assert_close(alpha, torch.tensor([52 / 9, 0.5]))
    torch.testing.assert_close(beta, torch.tensor([20 / 9, 0.5]))
    alpha, beta = initial_counts(torch.tensor([1.0]), trials=1, min_forget=0.5)
    torch.testing.assert_close(torch.cat([alpha, beta]), torch.tensor([1.5, 0.5]))


def test_all_failed_prompts_keep_a_chance() -> None:
    alpha, beta = initial_counts(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(tracker_value(alpha, beta), torch.tensor([1 / 18, 17 / 18]))


def test_arguments_are_checked() -> None:
    one, two = torch.ones(1), torch.ones(2)
    with pytest.raises(ValueError, match="one pair per prompt"):
        tracker_value(one, two)
    with pytest.raises(ValueError, match="one per count"):
        tracker_update(two, two, one, 0.9)
    with pytest.raises(ValueError, match="one per count"):
        tracker_update(two, two, two, one)
    for reward in (-0.1, 1.1):
        with pytest.raises(ValueError, match="a Beta tracker counts successes"):
            tracker_update(one, one, torch.tensor([reward]), 0.9)
    for rho in (-0.1, 1.1, NAN):
        with pytest.raises(ValueError, match="forget has entries outside"):
            tracker_update(one, one, one, rho)
    for half_life in (0.0, -1.0):
        with pytest.raises(ValueError, match="positive distance"):
            forget_factor(one, half_life=half_life)
    for low, high in ((0.9, 0.8), (-0.1, 0.9), (0.9, 1.1)):
        with pytest.raises(ValueError, match="low <= high"):
            forget_factor(one, low=low, high=high)
    for min_forget in (-0.1, 1.0):
        with pytest.raises(ValueError, match="least forgetting factor"):
            initial_counts(one, min_forget=min_forget)
    for value in (-0.1, 1.1, NAN):
        with pytest.raises(ValueError, match="trials=0 where there is none"):
            initial_counts(torch.tensor([value]))
    with pytest.raises(ValueError, match="0 or more"):
        initial_counts(one, trials=-1)


def test_policy_distance_by_hand() -> None:
    then = torch.tensor([[-1.0, -2.0, float("nan")], [-1.0, float("inf"), 0.0]])
    now = torch.tensor([[-1.5, -1.0, 0.0], [-1.0, 0.0, float("nan")]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    torch.testing.assert_close(policy_distance(then, now, mask), torch.tensor([0.75, 0.0]))
    assert policy_distance(then, now, torch.zeros(2, 3)).tolist() == [0.0, 0.0]
