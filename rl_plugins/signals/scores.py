"""Rewards of a batch, from what reward functions returned: a score for each completion, a reward for each token."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rl_plugins.functional.alignment import last_real
from rl_plugins.functional.rewards import overlong_penalty
from rl_plugins.rollouts.batch import Batch, loss_mask
from rl_plugins.rollouts.rewards import RewardFunc, weighted_scores
from rl_plugins.rollouts.step_rewards import StepRewards
from rl_plugins.signals.host import Ranks
from rl_plugins.signals.metrics import Metrics
from rl_plugins.signals.options import LengthOptions

OVERLONG_NAME = "overlong_penalty"
"""Name of the penalty on length among the reward functions."""


def overlong_reward(options: LengthOptions, max_completion_length: int) -> RewardFunc:
    """Make a reward function from DAPO's soft penalty on length; its weight should be 1.

    Args:
        options: Say where the penalty begins.
        max_completion_length: Longest completion in tokens.
    """
    cache = options.penalised_tokens(max_completion_length)

    def penalty(completion_ids: list[list[int]], **_: Any) -> list[float]:
        lengths = torch.tensor([len(ids) for ids in completion_ids])
        return overlong_penalty(lengths, max_length=max_completion_length, cache=cache).tolist()

    penalty.__name__ = OVERLONG_NAME
    return penalty


def with_unit_weight(weights: list[float] | None, num_functions: int) -> list[float] | None:
    """Add a weight of 1 for one more reward function, if each of the others has a weight."""
    return [*weights, 1.0] if weights is not None and len(weights) == num_functions else weights


def score(rewards: Tensor, weights: Tensor | None, names: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Sum up rewards, with and without the penalty on length.

    Only the task's own rewards decide whether the rewards of a group differ, and whether a completion can be scored.

    Args:
        rewards: (N, F), NaN for none.
        weights: (F,); ones by default.
        names: Names of the F functions.

    Returns:
        Scores (N,), scores without the penalty (N,), both NaN where a completion cannot be scored, and the rewards
        (N, F), in which such a completion has no penalty.
    """
    scores = weighted_scores(rewards, weights)
    of_length = torch.tensor([name == OVERLONG_NAME for name in names], device=rewards.device)
    if not of_length.any():
        return scores, scores, rewards
    task = weighted_scores(rewards[:, ~of_length], None if weights is None else weights.to(rewards)[~of_length])
    task = task.masked_fill(scores.isnan(), torch.nan)
    unscorable = task.isnan()
    return (
        scores.masked_fill(unscorable, torch.nan),
        task,
        rewards.masked_fill(unscorable[:, None] & of_length, torch.nan),
    )


def pay(
    batch: Batch, rewards: Tensor, weights: Tensor | None, names: Sequence[str], steps: StepRewards, ranks: Ranks
) -> Metrics:
    """Put `rewards` and `paid` (B, T) into a batch: every reward at the token after which it is paid.

    Args:
        batch: Completions of this rank.
        rewards: Rewards of the completions by function (B, F), a number or the sum over the steps; NaN for none.
        weights: Weights of the functions (F,); ones by default.
        names: Names of the functions.
        steps: Rewards of single steps, and the tokens after which they are paid.
        ranks: The trainer or module.

    Returns:
        Metrics of all ranks. If any function paid for steps: `step_rewards/per_completion`, the number of tokens at
        which a completion is paid, and `step_rewards/before_end`, the share of the absolute reward that is paid before
        the last token. For each function with a separator: `rewards/<name>/no_separator`, the share of completions
        without the separator.
    """
    mask = loss_mask(batch)
    batch["rewards"], batch["paid"] = steps.token_rewards(rewards, mask, weights)
    size = batch["rewards"].abs().double()
    size = size.masked_fill(~size.isfinite().all(1, keepdim=True), 0.0)  # completions that cannot be scored
    sums = [
        size.new_tensor(float(bool(steps.at_tokens) or any(any(places) for places in steps.paid.values()))),
        batch["paid"].sum().double(),
        size.new_tensor(float(len(mask))),
        size.sum(),
        size.masked_fill(last_real(mask), 0.0).sum(),
        *(size.new_tensor(float(count)) for count in steps.unseparated.values()),
    ]
    stepwise, tokens, rows, total, before, *unseparated = ranks.sum_over_ranks(torch.stack(sums)).unbind()
    metrics = Metrics()
    if stepwise:
        metrics["step_rewards/per_completion"] = (tokens / rows).float()
        metrics["step_rewards/before_end"] = (before / total.clamp(min=1e-12)).float()
    for number, count in zip(steps.unseparated, unseparated, strict=True):
        metrics[f"rewards/{names[number]}/no_separator"] = (count / rows).float()
    return metrics
