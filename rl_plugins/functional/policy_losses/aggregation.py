"""Aggregations: from a loss per token to the number that is minimised. Their divisor sets the weight of a token."""

import torch
from torch import Tensor

from rl_plugins.functional.checks import check_groups
from rl_plugins.functional.masking import masked_mean, masked_sum, upcast

AGGREGATIONS = ("token", "prompt", "sequence", "constant", "sequence_sum", "micro_batch")


def prompt_weights(lengths: Tensor, group_size: int) -> Tensor:
    """Weigh completions so that every prompt counts the same: `w_i = (N / P) / sum_{j of its prompt} |y_j|`.

    `N` is the number of completions and `P` the number of prompts with a token. `1/N sum_i w_i sum_t l` is then
    `1/P sum_p (sum_{i in p} sum_t l) / (sum_{i in p} |y_i|)`. Compute the weights once for a whole batch of all ranks,
    while the completions of a prompt are together. They stay right when the batch is shuffled and cut into slices of
    equal size, whose losses are averaged.

    Args:
        lengths: real tokens of each completion `(N,)`; row `i` belongs to prompt `i // group_size`.
        group_size: completions per prompt.

    Returns:
        `(N,)`, 0 for a prompt without tokens.

    Raises:
        ValueError: the lengths do not divide into groups.
    """
    check_groups("lengths", lengths, group_size)
    tokens = upcast(lengths).view(-1, group_size).sum(1)
    prompts = (tokens > 0).sum().clamp(min=1)
    weights = torch.where(tokens > 0, len(lengths) / (prompts * tokens.clamp(min=1)), 0.0)
    return weights.repeat_interleave(group_size)


def aggregate(
    token_loss: Tensor,
    mask: Tensor,
    how: str,
    *,
    num_items: Tensor | float | None = None,
    max_length: int | None = None,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Reduce a loss per token to one number, in which tokens, sequences or prompts have the same weight.

    - `token`: `sum_i sum_t l / num_items`: every token of the accumulation window weighs the same (TRL's `dapo`, and
      the code of DAPO). Sum the micro-batches; do not average them.
    - `prompt`: `1/P sum_p (sum_{i in p} sum_t l) / (sum_{i in p} |y_i|)`: every prompt weighs the same, and so does
      every token of its completions (DAPO, Yu et al., arXiv 2503.14476, eq. 8; CISPO, arXiv 2506.13585, eq. 4;
      ScaleRL, arXiv 2510.13786, section 4).
    - `micro_batch`: `sum_i sum_t l / sum_i |y_i|`: every token of a micro-batch weighs the same, and so does every
      micro-batch, however many tokens it has (TRL's `bnpo`).
    - `sequence`: `1/B sum_i 1/|y_i| sum_t l`: every sequence weighs the same (GRPO, Shao et al., arXiv 2402.03300).
    - `constant`: `sum_i sum_t l / (B max_length)`: no length in the divisor (Dr. GRPO, Liu et al., arXiv 2503.20783).
    - `sequence_sum`: `1/B sum_i sum_t l`: a sequence weighs by its length (LUSPO, Liu et al., arXiv 2602.05261).

    Rows without tokens add 0 and count in `B`, as in TRL. Arguments that `how` does not use are ignored, so that a
    caller may pass the same ones for every choice.

    Args:
        token_loss: `l (B, T)`; masked positions may hold anything.
        mask: real tokens `(B, T)`.
        how: one of `AGGREGATIONS`.
        num_items: for `token`, the divisor: the tokens of the accumulation window, per process; by default the tokens
            of this batch.
        max_length: for `constant`, the longest completion allowed.
        row_weights: for `prompt`, the [`prompt_weights`] of the rows `(B,)`.

    Returns:
        0-d.

    Raises:
        ValueError: `how` is unknown, `max_length` or `row_weights` is missing or the shapes do not fit.
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
    if how == "prompt":
        if row_weights is None or row_weights.shape != token_loss.shape[:1]:
            given = None if row_weights is None else tuple(row_weights.shape)
            raise ValueError(
                "aggregation 'prompt' needs to know which completions share a prompt: give row_weights "
                f"({token_loss.shape[0]},), the prompt_weights(lengths, group_size) of the whole batch, not {given}."
            )
        return (row_weights * masked_sum(token_loss, mask, dim=1)).mean()
    if how == "constant":
        if max_length is None:
            raise ValueError("aggregation 'constant' divides by max_length: give the longest completion allowed.")
        return masked_sum(token_loss, mask) / (token_loss.shape[0] * max_length)
    raise ValueError(f"Unknown aggregation {how!r}; choose one of {', '.join(AGGREGATIONS)}.")
