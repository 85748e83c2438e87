"""Cutting and joining the batches of completions on their way from scoring to the loss; the names are TRL's."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Batch = dict[str, Any]

LEFT_PADDED = ("prompt_ids", "prompt_mask")
TOKEN_IDS = ("prompt_ids", "completion_ids")
# What TRL has on padding; its vespo multiplies the ratios of a row without looking at the mask.
ONE_PADDED = ("tool_mask", "importance_sampling_ratio")


def num_rows(batch: Batch) -> int:
    """B of a batch."""
    return len(batch["completion_ids"])


def select_rows(batch: Batch, index: Tensor) -> Batch:
    """The rows `index` (n,) of a batch; what has no rows (token counts) is kept."""
    return {
        key: value[index.to(value.device)] if isinstance(value, Tensor) and value.ndim else value
        for key, value in batch.items()
    }


def _padded(x: Tensor, width: int, fill: int, *, left: bool) -> Tensor:
    missing = width - x.shape[1]
    return F.pad(x, (missing, 0) if left else (0, missing), value=fill)


def join_rows(batches: Sequence[Batch], pad_token_id: int) -> Batch:
    """One batch of all rows, padded to the longest: prompts on the left, everything else on the right.

    What has no rows comes from the first batch.
    """
    joined = dict(batches[0])
    for key, first in batches[0].items():
        if not isinstance(first, Tensor) or first.ndim == 0:
            continue
        parts = [batch[key] for batch in batches]
        if first.ndim == 2:
            width = max(part.shape[1] for part in parts)
            fill = pad_token_id if key in TOKEN_IDS else int(key in ONE_PADDED)
            parts = [_padded(part, width, fill, left=key in LEFT_PADDED) for part in parts]
        joined[key] = torch.cat(parts)
    return joined


def reordered(slices: Sequence[Batch], order: Tensor) -> list[Batch]:
    """The rows of equally long slices of one batch, in a new order (B,), cut into as many slices."""
    whole = join_rows(slices, 0)  # slices of one batch are equally wide: nothing is padded
    return [select_rows(whole, part) for part in order.chunk(len(slices))]
