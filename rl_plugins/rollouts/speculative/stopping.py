"""Applies transformers' stopping criteria, which expect one new token per row, to several new tokens at once."""

import torch
from torch import Tensor
from transformers import StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria


class Stopping:
    """Finds the new token with which a row ends.

    Args:
        criteria: Criteria that `generate` prepared. Those besides length and end-of-text tokens are called for every
            new token, with the rows that are equally long, and decide row by row.
    """

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        self.max_length: int = min(c.max_length for c in criteria if isinstance(c, MaxLengthCriteria))
        ends = [c.eos_token_id.flatten() for c in criteria if isinstance(c, EosTokenCriteria)]
        self.eos: Tensor | None = torch.cat(ends) if ends else None
        self.others = [c for c in criteria if not isinstance(c, MaxLengthCriteria | EosTokenCriteria)]

    def cut(self, ids: Tensor, lengths: Tensor, count: Tensor, num_new: int) -> tuple[Tensor, Tensor]:
        """Cut rows after the token that ends them.

        Args:
            ids: Tokens (A, W), the new ones included.
            lengths: Number of tokens before the new ones (A,).
            count: Number of new tokens (A,); those up to and including the one that ends the row are kept.
            num_new: Largest number of new tokens of any row.

        Returns:
            Number of new tokens that are kept (A,), and whether the row has ended (A,).
        """
        offset = torch.arange(num_new, device=ids.device)
        columns = lengths[:, None] + offset  # (A, S)
        ends = columns + 1 >= self.max_length
        if self.eos is not None:
            self.eos = self.eos.to(ids.device)
            ends |= torch.isin(ids.gather(1, columns), self.eos)
        if self.others:
            ends |= self._others(ids, columns)
        ends &= offset < count[:, None]
        ended = ends.any(dim=1)
        return torch.where(ended, ends.int().argmax(dim=1) + 1, count), ended

    def _others(self, ids: Tensor, columns: Tensor) -> Tensor:
        """Whether a criterion besides length and end-of-text tokens ends the row after each new token (A, S)."""
        ends = torch.zeros_like(columns, dtype=torch.bool)
        for column in columns.unique().tolist():
            rows, places = torch.nonzero(columns == column, as_tuple=True)
            prefixes = ids[rows, : column + 1]
            for criterion in self.others:
                ends[rows, places] |= criterion(prefixes, None)
        return ends
