"""Policy losses that replace PPO's fixed clip of the ratio by another trust region. For the arguments, see
`policy_losses`.
"""

import math

import torch
from torch import Tensor

from rl_plugins.functional.checks import check_positive, check_shares, check_widths
from rl_plugins.functional.masking import Reduce, zero_masked
from rl_plugins.functional.ratios import clipped_objective, finite_logps, policy_inputs

DPPO_THRESHOLDS = {"tv": 0.15, "kl": 0.05}
"""The thresholds of the DPPO paper's stability runs (appendix C.1), by divergence."""


def dppo(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    divergence: str = "tv",
    threshold: float | None = None,
    max_ratio: float | None = None,
) -> Tensor:
    """Mask the tokens that have left a trust region and would go further, and clip no ratio: `-M_t rho_t A_t`.

    DPPO: `M_t = 0` where `D_t > threshold` and the update leads further away, `(rho_t - 1) A_t > 0`; 1 elsewhere.
    `D_t` is the divergence of the two policies when all other tokens count as one, a lower bound of the whole
    divergence. `tv`: `|pi_old - pi|`; `kl`: `pi_old ln(pi_old / pi) + (1 - pi_old) ln((1 - pi_old) / (1 - pi))`.

    Qi et al., arXiv 2602.04879, eq. 11 to 14 (mask: eq. 12). Thresholds there: kl 0.05; tv 0.15 in the stability
    runs, 0.2 at scale. The paper takes `old_logps` from the engine that sampled, not from a recomputation.

    Args:
        divergence: `tv` or `kl`.
        threshold: largest divergence at which a token may still move further away; by default 0.15 for `tv`, 0.05 for
            `kl`.
        max_ratio: `C`; above it the gradient is `-M_t C A_t grad ln pi`, the paper's eq. 23 (`C` is infinite in the
            stability runs, 5 at scale). `None` is no limit.
    """
    if divergence not in DPPO_THRESHOLDS:
        raise ValueError(f"Unknown divergence {divergence!r}; choose one of {', '.join(DPPO_THRESHOLDS)}.")
    threshold = DPPO_THRESHOLDS[divergence] if threshold is None else threshold
    check_widths(threshold=threshold)
    if max_ratio is not None and max_ratio < 1:
        raise ValueError(f"max_ratio={max_ratio}: give at least 1, the ratio of an unchanged policy.")
    log_ratio, logps, advantages, real = policy_inputs(logps, old_logps, advantages, mask)
    with torch.no_grad():
        outwards = log_ratio * advantages > 0
        # Of the log-probabilities themselves, since the clamp of the ratio may hide how far a token has moved.
        old_logps = finite_logps(zero_masked(old_logps, real))
        blocked = outwards & (_binary_divergence(logps, old_logps, divergence) > threshold)
    return torch.where(blocked, 0.0, -_truncated_ratio(log_ratio, logps, max_ratio) * advantages)


def bapo(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    target_share: float = 0.4,
    low_range: tuple[float, float] = (0.6, 0.9),
    high_range: tuple[float, float] = (1.2, 3.0),
    low_step: float = 0.02,
    high_step: float = 0.05,
    weighted: bool = True,
    reduce: Reduce | None = None,
) -> Tensor:
    """Raise the clip bounds until positive tokens make up a share of the loss, which negative ones would dominate.

    BAPO: `-min(rho A, clip(rho, c_low, c_high) A)` with the bounds that [`bapo_bounds`] finds for this batch (Xi et
    al., arXiv 2510.18927, eq. 8 and algorithm 1; defaults of section 5.1). Positive and negative tokens are those of
    positive and negative advantage. With `target_share = 0` it is `ppo_clip` with the first bounds, `a-` and `a+`.

    Args:
        target_share: share of the loss in `[0, 1]` that positive tokens must reach, `rho_0`.
        low_range: lower bound of the ratio, first and last value, `(a-, b-)`.
        high_range: upper bound of the ratio, first and last value, `(a+, b+)`.
        low_step: step of the lower bound.
        high_step: step of the upper bound.
        weighted: whether a token's weight in the share includes its probability; see `bapo_bounds`.
        reduce: a function that sums a 1-D tensor across ranks, so that all ranks have the same bounds.
    """
    log_ratio, _, advantages, real = policy_inputs(logps, old_logps, advantages, mask)
    ratio = log_ratio.exp()
    shares = _weigh(advantages, zero_masked(old_logps, real), weighted)
    low, high = _search_bounds(ratio, shares, target_share, low_range, high_range, low_step, high_step, reduce)
    return -clipped_objective(ratio, advantages, low, high)


def bapo_bounds(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    target_share: float = 0.4,
    low_range: tuple[float, float] = (0.6, 0.9),
    high_range: tuple[float, float] = (1.2, 3.0),
    low_step: float = 0.02,
    high_step: float = 0.05,
    weighted: bool = True,
    reduce: Reduce | None = None,
) -> tuple[Tensor, Tensor]:
    """Find BAPO's clip bounds, to log them or to use them elsewhere.

    They are the first pair with which positive tokens make up at least `target_share` of the loss. The pairs are tried
    in this order: `c_high` rises from `a+` to `b+`, then `c_low` from `a-` to `b-`; if none reaches the share, the
    last is taken. The share is `P / (P + N)` with `P = sum_{A>0} pi_old min(rho, c_high) A` and
    `N = sum_{A<0} pi_old max(rho, c_low) |A|`, where `pi_old` is the probability that the sampler gave the token (Xi
    et al., arXiv 2510.18927, eq. 8 and algorithm 1). `weighted=False` leaves `pi_old` out. The absolute value in eq. 8
    is taken for each token, so that the share stays in `[0, 1]`.

    A clipped negative token adds `c_low |A|` to `N`, so raising `c_low` never raises the share: if `c_high` reaches
    its last value in vain, `c_low` will do so, too.

    The arguments are those of [`bapo`].

    Returns:
        `(c_low, c_high)`, each 0-d.
    """
    log_ratio, _, advantages, real = policy_inputs(logps, old_logps, advantages, mask)
    shares = _weigh(advantages, zero_masked(old_logps, real), weighted)
    return _search_bounds(log_ratio.exp(), shares, target_share, low_range, high_range, low_step, high_step, reduce)


def cpgd(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    drift_coef: float = 0.01,
    drift_clip: float = 2.0,
) -> Tensor:
    """Clip the log-ratio in place of the ratio, and penalise drift from the old policy.

    CPGD: `-min(l A, clip(l, ln(1 - eps_low), ln(1 + eps_high)) A) + alpha min(sg(rho) - 1, c) ln pi`, `l = ln rho`.
    The last term has the gradient of the k3 estimate of `KL(pi_old || pi)`, with a weight of at most `c`. Liu et al.,
    arXiv 2505.12504, eq. 2 and the text that follows it. The paper has one width for both sides; its schedule of
    widths along the sequence, from tight to loose, is left out.

    Args:
        epsilon_low: room below ratio 1; from 1 on there is no lower bound.
        epsilon_high: room above ratio 1.
        drift_coef: weight of the drift, `alpha`.
        drift_clip: largest weight of one token's drift, `c`.
    """
    check_widths(epsilon_low=epsilon_low, epsilon_high=epsilon_high, drift_coef=drift_coef, drift_clip=drift_clip)
    log_ratio, logps, advantages, _ = policy_inputs(logps, old_logps, advantages, mask)
    low = math.log1p(-epsilon_low) if epsilon_low < 1 else -math.inf
    gain = clipped_objective(log_ratio, advantages, low, math.log1p(epsilon_high))
    # The weight is clamped, not the penalty: a ratio above c + 1 is still pulled back.
    drift = torch.expm1(log_ratio.detach()).clamp(max=drift_clip) * logps
    return drift_coef * drift - gain


def _binary_divergence(logps: Tensor, old_logps: Tensor, divergence: str) -> Tensor:
    """Compute the divergence of `pi` from `pi_old` when all other tokens count as one."""
    if divergence == "tv":
        return (logps.exp() - old_logps.exp()).abs()
    # Rounding may leave a log-probability just above 0.
    rest, old_rest = (-torch.expm1(x).clamp(max=0) for x in (logps, old_logps))
    # xlogy makes 0 ln 0 = 0: two policies that are both certain do not diverge.
    return torch.xlogy(old_rest, old_rest) - torch.xlogy(old_rest, rest) - old_logps.exp() * (logps - old_logps)


def _truncated_ratio(log_ratio: Tensor, logps: Tensor, max_ratio: float | None) -> Tensor:
    """Compute `min(rho, C)`, with the gradient of `C ln pi` above `C` in place of 0."""
    if max_ratio is None:
        return log_ratio.exp()
    weight = log_ratio.detach().exp().clamp(max=max_ratio)
    return weight * (1 + (logps - logps.detach()))


@torch.no_grad()
def _weigh(advantages: Tensor, old_logps: Tensor, weighted: bool) -> Tensor:
    """Compute the weight of each token in BAPO's share, without the token's clipped ratio."""
    return advantages * old_logps.exp() if weighted else advantages


@torch.no_grad()
def _search_bounds(
    ratio: Tensor,
    advantages: Tensor,
    target_share: float,
    low_range: tuple[float, float],
    high_range: tuple[float, float],
    low_step: float,
    high_step: float,
    reduce: Reduce | None,
) -> tuple[Tensor, Tensor]:
    """Find the first pair of bounds, in the order tried, under which positive tokens reach their share of the loss.

    The pairs lie on a path in the plane of both bounds, with three upper and four lower ones:

        c_high
          b+   3 - 4 - 5 - 6      first up, at the lowest lower bound (1, 2, 3),
               2                  then right, at the highest upper bound (4, 5, 6)
          a+   1
               a-          b-  c_low

    The sum over positive tokens depends on `c_high` alone, and that over negative ones on `c_low` alone: one sum for
    each of the 3 + 4 bounds gives the share of all 6 pairs.
    """
    check_shares(target_share=target_share)
    if low_range[1] > 1 or high_range[0] < 1:
        raise ValueError(
            f"low_range={low_range}, high_range={high_range}: ratio 1 must stay between the bounds. Let low_range end "
            "at 1 or below, and high_range start at 1 or above."
        )
    lows, highs = (
        ratio.new_tensor(x) for x in (_grid("low", low_range, low_step), _grid("high", high_range, high_step))
    )
    # All pairs are evaluated, without a branch on the data, so that the host never waits for the device.
    gains, losses = advantages.clamp(min=0).flatten(), -advantages.clamp(max=0).flatten()
    ratios = ratio.flatten()
    clipped = torch.empty_like(ratios)
    # Not a dot product, which autocast would compute in bfloat16.
    positive = [torch.clamp(ratios, max=high, out=clipped).mul_(gains).sum() for high in highs]
    negative = [torch.clamp(ratios, min=low, out=clipped).mul_(losses).sum() for low in lows]
    sums = torch.stack(positive + negative)
    positives, negatives = _search_path(*(reduce(sums) if reduce else sums).split([len(highs), len(lows)]))
    reached = positives >= target_share * (positives + negatives)
    reached[-1] = True  # if no pair reaches the share, the last one is taken
    first = reached.int().argmax()
    highs, lows = _search_path(highs, lows)
    return lows.take(first), highs.take(first)


def _search_path(highs: Tensor, lows: Tensor) -> tuple[Tensor, Tensor]:
    """Lay both bounds along the path: all upper ones with the first lower one, then the last with the others."""
    rest = len(lows) - 1
    return torch.cat([highs, highs[-1:].expand(rest)]), torch.cat([lows[:1].expand(len(highs)), lows[1:]])


def _grid(name: str, ends: tuple[float, float], step: float) -> list[float]:
    """List the bounds to try: `first, first + step, ..` up to `last`."""
    first, last = ends
    if not 0 <= first <= last:
        raise ValueError(f"{name}_range={ends}: give (first, last) with 0 <= first <= last.")
    check_positive("give a positive step", **{f"{name}_step": step})
    # 0.3 / 0.02 is 15, but may be just below it after rounding.
    return [first + i * step for i in range(int((last - first) / step + 1e-6) + 1)]
