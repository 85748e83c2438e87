"""The whole loss of an online step: policy loss, KL term and entropy bonus, the same in both hosts."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rl_plugins.functional.log_probs import kl_k3
from rl_plugins.functional.masking import Reduce, masked_mean, masked_moments, masked_sum, zero_masked
from rl_plugins.functional.ratios import log_importance_weights, log_ratios
from rl_plugins.signals.metrics import Metrics
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
    weights: Tensor | None = None,
    scale: Tensor | float = 1.0,
    ref_logps: Tensor | None = None,
    beta: float = 0.0,
    correct_kl: bool = False,
    kl_level: str | None = None,
    entropies: Tensor | None = None,
    entropy_coef: float | None = None,
    entropy_mask: Tensor | None = None,
    num_tokens: Tensor | float | None = None,
    batch: Mapping[str, Any] | None = None,
    reduce: Reduce | None = None,
    gather: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Metrics]:
    """Compute the whole loss of an online step: `L = L_policy + beta KL(pi || ref) - c H(pi)`.

    Units and metric names are TRL's. The KL is estimated per token (k3; GRPO, 2402.03300, equations 3 and 4) and
    averaged like the policy loss; the entropy is a mean over tokens, however the policy loss is averaged.

    Args:
        loss: The policy loss.
        logps: `ln pi(y_t|s_t)` (B, T), with gradient.
        old_logps: `ln pi_old(y_t|s_t)` (B, T) of the policy that sampled.
        advantages: (B,) or (B, T).
        mask: Real tokens (B, T).
        num_items: Real tokens that the `token` aggregation averages over, per process.
        max_length: Longest completion allowed, for the `constant` aggregation.
        weights: Factor on each token's policy loss (B, T) or (B, 1); see [`policy_loss`].
        scale: Factor on policy loss and KL term with any aggregation but `token`: the share of this batch in its
            accumulation window.
        ref_logps: `ln pi_ref(y_t|s_t)` (B, T); needed where `beta` is not 0.
        beta: Coefficient of the KL term.
        correct_kl: Weigh the KL of each token by the importance ratio, so that its gradient is unbiased off-policy too
            (DeepSeek-V3.2; TRL's `use_bias_correction_kl`).
        kl_level: Level of this ratio, `token` or `sequence`; by default that of the policy loss.
        entropies: Entropies of the policy (B, T); with gradient if there is a bonus, otherwise for the metric only.
        entropy_coef: `c`; `None` for no entropy bonus.
        entropy_mask: Tokens that the bonus acts on (B, T); all real ones by default.
        num_tokens: Tokens that the bonus is averaged over, per process; those of this batch by default.
        batch: See [`policy_loss`].
        reduce: Sums statistics over ranks.
        gather: Joins the rows of all ranks, for the extremes of the clip ratios.

    Returns:
        The loss (0-d), and metrics of all ranks (0-d): `kl`, `entropy`, `clip_ratio/...`, and with a bonus
        `policy_loss`, which is the loss without it.

    Raises:
        ValueError: If shapes or settings are wrong.
    """
    total, cut = policy_loss(
        loss,
        logps,
        old_logps,
        advantages,
        mask,
        weights=weights,
        num_items=num_items,
        max_length=max_length,
        batch=batch,
    )
    means, rows = clip_shares(cut, advantages, mask, reduce=reduce)
    metrics = Metrics(means)
    if gather is not None:
        rows = gather(rows)
        metrics |= {"clip_ratio/low_min": rows[:, 0].min(), "clip_ratio/high_max": rows[:, 1].max()}
    if beta != 0.0:
        if ref_logps is None:
            raise ValueError(f"beta={beta} weighs the KL to a reference: give ref_logps, or set beta=0.")
        divergence = reference_kl(logps, old_logps, ref_logps, mask, correct=correct_kl, level=kl_level or loss.level)
        total = total + beta * averaged(
            loss, divergence, mask, num_items=num_items, max_length=max_length, batch=batch
        )
        metrics["kl"] = masked_moments(divergence.detach(), mask, reduce=reduce)[0]
    if entropies is not None:
        metrics["entropy"] = masked_moments(entropies.detach(), mask, reduce=reduce)[0]
    if entropy_coef is not None:
        metrics["policy_loss"] = _mean_over_ranks(total.detach(), reduce)
    if loss.aggregation != "token":
        total = total * scale
    if entropies is not None and entropy_coef is not None:
        acted_on = mask if entropy_mask is None else mask.bool() & entropy_mask.bool()
        mean = masked_mean(entropies, acted_on) if num_tokens is None else masked_sum(entropies, acted_on) / num_tokens
        total = total - entropy_coef * mean
    return total, metrics


def _mean_over_ranks(x: Tensor, reduce: Reduce | None) -> Tensor:
    pair = torch.stack([x.float(), torch.ones_like(x, dtype=torch.float32)])
    total, count = pair if reduce is None else reduce(pair)
    return total / count


def reference_kl(
    logps: Tensor, old_logps: Tensor, ref_logps: Tensor, mask: Tensor, *, correct: bool, level: str = "token"
) -> Tensor:
    """Compute `KL(pi || ref)` per token (k3; GRPO, 2402.03300, equation 4), as TRL does.

    Args:
        logps: `ln pi(y_t|s_t)` (B, T), with gradient.
        old_logps: `ln pi_old(y_t|s_t)` (B, T) of the policy that sampled.
        ref_logps: `ln pi_ref(y_t|s_t)` (B, T).
        mask: Real tokens (B, T).
        correct: Weigh each token by the importance ratio, so that the gradient is unbiased off-policy too.
        level: Level of this ratio, `token` or `sequence`.

    Returns:
        (B, T), 0 at masked positions.
    """
    divergence = kl_k3(zero_masked(logps, mask), zero_masked(ref_logps, mask))
    if not correct:
        return divergence
    log_ratio = log_ratios(zero_masked(logps, mask), zero_masked(old_logps, mask))
    return divergence * log_importance_weights(log_ratio, mask.bool(), level).exp()
