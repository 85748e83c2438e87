"""Target networks: parameters that follow others. No other functions of this layer write in place.

Arguments that functions here share, and do not list again:
    target: `theta'`, tensors that are updated in place.
    online: `theta`, as many tensors of the same shapes.

Both functions raise `ValueError`, and write nothing, where tensors do not match or a number is out of range.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from rl_plugins.functional.checks import check_shares


@torch.no_grad()
def polyak_update(target: Iterable[Tensor], online: Iterable[Tensor], *, tau: float) -> None:
    """Move a target network a share `tau` of the way to the online one: `theta' <- tau theta + (1 - tau) theta'`.

    Lillicrap et al., arXiv 1509.02971, algorithm 1. The target keeps its dtype and device; use float32, since
    bfloat16 rounds away any step below 0.2 % of a weight.

    Args:
        tau: share in `[0, 1]`; 1 copies.
    """
    check_shares(tau=tau)
    pairs = list(zip(target, online, strict=True))
    for old, new in pairs:
        # Also catches a parameter that ZeRO-3 has partitioned away: its local shape is (0,).
        if old.shape != new.shape:
            raise ValueError(f"target {tuple(old.shape)} and online {tuple(new.shape)}: gather or reorder them.")
    for old, new in pairs:
        if tau == 1.0:
            old.copy_(new)  # also integers, such as batch normalisation's counter, which lerp does not take
        else:
            old.lerp_(new.to(old), tau)


def periodic_update(target: Iterable[Tensor], online: Iterable[Tensor], *, step: int, period: int) -> bool:
    """Copy the online network into the target once in `period` steps: `theta' <- theta if step mod period = 0`.

    Mnih et al., Nature 518 (2015), algorithm 1.

    Args:
        step: the current step; 0 copies.
        period: steps between copies, at least 1.

    Returns:
        Whether it copied.
    """
    if period < 1:
        raise ValueError(f"period={period}: give at least 1 step.")
    if step % period:
        return False
    polyak_update(target, online, tau=1.0)
    return True
