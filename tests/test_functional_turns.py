"""Turns of a conversation, time measured in turns, and advantages of steps."""

import math

import pytest
import torch
from torch import Tensor

from rl_plugins.functional import (
    at_turn_ends,
    batch_normalized,
    discount_factors,
    discounted_returns,
    gae,
    group_normalized,
    lambda_returns,
    process_normalized,
    td_errors,
    terminal_rewards,
    turn_ends,
    turn_normalized,
    turn_numbers,
    turn_sums,
    vtrace,
)
from rl_plugins.functional.alignment import last_real

MASK = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0, 1, 1], [1] * 8, [0] * 8])


def test_turns_by_hand() -> None:
    ends = [[0, 1, 0, 0, 0, 0, 1, 0], [0, 0, 0, 1, 0, 0, 0, 1], [0] * 7 + [1], [0] * 8]
    numbers = [[0, 0, -1, -1, 1, 1, 1, -1], [-1, 0, 0, 0, -1, -1, 1, 1], [0] * 8, [-1] * 8]
    assert turn_ends(MASK).int().tolist() == ends
    assert turn_numbers(MASK).tolist() == numbers
    x = torch.arange(32.0).view(4, 8).masked_fill(MASK == 0, math.nan)
    assert turn_sums(x, MASK).tolist() == [[1.0, 15.0], [30.0, 29.0], [156.0, 0.0], [0.0, 0.0]]
    assert at_turn_ends(0.5, MASK)[0].tolist() == [1, 0.5, 0, 0, 1, 1, 0.5, 0]
    assert at_turn_ends(torch.tensor([0.5, 0.25, 0.0, 1.0]), MASK)[1].tolist() == [0, 1, 1, 0.25, 0, 0, 1, 0.25]


def by_turns(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Advantages by loops: each turn is one action, taken in the state of the token in question."""
    out = torch.zeros_like(rewards)
    for row in range(len(mask)):
        real = [t for t in range(mask.shape[1]) if mask[row, t]]
        last = {t: t + 1 == mask.shape[1] or not mask[row, t + 1] for t in real}
        following = 0.0
        for i in reversed(range(len(real))):
            t = real[i]
            step, decay = (gamma, lam) if last[t] else (1.0, 1.0)
            next_value = float(values[row, real[i + 1]]) if i + 1 < len(real) else 0.0
            delta = float(rewards[row, t]) + step * next_value - float(values[row, t])
            following = delta + step * decay * following
            out[row, t] = following
    return out


@pytest.mark.parametrize(("gamma", "lam"), [(0.9, 0.7), (1.0, 0.0), (0.5, 1.0)])
def test_time_that_passes_between_turns(gamma: float, lam: float) -> None:
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 4, 8, dtype=torch.float64)
    discount, decay = (at_turn_ends(x, MASK).double() for x in (gamma, lam))
    found = gae(rewards, values, MASK, gamma=discount, lam=decay)
    torch.testing.assert_close(found, by_turns(rewards, values, MASK, gamma, lam), rtol=1e-6, atol=1e-6)
    returns = lambda_returns(rewards, values, MASK, gamma=discount, lam=decay)
    torch.testing.assert_close(returns - values.where(MASK.bool(), torch.zeros(())), found)


def test_an_environment_takes_no_time() -> None:
    """The same turns with more tokens of the environment between them have the same returns and advantages."""
    torch.manual_seed(1)
    rewards, values = torch.randn(2, 1, 5)
    short, long = torch.tensor([[1, 1, 0, 1, 1]]), torch.tensor([[1, 1, 0, 0, 0, 0, 1, 1, 0]])

    def spread(x: Tensor) -> Tensor:
        wide = torch.full((1, 9), math.nan)
        wide[0, [0, 1, 6, 7]] = x[0, [0, 1, 3, 4]]
        return wide

    for mask, r, v in ((short, rewards, values), (long, spread(rewards), spread(values))):
        discount, decay = at_turn_ends(0.9, mask), at_turn_ends(0.8, mask)
        found = gae(r, v, mask, gamma=discount, lam=decay)[mask.bool()]
        expected = gae(rewards, values, short, gamma=at_turn_ends(0.9, short), lam=at_turn_ends(0.8, short))
        torch.testing.assert_close(found, expected[short.bool()], rtol=0, atol=0)


def test_a_constant_discount_per_token_is_the_number() -> None:
    torch.manual_seed(2)
    rewards, values, ratios = torch.randn(4, 8), torch.randn(4, 8), torch.rand(4, 8)
    gamma = torch.full((4, 8), 0.9)
    for estimate in (
        lambda g: discounted_returns(rewards, MASK, gamma=g),
        lambda g: td_errors(rewards, values, MASK, gamma=g),
        lambda g: gae(rewards, values, MASK, gamma=g, lam=0.7),
        lambda g: lambda_returns(rewards, values, MASK, gamma=g, lam=0.7),
        lambda g: vtrace(rewards, values, ratios, MASK, gamma=g, lam=0.7)[1],
        lambda g: discount_factors(MASK, gamma=g),
    ):
        torch.testing.assert_close(estimate(gamma), estimate(0.9), rtol=1e-6, atol=1e-6)


def test_discounts_from_the_start_in_turns() -> None:
    factors = discount_factors(MASK, gamma=at_turn_ends(0.5, MASK))
    assert factors[:2].tolist() == [[1, 1, 0, 0, 0.5, 0.5, 0.5, 0], [0, 1, 1, 1, 0, 0, 0.5, 0.5]]


@pytest.mark.parametrize(
    ("gamma", "message"), [(torch.full((4, 8), 1.5), "outside"), (torch.ones(4), "or one per token")]
)
def test_discounts_are_checked(gamma: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        discounted_returns(torch.zeros(4, 8), torch.ones(4, 8), gamma=gamma)


# Advantages of steps

STEPS = torch.tensor([[0, 1.0, 0, 0, 0, 0, 2.0, 0], [0, 0, 0, 3.0, 0, 0, 0, 5.0], [0] * 7 + [4.0], [0] * 8])
PAID = torch.tensor([[0, 1, 0, 0, 0, 0, 1, 0], [0, 0, 0, 1, 0, 0, 0, 1], [0] * 7 + [1], [0] * 8])


def test_process_supervision_by_hand() -> None:
    """All steps of a group are compared: 1, 2, 3 and 5 of the first, 4 alone of the second, which says nothing."""
    found = process_normalized(STEPS, PAID, MASK, 2, eps=0.0001)
    mean, std = 11 / 4, math.sqrt(sum((r - 11 / 4) ** 2 for r in (1, 2, 3, 5)) / 3) + 1e-4
    one, two, three, five = ((r - mean) / std for r in (1, 2, 3, 5))
    expected = torch.zeros(4, 8)
    expected[0] = torch.tensor([one + two, one + two, 0, 0, two, two, two, 0])
    expected[1] = torch.tensor([0, three + five, three + five, three + five, 0, 0, five, five])
    torch.testing.assert_close(found, expected)


def test_steps_worth_nothing_are_steps() -> None:
    rewards = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    every = process_normalized(rewards, torch.ones(2, 2), torch.ones(2, 2), 2)
    some = process_normalized(rewards, torch.tensor([[1, 0], [1, 1]]), torch.ones(2, 2), 2)
    assert every[0, 1] < 0 and some.abs().sum() == 0


def test_turn_levels_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0, 0, 5.0], [3.0, 0, 0, 1.0], [2.0, 0, 0, 0.0]])
    mask = torch.tensor([[1, 0, 0, 1], [1, 0, 0, 1], [1, 0, 0, 0]])  # the third has one turn, its last
    found = turn_normalized(rewards, mask, 3, gamma=0.5, eps=1e-4)
    outcome = group_normalized(torch.tensor([5.0, 1.0, 2.0]), 3)
    first = group_normalized(torch.tensor([1.0, 3.0, math.nan]), 3)
    expected = torch.zeros(3, 4)
    expected[:2, 0], expected[:2, 3] = first[:2] + 0.5 * outcome[:2], outcome[:2]
    expected[2, 0] = outcome[2]
    torch.testing.assert_close(found, expected)


def test_a_turn_is_credited_with_all_that_follow() -> None:
    """Three turns of two tokens, the second of which is paid: MT-GRPO's sum over the turns to come."""
    earned = torch.tensor([[1.0, 4.0, 0.0], [2.0, 0.0, 3.0]])
    mask = torch.tensor([[1, 1, 0, 1, 1, 0, 1, 1]] * 2)
    rewards = torch.zeros(2, 8)
    rewards[:, [1, 4, 7]] = earned
    one, two, three = (group_normalized(column, 2) for column in earned.unbind(1))
    expected = torch.zeros(2, 8)
    expected[:, 6:] = three[:, None]
    expected[:, 3:5] = (two + 0.5 * three)[:, None]
    expected[:, :2] = (one + 0.5 * two + 0.25 * three)[:, None]
    torch.testing.assert_close(turn_normalized(rewards, mask, 2, gamma=0.5), expected)


def test_one_reward_at_the_end_is_the_group_s_advantage() -> None:
    torch.manual_seed(3)
    scores, mask = torch.randn(8), torch.tensor([[1] * n + [0] * (6 - n) for n in (6, 5, 1, 3, 2, 2, 4, 6)])
    rewards, expected = terminal_rewards(scores, mask), group_normalized(scores, 4)[:, None] * mask
    # Sums over more entries, in another order.
    torch.testing.assert_close(process_normalized(rewards, last_real(mask), mask, 4), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(turn_normalized(rewards, mask, 4), expected)
    # And what follows each token is the score, whitened over tokens.
    returns = discounted_returns(rewards, mask)
    found = batch_normalized(returns, mask=mask)
    torch.testing.assert_close(found, batch_normalized(scores[:, None].expand_as(mask) * mask, mask=mask))


@pytest.mark.parametrize("garbage", [math.nan, 1e30])
def test_padding_reaches_nothing(garbage: float) -> None:
    dirty = STEPS.masked_fill(MASK == 0, garbage)
    for function in (lambda r: process_normalized(r, PAID, MASK, 2), lambda r: turn_normalized(r, MASK, 2)):
        assert torch.equal(function(dirty), function(STEPS))


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="rewards"):
        process_normalized(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 4), 2)
    with pytest.raises(ValueError, match="paid"):
        process_normalized(torch.zeros(2, 4), torch.zeros(2, 3), torch.ones(2, 4), 2)
    with pytest.raises(ValueError, match="divide"):
        turn_normalized(torch.zeros(3, 4), torch.ones(3, 4), 2)
