"""Divergences between two policies, estimated from sampled tokens."""

from torch import Tensor


def kl_k1(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Per-token estimate of `KL(pi || ref)` on tokens sampled from `pi`: `ln pi - ln ref` (the seed's 8.5).

    Unbiased, may be negative (Schulman, "Approximating KL divergence", 2020, estimator k1).

    Args:
        logps: `(B, T)` log-probabilities under the policy that sampled.
        ref_logps: `(B, T)` under the reference.

    Returns:
        `(B, T)`, in nats.
    """
    return logps - ref_logps


def kl_to_sampler(logps: Tensor, sampler_logps: Tensor) -> Tensor:
    """Per-token estimate of `KL(sampler || pi)` on tokens of the sampler: `r - 1 - ln r`, `r = pi / sampler`.

    Non-negative, and its gradient is that of the divergence in expectation (Schulman, 2020, estimator k3, in the
    direction that Phasic Policy Gradient holds the policy with, 2009.04416, equation 4).

    Args:
        logps: `(B, T)` log-probabilities under the policy being trained.
        sampler_logps: `(B, T)` under the policy to stay close to.

    Returns:
        `(B, T)`, in nats.
    """
    log_ratio = logps - sampler_logps
    return log_ratio.exp() - 1 - log_ratio


def kl_k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Per-token estimate of `KL(pi || ref)` on tokens sampled from `pi`: `r - 1 - ln r`, `r = ref / pi`.

    Unbiased and non-negative (Schulman, 2020, estimator k3); the KL term of GRPO (2402.03300, equation 4).

    Args:
        logps: `(B, T)` log-probabilities under the policy that sampled.
        ref_logps: `(B, T)` under the reference.

    Returns:
        `(B, T)`, in nats.
    """
    return kl_to_sampler(ref_logps, logps)
