"""From a loss per token to the number that is minimised: what divides the sum decides which tokens count."""

import torch
from torch import Tensor

from rl_plugins.functional.masking import masked_mean, masked_sum

AGGREGATIONS = ("token", "sequence", "constant", "sequence_sum", "micro_batch")


def aggregate(
    token_loss: Tensor,
    mask: Tensor,
    how: str,
    *,
    num_items: Tensor | float | None = None,
    max_length: int | None = None,
) -> Tensor:
    """Reduce a loss per token over the real tokens of a batch.

    - `token`: `sum_i sum_t l / num_items`: every token of the accumulation window weighs the same (DAPO, Yu et al.,
      arXiv 2503.14476, eq. 8). Sum the micro-batches; do not average them.
    - `micro_batch`: `sum_i sum_t l / sum_i |y_i|`: the same within one batch, whose micro-batches are then averaged
      whatever their token counts (TRL's `bnpo`).
    - `sequence`: `1/B sum_i 1/|y_i| sum_t l`: every sequence weighs the same (GRPO, Shao et al., arXiv 2402.03300).
    - `constant`: `sum_i sum_t l / (B max_length)`: no length in the divisor (Dr. GRPO, Liu et al., arXiv 2503.20783).
    - `sequence_sum`: `1/B sum_i sum_t l`: a sequence weighs by its length (LUSPO, Liu et al., arXiv 2602.05261).

    Rows without tokens add 0 and count in `B`, as in TRL. Arguments that `how` does not use are ignored, so that a
    caller may pass the same ones for every choice. The arithmetic is that of TRL 1.16, which the tests compare.

    Args:
        token_loss: `l (B, T)`; masked positions may hold anything.
        mask: real tokens `(B, T)`.
        how: one of `AGGREGATIONS`.
        num_items: for `token`, the divisor: the window's tokens per process; this batch's own tokens by default.
        max_length: for `constant`, the longest completion allowed.

    Returns:
        0-d.

    Raises:
        ValueError: `how` is unknown, `max_length` is missing or the shapes do not fit.
    """
    if how == "micro_batch" or (how == "token" and num_items is None):
        return masked_mean(token_loss, mask)
    if how == "token":
        # A window without a single token has a sum of 0: make it 0 / tiny rather than 0 / 0.
        return masked_sum(token_loss, mask) / torch.as_tensor(num_items).clamp(min=1e-9)
    if how == "sequence":
        return masked_mean(token_loss, mask, dim=1).mean()
    if how == "sequence_sum":
        return masked_sum(token_loss, mask, dim=1).mean()
    if how == "constant":
        if max_length is None:
            raise ValueError("aggregation 'constant' divides by max_length: give the longest completion allowed.")
        return masked_sum(token_loss, mask) / (token_loss.shape[0] * max_length)
    raise ValueError(f"Unknown aggregation {how!r}; choose one of {', '.join(AGGREGATIONS)}.")
