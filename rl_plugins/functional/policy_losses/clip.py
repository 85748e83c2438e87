"""Policy losses that clip or weigh the ratio by fixed bounds. For arguments and results, see `policy_losses`."""

import math

import torch
from torch import Tensor

from rl_plugins.functional.checks import check_positive, check_shape, check_widths
from rl_plugins.functional.masking import upcast, zero_masked
from rl_plugins.functional.ratios import LOG_RATIO_LIMIT, clipped_objective, log_importance_weights, policy_inputs

# VESPO has the limits of the authors' code, as in TRL: no weight below 1e-8, no log weight above 20.
_LOG_FLOOR = math.log(1e-8)


def vanilla(logps: Tensor, advantages: Tensor, mask: Tensor | None = None) -> Tensor:
    """Follow the policy gradient without a ratio, for one update per batch: `-A_t ln pi(y_t|s_t)`.

    Sutton and Barto 2018, section 13.5. This is also the loss of GPG (Chu et al., arXiv 2504.02546), with advantages
    that are multiplied by `gpg_scale`.
    """
    _, logps, advantages, _ = policy_inputs(logps, logps.detach(), advantages, mask)
    return -advantages * logps


def ppo_clip(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float | None = None,
    level: str = "token",
) -> Tensor:
    """Allow several updates on a batch: no update gains from moving a ratio out of the clip range.

    `-min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A)`. PPO's surrogate, Schulman et al., arXiv 1707.06347, eq. 7;
    with two bounds, DAPO, arXiv 2503.14476, eq. 10. The `sequence` level replaces `rho_t` by the length-normalised
    ratio of the sequence: GSPO, Zheng et al., arXiv 2507.18071, eq. 5 and 7 (its widths: 3e-4 and 4e-4). GRPO, DAPO,
    Dr. GRPO and LUSPO share this term and differ in the aggregation.

    With `delta`, the first term has `min(rho, delta)`, which bounds the loss of a negative advantage (two-sided
    clipping, INTELLECT-2, arXiv 2505.07291).

    Args:
        epsilon_low: room below ratio 1.
        epsilon_high: room above ratio 1.
        delta: cap on the ratio; give more than `1 + epsilon_high`, or `None` for no cap.
        level: `token` or `sequence`.
    """
    check_widths(epsilon_low=epsilon_low, epsilon_high=epsilon_high, delta=delta or 0.0)
    log_ratio, _, advantages, mask = policy_inputs(logps, old_logps, advantages, mask)
    ratio = torch.exp(log_importance_weights(log_ratio, mask, level))
    return -clipped_objective(ratio, advantages, 1 - epsilon_low, 1 + epsilon_high, cap=delta)


def gspo_token(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    epsilon_low: float = 3e-4,
    epsilon_high: float = 4e-4,
) -> Tensor:
    """Clip by the ratio of the sequence, and still give each token its own advantage.

    GSPO-token: `-min(s_t A_t, clip(s_t, 1 - eps_low, 1 + eps_high) A_t)`, `s_t = sg[s] pi(y_t|s_t) / sg[pi(y_t|s_t)]`,
    `s = exp(1/|y| sum_t ln rho_t)` (Zheng et al., arXiv 2507.18071, section 4.3). Every token has the ratio of its
    sequence, but a gradient only through its own probability, which makes advantages per token meaningful. With one
    advantage per sequence, value and gradient of the `sequence` aggregate are those of `ppo_clip(level="sequence")`.

    Args:
        epsilon_low: room below ratio 1.
        epsilon_high: room above ratio 1.
    """
    check_widths(epsilon_low=epsilon_low, epsilon_high=epsilon_high)
    log_ratio, logps, advantages, mask = policy_inputs(logps, old_logps, advantages, mask)
    sequence = log_importance_weights(log_ratio.detach(), mask, "sequence")
    ratio = torch.exp(sequence + (logps - logps.detach()))
    return -clipped_objective(ratio, advantages, 1 - epsilon_low, 1 + epsilon_high)


def gmpo(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    epsilon_low: float = 0.4,
    epsilon_high: float = 0.4,
) -> Tensor:
    """Damp outliers among the token ratios by their geometric mean: `-A exp(1/|y| sum_t c_t)`, at every token.

    GMPO: `c_t = min(ln rho_t, eps_high)` for `A > 0`, else `max(ln rho_t, -eps_low)` (Zhao et al., arXiv 2507.20673).
    The widths are in log space: 0.4 stands for the ratios `e^-0.4` and `e^0.4`. The paper's own clip, on `rho^sgn(A)`,
    is the same for equal widths; for unequal ones `eps_low` here bounds the ratio from below, as in verl and TRL.

    The paper's objective is the `sequence` aggregate, with one advantage per sequence. Our extension to `A_t` clips
    each token by the sign of its own advantage, and multiplies the ratio of the sequence by `A_t`.

    Args:
        epsilon_low: room below log ratio 0, used where `A <= 0`.
        epsilon_high: room above log ratio 0, used where `A > 0`.
    """
    check_widths(epsilon_low=epsilon_low, epsilon_high=epsilon_high)
    log_ratio, _, advantages, mask = policy_inputs(logps, old_logps, advantages, mask)
    clipped = torch.where(advantages > 0, log_ratio.clamp(max=epsilon_high), log_ratio.clamp(min=-epsilon_low))
    return -torch.exp(log_importance_weights(clipped, mask, "sequence")) * advantages


def cispo(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    epsilon_high: float = 5.0,
    level: str = "token",
) -> Tensor:
    """Cap the importance weight in front of the policy gradient, so that no token loses its gradient.

    `-sg(min(rho, eps_high)) A ln pi`. CISPO, MiniMax, arXiv 2506.13585, which writes a lower bound as well. ScaleRL
    has the upper bound alone (Khatri et al., arXiv 2510.13786). Here the cap is `eps_high` itself; in other code, such
    as verl, it is `1 + eps_high`.

    Args:
        epsilon_high: the largest weight.
        level: `token` or `sequence`.
    """
    check_widths(epsilon_high=epsilon_high)
    log_ratio, logps, advantages, mask = policy_inputs(logps, old_logps, advantages, mask)
    weight = torch.exp(log_importance_weights(log_ratio.detach(), mask, level)).clamp(max=epsilon_high)
    return -weight * advantages * logps


def sapo(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    temperature_pos: float = 1.0,
    temperature_neg: float = 1.05,
    level: str = "token",
) -> Tensor:
    """Fade out tokens far from ratio 1 by a soft gate in place of the clip: `-A (4 / tau) sigmoid(tau (rho - 1))`.

    SAPO: `tau = tau_pos` for `A > 0`, else `tau_neg`, the larger one: its gate closes faster (Gao et al., arXiv
    2511.20347). At `rho = 1` the gradient is that of `vanilla`, and the value is `-2 A / tau`. The paper's objective
    is the `sequence` aggregate.

    Args:
        temperature_pos: `tau` where the advantage is positive.
        temperature_neg: `tau` elsewhere.
        level: `token` or `sequence`.
    """
    check_positive(temperature_pos=temperature_pos, temperature_neg=temperature_neg)
    log_ratio, _, advantages, mask = policy_inputs(logps, old_logps, advantages, mask)
    ratio = torch.exp(log_importance_weights(log_ratio, mask, level))
    # Not where() of two numbers, which would be float32 whatever the dtype of the advantages is.
    temperature = torch.full_like(advantages, temperature_neg).masked_fill(advantages > 0, temperature_pos)
    gate = torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature
    return -gate * advantages


def vespo(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    k_pos: float = 2.0,
    lambda_pos: float = 3.0,
    k_neg: float = 3.0,
    lambda_neg: float = 2.0,
    sampler_weights: Tensor | None = None,
) -> Tensor:
    """Weigh whole sequences by a smooth function of their ratio, which fades out stale ones: `-sg(phi(W)) A ln pi`.

    VESPO: `phi(W) = W^k exp(lambda (1 - W))`, `W = prod_t rho_t`, without length normalisation, times
    `sampler_weights`. `k` and `lambda` depend on the sign of `A`, where 0 counts as positive (Shen et al., arXiv
    2602.10693). `phi(1) = 1`, and `phi` falls to 0 for small and for large `W`.

    Args:
        k_pos: power of `W` where `A >= 0`.
        lambda_pos: rate of decay in `W` where `A >= 0`.
        k_neg: power of `W` where `A < 0`.
        lambda_neg: rate of decay in `W` where `A < 0`.
        sampler_weights: `pi_old / pi_sampler (B, T)`, where the sampler is not `pi_old`; they enter `W`.
    """
    check_widths(k_pos=k_pos, lambda_pos=lambda_pos, k_neg=k_neg, lambda_neg=lambda_neg)
    log_ratio, logps, advantages, mask = policy_inputs(logps, old_logps, advantages, mask)
    log_weight = log_ratio.detach().sum(1, keepdim=True)
    if sampler_weights is not None:
        log_weight = log_weight + _log_sampler_weight(sampler_weights, mask)
    log_weight = log_weight.clamp(_LOG_FLOOR, LOG_RATIO_LIMIT)
    phi = torch.where(
        advantages >= 0, _gamma_weight(log_weight, k_pos, lambda_pos), _gamma_weight(log_weight, k_neg, lambda_neg)
    )
    return -phi * advantages * logps


def _log_sampler_weight(weights: Tensor, mask: Tensor) -> Tensor:
    """Compute the log of the product of the sampler's weights over each sequence, `(B, 1)`."""
    check_shape("sampler_weights", weights, mask.shape, "give one per token")
    log_weights = upcast(weights.detach()).log().clamp(_LOG_FLOOR, LOG_RATIO_LIMIT)
    return zero_masked(log_weights, mask).sum(1, keepdim=True)


def _gamma_weight(log_weight: Tensor, k: float, rate: float) -> Tensor:
    """Compute `W^k exp(lambda (1 - W))` from `ln W`, in the shape of `log_weight`."""
    rate = max(rate, 1e-4)
    phi = torch.exp(rate + k * log_weight - rate * log_weight.exp())
    return phi.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
