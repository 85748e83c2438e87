"""FIPO: a policy loss that weighs each token by how the policy has changed on the rest of its sequence."""

import torch
from torch import Tensor

from rl_plugins.functional.checks import check_positive, check_widths
from rl_plugins.functional.ratios import clipped_objective, policy_inputs
from rl_plugins.functional.returns import discounted_returns


def fipo(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    half_life: float = 32.0,
    weight_low: float = 0.0,
    weight_high: float = 0.2,
    max_ratio: float = 10.0,
    safe_ratio: float = 10.0,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.28,
) -> Tensor:
    """Give a token more weight if the policy has since made the rest of its sequence more likely.

    FIPO: `-min(rho f A, clip(rho, 1 - eps_low, 1 + eps_high) f A)`,
    `f_t = clip(exp(F_t), 1 - weight_low, 1 + weight_high)`, `F_t = sum_{k>=t} gamma^(k-t) M_k ln rho_k`,
    `gamma = 2^(-1 / half_life)`, `M_k = 1` where `rho_k <= max_ratio`. `f_t = 1` for a negative advantage with
    `rho_t > safe_ratio`. `f` is a constant in the gradient.

    Ma et al., arXiv 2603.19835, eq. 6 to 8 and the end of section 3.2, with the values of the paper's 32B run; the 7B
    run has `weight_low=0.2, safe_ratio=3`.

    The distance `k - t` counts real tokens, as everywhere here, including those with `M_k = 0`. With `weight_low` and
    `weight_high` of 0 the loss is `ppo_clip`. For the other arguments, see `policy_losses`.

    Args:
        half_life: tokens after which the future counts half, `tau`; infinite is no decay.
        weight_low: room of the weight below 1.
        weight_high: room of the weight above 1.
        max_ratio: tokens with a larger ratio are left out of `F`, `c`.
        safe_ratio: tokens with a larger ratio and a negative advantage are not weighted.
        epsilon_low: room of the ratio below 1.
        epsilon_high: room of the ratio above 1.
    """
    check_widths(epsilon_low=epsilon_low, epsilon_high=epsilon_high, weight_low=weight_low, weight_high=weight_high)
    check_positive(half_life=half_life, max_ratio=max_ratio, safe_ratio=safe_ratio)
    log_ratio, _, advantages, real = policy_inputs(logps, old_logps, advantages, mask)
    ratio = log_ratio.exp()
    with torch.no_grad():
        shifts = torch.where(ratio > max_ratio, 0.0, log_ratio)
        future = discounted_returns(shifts, real, gamma=2 ** (-1 / half_life))
        weight = future.exp().clamp(1 - weight_low, 1 + weight_high)
        weight = torch.where((advantages < 0) & (ratio > safe_ratio), 1.0, weight)
    return -clipped_objective(ratio, advantages * weight, 1 - epsilon_low, 1 + epsilon_high)
