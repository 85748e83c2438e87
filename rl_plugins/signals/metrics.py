"""Metrics of training: numbers of all ranks by name, under TRL's names where TRL has them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rl_plugins.functional.masking import Reduce, upcast


class Metrics(dict[str, Tensor]):
    """Numbers (0-d) of all ranks by name, with the count of items over which each is a mean.

    A host that averages the micro-batches of an optimizer step weights a number by its count; numbers without a count
    are means over the tokens of the micro-batch.

    Args:
        values: Numbers by name.
        counts: Counts of items by name; a single tensor is the count of every number.
    """

    def __init__(
        self, values: Mapping[str, Tensor] | None = None, counts: Mapping[str, Tensor] | Tensor | None = None
    ):
        super().__init__(values or {})
        self.counts: dict[str, Tensor] = {}
        if isinstance(counts, Tensor):
            self.counts = dict.fromkeys(self, counts)
        elif counts is not None:
            self.counts = dict(counts)

    def add(self, other: Mapping[str, Tensor]) -> None:
        """Copy all numbers of `other`, with their counts."""
        self.update(other)
        if isinstance(other, Metrics):
            self.counts |= other.counts


@torch.no_grad()
def completion_metrics(lengths: Tensor, ended: Tensor) -> dict[str, Tensor]:
    """Measure the lengths of the completions of all ranks, under TRL's metric names.

    Args:
        lengths: Real tokens of each completion (N,).
        ended: Whether the completion ended by itself (N,).

    Returns:
        0-d tensors; those of `..._terminated_length` are 0 if no completion ended.
    """
    lengths = upcast(lengths)
    terminated = lengths[ended.bool()] if ended.any() else torch.zeros_like(lengths[:1])
    return {
        **{f"completions/{name}_terminated_length": getattr(terminated, name)() for name in ("mean", "min", "max")},
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": 1.0 - ended.float().mean(),
    }


def draft_metrics(counts: Tensor) -> dict[str, Tensor]:
    """Measure how many drafts of speculative rollouts were accepted.

    Args:
        counts: Sums over all ranks of [`~rl_plugins.rollouts.DraftStatistics.counts`] (2 + 2K,).

    Returns:
        0-d tensors: `mtp/acceptance/head_k`, the share of head k's drafts that were accepted, among those with all
        earlier drafts accepted, and `mtp/tokens_per_step`, the tokens of a row per forward pass. A share of no drafts
        is NaN.
    """
    counts = upcast(counts)
    steps, tokens = counts[:2]
    reached, accepted = counts[2:].view(2, -1)
    rates = {f"mtp/acceptance/head_{k + 1}": rate for k, rate in enumerate((accepted / reached).unbind())}
    return {**rates, "mtp/tokens_per_step": tokens / steps}


@torch.no_grad()
def reward_metrics(rewards: Tensor, scores: Tensor, names: Sequence[str], group_size: int) -> dict[str, Tensor]:
    """Measure the rewards of all ranks, under TRL's metric names.

    Args:
        rewards: Rewards by function (N, F), NaN for none.
        scores: Weighted sums (N,), NaN where a completion cannot be scored.
        names: Names of the functions.
        group_size: Completions per prompt, which are side by side.

    Returns:
        0-d tensors: `reward`, `reward_std`, `rewards/<name>/mean` and `/std`, and where there are groups
        `frac_reward_zero_std`, the share of groups with equal rewards. NaN where there are too few rewards.
    """
    metrics: dict[str, Tensor] = {}
    rewards, scores = upcast(rewards), upcast(scores)
    metrics["reward"], metrics["reward_std"] = _moments(scores)
    for name, column in zip(names, rewards.unbind(1), strict=True):
        metrics[f"rewards/{name}/mean"], metrics[f"rewards/{name}/std"] = _moments(column)
    if group_size > 1:
        spreads = torch.stack([_moments(group)[1] for group in scores.view(-1, group_size)])
        metrics["frac_reward_zero_std"] = (spreads.abs() < 1e-8).float().mean()
    return metrics


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the mean and the sample standard deviation (0-d) of the finite entries of (N,)."""
    real = x[x.isfinite()]
    undefined = torch.full((), torch.nan, dtype=x.dtype, device=x.device)
    return (real.mean() if len(real) else undefined), (real.std() if len(real) > 1 else undefined)


def per_head_means(name: str, sums: Tensor, counts: Tensor) -> dict[str, Tensor]:
    """Compute the mean loss of each head, `<name>/head_k`, and over all heads, `<name>`.

    Args:
        name: Name of the loss.
        sums: Summed losses of all ranks (K,).
        counts: Numbers of targets of all ranks (K,).

    Returns:
        0-d tensors, 0 where there is no target.
    """
    sums, counts = upcast(sums), upcast(counts)
    means = sums / counts.clamp(min=1.0)
    return {
        name: sums.sum() / counts.sum().clamp(min=1.0),
        **{f"{name}/head_{k + 1}": mean for k, mean in enumerate(means)},
    }


def head_metrics(name: str, sums: Tensor, counts: Tensor, reduce: Reduce) -> Metrics:
    """Compute [`per_head_means`] of all ranks, with the number of targets that each is a mean over.

    Args:
        name: Name of the loss.
        sums: Summed losses of this rank (K,).
        counts: Numbers of targets of this rank (K,).
        reduce: Sums over ranks.
    """
    sums, counts = reduce(torch.stack([sums, counts]).flatten()).view(2, -1)
    per_head = {f"{name}/head_{k + 1}": count for k, count in enumerate(counts)}
    return Metrics(per_head_means(name, sums, counts), {name: counts.sum(), **per_head})


def gradient_metrics(totals: Tensor) -> Metrics:
    """Compute the mean norm of the value gradient into the trunk, and the share of tokens where it was clamped.

    Args:
        totals: Sum of norms, clamped tokens, tokens (3,), over all ranks.
    """
    norms, clamped, tokens = upcast(totals)
    tokens = tokens.clamp(min=1.0)
    return Metrics({"critic/grad_norm": norms / tokens, "critic/grad_clamped": clamped / tokens})
