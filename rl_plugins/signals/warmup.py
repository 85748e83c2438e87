"""A warm-up in which only the critic learns."""

from torch.optim import Optimizer

AFTERWARDS = "weight_decay_after_warmup"


def pause_weight_decay(optimizer: Optimizer, paused: bool) -> None:
    """Take weight decay off all parameters while `paused`, since it needs no gradient, and put it back afterwards.

    What it will be again is kept in the parameter groups, so that a checkpoint of the warm-up knows it.
    """
    for group in optimizer.param_groups:
        decay = group.setdefault(AFTERWARDS, group["weight_decay"])
        group["weight_decay"] = 0.0 if paused else decay
