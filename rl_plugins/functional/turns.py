"""Turns of a conversation: runs of the policy's tokens between those of an environment.

Arguments that functions here share, and do not list again:
    mask: the policy's tokens `(B, T)`, 0 for tokens of an environment and padding. A turn is a run of ones:

        mask    = 1 1 0 0 1 1 1 0
        numbers = 0 0 - - 1 1 1 -
        ends    = 0 1 0 0 0 0 1 0
"""

import torch
from torch import Tensor

from rl_plugins.functional.masking import zero_masked

TIME_UNITS = ("token", "turn")


def turn_ends(mask: Tensor) -> Tensor:
    """Mark the last token of every turn, at which a reward for the turn is paid.

    Returns:
        `(B, T)` bool.
    """
    real = mask.bool()
    after = torch.cat([real[:, 1:], torch.zeros_like(real[:, :1])], dim=1)
    return real & ~after


def turn_numbers(mask: Tensor) -> Tensor:
    """Number the turns of each row from 0.

    Returns:
        `(B, T)` int64, -1 where the mask is 0.
    """
    ends = turn_ends(mask)
    return (ends.cumsum(1) - ends.long()).masked_fill(~mask.bool(), -1)


def at_turn_ends(factor: float | Tensor, mask: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Make a discount or a trace decay act once a turn: `factor` where a turn ends, 1 inside it.

    With these factors as `gamma` and `lam`, the estimators of `returns` measure time in turns: inside a turn nothing
    is discounted and no trace decays. Tokens of the environment take no time in either unit.

    Args:
        factor: a float, or one per sequence, `(B,)` or `(B, 1)`.
        dtype: that of the numbers to be multiplied by the factors; the factors are float32 at least.

    Returns:
        `(B, T)`, 0 where the mask is 0.
    """
    given = torch.as_tensor(factor, device=mask.device, dtype=torch.promote_types(dtype, torch.float32))
    given = given.reshape(-1, 1) if given.ndim else given
    return zero_masked(torch.where(turn_ends(mask), given, torch.ones_like(given)), mask)


def in_time_unit(
    factor: float | Tensor, mask: Tensor, *, time_unit: str, dtype: torch.dtype = torch.float32
) -> float | Tensor:
    """Make a discount or a trace decay act once a token, which changes nothing, or once a turn ([`at_turn_ends`]).

    Args:
        factor: a float, or one per sequence, `(B,)` or `(B, 1)`.
        time_unit: one of `TIME_UNITS`.
        dtype: see [`at_turn_ends`].

    Raises:
        ValueError: If the unit is unknown.
    """
    if time_unit not in TIME_UNITS:
        raise ValueError(f"Unknown time unit {time_unit!r}; choose one of {', '.join(TIME_UNITS)}.")
    return factor if time_unit == "token" else at_turn_ends(factor, mask, dtype=dtype)


def turn_sums(x: Tensor, mask: Tensor) -> Tensor:
    """Sum up each turn: `X_k = sum of x_t over the tokens of turn k`.

    Args:
        x: `(B, T)`; masked entries may hold anything.

    Returns:
        `(B, K)`, float32 or wider; K is the largest number of turns of a row, at least 1.
    """
    numbers, real = turn_numbers(mask), zero_masked(x, mask)
    turns = max([1, *turn_ends(mask).sum(1).tolist()])
    return real.new_zeros(len(x), turns).scatter_add_(1, numbers.clamp(min=0), real)
