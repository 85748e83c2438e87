"""The end of a script that ran on several processes."""

from torch import distributed


def end_process_group() -> None:
    """Wait for all ranks, then end the process group, if there is one: the last call of a script.

    A process that leaves without it may abort, whereupon the launcher kills the other ranks, which may still write
    their report.
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
