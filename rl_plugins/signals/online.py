"""The whole loss of an online step: policy loss, KL term and entropy bonus; and the metrics of its completions."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rl_plugins.functional.log_probs import kl_k3
from rl_plugins.functional.masking import Reduce, masked_mean, masked_moments, masked_sum, upcast, zero_masked
from rl_plugins.functional.ratios import log_importance_weights, log_ratios
from rl_plugins.signals.policy import PolicyLoss, averaged, clip_shares, policy_loss


def online_loss(
    loss: PolicyLoss,
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    num_items: Tensor | float,
    max_length: int,
    num_tokens: Tensor | float | None = None,
    weight: Tensor | float = 1.0,
    ref_logps: Tensor | None = None,
    beta: float = 0.0,
    correct_kl: bool = False,
    entropies: Tensor | None = None,
    entropy_coef: float = 0.0,
    batch: Mapping[str, Any] | None = None,
    reduce: Reduce | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`L = L_policy + beta KL(pi || ref) - c H(pi)`, with TRL's units and metric names.

    The KL is estimated per token (k3; GRPO, 2402.03300, equations 3 and 4) and averaged like the policy loss; the
    entropy is a mean over tokens, whatever the policy loss is averaged by.

    Args:
        loss: The policy loss.
        logps: `ln pi(y_t|s_t)` (B, T), with gradient.
        old_logps: The same under the policy that sampled (B, T).
        advantages: (B,) or (B, T).
        mask: Real tokens (B, T).
        num_items: Real tokens that the `token` aggregation averages over, per process.
        max_length: Longest completion allowed, for the `constant` aggregation.
        num_tokens: Real tokens that the entropy is averaged over, per process; this batch's own by default.
        weight: Factor on the policy loss and the KL term with any other aggregation: how many times the mean share
            of its accumulation window this batch is.
        ref_logps: Under the reference (B, T); needed where `beta` is not 0.
        beta: Coefficient of the KL term.
        correct_kl: Weigh the KL of each token by the importance ratio, of the level that the policy loss has, so that
            its gradient is unbiased off-policy too (DeepSeek-V3.2; TRL's `use_bias_correction_kl`).
        entropies: Of the policy (B, T), with gradient where `entropy_coef` is not 0; for the metric otherwise.
        entropy_coef: `c`.
        batch: See [`policy_loss`].
        reduce: Sums statistics over ranks.

    Returns:
        The loss (0-d), and metrics (0-d): `kl`, `entropy`, `clip_ratio/...`.

    Raises:
        ValueError: If shapes or settings are wrong.
    """
    total, cut = policy_loss(
        loss, logps, old_logps, advantages, mask, num_items=num_items, max_length=max_length, batch=batch
    )
    metrics = clip_shares(cut, advantages, mask, reduce=reduce)[0]
    if beta != 0.0:
        if ref_logps is None:
            raise ValueError(f"beta={beta} weighs the KL to a reference: give ref_logps, or set beta=0.")
        divergence = reference_kl(logps, old_logps, ref_logps, mask, correct=correct_kl, level=loss.level)
        total = total + beta * averaged(
            loss, divergence, mask, num_items=num_items, max_length=max_length, batch=batch
        )
        metrics["kl"] = masked_moments(divergence.detach(), mask, reduce=reduce)[0]
    if loss.aggregation != "token":
        total = total * weight
    if entropies is not None:
        metrics["entropy"] = masked_moments(entropies.detach(), mask, reduce=reduce)[0]
        if entropy_coef != 0.0:
            mean = masked_mean(entropies, mask) if num_tokens is None else masked_sum(entropies, mask) / num_tokens
            total = total - entropy_coef * mean
    return total, metrics


def reference_kl(
    logps: Tensor, old_logps: Tensor, ref_logps: Tensor, mask: Tensor, *, correct: bool, level: str = "token"
) -> Tensor:
    """`KL(pi || ref)` per token (k3; GRPO, 2402.03300, equation 4), as TRL computes it.

    Args:
        logps: `ln pi(y_t|s_t)` (B, T), with gradient.
        old_logps: The same under the policy that sampled (B, T).
        ref_logps: The same under the reference (B, T).
        mask: Real tokens (B, T).
        correct: Weigh each token by the importance ratio, so that the gradient is unbiased off-policy too.
        level: Of that ratio, `token` or `sequence`.

    Returns:
        (B, T), 0 at masked positions.
    """
    divergence = kl_k3(zero_masked(logps, mask), zero_masked(ref_logps, mask))
    if not correct:
        return divergence
    log_ratio = log_ratios(zero_masked(logps, mask), zero_masked(old_logps, mask))
    return divergence * log_importance_weights(log_ratio, mask.bool(), level).exp()


@torch.no_grad()
def completion_metrics(lengths: Tensor, ended: Tensor) -> dict[str, Tensor]:
    """How long the completions of all ranks are, under TRL's metric names.

    Args:
        lengths: Real tokens of each (N,).
        ended: Whether it ended by itself (N,).

    Returns:
        0-d tensors; those of `..._terminated_length` are 0 where none ended.
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
    """How the drafts of speculative rollouts were received.

    Args:
        counts: Sums over all ranks of [`~rl_plugins.rollouts.DraftStatistics.counts`] (2 + 2K,).

    Returns:
        0-d tensors: `mtp/acceptance/head_k`, the share of head k's drafts that were accepted of those with all before
        them accepted, and `mtp/tokens_per_step`, the tokens of a row per forward pass. NaN where there are none.
    """
    counts = upcast(counts)
    steps, tokens = counts[:2]
    reached, accepted = counts[2:].view(2, -1)
    rates = {f"mtp/acceptance/head_{k + 1}": rate for k, rate in enumerate((accepted / reached).unbind())}
    return {**rates, "mtp/tokens_per_step": tokens / steps}


@torch.no_grad()
def reward_metrics(rewards: Tensor, scores: Tensor, names: Sequence[str], group_size: int) -> dict[str, Tensor]:
    """Rewards of all ranks, under TRL's metric names.

    Args:
        rewards: Per function (N, F), NaN for none.
        scores: Weighted sums (N,), NaN where a completion cannot be scored.
        names: Of the functions.
        group_size: Completions per prompt, which are side by side.

    Returns:
        0-d tensors: `reward`, `reward_std`, `rewards/<name>/mean` and `/std`, and where there are groups
        `frac_reward_zero_std`, the share of groups that teach nothing. NaN where there are too few rewards.
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
    """Mean and sample standard deviation (0-d) of the finite entries of (N,)."""
    real = x[x.isfinite()]
    undefined = torch.full((), torch.nan, dtype=x.dtype, device=x.device)
    return (real.mean() if len(real) else undefined), (real.std() if len(real) > 1 else undefined)
