"""Divergences between two policies, estimated from sampled tokens.

Where a probability is 0, its logarithm counts as -1e6; the exponent of the k3 estimate is held at 20 (see `ratios`).
Values and gradients are finite then, and nothing else changes.
"""

from torch import Tensor

from rl_plugins.functional.ratios import LOG_RATIO_LIMIT, finite_logps


def kl_k1(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Per-token estimate of `KL(pi || ref)` on tokens sampled from `pi`: `ln pi - ln ref`.

    Unbiased, may be negative (Schulman, "Approximating KL divergence", 2020, estimator k1).

    Args:
        logps: `(B, T)` log-probabilities under the policy that sampled.
        ref_logps: `(B, T)` under the reference.

    Returns:
        `(B, T)`, in nats, float32 or wider.
    """
    return finite_logps(logps) - finite_logps(ref_logps)


def kl_to_sampler(logps: Tensor, sampler_logps: Tensor) -> Tensor:
    """Per-token estimate of `KL(sampler || pi)` on tokens of the sampler: `r - 1 - ln r`, `r = pi / sampler`.

    Non-negative, and its gradient is that of the divergence in expectation (Schulman, 2020, estimator k3, in the
    direction that Phasic Policy Gradient holds the policy with, 2009.04416, equation 4).

    Args:
        logps: `(B, T)` log-probabilities under the policy being trained.
        sampler_logps: `(B, T)` under the policy to stay close to.

    Returns:
        `(B, T)`, in nats, float32 or wider; without a gradient where `r` is above `e^20`.
    """
    # Bounded on one side: far below 0 the estimate is a straight line, whose slope pulls the policy back.
    log_ratio = kl_k1(logps, sampler_logps).clamp(max=LOG_RATIO_LIMIT)
    return log_ratio.exp() - 1 - log_ratio


def kl_k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Per-token estimate of `KL(pi || ref)` on tokens sampled from `pi`: `r - 1 - ln r`, `r = ref / pi`.

    Unbiased and non-negative (Schulman, 2020, estimator k3); the KL term of GRPO (2402.03300, equation 4).

    Args:
        logps: `(B, T)` log-probabilities under the policy that sampled.
        ref_logps: `(B, T)` under the reference.

    Returns:
        `(B, T)`, in nats, float32 or wider; without a gradient where `r` is above `e^20`.
    """
    return kl_to_sampler(ref_logps, logps)
