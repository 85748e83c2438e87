"""Advantages by name: each is its function, options are known, and what is unknown lists the valid ones."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rl_plugins.functional.advantages import group as pure
from rl_plugins.functional.advantages.group import gpg_scale
from rl_plugins.functional.advantages.traces import lambda_trace
from rl_plugins.signals.advantages import ADVANTAGES, advantage_options, advantages_of, check_advantage

NAN = math.nan
SCORES = torch.tensor([0.0, 1.0, 0.5, 0.25, 1.0, 1.0, 1.0, 1.0, NAN, 0.5, 0.0, NAN, NAN, NAN, NAN, 0.75])
LENGTHS = torch.tensor([3, 5, 1, 2, 4, 4, 4, 4, 6, 2, 1, 3, 0, 1, 2, 3])
OPTIONS: dict[str, dict[str, Any]] = {"pass_at_k": {"k": 2}, "kalman": {"measurement_var": 0.1}}
OPTIONS["group_normalized"] = {"eps": 0.1}
OF_GROUPS = [name for name, entry in ADVANTAGES.items() if not entry.per_token and not entry.tracks_prompts]


def mask_of(lengths: torch.Tensor) -> torch.Tensor:
    return torch.arange(8) < lengths[:, None]


@pytest.mark.parametrize("name", OF_GROUPS)
def test_each_name_is_its_function(name: str) -> None:
    options = OPTIONS.get(name, {})
    found = advantages_of(name, SCORES, 4, mask_of(LENGTHS), options=options)
    if name == "reward":
        expected = torch.where(SCORES.isnan(), 0.0, SCORES)
    elif name == "group_centered_rescaled":
        expected = pure.group_centered(SCORES, 4) * 2  # two of four groups have a signal
    elif name == "batch_normalized":
        expected = pure.batch_normalized(SCORES)
    elif name == "length_weighted":
        expected = pure.length_weighted(SCORES, 4, LENGTHS)
    else:
        expected = getattr(pure, name)(SCORES, 4, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert found.shape == SCORES.shape and (found[SCORES.isnan()] == 0).all() and found.abs().max() > 0.1


def test_gpg_by_hand() -> None:
    scores = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    found = advantages_of("group_centered_rescaled", scores, 2, torch.ones(6, 1), options={})
    assert found.tolist() == [-1.5, 1.5, 0.0, 0.0, 0.0, 0.0]
    groups = torch.arange(6) // 2
    assert gpg_scale(scores, groups).item() == 3.0
    nothing = advantages_of("group_centered_rescaled", torch.ones(6), 2, torch.ones(6, 1), options={})
    assert nothing.tolist() == [0.0] * 6


def test_evaluation_with_fewer_than_k_completions() -> None:
    scores = torch.tensor([0.0, 1.0, 0.5, 0.5])
    found = advantages_of("pass_at_k", scores, 2, torch.ones(4, 1), options={"k": 4})
    torch.testing.assert_close(found, pure.pass_at_k(scores, 2, k=2), rtol=0, atol=0)
    single = advantages_of("pass_at_k", scores, 1, torch.ones(4, 1), options={"k": 4})
    assert single.tolist() == [0.0] * 4


def test_no_gradient() -> None:
    scores = SCORES.nan_to_num(0.5).requires_grad_()
    assert not advantages_of("group_normalized", scores, 4, mask_of(LENGTHS), options={}).requires_grad


def test_options_of_each_name() -> None:
    expected = {
        "reward": [],
        "group_normalized": ["eps"],
        "group_centered": [],
        "group_min_max": [],
        "group_centered_rescaled": [],
        "leave_one_out": [],
        "max_likelihood": ["eps"],
        "length_weighted": [],
        "group_centered_batch_normalized": ["eps"],
        "group_centered_batch_scaled": ["eps"],
        "pass_at_k": ["k", "normalize", "eps"],
        "kalman": ["process_var", "measurement_var", "initial_mean", "initial_var", "eps"],
        "batch_normalized": ["eps"],
        "reward_to_go": ["gamma", "time_unit", "eps"],
        "process_normalized": ["eps"],
        "turn_normalized": ["gamma", "eps"],
        "value_tracker": ["forget", "half_life", "low", "high"],
        "lambda_trace": ["gamma", "lam", "style", "min_advantage"],
    }
    assert {name: advantage_options(name) for name in ADVANTAGES} == expected
    assert len(ADVANTAGES) == 18
    groupless = {name for name, entry in ADVANTAGES.items() if not entry.compares_groups}
    assert groupless == {"reward", "batch_normalized", "reward_to_go", "value_tracker"}


@pytest.mark.parametrize("name", ADVANTAGES)
def test_an_entry_says_in_one_way_how_it_is_computed(name: str) -> None:
    entry = ADVANTAGES[name]
    alone = entry.of_rewards if entry.only_of_rewards else None
    ways = (
        entry.of_scores,
        entry.of_lengths,
        entry.of_advantages,
        entry.of_steps,
        alone,
        entry.tracks_prompts or None,
    )
    assert sum(way is not None for way in ways) == 1


def test_traces_spread_the_advantage_of_the_whole() -> None:
    mask = mask_of(LENGTHS)
    found = advantages_of("lambda_trace", SCORES, 4, mask, options={"lam": 0.5})
    expected = lambda_trace(pure.group_normalized(SCORES, 4), mask, lam=0.5)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    # Two ranks: statistics are of all rows, the result of one's own.
    half = advantages_of(
        "lambda_trace", SCORES[8:], 4, mask[8:], options={"lam": 0.5},
        gather=lambda x: torch.cat([SCORES[:8], x]), own=lambda x: x[8:],
    )  # fmt: skip
    torch.testing.assert_close(half, expected[8:], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["process_normalized", "turn_normalized"])
def test_a_group_may_lie_on_ranks_whose_completions_have_other_lengths(name: str) -> None:
    """Four completions of two tokens on this rank, four of five on another, masks of both kinds that hosts have."""
    torch.manual_seed(0)
    mask = torch.arange(5) < torch.tensor([2] * 4 + [5] * 4)[:, None]
    rewards, paid, scores = torch.randn(8, 5) * mask, torch.rand(8, 5) < 0.7, torch.zeros(8)
    whole = advantages_of(name, scores, 8, mask.long(), rewards=rewards, paid=paid, options={})
    others = iter([rewards[4:], paid[4:], mask[4:]])

    def gather(x: Tensor) -> Tensor:
        return torch.cat([x, next(others).to(x.dtype) if x.ndim == 2 else torch.tensor([5])])

    own = advantages_of(
        name, scores[:4], 8, mask[:4, :2], rewards=rewards[:4, :2], paid=paid[:4, :2], options={},
        gather=gather, own=lambda x: x[:4],
    )  # fmt: skip
    assert own.shape == (4, 2)
    torch.testing.assert_close(own, whole[:4, :2])


def test_unknown_names_list_the_valid_ones() -> None:
    with pytest.raises(
        ValueError, match="Unknown advantage 'gae'; choose one of reward, group_normalized, .*lambda_tr"
    ):
        advantage_options("gae")
    with pytest.raises(
        ValueError, match="num_generations is 1. Set it to at least 2, or choose one of reward, batch_n"
    ):
        check_advantage("kalman", {}, 1)
    with pytest.raises(ValueError, match="do not divide into groups|must divide the batch"):
        advantages_of("group_centered", SCORES, 3, mask_of(LENGTHS), options={})
