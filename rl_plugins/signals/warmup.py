"""A warm-up in which only the critic learns."""

from torch.optim import Optimizer

AFTERWARDS = "weight_decay_after_warmup"


def pause_weight_decay(optimizer: Optimizer, paused: bool) -> None:
    """Set the weight decay of all parameters to 0 while `paused`, and restore it afterwards.

    Weight decay would change parameters even without a gradient. The parameter groups keep the original decay, so that
    a checkpoint of the warm-up has it.
    """
    for group in optimizer.param_groups:
        decay = group.setdefault(AFTERWARDS, group["weight_decay"])
        group["weight_decay"] = 0.0 if paused else decay
