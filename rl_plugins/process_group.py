"""The default process group: sums over its ranks, and the end of a script that ran on several."""

from torch import Tensor, distributed


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum a tensor over the ranks of the default process group, without gradient; `x` is left alone, and returned
    where there is no group."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return x
    total = x.detach().clone()
    distributed.all_reduce(total)
    return total


def end_process_group() -> None:
    """Wait for all ranks, then end the process group, if there is one: the last call of a script.

    A process that leaves without it may abort, whereupon the launcher kills the other ranks, which may still write
    their report.
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
