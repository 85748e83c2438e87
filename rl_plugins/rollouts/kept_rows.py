"""Whole rows of completions that a copy of sequential heads judges and that are kept for later."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rl_plugins.functional.alignment import value_after
from rl_plugins.nn.sequential_heads import SequentialHeads
from rl_plugins.nn.target_heads import RowCopy


class Rows(NamedTuple):
    """Rows of prompts and completions, as a trunk has read them.

    Attributes:
        hidden: States of the trunk (R, S, D).
        input_ids: The tokens there (R, S).
        attention_mask: Real tokens (R, S).
        positions: Positions of the tokens (R, S).
    """

    hidden: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    positions: Tensor

    def choose(self, rows: Tensor | slice) -> "Rows":
        """Take some of the rows."""
        return Rows(*(x[rows] for x in self))


class JudgedRows:
    """Observes forward passes over whole rows: a copy of sequential heads judges them, and the first rows are kept.

    Args:
        heads: The online heads, which know the inputs of a pass.
        judge: The copy of the heads.
        num_tokens: T, completion length; the rows hold prompt + completion.
        limit: Most states to keep. The first row is kept whatever its length.
    """

    def __init__(self, heads: SequentialHeads, judge: RowCopy, num_tokens: int, limit: int) -> None:
        self.heads, self.judge, self.num_tokens, self.limit = heads, judge, num_tokens, limit
        self._values: list[Tensor] = []
        self._kept: list[Rows] = []
        self._full = False

    @torch.no_grad()
    def __call__(self, hidden: Tensor) -> None:
        """Take the states (B, S, D) of one chunk of rows."""
        ids, mask, positions = self.heads.row_inputs()
        mask = torch.ones_like(ids) if mask is None else mask
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        rows = Rows(hidden.detach(), ids, mask, positions.expand_as(ids))
        self._values.append(self.judge(*rows)[:, -(self.num_tokens + 1) :])
        if self._full:
            return
        room = self.limit - sum(kept.input_ids.numel() for kept in self._kept)
        count = min(len(ids), room // ids.shape[1])
        if not self._kept:
            count = max(1, count)
        self._full = count < len(ids)
        if count:
            self._kept.append(rows.choose(slice(count)))

    def finish(self) -> tuple[Tensor, Tensor] | None:
        """Return the values (B, T, K) of the completions' states, online and target alike; `None` without a pass."""
        if not self._values:
            return None
        values = torch.cat(self._values)[:, :-1]
        return values, values

    def after(self, target_values: Tensor, completion_mask: Tensor) -> Tensor:
        """Return the value of the state after each completion's last token (B,)."""
        return value_after(torch.cat(self._values)[..., 0], completion_mask)

    def kept(self) -> Rows:
        """Join the rows that were kept, padded on the left."""
        width = max(rows.input_ids.shape[1] for rows in self._kept)

        def joined(parts: list[Tensor]) -> Tensor:
            ends = [(0, 0) * (x.ndim - 2) + (width - x.shape[1], 0) for x in parts]
            return torch.cat([F.pad(x, end) for x, end in zip(parts, ends, strict=True)])

        return Rows(*(joined(list(parts)) for parts in zip(*self._kept, strict=True)))
