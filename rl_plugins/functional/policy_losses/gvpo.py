"""Losses that compare the completions of one prompt. Rows of a batch that carry the same id form a group."""

from torch import Tensor

from rl_plugins.functional.masking import same_group, upcast, zero_masked
from rl_plugins.functional.ratios import policy_inputs


def gvpo(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    groups: Tensor,
    beta: float = 0.1,
) -> Tensor:
    """GVPO: half the squared gap between centred implicit and centred actual reward, at every token.

    `1/2 e_i^2`, `e_i = (R_theta,i - mean R_theta) - (R_i - mean R)`, `R_theta,i = beta sum_t ln rho_t`, means over the
    group (Zhang et al., arXiv 2504.19599; formula, the half and `beta = 0.1` from the authors' repository, equation
    number not verified). Errors of a group sum to 0, hence the gradient of its sum:
    `-beta sum_i [(R_i - mean R) - (R_theta,i - mean R_theta)] nabla ln pi(y_i)`.

    Each real token carries its sequence's whole term, so that the `sequence` aggregate is the mean over sequences;
    other aggregates weigh sequences by length. The authors divide the group's sum by `k - 1`, which is this mean
    times `k / (k - 1)` for groups of `k`: a constant of the learning rate.

    Nothing is gathered: groups must not be split over micro-batches or ranks, or each part is centred on its own.
    Rows without tokens do not enter the means.

    Args:
        logps: `ln pi(y_t|s_t) (B, T)`.
        old_logps: `ln pi_old(y_t|s_t) (B, T)` of the policy to stay close to.
        advantages: `R (B,)`, rewards, centred or not, but not divided by their deviation.
        mask: real tokens `(B, T)`.
        groups: id of each row's prompt `(B,)`.
        beta: weight of the divergence from `pi_old` in the objective whose optimum this loss has.

    Returns:
        `(B, T)`.

    Raises:
        ValueError: `beta` is not positive or the shapes do not fit.
    """
    if beta <= 0:
        raise ValueError(f"beta={beta}: must be above 0, at 0 the loss does not depend on the policy.")
    if advantages.shape != logps.shape[:1]:
        raise ValueError(f"advantages {tuple(advantages.shape)}: give one reward per sequence, {logps.shape[0]}.")
    log_ratio, _, _, mask = policy_inputs(logps, old_logps, advantages, mask)
    present = mask.any(1)
    gap = zero_masked(beta * log_ratio.sum(1) - upcast(advantages), present)
    error = gap - _group_means(gap, same_group(groups, present))
    return zero_masked((0.5 * error**2)[:, None].expand_as(log_ratio), mask)


def _group_means(x: Tensor, same: Tensor) -> Tensor:
    """Mean of `x (B,)` over each row's group, `(B,)`."""
    # Not a matrix product, which autocast would take in bfloat16.
    return (same * x[None, :]).sum(1) / same.sum(1).clamp(min=1)
