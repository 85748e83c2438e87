"""Sums and rows of all ranks, whichever strategy started them."""

from typing import Any

import torch
from torch import Tensor, distributed

from rl_plugins.process_group import sum_over_ranks as sum_over_ranks


def world_size() -> int:
    """Number of ranks."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Number of this rank."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def mean_over_ranks(x: Tensor) -> Tensor:
    """Mean of a tensor over all ranks, such as of a loss that every rank has its share of; without gradient."""
    return sum_over_ranks(x.detach()) / world_size()


def gather_rows(x: Tensor) -> Tensor:
    """Rows (B, ...) of all ranks, in their order; every rank must have as many."""
    if not distributed.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def own_rows(x: Tensor) -> Tensor:
    """Take the rows of this rank out of what [`gather_rows`] gave."""
    return x.chunk(world_size())[rank()]


def gather_objects(x: Any) -> list[Any]:
    """One object of every rank."""
    if not distributed.is_initialized():
        return [x]
    parts: list[Any] = [None] * world_size()
    distributed.all_gather_object(parts, x)
    return parts
