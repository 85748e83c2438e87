"""Log-probabilities and entropies of tokens, from logits."""

import torch
from torch import Tensor

from rl_plugins.functional.masking import upcast


def token_log_probs(logits: Tensor, tokens: Tensor, *, temperature: float = 1.0) -> Tensor:
    """`ln pi(y_t|s_t) = z_y / tau - ln sum_a exp(z_a / tau)`, the policy that samples at temperature `tau`.

    Args:
        logits: `z (B, T, V)`, those that predict each token.
        tokens: `y (B, T)`.
        temperature: `tau`.

    Returns:
        `(B, T)`, float32 or wider.

    Raises:
        ValueError: `temperature` is not positive, or the shapes do not fit.
    """
    _check(logits, tokens.shape, temperature)
    # Row by row, so that only one row of (T, V) is ever held in float32 beside the logits.
    rows = [_row_log_probs(row, ids, temperature) for row, ids in zip(logits, tokens, strict=True)]
    return torch.stack(rows) if rows else upcast(logits.new_zeros(tokens.shape))


def token_entropies(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """`H(pi(.|s_t)) = -sum_a pi ln pi` in nats, where `0 ln 0 = 0`: a logit of -inf forbids its token.

    Args:
        logits: `(B, T, V)`.
        temperature: `tau`.

    Returns:
        `(B, T)`, float32 or wider.

    Raises:
        ValueError: `temperature` is not positive, or there are no three dimensions.
    """
    _check(logits, logits.shape[:-1], temperature)
    rows = [_row_entropies(row, temperature) for row in logits]
    return torch.stack(rows) if rows else upcast(logits.new_zeros(logits.shape[:-1]))


def _row_log_probs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    scaled = upcast(logits) / temperature
    return scaled.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(-1)


def _row_entropies(logits: Tensor, temperature: float) -> Tensor:
    logps = (upcast(logits) / temperature).log_softmax(-1)
    # 0 * -inf is NaN, in the value and in the gradient; 0 times the lowest number is 0 in both.
    return -(logps.exp() * logps.clamp(min=torch.finfo(logps.dtype).min)).sum(-1)


def _check(logits: Tensor, shape: torch.Size, temperature: float) -> None:
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}: give a positive number; greedy decoding has no distribution.")
    if logits.ndim != 3 or logits.shape[:-1] != shape:
        raise ValueError(f"logits {tuple(logits.shape)} must be (B, T, V) for tokens (B, T) = {tuple(shape)}.")
