"""Probability ratios between the policy and the one that sampled, and the inputs of policy losses in one form.

A token that the old policy did not choose (forced, filtered or replayed) may have any ratio. A ratio above `e^88` is
infinite in float32, and a clipped loss or an advantage of 0 then turns it into NaN, `0 * inf`. Hence log-ratios are
clamped to `LOG_RATIO_LIMIT` on either side, as in verl. Inside the clamp nothing changes; a token outside of it has
the ratio at the edge, and no gradient through this ratio.

Names: `ln pi` is `logps`, `ln pi_old` is `old_logps`. All functions raise `ValueError` where shapes do not fit.
"""

import torch
from torch import Tensor

from rl_plugins.functional.checks import check_shape
from rl_plugins.functional.masking import masked_mean, upcast, zero_masked

LEVELS = ("token", "sequence")

LOG_RATIO_LIMIT = 20.0
"""Largest `|ln rho|`: beyond it, the old policy did not choose the token. The ratio is then 4.9e8 or 2.1e-9."""

LOG_PROB_LIMIT = 1e6
"""Size of a log-probability that stands for infinity: float32 resolves no ratio of larger log-probabilities."""


def finite_logps(logps: Tensor) -> Tensor:
    """Upcast log-probabilities and clamp them to at least `-LOG_PROB_LIMIT`, which stands for `ln 0 = -inf`.

    No gradient passes at the limit, since nothing can raise a probability of 0. NaN stays NaN.
    """
    return upcast(logps).clamp(-LOG_PROB_LIMIT, LOG_PROB_LIMIT)


def log_ratios(logps: Tensor, old_logps: Tensor) -> Tensor:
    """Compare two policies on the same tokens: `ln rho = clamp(ln pi - ln pi_old, -20, 20)`.

    The ratio and its gradient are then finite. A log-probability of -inf (a probability of 0) is valid: `ln rho` is
    the edge of the clamp, or 0 where both log-probabilities are -inf.

    Args:
        logps: `ln pi`, any shape.
        old_logps: `ln pi_old`, the shape of `logps`.

    Returns:
        The shape of `logps`, float32 or wider; no gradient outside the clamp.
    """
    check_shape("old_logps", old_logps, logps.shape, "their shape must not differ from that of logps")
    return _clamp(finite_logps(logps) - finite_logps(old_logps))


def _clamp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def policy_inputs(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bring the inputs of a policy loss to one form: float32, (B, T), 0 at masked positions.

    Args:
        logps: `ln pi(y_t|s_t) (B, T)`.
        old_logps: `ln pi_old(y_t|s_t) (B, T)`.
        advantages: `A (B,)`, one per sequence, or `A_t (B, T)`.
        mask: real tokens `(B, T)`; `None` means all.

    Returns:
        `(log_ratio, logps, advantages, mask)`, all `(B, T)`: the `log_ratios`, which are clamped, finite `logps`, and
        the mask as bool.
    """
    check_shape("old_logps", old_logps, logps.shape, "their shape must not differ from that of logps")
    if advantages.shape not in (logps.shape, logps.shape[:1]):
        raise ValueError(
            f"advantages {tuple(advantages.shape)}: give one per sequence ({logps.shape[0]},) or per token "
            f"{tuple(logps.shape)}."
        )
    real = torch.ones_like(logps, dtype=torch.bool) if mask is None else mask.bool()
    per_token = advantages if advantages.shape == logps.shape else advantages[:, None].expand_as(logps)
    logps, old_logps = (finite_logps(zero_masked(x, real)) for x in (logps, old_logps))
    return _clamp(logps - old_logps), logps, zero_masked(per_token, real), real


def log_importance_weights(log_ratio: Tensor, mask: Tensor, level: str = "token") -> Tensor:
    """Return the log of each token's weight, which is its own ratio or that of its sequence.

    `token`: `ln rho_t`. `sequence`: `1/|y| sum_t ln rho_t` for every real token, GSPO's length-normalised sequence
    ratio (Zheng et al., arXiv 2507.18071, eq. 7).

    Args:
        log_ratio: `(B, T)`, 0 at masked positions.
        mask: `(B, T)`, bool.
        level: one of [`LEVELS`].

    Returns:
        `(B, T)`, 0 at masked positions.
    """
    if level == "token":
        return log_ratio
    if level != "sequence":
        raise ValueError(f"Unknown importance sampling level {level!r}; choose one of {', '.join(LEVELS)}.")
    return zero_masked(masked_mean(log_ratio, mask, dim=1)[:, None].expand_as(log_ratio), mask)


def clipped_objective(
    x: Tensor, advantages: Tensor, low: float | Tensor, high: float | Tensor, *, cap: float | None = None
) -> Tensor:
    """Compute PPO's pessimistic objective, to be maximised: `min(min(x, cap) A, clip(x, low, high) A)`.

    Args:
        x: ratios or log-ratios `(B, T)`.
        advantages: `A_t (B, T)`.
        low: lower bound of `x`, a float or 0-d.
        high: upper bound of `x`, of the same kind.
        cap: upper bound of `x` in the first term; `None` for no bound.

    Returns:
        `(B, T)`.
    """
    # mypy knows no overload for a union of both kinds.
    clipped = torch.clamp(x, low, high)  # type: ignore[arg-type]
    if cap is not None:
        x = x.clamp(max=cap)
    return torch.minimum(x * advantages, clipped * advantages)
