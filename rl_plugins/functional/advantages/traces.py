"""Credit per token from an advantage per completion, by eligibility traces and without a critic.

Arguments that functions here share, and do not list again:
    mask: real tokens `(B, T)`; positions count real tokens from 0.
    gamma: discount in `[0, 1]`.
    lam: trace decay in `[0, 1]`; with "recent", `gamma lam = 0` is plain GRPO.
    style: with "recent" the trace of a token fades; with "both" the traces of the first tokens also stay high.

All functions raise `ValueError` where shapes do not fit, a number is out of range or the style is unknown.
"""

from typing import Literal

import torch
from torch import Tensor

from rl_plugins.functional.checks import check_shape
from rl_plugins.functional.masking import upcast, zero_masked
from rl_plugins.functional.returns import check_discount, check_trace_decay

TraceStyle = Literal["recent", "both"]


def trace_weights(mask: Tensor, *, gamma: float = 1.0, lam: float = 0.99, style: TraceStyle = "recent") -> Tensor:
    """Compute how much credit each token gets when its traces are summed over the later tokens.

    `w_j = sum_{t >= j} tr(t, t - j)`. GRPO-lambda (arXiv 2510.00194) keeps the advantage of the completion and puts a
    trace into the ratio of token `t`: `rho_t = exp(sum_l tr(t, l) (ln pi - ln pi_old)(y_{t-l}))`, with
    `tr(t, l) = (gamma lam)^l` ("recent") or `max((gamma lam)^l, (gamma lam)^(t-l))` ("both", section 3.2, eq. 2). At
    `pi = pi_old` the gradient of `sum_t rho_t A` is `sum_j w_j A grad ln pi(y_j)`: the weights give this gradient
    on-policy, with any ratio. Off-policy the two differ, since GRPO-lambda clips `rho_t`.

    With "both" the first token keeps a full trace in every later token.

    Returns:
        `(B, T)`: between 1 and the number of real tokens from `j` on; "recent" stays below `1 / (1 - gamma lam)`.
    """
    return _weights(mask, gamma, lam, style).to(upcast(mask).dtype)


def _weights(mask: Tensor, gamma: float, lam: float, style: str) -> Tensor:
    """Compute `trace_weights` in float64."""
    if mask.ndim != 2:
        raise ValueError(f"mask {tuple(mask.shape)}: give the completion mask, (B, T).")
    check_discount(gamma)
    check_trace_decay(lam)
    if style not in ("recent", "both"):
        raise ValueError(f"style={style!r}: choose 'recent' or 'both'.")
    real = mask.bool()
    before = (real.cumsum(1) - 1).clamp(min=0)
    after = (real.sum(1, keepdim=True) - 1 - before).clamp(min=0)
    powers = (gamma * lam) ** torch.arange(mask.shape[1], device=mask.device, dtype=torch.float64)
    sums = powers.cumsum(0)
    if style == "recent":
        weights = sums[after]
    else:
        # The trace of token j has lag l = t - j: it fades as (gamma lam)^l to (gamma lam)^j at l = j and stays there.
        weights = sums[torch.minimum(before, after)] + (after - before).clamp(min=0) * powers[before]
    return zero_masked(weights, mask)


def lambda_trace(
    advantages: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.99,
    style: TraceStyle = "recent",
    min_advantage: float | None = None,
) -> Tensor:
    """Credit early tokens of a completion more, since they have a trace in every later token.

    `A_{i,t} = w_{i,t} max(A_i, min_advantage)`. GRPO-lambda (arXiv 2510.00194) with the `trace_weights` `w`. With
    `gamma lam = 0` and "recent", each token gets the advantage of its completion; with `gamma lam = 1`, that times the
    number of tokens left. The weights are not normalised: gradients grow by up to `1 / (1 - gamma lam)`, and by more
    with "both".

    Args:
        advantages: `A`, one per completion `(B,)`.
        min_advantage: floor of the advantage of a completion, against accumulated traces that push whole completions
            down; -0.1 in GRPO-lambda.

    Returns:
        `(B, T)`.
    """
    check_shape("advantages", advantages, mask.shape[:1], "give one per completion")
    advantages = upcast(advantages)
    if min_advantage is not None:
        advantages = advantages.clamp(min=min_advantage)
    weights = _weights(mask, gamma, lam, style).to(advantages.dtype)
    return zero_masked(advantages[:, None] * weights, mask)
