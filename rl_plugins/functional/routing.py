"""Balance of mixture-of-experts routers: losses on their logits, updates of their selection bias, and measures.

The functions take the experts of a token from the router and never choose them again: with a bias on the selection, or
with groups of experts, the experts used need not be those with the largest logits.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from rl_plugins.functional.masking import masked_mean, upcast, zero_masked

Scoring = Literal["softmax", "sigmoid"]
"""The function that turns the logits of a router into scores."""

BiasRule = Literal["sign", "proportional", "quantile"]
"""One of `BIAS_RULES`."""


def router_probabilities(logits: Tensor, scoring: Scoring = "softmax") -> Tensor:
    """Compute a router's scores, normalised over the experts.

    - `softmax`: `p_i = exp(x_i) / sum_j exp(x_j)`.
    - `sigmoid`: `p_i = s_i / sum_j s_j`, `s_i = 1 / (1 + exp(-x_i))` (DeepSeek-V3, arXiv 2412.19437, eq. 19).

    Args:
        logits: `x (..., E)`.
        scoring: the router's own scores.

    Returns:
        `(..., E)`, sums to 1 over the last dimension.

    Raises:
        ValueError: `scoring` is unknown.
    """
    logits = upcast(logits)
    if scoring == "softmax":
        return logits.softmax(-1)
    if scoring == "sigmoid":
        # This equals a division by the sum, but is not 0 / 0 where all scores underflow.
        return F.logsigmoid(logits).softmax(-1)
    raise ValueError(f"Unknown scoring {scoring!r}; choose 'softmax' or 'sigmoid', whichever the router uses.")


def expert_counts(indices: Tensor, num_experts: int, mask: Tensor | None = None) -> Tensor:
    """Count the real tokens of each expert: `c_i = sum_t m_t [i in indices_t]`.

    The host does not wait for the device.

    Args:
        indices: experts of each token `(N, k)`; rows of masked tokens may hold anything.
        num_experts: `E`.
        mask: real tokens `(N,)`; `None` means all.

    Returns:
        `c (E,)`, int64, sums to `k` times the real tokens.

    Raises:
        ValueError: the shapes do not fit.
    """
    _check_indices(indices, 2, "(N, k)")
    if mask is not None:
        mask = _check_mask(mask, indices)
    return _count(indices[None], num_experts, None if mask is None else mask[None])[0]


def load_fractions(counts: Tensor, k: int) -> Tensor:
    """Compute the share of the tokens that each expert has: `f_i = k c_i / sum_j c_j`, or `c_i / n` for `n` tokens.

    Fedus et al., arXiv 2101.03961, eq. 5, for `k` experts per token.

    Args:
        counts: `c (..., E)`, from [`expert_counts`]; sums to `k n`.
        k: experts per token.

    Returns:
        `f (..., E)`, sums to `k`; 0 where there are no tokens.
    """
    return k * _over_total(counts, counts)


def switch_balance_loss(
    logits: Tensor, fractions: Tensor, mask: Tensor | None = None, *, scoring: Scoring = "softmax"
) -> Tensor:
    """Compute the balance loss of Switch Transformers for one layer: `E sum_i f_i P_i`.

    `f_i` is the share of the tokens that went to expert `i`, a constant in the gradient, and
    `P_i = 1/n sum_t p_i(x_t)` is the mean probability of that expert over the `n` real tokens (Fedus et al., arXiv
    2101.03961, eq. 4 to 6). The shares sum to `k`, as in the library transformers, so that the same coefficients can
    be used: the loss of a balanced router is `k`.

    The tokens behind the shares decide what has to be balanced. Shares of the same tokens,
    `load_fractions(expert_counts(indices, E, mask), k)`, ask for balance within the micro-batch, which costs
    specialisation. Shares of the accumulation window or of all ranks ask for balance over all of these tokens (Qiu et
    al., arXiv 2501.11873). With the mean of the shares over all layers, the mean of this loss over the layers is
    transformers' `load_balancing_loss_func`. That function asks for too little: two layers that have collapsed onto
    opposite experts are balanced on average (huggingface/transformers#31464).

    Args:
        logits: of the layer's router, `(N, E)`; masked tokens may hold anything.
        fractions: `f (E,)`, summing to `k`.
        mask: real tokens `(N,)`; `None` means all.
        scoring: the router's own scores.

    Returns:
        0-d; 0 where no token is real.

    Raises:
        ValueError: the shapes do not fit.
    """
    p = _mean_probabilities(logits, mask, scoring)
    if fractions.shape != p.shape:
        raise ValueError(f"fractions {tuple(fractions.shape)}: give (E,), here {tuple(p.shape)}.")
    return len(p) * (upcast(fractions.detach()).to(p.device) * p).sum()


def sequence_balance_loss(
    logits: Tensor, indices: Tensor, mask: Tensor | None = None, *, scoring: Scoring = "sigmoid"
) -> Tensor:
    """Compute DeepSeek-V3's balance loss within each sequence, for one layer: the mean of `sum_i f_i P_i`.

    `f_i = E / (k n) c_i` from the `n` real tokens of a sequence, a constant in the gradient, and
    `P_i = 1/n sum_t p_i(x_t)` (arXiv 2412.19437, eq. 17 to 20). The loss is 1 where a sequence is balanced. The counts
    are those of `indices`, the experts that the router used. Eq. 18 counts the experts with the largest scores without
    the bias, which are others once the selection has a bias.

    Args:
        logits: `x (B, T, E)`; masked tokens may hold anything.
        indices: experts of each token `(B, T, k)`.
        mask: real tokens `(B, T)`; `None` means all.
        scoring: the router's own scores.

    Returns:
        0-d: mean over the sequences that have a real token, 0 where none has.

    Raises:
        ValueError: the shapes do not fit.
    """
    _check_indices(indices, 3, "(B, T, k)")
    _check_routed(logits, indices)
    real = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device) if mask is None else mask
    real = _check_mask(real, indices)
    tokens = real.sum(1, keepdim=True)
    experts, k = logits.shape[-1], indices.shape[-1]
    p = (router_probabilities(zero_masked(logits, real), scoring) * real[..., None]).sum(1) / tokens.clamp(min=1)
    f = load_fractions(_count(indices, experts, real).to(p.dtype), k) * (experts / k)
    return masked_mean((f * p).sum(-1), tokens.squeeze(1) > 0)


def router_z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute the z-loss of ST-MoE, which keeps logits small: `1/n sum_t (ln sum_i exp(x_ti))^2`.

    Zoph et al., arXiv 2202.08906, eq. 5.

    Args:
        logits: `x (N, E)`; masked tokens may hold anything.
        mask: real tokens `(N,)`; `None` means all.

    Returns:
        0-d; 0 where no token is real.

    Raises:
        ValueError: the shapes do not fit.
    """
    _check_logits(logits)
    real = torch.ones_like(logits[:, 0], dtype=torch.bool) if mask is None else _check_mask(mask, logits)
    return masked_mean(zero_masked(logits, real).logsumexp(-1) ** 2, real)


def _sign(bias: Tensor, counts: Tensor, targets: Tensor | None) -> Tensor:
    """Compute `sign(mean c - c_i)`."""
    return _shortfall(counts).sign().to(bias.dtype)


def _proportional(bias: Tensor, counts: Tensor, targets: Tensor | None) -> Tensor:
    """Compute `(mean c - c_i) / mean c`."""
    return _over_total(_shortfall(counts).to(bias.dtype), counts)


def _quantile(bias: Tensor, counts: Tensor, targets: Tensor | None) -> Tensor:
    """Compute `targets_i - b_i`."""
    if targets is None or targets.shape != bias.shape:
        raise ValueError(
            f"rule 'quantile' moves to targets: give those of selection_bias_quantile, {tuple(bias.shape)}."
        )
    return upcast(targets) - bias


BIAS_RULES: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "sign": _sign,
    "proportional": _proportional,
    "quantile": _quantile,
}
"""For each name, the function that computes the direction of the step from the bias, the counts and the targets."""


def selection_bias_update(
    bias: Tensor, counts: Tensor, *, rate: float, rule: BiasRule = "sign", targets: Tensor | None = None
) -> Tensor:
    """Compute the next bias on the scores that select experts, to balance without a loss: `b + d - mean d`.

    - `sign`: `d_i = rate sign(mean c - c_i)` (Wang et al., arXiv 2408.15664, algorithm 1).
    - `proportional`: `d_i = rate (mean c - c_i) / mean c`: smaller steps where the load is nearly balanced.
    - `quantile`: `d_i = rate (targets_i - b_i)`, towards the bias that would have balanced these tokens.

    The bias changes which experts are chosen, and not their weights. A constant added to all biases of a layer changes
    nothing, so the mean of `d` is subtracted. Otherwise the bias would drift away from the scores, until half
    precision no longer resolves the differences.

    Args:
        bias: `b (..., E)`: one layer, or several stacked.
        counts: `c (..., E)` tokens of each expert, over all ranks and the whole optimizer step.
        rate: size of the step; 0 leaves the bias as it is.
        rule: one of `BIAS_RULES`.
        targets: `(..., E)` from `selection_bias_quantile`, for `quantile`.

    Returns:
        The new bias `(..., E)`, float32 or wider. Store it so, since 0.5 + 0.001 is 0.5 in bfloat16. Layers without
        any token keep their bias.

    Raises:
        ValueError: `rule` is unknown or lacks its `targets`, `rate` is negative or the shapes differ.
    """
    if rule not in BIAS_RULES:
        raise ValueError(f"Unknown rule {rule!r}; choose one of {', '.join(BIAS_RULES)}.")
    if not rate >= 0:
        raise ValueError(f"rate={rate}: must not be negative, or busy experts get busier.")
    if bias.shape != counts.shape:
        raise ValueError(f"bias {tuple(bias.shape)} and counts {tuple(counts.shape)} differ: give both as (..., E).")
    bias = upcast(bias)
    step = rate * BIAS_RULES[rule](bias, counts, targets)
    return torch.where(counts.sum(-1, keepdim=True) > 0, bias + step - step.mean(-1, keepdim=True), bias)


def selection_bias_quantile(scores: Tensor, bias: Tensor, k: int, mask: Tensor | None = None) -> Tensor:
    """Compute the bias with which `k / E` of the tokens would choose each expert (Quantile Balancing).

    `b_j = -Q_{1 - k/E}(s_tj - a_t)` over the real tokens `t`. An expert must exceed the threshold `a_t` to be chosen:
    the `(k + 1)`-th largest of `s_t + b` with the bias in use. This is one of two alternating steps that solve the
    balanced assignment (Jianlin Su, kexue.fm/archives/11619).

    Args:
        scores: `s (N, E)`, to which the selection adds the bias; masked tokens may hold anything.
        bias: `b (E,)` in use.
        k: experts per token.
        mask: real tokens `(N,)`; `None` means all.

    Returns:
        Targets `(E,)` for `selection_bias_update`; `b` where no token is real.

    Raises:
        ValueError: `k` is not in `[1, E - 1]` or the shapes do not fit.
    """
    _check_logits(scores, "scores")
    experts = scores.shape[1]
    if not 1 <= k < experts:
        raise ValueError(f"k={k} of {experts} experts: with k outside [1, E - 1] there is nothing to select.")
    if bias.shape != (experts,):
        raise ValueError(f"bias {tuple(bias.shape)}: give one per expert, ({experts},).")
    real = torch.ones_like(scores[:, 0], dtype=torch.bool) if mask is None else _check_mask(mask, scores)
    scores, bias = zero_masked(scores, real), upcast(bias)
    if not len(scores):
        return bias
    threshold = (scores + bias).topk(k + 1, dim=-1).values[:, -1:]
    quantile = _upper_quantile(torch.where(real[:, None], scores - threshold, -torch.inf), real.sum(), k, experts)
    return torch.where(real.any(), -quantile, bias)


def max_violation(counts: Tensor) -> Tensor:
    """Measure how much more than its share the busiest expert has: `(max c - mean c) / mean c`.

    MaxVio of Wang et al., arXiv 2408.15664, eq. 4: 0 where balanced, `E / k - 1` where all tokens go to the
    same experts.

    Args:
        counts: `c (..., E)`.

    Returns:
        `(...)`; 0 where there are no tokens.
    """
    return _over_total(-_shortfall(counts), counts).amax(-1)


def load_entropy(counts: Tensor) -> Tensor:
    """Compute the entropy of the load, divided by that of a balanced load.

    `-sum_i q_i ln q_i / ln E`, with `q_i = c_i / sum_j c_j`.

    Args:
        counts: `c (..., E)`.

    Returns:
        `(...)` in `[0, 1]`; 1 where the load is balanced, where there are no tokens, and with a single expert.
    """
    experts = counts.shape[-1]
    if experts == 1:
        return torch.ones_like(upcast(counts[..., 0]))
    entropy = torch.special.entr(_over_total(counts, counts)).sum(-1) / math.log(experts)
    return torch.where(counts.sum(-1) > 0, entropy, 1.0)


def _mean_probabilities(logits: Tensor, mask: Tensor | None, scoring: Scoring) -> Tensor:
    """Compute the mean probability of each expert over the real tokens `(E,)`; 0 where no token is real."""
    _check_logits(logits)
    if mask is None:
        return router_probabilities(logits, scoring).sum(0) / max(len(logits), 1)
    real = _check_mask(mask, logits)
    tokens = real.sum().clamp(min=1)
    if _is_free_to_select(logits):
        rows = logits.index_select(0, real.nonzero().squeeze(1))
        return router_probabilities(rows, scoring).sum(0) / tokens
    # Not a matrix product, which autocast would compute in bfloat16.
    return (router_probabilities(zero_masked(logits, real), scoring) * real[:, None]).sum(0) / tokens


def _is_free_to_select(x: Tensor) -> bool:
    """Tell whether rows can be selected without a wait for the device; this is twice as fast as masking them."""
    return x.device.type == "cpu"


def _count(indices: Tensor, num_experts: int, mask: Tensor | None) -> Tensor:
    """Count each expert in indices `(B, T, k)` where the mask `(B, T)` is set: `(B, E)`."""
    weights = torch.ones_like(indices, dtype=torch.int64)
    if mask is not None:
        weights = mask[..., None].expand_as(indices).long()
        indices = indices * weights
    zeros = weights.new_zeros(len(indices), num_experts)
    # Not bincount, which makes the host wait for a GPU.
    return zeros.scatter_add_(1, indices.flatten(1).long(), weights.flatten(1))


def _shortfall(counts: Tensor) -> Tensor:
    """Compute `E (mean c - c_i)`, which is exact for integers."""
    counts = _wide(counts)
    return counts.sum(-1, keepdim=True) - counts.shape[-1] * counts


def _over_total(x: Tensor, counts: Tensor) -> Tensor:
    """Compute `x / sum_j c_j`, 0 where there are no tokens."""
    total = _wide(counts).sum(-1, keepdim=True)
    return torch.where(total > 0, _wide(x) / torch.where(total > 0, total, 1), 0.0)


def _wide(counts: Tensor) -> Tensor:
    """Upcast floats, and keep integers, which count further than float32."""
    return upcast(counts) if counts.is_floating_point() else counts


def _upper_quantile(x: Tensor, rows: Tensor, k: int, of: int) -> Tensor:
    """Interpolate the `1 - k / of` quantile of the largest `rows` entries of every column of `x (N, E)`."""
    # Not torch.quantile, which neither takes a mask nor more than 16 million entries.
    ordered = x.sort(dim=0, descending=True).values
    position = (rows - 1).clamp(min=0) * k
    low = position // of
    above, below = (ordered.index_select(0, row.reshape(1)).squeeze(0) for row in (low, low + (position % of > 0)))
    return torch.lerp(above, below, (position % of).to(x.dtype) / of)


def _check_logits(logits: Tensor, name: str = "logits") -> None:
    if logits.ndim != 2:
        raise ValueError(f"{name} {tuple(logits.shape)}: give one row per token, (N, E); flatten (B, T, E).")


def _check_indices(indices: Tensor, ndim: int, shape: str) -> None:
    if indices.ndim != ndim or indices.is_floating_point() or indices.dtype == torch.bool:
        raise ValueError(f"indices {tuple(indices.shape)} {indices.dtype}: give the chosen experts {shape}, integer.")


def _check_routed(logits: Tensor, indices: Tensor) -> None:
    if logits.shape[:-1] != indices.shape[:-1]:
        raise ValueError(
            f"logits {tuple(logits.shape)} and indices {tuple(indices.shape)} differ before the last dimension: "
            "give both for the same tokens."
        )


def _check_mask(mask: Tensor, x: Tensor) -> Tensor:
    """Return `mask` as bool, on the device of `x`."""
    if mask.shape != x.shape[:-1]:
        raise ValueError(f"mask {tuple(mask.shape)}: give one entry per token, {tuple(x.shape[:-1])}.")
    return mask.to(device=x.device, dtype=torch.bool)
