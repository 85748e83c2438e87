"""Log-probabilities and entropies of tokens from logits, and divergences between two policies from sampled tokens.

Arguments that functions here share, and do not list again:
    logits: `z (B, T, V)`; those at `t` predict the token `y_t`.
    temperature: `tau` above 0, of the policy that samples.
    logps, ref_logps, ...: log-probabilities of the same tokens under two policies `(B, T)`.

Results are `(B, T)`, in nats, float32 or wider. The functions of logits raise `ValueError` where shapes do not fit or
`temperature` is not positive. In the divergences, the logarithm of a probability of 0 counts as -1e6, and the exponent
of the k3 estimate is at most 20 (see `ratios`), so that values and gradients are finite.
"""

import torch
from torch import Tensor

from rl_plugins.functional.checks import check_positive
from rl_plugins.functional.masking import upcast
from rl_plugins.functional.ratios import LOG_RATIO_LIMIT, finite_logps


def token_log_probs(logits: Tensor, tokens: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Compute the log-probability of each token: `ln pi(y_t|s_t) = z_y / tau - ln sum_a exp(z_a / tau)`.

    Args:
        tokens: `y (B, T)`.
    """
    _check(logits, tokens.shape, temperature)
    # Row by row, so that only one row of (T, V) is ever held in float32 beside the logits.
    rows = [_row_log_probs(row, ids, temperature) for row, ids in zip(logits, tokens, strict=True)]
    return torch.stack(rows) if rows else upcast(logits.new_zeros(tokens.shape))


def token_entropies(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Measure how undecided the policy is in each state: `H(pi(.|s_t)) = -sum_a pi ln pi`.

    `0 ln 0 = 0`: a logit of -inf forbids its token.
    """
    _check(logits, logits.shape[:-1], temperature)
    rows = [_row_entropies(row, temperature) for row in logits]
    return torch.stack(rows) if rows else upcast(logits.new_zeros(logits.shape[:-1]))


def _row_log_probs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    scaled = upcast(logits) / temperature
    return scaled.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(-1)


def _row_entropies(logits: Tensor, temperature: float) -> Tensor:
    logps = (upcast(logits) / temperature).log_softmax(-1)
    # 0 * -inf is NaN, in the value and in the gradient; 0 times the lowest number is 0 in both.
    return -(logps.exp() * logps.clamp(min=torch.finfo(logps.dtype).min)).sum(-1)


def _check(logits: Tensor, shape: torch.Size, temperature: float) -> None:
    check_positive("give a positive number; greedy decoding has no distribution", temperature=temperature)
    if logits.ndim != 3 or logits.shape[:-1] != shape:
        raise ValueError(f"logits {tuple(logits.shape)} must be (B, T, V) for tokens (B, T) = {tuple(shape)}.")


def kl_k1(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Estimate `KL(pi || ref)` without bias on tokens sampled from `pi`: `ln pi - ln ref`, which may be negative.

    Schulman, "Approximating KL divergence", 2020, estimator k1.

    Args:
        logps: under `pi`, the policy that sampled.
        ref_logps: under the reference.
    """
    return finite_logps(logps) - finite_logps(ref_logps)


def kl_to_sampler(logps: Tensor, sampler_logps: Tensor) -> Tensor:
    """Hold a policy close to the one that sampled, by an estimate of `KL(sampler || pi)` on its tokens.

    `r - 1 - ln r`, `r = pi / sampler`: it is never negative, and in expectation its gradient is that of the divergence
    (Schulman, 2020, estimator k3, for the divergence in the policy loss of Phasic Policy Gradient, 2009.04416,
    equation 4). There is no gradient where `r` is above `e^20`.

    Args:
        logps: under `pi`, the policy being trained.
        sampler_logps: under the policy to stay close to.
    """
    # The log-ratio is bounded above only: far below 0 the estimate is a straight line, whose slope pulls the policy
    # back.
    log_ratio = kl_k1(logps, sampler_logps).clamp(max=LOG_RATIO_LIMIT)
    return log_ratio.exp() - 1 - log_ratio


def kl_k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Estimate `KL(pi || ref)` on tokens of `pi` with little variance and never below 0, as in GRPO's loss.

    `r - 1 - ln r`, `r = ref / pi` (Schulman, 2020, estimator k3; 2402.03300, equation 4); unbiased. There is no
    gradient where `r` is above `e^20`.

    Args:
        logps: under `pi`, the policy that sampled.
        ref_logps: under the reference.
    """
    return kl_to_sampler(ref_logps, logps)
