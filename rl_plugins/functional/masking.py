"""Sums and moments over the real tokens of a batch.

Arguments that functions here share, and do not list again:
    x: `(B, T, ...)`; masked entries may hold anything (NaN, inf).
    mask: `(B, T)`, or any leading part of the shape of `x`; true for real entries.
    dim: dimension to reduce; all of them by default.
    reduce: a function that sums a 1-D tensor of statistics across ranks; `None` where there is one rank.

Functions with a `mask` raise `ValueError` where its shape is not a leading part of the shape of `x`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rl_plugins.functional.checks import check_shape

Reduce = Callable[[Tensor], Tensor]
"""A function that sums a 1-D tensor of statistics across ranks; `None` in a signature means one rank."""


def upcast(x: Tensor) -> Tensor:
    """Return `x` as float32, or as float64 where it already is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def zero_masked(x: Tensor, mask: Tensor) -> Tensor:
    """Replace the masked entries of `x` by 0, whatever they hold, and cut their gradient.

    Apply it to the *inputs* of a loss: a NaN that is replaced only after the loss is still a NaN in the gradient.

    Returns:
        The shape of `x`, float32 or wider.
    """
    return torch.where(_expand(mask, x), upcast(x), 0.0)


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum over the real entries: `sum_i m_i x_i`.

    Returns:
        0-d, or the shape of `x` without `dim`.
    """
    real = zero_masked(x, mask)
    return real.sum() if dim is None else real.sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Average over the real entries, 0 where there is none: `sum_i m_i x_i / max(sum_i m_i, 1)`.

    Returns:
        0-d, or the shape of `x` without `dim`.
    """
    real = _expand(mask, x)
    count = real.sum() if dim is None else real.sum(dim)
    return masked_sum(x, mask, dim) / count.clamp(min=1)


def masked_moments(x: Tensor, mask: Tensor, *, reduce: Reduce | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Take mean, population variance and count over the real entries of every rank.

    `mean = sum m x / sum m`, `var = sum m (x - mean)^2 / sum m`; all three are 0 where the mask is empty. The sums are
    taken in float64: equal numbers have a variance of exactly 0, and a small spread around a large mean keeps its
    digits.

    Returns:
        `(mean, var, count)`, each 0-d and floating.
    """
    mean, var, count = (m.to(upcast(x).dtype) for m in exact_moments(x, mask, reduce=reduce))
    return mean, var, count


def exact_moments(x: Tensor, mask: Tensor, *, reduce: Reduce | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `masked_moments` and return them in float64, for callers that subtract the mean from `x`.

    The sum of equal float32 numbers is exact in float64 (up to 2^29 of them), hence so is their mean.
    """
    real = zero_masked(x.double(), mask)
    local = torch.stack([real.sum(), _expand(mask, x).sum().double()])
    total, count = (reduce(local) if reduce else local).unbind()
    mean = total / count.clamp(min=1)
    # A second pass: E[x^2] - E[x]^2 would cancel to noise where the mean is much larger than the spread.
    squares = masked_sum((real - mean) ** 2, mask).reshape(1)
    var = (reduce(squares) if reduce else squares).squeeze(0) / count.clamp(min=1)
    # The mean of equal float64 numbers may be off by a few units in the last place, which is no variance.
    rounding = 32 * torch.finfo(mean.dtype).eps * mean
    return mean, torch.where(var <= rounding**2, 0.0, var), count


def masked_whiten(
    x: Tensor, mask: Tensor, *, shift_mean: bool = True, eps: float = 1e-8, reduce: Reduce | None = None
) -> Tensor:
    """Scale the real entries to unit variance and, with `shift_mean`, zero mean, so that their units do not matter.

    `(x - mean) / sqrt(var + eps)`, plus `mean` without `shift_mean`, which is for rewards whose sign matters. The
    differences are taken in float64, as in `masked_moments`: equal entries become exactly 0, or stay as they are
    without `shift_mean`.

    Args:
        shift_mean: whether to leave the mean at 0.
        eps: added to the variance.

    Returns:
        The shape of `x`, 0 outside the mask, float32 or wider.
    """
    mean, var, _ = exact_moments(x, mask, reduce=reduce)
    # Without variance the difference is the rounding of the mean.
    deviations = torch.where(var == 0, 0.0, zero_masked(x.double(), mask) - mean)
    white = deviations * torch.rsqrt(var + eps)
    return zero_masked(white if shift_mean else white + mean, mask).to(upcast(x).dtype)


def explained_variance(predictions: Tensor, targets: Tensor, mask: Tensor, *, reduce: Reduce | None = None) -> Tensor:
    """Measure how much of the targets' variance the predictions explain: `1 - Var(y - yhat) / Var(y)`.

    1 is perfect, 0 is as good as the targets' mean, and below 0 is worse than that.

    Args:
        predictions: `yhat (B, T, ...)`.
        targets: `y`, the shape of `predictions`.

    Returns:
        0-d; NaN where the targets do not vary or the mask is empty.
    """
    check_shape("predictions", predictions, targets.shape, "align them with the targets")
    _, var, _ = exact_moments(targets, mask, reduce=reduce)
    residual_var = exact_moments(targets.double() - predictions.double(), mask, reduce=reduce)[1]
    share = torch.where(var > 0, 1 - residual_var / var, torch.nan)
    return share.to(torch.promote_types(upcast(targets).dtype, predictions.dtype))


def masked_line(
    x: Tensor,
    y: Tensor,
    mask: Tensor,
    *,
    slopes: tuple[float, float] = (-torch.inf, torch.inf),
    reduce: Reduce | None = None,
) -> tuple[Tensor, Tensor]:
    """Fit the line that predicts `y` from `x` with the least squared error over the real entries of every rank.

    `slope = Cov(x, y) / Var(x)`, and the line goes through both means.

    Args:
        x: `(B, T)`.
        y: the shape of `x`.
        slopes: smallest and largest slope; the best one in between is taken.

    Returns:
        Slope and intercept, 0-d float64. Where `x` does not vary, the slope is the allowed one nearest to 0.
    """
    check_shape("x", x, y.shape, "align both")
    mean_x, var_x, _ = exact_moments(x, mask, reduce=reduce)
    mean_y, _, _ = exact_moments(y, mask, reduce=reduce)
    products = (zero_masked(x.double(), mask) - mean_x) * (zero_masked(y.double(), mask) - mean_y)
    covariance = exact_moments(products, mask, reduce=reduce)[0]
    slope = torch.where(var_x > 0, covariance / var_x, 0.0).clamp(*slopes)
    return slope, mean_y - slope * mean_x


def _expand(mask: Tensor, x: Tensor) -> Tensor:
    """Return `mask` as bool in the shape of `x`, repeated along the trailing dimensions."""
    if mask.shape != x.shape[: mask.ndim]:
        raise ValueError(
            f"mask {tuple(mask.shape)} must lead the shape of x {tuple(x.shape)}: "
            "pass the completion mask (B, T) with tensors (B, T, ...)."
        )
    return mask.bool().reshape(mask.shape + (1,) * (x.ndim - mask.ndim)).expand_as(x)


def same_group(groups: Tensor, present: Tensor) -> Tensor:
    """Tell which rows belong to one group, `(B, B)`; absent rows belong to none.

    Args:
        groups: id of each row's prompt `(B,)`.
        present: rows that count `(B,)`, bool.
    """
    check_shape("groups", groups, present.shape, "give the prompt's id of each row")
    return (groups[:, None] == groups[None, :]) & present[:, None] & present[None, :]
