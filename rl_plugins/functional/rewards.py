"""Rewards per token, from a score per completion and log-probabilities.

All functions raise `ValueError` where shapes do not fit or a number is out of range.
"""

import torch
from torch import Tensor

from rl_plugins.functional.alignment import last_real
from rl_plugins.functional.checks import check_shape
from rl_plugins.functional.log_probs import kl_k1
from rl_plugins.functional.masking import upcast, zero_masked


def terminal_rewards(scores: Tensor, mask: Tensor) -> Tensor:
    """Pay the score of a completion after its last real token: `r_t = R [t = last]`.

    Args:
        scores: `R (B,)`.
        mask: `(B, T)`.

    Returns:
        `(B, T)`; all 0 in a row without real tokens, whose score is lost.
    """
    check_shape("scores", scores, mask.shape[:1], "give one per completion")
    return torch.where(last_real(mask), upcast(scores)[:, None], 0.0)


def kl_shaped_rewards(rewards: Tensor, logps: Tensor, ref_logps: Tensor, mask: Tensor, *, beta: float) -> Tensor:
    """Penalise each token for leaving the reference: `r_t - beta (ln pi(y_t|s_t) - ln pi_ref(y_t|s_t))`.

    The penalty is the k1 estimate of the KL divergence (Ouyang et al., arXiv 2203.02155, eq. 2). A reward is data:
    pass `logps` detached.

    Args:
        rewards: `(B, T)`.
        logps: `ln pi(y_t|s_t) (B, T)` of the policy that sampled.
        ref_logps: `ln pi_ref(y_t|s_t) (B, T)`.
        mask: `(B, T)`.
        beta: weight of the penalty.

    Returns:
        `(B, T)`.
    """
    return zero_masked(rewards, mask) - beta * kl_k1(zero_masked(logps, mask), zero_masked(ref_logps, mask))


def overlong_penalty(lengths: Tensor, *, max_length: int, cache: int) -> Tensor:
    """Penalise completions whose length is close to the limit, by a penalty that grows with the length.

    0 up to `L_max - L_cache` tokens, then `(L_max - L_cache - |y|) / L_cache`, down to -1 at `L_max` and beyond.
    DAPO's overlong reward shaping, Yu et al., arXiv 2503.14476, eq. 13 (there `L_max` = 20480, `L_cache` = 4096).

    Args:
        lengths: `|y| (B,)`, in tokens.
        max_length: `L_max`.
        cache: `L_cache`, the length of the slope, in `(0, L_max]`.

    Returns:
        `(B,)`, in `[-1, 0]`, to be added to the score.
    """
    if not 0 < cache <= max_length:
        raise ValueError(f"cache={cache}, max_length={max_length}: give 0 < cache <= max_length, in tokens.")
    return ((max_length - cache - upcast(lengths)) / cache).clamp(-1.0, 0.0)
