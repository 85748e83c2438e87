"""Sums and rows over all ranks, whichever strategy started them."""

from typing import Any

import torch
from torch import Tensor, distributed

from rl_plugins.process_group import sum_over_ranks as sum_over_ranks


def world_size() -> int:
    """Return the number of ranks."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Return the number of this rank."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def mean_over_ranks(x: Tensor) -> Tensor:
    """Average a tensor over all ranks, without gradient, such as a loss of which every rank has its share."""
    return sum_over_ranks(x.detach()) / world_size()


def gather_rows(x: Tensor) -> Tensor:
    """Join the rows (B, ...) of all ranks, in the order of the ranks; all ranks must have equally many rows."""
    if not distributed.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def own_rows(x: Tensor) -> Tensor:
    """Take the rows of this rank out of the rows that [`gather_rows`] has joined."""
    return x.chunk(world_size())[rank()]


def gather_objects(x: Any) -> list[Any]:
    """Return a list with one object of every rank."""
    if not distributed.is_initialized():
        return [x]
    parts: list[Any] = [None] * world_size()
    distributed.all_gather_object(parts, x)
    return parts
