"""Slices of a rollout to learn from, and metrics of its completions over all ranks."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rl_plugins.lightning.ranks import gather_objects, gather_rows
from rl_plugins.rollouts.batch import Batch, loss_mask, num_rows, select_rows
from rl_plugins.rollouts.completions import Completions
from rl_plugins.rollouts.rewards import weighted_scores
from rl_plugins.signals.metrics import Metrics, completion_metrics, reward_metrics


def cut_rollout(rollout: Batch, slices: int, *, whole_groups_of: int | None = None) -> list[Batch]:
    """Cut a batch of completions into equal slices, one for each training step, in random order.

    Args:
        rollout: B completions.
        slices: Number of slices.
        whole_groups_of: Number of neighbouring rows to keep together; all rows then stay in their order.

    Raises:
        ValueError: If `slices` does not divide B, or a slice does not hold whole groups.
    """
    rows = num_rows(rollout)
    if slices == 1:
        return [rollout]
    if rows % slices:
        raise ValueError(
            f"A batch has {rows} completions (prompts * num_generations), which steps_per_generation={slices} "
            "does not divide. Change the batch size of the loader."
        )
    if whole_groups_of is not None and rows // slices % whole_groups_of:
        raise ValueError(
            "The policy loss compares the completions of a prompt inside the loss, but a slice has "
            f"{rows // slices} completions, which num_generations={whole_groups_of} does not divide. Change "
            "steps_per_generation, or the batch size of the loader."
        )
    order = torch.randperm(rows) if whole_groups_of is None else torch.arange(rows)
    return [select_rows(rollout, part) for part in order.chunk(slices)]


def counts_of(batch: Batch) -> Tensor:
    """Count the items of a batch of completions on this rank, by which losses are divided (4,): its `num_items`, the
    policy's tokens, the completions, and all tokens including the prompts."""
    tokens = loss_mask(batch).sum()
    real = batch["completion_mask"].sum() + batch["prompt_mask"].sum()
    items = torch.as_tensor(batch["num_items"], device=tokens.device)
    return torch.stack([items.float(), tokens.float(), real.new_tensor(num_rows(batch)).float(), real.float()])


def describe_rollout(
    completions: Completions, rewards: Tensor, weights: Tensor | None, names: Sequence[str], group_size: int
) -> Metrics:
    """Describe rewards and lengths of all ranks.

    Args:
        completions: The B completions of this rank.
        rewards: Their rewards (B, F), NaN for none.
        weights: Weights of the reward functions (F,).
        names: Names of the reward functions.
        group_size: Completions per prompt.
    """
    rewards = gather_rows(rewards)
    rewards = rewards.masked_fill(rewards.isinf(), torch.nan)  # as in TRL's metrics, only that number is left out
    own = completions.completion_mask if completions.tool_mask is None else completions.tool_mask
    lengths = gather_rows((completions.completion_mask * own).sum(1))
    return Metrics(
        {
            **reward_metrics(rewards, weighted_scores(rewards, weights), names, group_size),
            **completion_metrics(lengths, gather_rows(completions.ended)),
        }
    )


def average_logged(logged: Mapping[str, list[float]], device: torch.device) -> dict[str, Tensor]:
    """Average what the reward functions of all ranks logged with `log_metric`."""
    given = gather_objects(logged)
    names = dict.fromkeys(name for part in given for name in part)
    values = {name: [x for part in given for x in part.get(name, [])] for name in names}
    return {name: torch.tensor(sum(xs) / len(xs), device=device) for name, xs in values.items()}
