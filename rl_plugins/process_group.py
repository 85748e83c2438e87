"""The default process group: sums over its ranks, and the end of a script that ran on several."""

from torch import Tensor, distributed


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum a tensor over the ranks of the default process group, without gradient. `x` itself is not changed; it is
    returned if there is no group."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return x
    total = x.detach().clone()
    distributed.all_reduce(total)
    return total


def end_process_group() -> None:
    """Wait for all ranks, then end the process group, if there is one. Make this the last call of a script.

    A process that exits without this call may abort. The launcher then kills the other ranks, which may still be
    writing their report.
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
