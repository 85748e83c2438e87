"""Parameters that DeepSpeed's ZeRO-3 has partitioned, whichever host started the engine."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor


def is_partitioned(param: Tensor) -> bool:
    """Whether ZeRO-3 owns `param`, so that this rank may hold a part of it only."""
    return "ds_id" in vars(param)


def is_in_use(param: Tensor) -> bool:
    """Whether a module whose forward runs now has made a partitioned `param` whole, and will let go of it."""
    return bool(vars(param).get("ds_active_sub_modules"))


def whole_size(param: Tensor) -> int:
    """Number of entries of the whole parameter."""
    return int(vars(param)["ds_numel"]) if is_partitioned(param) else param.numel()


def whole_parameters(params: Sequence[Tensor], *, writing: bool = False) -> AbstractContextManager[None]:
    """Make parameters whole under ZeRO-3, a collective operation; does nothing elsewhere.

    Args:
        params: Parameters to read or write; those that nobody partitioned are left alone.
        writing: Keep what is written, taken from rank 0. Without it DeepSpeed drops writes silently.
    """
    partitioned = [param for param in params if is_partitioned(param)]
    if not writing:
        # DeepSpeed refuses to part what it gathered for a module that still runs: tied weights in the trunk's hook.
        partitioned = [param for param in partitioned if not is_in_use(param)]
    if not partitioned:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if writing else None)
