"""Which groups of completions teach anything."""

import torch
from torch import Tensor

from rl_plugins.functional.masking import upcast


def informative_groups(rewards: Tensor, group_size: int, *, tolerance: float = 1e-6) -> Tensor:
    """Groups whose rewards differ: `max r - min r > tolerance max(1, |r|)` over the scorable rows.

    Where all rewards of a prompt are equal, every advantage that subtracts the group's mean is 0 (DAPO, Yu et al.,
    arXiv 2503.14476, eq. 11, keeps the prompts with `0 < number right < G`).

    Args:
        rewards: those of a prompt side by side `(B,)`; NaN cannot be scored.
        group_size: completions per prompt `G`.
        tolerance: rewards nearer than this are equal.

    Returns:
        `(B / G,)`, bool; False with fewer than two scorable rows.

    Raises:
        ValueError: the rewards do not divide into groups.
    """
    if rewards.ndim != 1 or group_size < 1 or len(rewards) % group_size:
        raise ValueError(f"rewards {tuple(rewards.shape)} do not divide into groups of {group_size}: give (B,).")
    groups = upcast(rewards).view(-1, group_size)
    highest = groups.nan_to_num(nan=-torch.inf).max(dim=1).values
    lowest = groups.nan_to_num(nan=torch.inf).min(dim=1).values
    return highest - lowest > tolerance * torch.maximum(highest.abs(), torch.ones_like(highest))
