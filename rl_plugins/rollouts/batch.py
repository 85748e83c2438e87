"""Batches of completions on their way from scoring to the loss: their keys, and how they are cut and joined."""

from collections.abc import Sequence
from typing import Any, TypedDict, cast

import torch
from torch import Tensor
from torch.nn import functional as F


class Batch(TypedDict, total=False):
    """Completions of one rank (B rows, P prompt tokens, T completion tokens), under TRL's names where TRL has them.

    Not every batch has every key; vision-language models add what their processor makes of the images.
    """

    # The completions
    prompt_ids: Tensor  # (B, P), padded on the left
    prompt_mask: Tensor  # (B, P), 1 for real tokens
    completion_ids: Tensor  # (B, T), padded on the right
    completion_mask: Tensor  # (B, T), 1 for tokens that count, the end-of-text token included
    tool_mask: Tensor  # (B, T), 0 for tokens of an environment, which the policy did not choose
    # Log-probabilities of the completions' tokens
    old_per_token_logps: Tensor  # (B, T), under the policy that sampled
    ref_per_token_logps: Tensor  # (B, T), under the reference
    sampling_per_token_logps: Tensor  # (B, T), of the engine that sampled, if it is not the model itself
    importance_sampling_ratio: Tensor  # (B, T) or (B, 1), the correction for that engine
    held_logps: Tensor  # (B, T), under the policy that an auxiliary phase must stay close to
    # What they teach
    scores: Tensor  # (B,), weighted sums of rewards, NaN where a completion cannot be scored
    rewards: Tensor  # (B, T), the same rewards at the tokens after which they are paid
    paid: Tensor  # (B, T), whether something is paid after the token, even if it is 0
    truncated: Tensor  # (B,), whether the episode would go on, so that its last state is worth V(s_T) and not 0
    advantages: Tensor  # (B,) or (B, T)
    returns: Tensor  # (B, T), targets of value head 1
    old_values: Tensor  # (B, T, K), values when the completion was made
    td_errors: Tensor  # (B, T)
    critic_mask: Tensor  # (B, T), tokens that the values learn from
    # Groups: completions of one prompt
    groups: Tensor  # (B,), number of the prompt
    informative: Tensor  # (B,), whether the rewards of the group differ
    table_row: Tensor  # (B,), place in the host's table of completions, -1 for none
    prompt_weights: Tensor  # (B,), with which every prompt counts alike
    # Sums over the accumulation window
    num_items_in_batch: Tensor  # 0-d, TRL: real tokens of the whole rollout, of all ranks
    num_items: Tensor  # 0-d, Lightning: divisor of the losses; the next four are of Lightning, too
    num_tokens: Tensor  # the policy's tokens per rank and micro-batch
    row_weight: Tensor  # weight of a micro-batch, by its completions
    micro_batch_weight: Tensor  # weight of a micro-batch, where all count alike
    router_weight: Tensor  # weight of a micro-batch, by all its tokens, for the losses of routers
    # Images
    num_images: list[int]
    pixel_values: Tensor


SAMPLING_KEYS = ("informative", "table_row")
"""Keys that only sampling reads."""
REWARD_KEYS = ("scores", "rewards", "paid", "truncated")
"""Keys that only the signal reads, which turns them into advantages."""
LEFT_PADDED = ("prompt_ids", "prompt_mask")
TOKEN_IDS = ("prompt_ids", "completion_ids")
# Keys that are 1 on padding, as in TRL: its vespo loss multiplies the ratios of a row without looking at the mask.
ONE_PADDED = ("tool_mask", "importance_sampling_ratio")


def without(batch: Batch, names: Sequence[str]) -> Batch:
    """Copy a batch without some of its entries."""
    return cast(Batch, {name: value for name, value in batch.items() if name not in names})


def num_rows(batch: Batch) -> int:
    """Count the completions of a batch."""
    return len(batch["completion_ids"])


def loss_mask(batch: Batch) -> Tensor:
    """Mask the tokens (B, T) that the policy chose, from which it learns."""
    mask = batch["completion_mask"]
    return mask * batch["tool_mask"] if "tool_mask" in batch else mask


def select_rows(batch: Batch, index: Tensor) -> Batch:
    """Take the rows `index` (n,) of a batch; entries without rows (token counts) are kept."""
    chosen = {
        key: value[index.to(value.device)] if isinstance(value, Tensor) and value.ndim else value
        for key, value in batch.items()
    }
    return cast(Batch, chosen)


def _padded(x: Tensor, width: int, fill: int, *, left: bool) -> Tensor:
    missing = width - x.shape[1]
    return F.pad(x, (missing, 0) if left else (0, missing), value=fill)


def join_rows(batches: Sequence[Batch], pad_token_id: int) -> Batch:
    """Join all rows into one batch, padded to the longest: prompts on the left, everything else on the right.

    Entries without rows come from the first batch.
    """
    parts_of: list[dict[str, Any]] = [dict(batch) for batch in batches]
    joined = dict(parts_of[0])
    for key, first in parts_of[0].items():
        if not isinstance(first, Tensor) or first.ndim == 0:
            continue
        parts = [part[key] for part in parts_of]
        if first.ndim == 2:
            width = max(part.shape[1] for part in parts)
            fill = pad_token_id if key in TOKEN_IDS else int(key in ONE_PADDED)
            parts = [_padded(part, width, fill, left=key in LEFT_PADDED) for part in parts]
        joined[key] = torch.cat(parts)
    return cast(Batch, joined)


def reordered(slices: Sequence[Batch], order: Tensor) -> list[Batch]:
    """Put the rows of equally long slices of one batch into a new order (B,), and cut them into as many slices."""
    whole = join_rows(slices, 0)  # slices of one batch are equally wide: nothing is padded
    return [select_rows(whole, part) for part in order.chunk(len(slices))]
