"""Alignment of states, tokens and multi-token-prediction heads: the only file that shifts indices.

Arguments that functions here share, and do not list again:
    mask: real tokens `(B, T)`; distances count real tokens only.
    num_heads: `K`, at least 1.
    ahead: how many tokens further each head looks than the one before it: 1 for parallel heads, which forecast from
        one hidden state; 0 for sequential heads, which have read the tokens in between.

The functions raise `ValueError` where shapes do not fit or `num_heads` is out of range.
"""

import torch
from torch import Tensor

from rl_plugins.functional.checks import check_shape
from rl_plugins.functional.masking import masked_mean


def shift_real(x: Tensor, mask: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """Pair every token with one that follows or precedes it, counted in real tokens.

    With real positions `p_0 < p_1 < ...`: `shifted[p_i] = x[p_{i + offset}]`.

    Args:
        x: `(B, T, ...)`, any dtype, which is kept.
        offset: number of real tokens to look ahead; negative looks back.

    Returns:
        `(shifted (B, T, ...), valid (B, T))`; 0 and False where there is no such token, and at masked positions.
    """
    if mask.ndim != 2 or x.shape[:2] != mask.shape:
        raise ValueError(f"x {tuple(x.shape)} must be (B, T, ...) for a mask (B, T), not {tuple(mask.shape)}.")
    real, length, trailing = mask.bool(), mask.shape[1], (1,) * (x.ndim - 2)
    # Write the real entries side by side into columns 1 .. count of T + 2, then read them `offset` columns further.
    # Column 0 receives every masked token, as a 0, and column T + 1 nothing. A row with offset = 1:
    #
    #     x    = a b c d      mask = 1 0 1 1      count = 3
    #     slot = 1 0 2 3      where each entry is written:  packed = 0 a c d 0 0
    #     goal = 2 0 3 4      where each one reads:        shifted = c 0 d 0      valid = 1 0 1 0
    #
    # The integers are changed in place, because their allocation would take most of the time.
    rank = real.cumsum(1)
    count = rank[:, -1:].clone()
    slot = rank.mul_(real)
    goal = (slot + offset).clamp_(0, length + 1).mul_(real)
    entries = x.masked_fill(~real.reshape(real.shape + trailing), 0)
    packed = x.new_zeros(x.shape[0], length + 2, *x.shape[2:])
    packed = packed.scatter_(1, slot.reshape(real.shape + trailing).expand_as(x), entries)
    shifted = packed.gather(1, goal.reshape(real.shape + trailing).expand_as(x))
    return shifted, (goal > 0) & (goal <= count)


def last_real(mask: Tensor) -> Tensor:
    """Mark the last real token of every row, where a completion ends.

    Returns:
        `(B, T)` bool; all False in a row without real tokens.
    """
    real = mask.bool()
    return real & (real.cumsum(1) == real.sum(1, keepdim=True))


def next_state_values(values: Tensor, mask: Tensor) -> Tensor:
    """Return the value of the state after each token, for one-step targets: `V(s_{t+1})`, 0 after the last one.

    Args:
        values: `V(s_t) (B, T)`.

    Returns:
        `(B, T)`.
    """
    return shift_real(values, mask, 1)[0]


def value_after(values: Tensor, mask: Tensor) -> Tensor:
    """Return the value of the state in which each completion ends: that of the column after its last token.

    Args:
        values: Those of the states before the tokens, and of the state after the last column `(B, T + 1)`.
        mask: 1 for the tokens of a completion `(B, T)`; may have holes.

    Returns:
        `(B,)`; that of the first column where a row has no token.
    """
    check_shape("values", values, (mask.shape[0], mask.shape[1] + 1), "give one more column than the mask has")
    columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return values.gather(1, (mask.bool() * columns).amax(1, keepdim=True)).squeeze(1)


def head_targets(targets: Tensor, mask: Tensor, num_heads: int, *, ahead: int = 1) -> tuple[Tensor, Tensor]:
    """Shift the value targets of head 1 to all heads: parallel head `k` learns the return that begins `k - 1` tokens
    later.

    `Y_k[t] = Y[t + (k - 1) ahead]`, counted in real tokens and masked past the end.

    Args:
        targets: targets of head 1 `(B, T)`.

    Returns:
        `(targets (B, T, K), target_mask (B, T, K) bool)`.
    """
    _check_heads(num_heads)
    shifted, valid = zip(*(shift_real(targets, mask, k * ahead) for k in range(num_heads)), strict=True)
    return torch.stack(shifted, -1), torch.stack(valid, -1)


def lookahead_values(values: Tensor, mask: Tensor, num_heads: int | None = None, *, ahead: int = 1) -> Tensor:
    """Average all heads' forecasts of `V(s_t)`, made at `t` and before it, into one value.

    `mean_k v_k[t - (k - 1) ahead]`, counted in real tokens, over those of the first `num_heads` heads (all by
    default) for which that token exists.

    Args:
        values: `(B, T, K)`.

    Returns:
        `(B, T)`, float32 or wider.
    """
    available = values.shape[-1]
    num_heads = available if num_heads is None else num_heads
    _check_heads(num_heads)
    if values.ndim != 3 or num_heads > available:
        raise ValueError(f"num_heads={num_heads} needs values (B, T, K >= {num_heads}), not {tuple(values.shape)}.")
    shifted, valid = zip(*(shift_real(values[..., k], mask, -k * ahead) for k in range(num_heads)), strict=True)
    return masked_mean(torch.stack(shifted, -1), torch.stack(valid, -1), dim=-1)


def mtp_labels(
    labels: Tensor,
    num_heads: int,
    position_ids: Tensor | None = None,
    ignore_index: int = -100,
    *,
    ahead: int = 1,
) -> Tensor:
    """Make the token labels of the heads: parallel head `k` learns the token `k` places after the main head's.

    `labels_k[p] = labels[p + 1 + k ahead]`, where the main head predicts token `p + 1` (Gloeckle et al., arXiv
    2404.19737, section 2). A sequential head that has read token `p` learns token `p + 1`, too.

    Args:
        labels: `(B, L)`, aligned with the input tokens (not shifted).
        position_ids: `(B, L)` of packed rows; a label from another document is ignored.
        ignore_index: the label of positions without a target.

    Returns:
        `(B, L, K)`.
    """
    _check_heads(num_heads)
    length = labels.shape[1]
    distance = 1 + ahead * torch.arange(1, num_heads + 1, device=labels.device)  # (K,)
    source = torch.arange(length, device=labels.device)[:, None] + distance  # (L, K)
    missing = (source >= length).expand(labels.shape[0], -1, -1)
    source = source.clamp(max=max(length - 1, 0))
    if position_ids is not None:
        check_shape("position_ids", position_ids, labels.shape, "give the position of each label")
        # Positions restart with every packed document, so within one they differ by exactly the distance.
        missing = missing | (position_ids[:, source] != position_ids[..., None] + distance)
    return labels[:, source].masked_fill(missing, ignore_index)


def completion_states(hidden: Tensor, num_tokens: int) -> Tensor:
    """Cut out the states `s_0 .. s_{T-1}` in which a completion's tokens are chosen: each token's predecessor.

    `hidden[:, P-1 : P+T-1]`, counted from the right.

    Args:
        hidden: `(B, P + T, ...)` over prompt and completion; at least `T + 1` positions.
        num_tokens: `T`.

    Returns:
        `(B, T, ...)`.
    """
    if hidden.shape[1] < num_tokens + 1:
        raise ValueError(
            f"{num_tokens} completion tokens need {num_tokens + 1} positions, hidden has {hidden.shape[1]}: "
            "keep at least the last prompt token (logits_to_keep + 1)."
        )
    return hidden[:, -(num_tokens + 1) : -1]


def completion_labels(
    prompt_ids: Tensor, completion_ids: Tensor, mask: Tensor, num_heads: int, *, ahead: int = 1
) -> Tensor:
    """Make the token labels of the heads along a completion: in the state of `y_t`, head `k` learns `y_{t + k ahead}`.

    Args:
        prompt_ids: `(B, P)`, at least one token.
        completion_ids: `(B, T)`.

    Returns:
        `(B, T, K)`, -100 where there is no such token.
    """
    tokens = torch.cat([prompt_ids, completion_ids.masked_fill(~mask.bool(), -100)], dim=1)
    return completion_states(mtp_labels(tokens, num_heads, ahead=ahead), completion_ids.shape[1])


def predicted_mask(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Mark the actions of a labelled row that count in a loss.

    Action `t` is token `t + 1`, chosen in the state of token `t`. The mask goes with
    `completion_states(hidden, L - 1)`, which takes the row after its first token for the completion.

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
