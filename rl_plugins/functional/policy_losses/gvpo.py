"""Losses that compare the completions of one prompt. Rows of a batch that carry the same id form a group."""

from torch import Tensor

from rl_plugins.functional.checks import check_positive, check_shape
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
    """Fit the reward that a policy implies to the actual one, both centred in the group: `1/2 e_i^2` at every token.

    GVPO: `e_i = (R_theta,i - mean R_theta) - (R_i - mean R)`, `R_theta,i = beta sum_t ln rho_t`, means over the group
    (Zhang et al., arXiv 2504.19599). The errors of a group sum to 0, so the gradient of a group's summed loss is
    `-beta sum_i [(R_i - mean R) - (R_theta,i - mean R_theta)] nabla ln pi(y_i)`.

    Each real token carries its sequence's whole term, so that the `sequence` aggregate is the mean over sequences;
    other aggregates weigh sequences by length. The authors divide the group's sum by `k - 1`, which is this mean times
    `k / (k - 1)` for groups of `k`: a constant that the learning rate can include.

    Nothing is gathered from other ranks: do not split a group over micro-batches or ranks, or each part is centred on
    its own. Rows without tokens do not enter the means. For the other arguments, see `policy_losses`.

    Args:
        old_logps: `(B, T)` under the policy to stay close to.
        advantages: `R (B,)`, rewards, centred or not, but not divided by their deviation.
        groups: id of each row's prompt `(B,)`.
        beta: weight of the divergence from `pi_old` in the objective whose optimum this loss has, above 0.
    """
    check_positive("must be above 0, since at 0 the loss does not depend on the policy", beta=beta)
    check_shape("advantages", advantages, logps.shape[:1], "give one reward per sequence")
    log_ratio, _, _, mask = policy_inputs(logps, old_logps, advantages, mask)
    present = mask.any(1)
    gap = zero_masked(beta * log_ratio.sum(1) - upcast(advantages), present)
    error = gap - _group_means(gap, same_group(groups, present))
    return zero_masked((0.5 * error**2)[:, None].expand_as(log_ratio), mask)


def _group_means(x: Tensor, same: Tensor) -> Tensor:
    """Compute the mean of `x (B,)` over each row's group, `(B,)`."""
    # Not a matrix product, which autocast would compute in bfloat16.
    return (same * x[None, :]).sum(1) / same.sum(1).clamp(min=1)
