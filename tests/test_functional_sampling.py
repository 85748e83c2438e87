"""Which groups teach anything, and DAPO's penalty on length, against TRL's own and by hand."""

import math

import pytest
import torch
from trl.rewards import get_soft_overlong_punishment

from rl_plugins.functional.advantages.group import informative_groups
from rl_plugins.functional.rewards import overlong_penalty

NAN, INF = math.nan, math.inf


def test_groups_whose_rewards_differ() -> None:
    rewards = torch.tensor([0.0, 1.0, 0.5, 0.5, NAN, 0.5, NAN, NAN, -1.0, -1.5])
    assert informative_groups(rewards, 2).tolist() == [True, False, False, False, True]
    assert informative_groups(rewards, 5).tolist() == [True, True]
    assert informative_groups(rewards, 1).tolist() == [False] * 10
    assert informative_groups(rewards, 2).dtype == torch.bool


def test_unscorable_rows_do_not_count_as_zero() -> None:
    assert informative_groups(torch.tensor([1.0, NAN, 1.0, NAN, 0.0, 1.0]), 3).tolist() == [False, True]


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([0.1 + 0.2, 0.3], False),  # a unit in the last place
        ([1000.0, 1000.0005], False),  # relative for large rewards
        ([1000.0, 1000.01], True),
        ([0.0, 1e-5], True),
        ([-1000.0, -1000.5], True),
    ],
)
def test_the_tolerance_is_that_of_rounding(rewards: list[float], expected: bool) -> None:
    assert informative_groups(torch.tensor(rewards), 2).tolist() == [expected]
    assert informative_groups(torch.tensor(rewards), 2, tolerance=10.0).tolist() == [False]


def test_half_precision_is_compared_in_float32() -> None:
    rewards = torch.tensor([0.5, 0.5, 0.0, 1.0], dtype=torch.bfloat16)
    assert informative_groups(rewards, 2).tolist() == [False, True]


@pytest.mark.parametrize(("shape", "size"), [((5,), 2), ((2, 2), 2), ((4,), 0)])
def test_what_does_not_divide_is_refused(shape: tuple[int, ...], size: int) -> None:
    with pytest.raises(ValueError, match="do not divide into groups"):
        informative_groups(torch.zeros(shape), size)


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
