"""A value per prompt from its own past rewards: the Beta tracker of SPO (arXiv 2509.13232).

A prompt has pseudo-counts of success `alpha` and failure `beta`. The advantage of a new completion is
`r - tracker_value(alpha, beta)`, from the counts before that completion is added; SPO then whitens it over the batch.

Arguments that functions here share, and do not list again:
    alpha: pseudo-count of success `(N,)`.
    beta: pseudo-count of failure `(N,)`.

All functions raise `ValueError` where shapes do not fit or a number is out of range.
"""

import torch
from torch import Tensor

from rl_plugins.functional.checks import check_positive, check_shape
from rl_plugins.functional.masking import masked_mean, upcast, zero_masked
from rl_plugins.functional.ratios import finite_logps

PAIRS = "give one pair per prompt, beta with the shape of alpha"


def tracker_value(alpha: Tensor, beta: Tensor) -> Tensor:
    """Forecast a prompt's reward by the mean of `Beta(alpha, beta)`: `v = alpha / (alpha + beta)`.

    Returns:
        `(N,)`.
    """
    check_shape("beta", beta, alpha.shape, PAIRS)
    return upcast(alpha) / (upcast(alpha) + upcast(beta))


def tracker_update(alpha: Tensor, beta: Tensor, rewards: Tensor, forget: float | Tensor) -> tuple[Tensor, Tensor]:
    """Add a reward to the counts and let the old counts fade: `alpha' = rho alpha + r`, `beta' = rho beta + 1 - r`.

    The counts tend to the sum `1 / (1 - rho)`, the number of rewards that the tracker remembers.

    Args:
        rewards: `r (N,)` in `[0, 1]`; NaN leaves the counts of its row as they are.
        forget: `rho` in `[0, 1]`, a float or per row `(N,)`; 1 remembers all.

    Returns:
        `alpha'` and `beta'`, each `(N,)`.
    """
    check_shape("beta", beta, alpha.shape, PAIRS)
    check_shape("rewards", rewards, alpha.shape, "give one per count")
    scorable = ~rewards.isnan()
    if bool((scorable & ((rewards < 0) | (rewards > 1))).any()):
        raise ValueError(
            "rewards outside [0, 1]: scale the rewards to this range, since a Beta tracker counts successes."
        )
    rho = torch.as_tensor(forget, dtype=upcast(alpha).dtype, device=alpha.device)
    if rho.shape not in ((), alpha.shape):
        raise ValueError(f"forget {tuple(rho.shape)}: give a float, or one per count, {tuple(alpha.shape)}.")
    if not bool(((rho >= 0) & (rho <= 1)).all()):
        raise ValueError("forget has entries outside [0, 1]: give shares in this range.")
    old_alpha, old_beta, r = upcast(alpha), upcast(beta), upcast(rewards)
    return (
        torch.where(scorable, rho * old_alpha + r, old_alpha),
        torch.where(scorable, rho * old_beta + (1 - r), old_beta),
    )


def policy_distance(logps_then: Tensor, logps_now: Tensor, mask: Tensor) -> Tensor:
    """Measure how far the policy has moved on an answer: `D = 1/|y| sum_t |ln pi_then(y_t) - ln pi_now(y_t)|`.

    `D` stands in for the divergence of the two policies in [`forget_factor`].

    Args:
        logps_then: log-probabilities of the answer's tokens when it was sampled `(N, T)`.
        logps_now: log-probabilities of these tokens under the present policy `(N, T)`.
        mask: real tokens `(N, T)`.

    Returns:
        `(N,)`, in nats, at least 0; finite, since a log-probability of -inf counts as -1e6.
    """
    then, now = (finite_logps(zero_masked(x, mask)) for x in (logps_then, logps_now))
    return masked_mean((then - now).abs(), mask, dim=1)


def forget_factor(distance: Tensor, *, half_life: float = 0.06, low: float = 0.875, high: float = 0.96) -> Tensor:
    """Forget faster the further the policy has moved: `rho = clamp(2^(-D / half_life), low, high)`.

    Args:
        distance: `D (N,)`, the [`policy_distance`] since the prompt was last answered.
        half_life: the distance at which `rho` would be 1/2 without the bounds, above 0.
        low: least `rho`; 0.875 remembers 8 rewards.
        high: greatest `rho`; 0.96 remembers 25.

    Returns:
        `(N,)`.
    """
    check_positive("give a positive distance, such as 0.06", half_life=half_life)
    if not 0 <= low <= high <= 1:
        raise ValueError(f"low={low}, high={high}: give 0 <= low <= high <= 1.")
    return torch.exp2(-upcast(distance) / half_life).clamp(low, high)


def initial_counts(values: Tensor, *, trials: int | Tensor = 8, min_forget: float = 0.875) -> tuple[Tensor, Tensor]:
    """Start a tracker from rewards sampled before training: `alpha = N_0 v'`, `beta = N_0 (1 - v')`.

    `v' = (m v + 1/2) / (m + 1)` shrinks the mean `v` of `m` trials towards 1/2 (Jeffreys' prior), and
    `N_0 = 1 / (1 - min_forget)` is the sum that the counts tend to with `rho = min_forget`. Without trials the counts
    are the prior, 1/2 each.

    Args:
        values: `v (N,)` in `[0, 1]`; may be anything (NaN too) where there are no trials.
        trials: `m`, an int or per row `(N,)`.
        min_forget: the `low` of `forget_factor`, in `[0, 1)`.

    Returns:
        `alpha` and `beta`, each `(N,)`.
    """
    if not 0 <= min_forget < 1:
        raise ValueError(f"min_forget={min_forget}: give the least forgetting factor, in [0, 1).")
    v = upcast(values)
    count = torch.as_tensor(trials, device=v.device).to(v.dtype).expand_as(v)
    if bool((count < 0).any()):
        raise ValueError(f"trials={trials}: give the number of rewards behind each value, 0 or more.")
    if bool(((count > 0) & ~((v >= 0) & (v <= 1))).any()):
        raise ValueError(
            "values outside [0, 1]: give the mean of rewards in [0, 1], and trials=0 where there is none."
        )
    successes = torch.where(count > 0, count * v, 0.0)
    # Not where() of two numbers, which would be float32 whatever the dtype of the values is.
    total = torch.ones_like(count).masked_fill(count > 0, 1 / (1 - min_forget))
    return total * (successes + 0.5) / (count + 1), total * (count - successes + 0.5) / (count + 1)
