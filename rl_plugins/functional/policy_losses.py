"""Policy losses per token: reduce them with `masked_mean`.

Nothing is detached here: pass advantages and old log-probabilities under stop-gradient. There is no mask
either: where padding may hold NaN, pass the inputs through `zero_masked` first.
"""

import torch
from torch import Tensor

from rl_plugins.functional.masking import upcast


def vanilla(logps: Tensor, advantages: Tensor) -> Tensor:
    """Policy gradient: `-A_t ln pi(y_t|s_t)` (Sutton and Barto 2018, section 13.5).

    Args:
        logps: `ln pi(y_t|s_t) (B, T)`.
        advantages: `A_t (B, T)`.

    Returns:
        `(B, T)`.
    """
    return -upcast(advantages) * upcast(logps)


def ppo_clip(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
) -> Tensor:
    """PPO's clipped surrogate: `-min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A)`, `rho = pi / pi_old`.

    Schulman et al., arXiv 1707.06347, eq. 7; with two bounds, DAPO, arXiv 2503.14476, eq. 10.

    Args:
        logps: `ln pi(y_t|s_t) (B, T)`.
        old_logps: `ln pi_old(y_t|s_t) (B, T)` of the policy that sampled.
        advantages: `A_t (B, T)`.
        epsilon_low: room below ratio 1.
        epsilon_high: room above ratio 1.

    Returns:
        `(B, T)`.

    Raises:
        ValueError: a bound is negative.
    """
    if epsilon_low < 0 or epsilon_high < 0:
        raise ValueError(f"epsilon_low={epsilon_low}, epsilon_high={epsilon_high}: give widths, not negative.")
    ratio = torch.exp(upcast(logps) - upcast(old_logps))
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    return -torch.minimum(ratio * upcast(advantages), clipped * upcast(advantages))
