"""Rewards per token, DAPO's penalty on length and the scale of advantages: by hand, and against TRL's own."""

import math

import pytest
import torch
from trl.rewards import get_soft_overlong_punishment

from rl_plugins.functional import (
    kl_shaped_rewards,
    overlong_penalty,
    terminal_rewards,
    value_implied_std,
    value_scaled,
)

NAN = math.nan


def test_terminal_rewards_pay_the_last_real_token() -> None:
    mask = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    rewards = terminal_rewards(torch.tensor([0.5, -2.0, NAN]), mask)
    assert rewards.tolist() == [[0.0, 0.0, 0.0, 0.5, 0.0], [-2.0, 0.0, 0.0, 0.0, 0.0], [0.0] * 5]


def test_terminal_rewards_upcast_and_check() -> None:
    mask = torch.ones(2, 3)
    assert terminal_rewards(torch.tensor([1, 0]), mask).dtype == torch.float32
    assert terminal_rewards(torch.ones(2, dtype=torch.bfloat16), mask).dtype == torch.float32
    with pytest.raises(ValueError, match="one per completion"):
        terminal_rewards(torch.zeros(2, 1), mask)


def test_kl_shaped_rewards_by_hand() -> None:
    rewards = torch.tensor([[0.0, NAN, 1.0]])
    logps, ref_logps = torch.tensor([[-1.0, NAN, -2.0]]), torch.tensor([[-3.0, -math.inf, -1.0]])
    shaped = kl_shaped_rewards(rewards, logps, ref_logps, torch.tensor([[1, 0, 1]]), beta=0.5)
    assert shaped.tolist() == [[-1.0, 0.0, 1.5]]


def test_kl_charge_is_kl_in_the_mean() -> None:
    policy, reference = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    zero, mask = torch.zeros(1, 3), torch.ones(1, 3)
    charge = -kl_shaped_rewards(zero, policy.log()[None], reference.log()[None], mask, beta=2.0)[0]
    kl = torch.nn.functional.kl_div(reference.log(), policy, reduction="sum")
    torch.testing.assert_close((policy * charge).sum(), 2 * kl)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (2.0, 12.0)])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_implied_std_is_that_of_two_points(low: float, high: float, share: float) -> None:
    outcomes = torch.tensor([high] * round(10 * share) + [low] * round(10 * (1 - share)))
    std = value_implied_std(outcomes.mean()[None], low=low, high=high)
    torch.testing.assert_close(std[0], outcomes.std(correction=0))


def test_implied_std_bounds_any_reward_in_the_range() -> None:
    torch.manual_seed(0)
    rewards = torch.rand(200, 6)
    bound = value_implied_std(rewards.mean(1), min_std=1e-6)
    assert (rewards.std(1, correction=0) <= bound + 1e-6).all()


def test_implied_std_has_a_floor_with_finite_slope() -> None:
    values = torch.tensor([-0.5, 0.0, 0.001, 1.0, 3.0], requires_grad=True)
    std = value_implied_std(values, min_std=0.1)
    torch.testing.assert_close(std, torch.full((5,), 0.1))
    std.sum().backward()
    assert values.grad is not None and values.grad.isfinite().all()
    torch.testing.assert_close(
        value_implied_std(torch.tensor([-1.0]), low=-1.0, high=1.0, min_std=0.1), torch.tensor([0.2])
    )


def test_value_scaled_by_hand() -> None:
    scaled = value_scaled(torch.tensor([[1.0, 0.0], [2.0, -1.0]]), torch.tensor([0.5, 0.2]), min_std=0.1)
    torch.testing.assert_close(scaled, torch.tensor([[2.0, 0.0], [5.0, -2.5]]))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [({"low": 1.0, "high": 1.0}, "range"), ({"low": 1.0, "high": 0.0}, "range"), ({"min_std": 0.0}, "floor")],
)
def test_range_is_checked(arguments: dict[str, float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        value_scaled(torch.zeros(2, 3), torch.zeros(2), **arguments)


def test_one_initial_value_per_sequence() -> None:
    with pytest.raises(ValueError, match="initial_values"):
        value_scaled(torch.zeros(2, 3), torch.zeros(2, 1))


@pytest.mark.parametrize(("max_length", "cache"), [(100, 20), (100, 100), (20480, 4096), (5, 1)])
def test_the_penalty_is_trls(max_length: int, cache: int) -> None:
    lengths = sorted({0, 1, max_length - cache, max_length - cache + 1, max_length - 1, max_length, max_length + 7})
    theirs = get_soft_overlong_punishment(max_length, cache)(completion_ids=[[0] * n for n in lengths])
    ours = overlong_penalty(torch.tensor(lengths), max_length=max_length, cache=cache)
    torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float32), rtol=1e-6, atol=1e-7)
    assert ours.min() == -1.0 and (ours[torch.tensor(lengths) <= max_length - cache] == 0).all()


def test_the_penalty_by_hand() -> None:
    penalty = overlong_penalty(torch.tensor([7, 8, 9, 10, 11, 12, 20]), max_length=12, cache=4)
    assert penalty.tolist() == [0.0, 0.0, -0.25, -0.5, -0.75, -1.0, -1.0]


@pytest.mark.parametrize(("max_length", "cache"), [(10, 0), (10, 11), (10, -1)])
def test_a_slope_outside_the_completion_is_refused(max_length: int, cache: int) -> None:
    with pytest.raises(ValueError, match="0 < cache <= max_length"):
        overlong_penalty(torch.zeros(1), max_length=max_length, cache=cache)
