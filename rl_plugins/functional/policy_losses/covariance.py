"""Policy losses that restrain the tokens which lower the entropy most: those of high covariance.

Cui et al., arXiv 2505.22617: to first order the entropy falls by the covariance of `ln pi` and the advantage, and a
few tokens carry most of it. For the arguments, see `policy_losses`.
"""

import torch
from torch import Tensor

from rl_plugins.functional.checks import check_shares, check_widths
from rl_plugins.functional.masking import upcast, zero_masked
from rl_plugins.functional.ratios import clipped_objective, policy_inputs


def token_covariance(logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Compute each token's part of the covariance, which is high for tokens that lower the entropy.

    `(ln pi_t - mean ln pi) (A_t - mean A)`. The means are over the real tokens given: arXiv 2505.22617, eq. 10.

    Args:
        logps: `ln pi(y_t|s_t) (B, T)`.
        advantages: `A_t (B, T)`.
        mask: real tokens `(B, T)`.

    Returns:
        `(B, T)`, 0 at masked positions.
    """
    # In float64, in which the mean of equal float32 numbers is exact.
    real = [zero_masked(x.double(), mask) for x in (logps, advantages)]
    count = mask.bool().sum().clamp(min=1)
    covariance = (real[0] - real[0].sum() / count) * (real[1] - real[1].sum() / count)
    return zero_masked(covariance, mask).to(torch.promote_types(upcast(logps).dtype, advantages.dtype))


def clip_cov(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    ratio: float = 2e-4,
    cov_low: float = 1.0,
    cov_high: float = 5.0,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Keep the entropy up: use `ppo_clip`, with a loss of 0 at a few random tokens of high covariance.

    Clip-Cov: `floor(ratio N)` of the `N` real tokens are drawn from those with `token_covariance` in
    `[cov_low, cov_high]`; if there are fewer of these, all are taken. Tokens that PPO clips already are not drawn.
    `ratio = 0` is `ppo_clip`.

    Cui et al., arXiv 2505.22617, eq. 10 to 12, with that paper's values.

    Args:
        ratio: share of the real tokens to cut.
        cov_low: lowest covariance of a token that may be cut.
        cov_high: highest covariance of a token that may be cut.
        epsilon_low: room below ratio 1.
        epsilon_high: room above ratio 1.
        generator: draws the tokens; by default the global one of the CPU.

    Returns:
        `(B, T)`, 0 at masked positions and at the tokens cut.
    """
    check_shares(ratio=ratio)
    check_widths(epsilon_low=epsilon_low, epsilon_high=epsilon_high)
    if cov_low > cov_high:
        raise ValueError(f"cov_low={cov_low} exceeds cov_high={cov_high}. Give cov_low <= cov_high.")
    log_ratio, logps, advantages, real = policy_inputs(logps, old_logps, advantages, mask)
    rho = log_ratio.exp()
    objective = clipped_objective(rho, advantages, 1 - epsilon_low, 1 + epsilon_high)
    with torch.no_grad():
        covariance = token_covariance(logps, advantages, real)
        free = real & (objective == rho * advantages)
        candidates = free & (covariance >= cov_low) & (covariance <= cov_high)
        cut = _draw(candidates, _share_of(real, ratio), generator)
    return torch.where(cut, 0.0, -objective)


def kl_cov(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    ratio: float = 2e-4,
    kl_coef: float = 1.0,
) -> Tensor:
    """Keep the entropy up: use `-rho A`, with a penalty `kl_coef |ln rho|` at the tokens of highest covariance.

    KL-Cov: the penalty is on the `floor(ratio N)` of the `N` real tokens with the highest `token_covariance`.
    `ratio = 0` is the surrogate without a clip.

    Cui et al., arXiv 2505.22617, eq. 10, 13 and 14; `|ln rho|` as the divergence is from listing 1. The paper's
    `ratio` is 2e-3 for 7B and 2e-4 for 32B.

    Args:
        ratio: share of the real tokens to penalise, `k`.
        kl_coef: weight of the penalty, `beta`.
    """
    check_shares(ratio=ratio)
    check_widths(kl_coef=kl_coef)
    log_ratio, logps, advantages, real = policy_inputs(logps, old_logps, advantages, mask)
    with torch.no_grad():
        covariance = torch.where(real, token_covariance(logps, advantages, real), -torch.inf)
        top = covariance.flatten().topk(_share_of(real, ratio), sorted=False).indices
    loss = -log_ratio.exp() * advantages
    penalty = kl_coef * log_ratio.flatten()[top].abs()
    return loss.flatten().index_add(0, top, penalty).view_as(loss)


def _share_of(mask: Tensor, share: float) -> int:
    """Compute `floor(share N)` for `N` real tokens."""
    # 2e-4 * 5000 is 1, but may be just below it after rounding.
    return int(share * int(mask.sum()) + 1e-6)


def _draw(candidates: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Draw `count` of the candidates without replacement, and return their mask."""
    drawn = torch.zeros_like(candidates).flatten()
    if count:
        where = candidates.flatten().nonzero().squeeze(1)
        device = generator.device if generator else "cpu"
        order = torch.randperm(len(where), generator=generator, device=device)[:count]
        drawn[where[order.to(where.device)]] = True
    return drawn.view_as(candidates)
