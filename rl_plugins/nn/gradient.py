"""Functions that change nothing in the forward pass, but change the gradient in the backward pass."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class GradientStats:
    """Norms and counts that `clamp_gradient` saw in the backward pass, as sums, so that ranks and micro-batches can be
    added up."""

    norm_sum: list[Tensor] = field(default_factory=list)
    clamped: list[Tensor] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)

    def totals(self, device: torch.device) -> Tensor:
        """Return `(sum of norms, clamped tokens, tokens with gradient)` as a `(3,)` tensor.

        All are zero if no backward pass ran.
        """
        columns = (self.norm_sum, self.clamped, self.tokens)
        return torch.stack(
            [torch.stack(column).sum() if column else torch.zeros((), device=device) for column in columns]
        )


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.num_others = len(others)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*grads, *[None] * ctx.num_others)


def tie(x: Tensor, others: Iterable[Tensor | None]) -> Tensor:
    """Return `x` unchanged, but with `others` in its graph; no gradient flows to them from `x`.

    DDP with `find_unused_parameters=True` looks for parameters in the graph of the model's output. Parameters
    that only a side result depends on count as unused, and DDP fails when they get a gradient all the same.

    Args:
        x: Part of the model's output.
        others: Side results of the same forward pass; `None`, and those without a graph, are left out.

    Returns:
        `x`.
    """
    differentiable = [other for other in others if other is not None and other.requires_grad]
    return _Tie.apply(x, *differentiable) if differentiable and x.requires_grad else x


class _ClampGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, max_norm: Tensor | None, scale: float, stats: GradientStats | None) -> Tensor:
        ctx.max_norm, ctx.scale, ctx.stats = max_norm, scale, stats
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        norm = grad.float().norm(dim=-1, keepdim=True)
        factor = torch.full_like(norm, ctx.scale)
        if ctx.max_norm is not None:
            # An overflowing token would give inf * 0 = NaN below: it contributes nothing instead.
            factor = factor * (ctx.max_norm / norm.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(max=1.0)
        if ctx.stats is not None:
            seen = norm > 0
            limit = norm.new_tensor(torch.inf) if ctx.max_norm is None else ctx.max_norm
            # A limit of 0 (the loss has weight 0) cannot be the unit of norms.
            unit = torch.where((limit > 0) & limit.isfinite(), limit, 1.0)
            ctx.stats.norm_sum.append((norm / unit).sum())
            ctx.stats.clamped.append((norm > limit).sum().float())
            ctx.stats.tokens.append(seen.sum().float())
        clamped = torch.where(norm.isfinite(), grad * factor.to(grad.dtype), torch.zeros_like(grad))
        return clamped, None, None, None


def clamp_gradient(
    x: Tensor,
    *,
    max_norm: float | Tensor | None = None,
    scale: float = 1.0,
    stats: GradientStats | None = None,
) -> Tensor:
    """Return `x` unchanged, and in the backward pass clamp the gradient of every token, then scale it.

    `g_t <- scale * g_t * min(1, max_norm / ||g_t||)`, for the gradient of the value loss into the
    trunk. Each token has a norm of its own, over the last dimension, so no single token dominates the update.

    Args:
        x: Hidden states (..., D).
        max_norm: Largest norm of one token's gradient, in the units of the loss; `None` does not clamp.
        scale: Factor after the clamp; 0 stops the gradient.
        stats: Filled by the backward pass with norms (in units of `max_norm`, where that is given) and counts.

    Returns:
        `x` (..., D).

    Raises:
        ValueError: If `max_norm` or `scale` is negative.
    """
    if max_norm is not None and float(max_norm) < 0:
        raise ValueError(f"max_norm must be at least 0, got {float(max_norm)}; use None for no clamp.")
    if scale < 0:
        raise ValueError(f"scale must be at least 0, got {scale}; a negative scale would climb the loss.")
    limit = None if max_norm is None else torch.as_tensor(max_norm, dtype=torch.float32, device=x.device)
    return _ClampGradient.apply(x, limit, scale, stats)
