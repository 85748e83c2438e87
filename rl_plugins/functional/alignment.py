"""Alignment of states, tokens and multi-token-prediction heads: the one place of index shifts."""

import torch
from torch import Tensor

from rl_plugins.functional.masking import masked_mean


def shift_real(x: Tensor, mask: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """At every real token, the entry of the `offset`-th following real token.

    With real positions `p_0 < p_1 < ...`: `shifted[p_i] = x[p_{i + offset}]`.

    Args:
        x: `(B, T, ...)`, any dtype, which is kept.
        mask: `(B, T)`.
        offset: how many real tokens ahead; negative looks back.

    Returns:
        `(shifted (B, T, ...), valid (B, T))`; 0 and False where there is no such token, or it is masked.

    Raises:
        ValueError: `x` does not begin with the shape of `mask`.
    """
    if mask.ndim != 2 or x.shape[:2] != mask.shape:
        raise ValueError(f"x {tuple(x.shape)} must be (B, T, ...) for a mask (B, T), not {tuple(mask.shape)}.")
    real, length, trailing = mask.bool(), mask.shape[1], (1,) * (x.ndim - 2)
    rank = real.cumsum(1)
    count = rank[:, -1:].clone()
    # Write the real entries side by side into columns 1 .. count, then read them `offset` columns further.
    # The others are 0: column 0 receives every masked token, column T + 1 nothing. The integers are worked on
    # in place because allocating them is most of the time this takes.
    slot = rank.mul_(real)
    goal = (slot + offset).clamp_(0, length + 1).mul_(real)
    entries = x.masked_fill(~real.reshape(real.shape + trailing), 0)
    packed = x.new_zeros(x.shape[0], length + 2, *x.shape[2:])
    packed = packed.scatter_(1, slot.reshape(real.shape + trailing).expand_as(x), entries)
    shifted = packed.gather(1, goal.reshape(real.shape + trailing).expand_as(x))
    return shifted, (goal > 0) & (goal <= count)


def last_real(mask: Tensor) -> Tensor:
    """Mark the last real token of every row.

    Args:
        mask: `(B, T)`.

    Returns:
        `(B, T)` bool; all False in a row without real tokens.
    """
    real = mask.bool()
    return real & (real.cumsum(1) == real.sum(1, keepdim=True))


def next_state_values(values: Tensor, mask: Tensor) -> Tensor:
    """The value of the state after each token: `V(s_{t+1})`, and 0 after the last real token.

    Args:
        values: `V(s_t) (B, T)`.
        mask: `(B, T)`.

    Returns:
        `(B, T)`.

    Raises:
        ValueError: the shapes do not fit.
    """
    return shift_real(values, mask, 1)[0]


def head_targets(targets: Tensor, mask: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Shift the targets of head 1 to all heads: head `k` at `t` regresses on the target at `t + k - 1`.

    `Y_k[t] = Y[t + k - 1]`, counted in real tokens and masked past the end.

    Args:
        targets: targets of head 1 `(B, T)`.
        mask: `(B, T)`.
        num_heads: `K`.

    Returns:
        `(targets (B, T, K), target_mask (B, T, K) bool)`.

    Raises:
        ValueError: `num_heads` is below 1, or the shapes do not fit.
    """
    _check_heads(num_heads)
    shifted, valid = zip(*(shift_real(targets, mask, k) for k in range(num_heads)), strict=True)
    return torch.stack(shifted, -1), torch.stack(valid, -1)


def lookahead_values(values: Tensor, mask: Tensor, num_heads: int | None = None) -> Tensor:
    """Average of the forecasts of `V(s_t)` that the heads made at `t` and before it.

    `mean_k v_k[t - k + 1]`, counted in real tokens, over those heads for which that token exists.

    Args:
        values: `(B, T, K)`.
        mask: `(B, T)`.
        num_heads: use the first so many heads; all `K` by default.

    Returns:
        `(B, T)`, float32 or wider.

    Raises:
        ValueError: `num_heads` is not in `1..K`, or the shapes do not fit.
    """
    available = values.shape[-1]
    num_heads = available if num_heads is None else num_heads
    _check_heads(num_heads)
    if values.ndim != 3 or num_heads > available:
        raise ValueError(f"num_heads={num_heads} needs values (B, T, K >= {num_heads}), not {tuple(values.shape)}.")
    shifted, valid = zip(*(shift_real(values[..., k], mask, -k) for k in range(num_heads)), strict=True)
    return masked_mean(torch.stack(shifted, -1), torch.stack(valid, -1), dim=-1)


def mtp_labels(labels: Tensor, num_heads: int, position_ids: Tensor | None = None, ignore_index: int = -100) -> Tensor:
    """Token labels of the heads: where the main head predicts token `p + 1`, head `k` takes `p + 1 + k`.

    `labels_k[p] = labels[p + 1 + k]` (DeepSeek-V3, arXiv 2412.19437, section 2.2).

    Args:
        labels: `(B, L)`, aligned with the input tokens (not shifted).
        num_heads: `K`.
        position_ids: `(B, L)` of packed rows; a label from another document is ignored.
        ignore_index: the label of positions without a target.

    Returns:
        `(B, L, K)`.

    Raises:
        ValueError: `num_heads` is below 1, or `position_ids` has another shape than `labels`.
    """
    _check_heads(num_heads)
    length = labels.shape[1]
    ahead = torch.arange(2, num_heads + 2, device=labels.device)  # (K,), 1 + k
    source = torch.arange(length, device=labels.device)[:, None] + ahead  # (L, K)
    missing = (source >= length).expand(labels.shape[0], -1, -1)
    source = source.clamp(max=max(length - 1, 0))
    if position_ids is not None:
        if position_ids.shape != labels.shape:
            raise ValueError(f"position_ids {tuple(position_ids.shape)} must have labels' {tuple(labels.shape)}.")
        # Positions restart with every packed document, so within one they differ by exactly the distance.
        missing = missing | (position_ids[:, source] != position_ids[..., None] + ahead)
    return labels[:, source].masked_fill(missing, ignore_index)


def completion_states(hidden: Tensor, num_tokens: int) -> Tensor:
    """The states `s_0 .. s_{T-1}` that predict the completion: each token's predecessor.

    `hidden[:, P-1 : P+T-1]`, counted from the right.

    Args:
        hidden: `(B, P + T, ...)` over prompt and completion.
        num_tokens: `T`.

    Returns:
        `(B, T, ...)`.

    Raises:
        ValueError: there are fewer than `T + 1` positions.
    """
    if hidden.shape[1] < num_tokens + 1:
        raise ValueError(
            f"{num_tokens} completion tokens need {num_tokens + 1} positions, hidden has {hidden.shape[1]}: "
            "keep at least the last prompt token (logits_to_keep + 1)."
        )
    return hidden[:, -(num_tokens + 1) : -1]


def completion_labels(prompt_ids: Tensor, completion_ids: Tensor, mask: Tensor, num_heads: int) -> Tensor:
    """Token labels of the heads along a completion: at `y_t`, head `k` takes `y_{t+k}`.

    Args:
        prompt_ids: `(B, P)`.
        completion_ids: `(B, T)`.
        mask: real tokens of the completion `(B, T)`.
        num_heads: `K`.

    Returns:
        `(B, T, K)`, -100 where there is no such token.

    Raises:
        ValueError: `num_heads` is below 1, or there is no prompt.
    """
    tokens = torch.cat([prompt_ids, completion_ids.masked_fill(~mask.bool(), -100)], dim=1)
    return completion_states(mtp_labels(tokens, num_heads), completion_ids.shape[1])


def predicted_mask(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Which actions of a labelled row count: action `t` is token `t + 1`, chosen in the state of token `t`.

    Goes with `completion_states(hidden, L - 1)`, which takes the whole row after its first token for the completion.

    Args:
        labels: `(B, L)`.
        ignore_index: label of tokens without loss.

    Returns:
        `(B, L - 1)` bool.
    """
    return labels[:, 1:] != ignore_index


def _check_heads(num_heads: int) -> None:
    if num_heads < 1:
        raise ValueError(f"num_heads={num_heads}: give at least one head.")
