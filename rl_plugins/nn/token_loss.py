"""Token losses of MTP heads, through the model's own LM head."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig

from rl_plugins.nn.seeding import draw_beside
from rl_plugins.nn.sharding import whole_parameters

LabelLoss = Callable[[Tensor, Tensor], Tensor]
"""Sums the cross-entropy, in float32, of features (N, D) against labels (N,) or the model's own states (N, D)."""

CHUNK_LOGITS = 2**23
"""Logits held at once by the token loss: 32 MiB in float32, so that the heads add next to nothing to peak memory."""


def head_token_loss(
    features: Callable[[int, tuple[Tensor, Tensor]], Tensor],
    labels: Tensor,
    lm_head: nn.Module,
    *,
    temperature: float = 1.0,
    cap: float | None = None,
    share: float = 1.0,
    teacher: Tensor | None = None,
    ahead: int = 1,
) -> tuple[Tensor, Tensor]:
    """Sum the cross-entropy of each head's token logits, without building (B, T, K, V).

    `L_k = -sum_t ln softmax(W x_k[t] / temperature)[label_k[t]]` (Gloeckle et al., 2404.19737, equation 2;
    DeepSeek-V3, 2412.19437, equation 24), with the model's own LM head `W` held constant: only the heads learn from
    the loss.

    With a `teacher` a head learns the model's own distribution of the token instead of the token:
    `L_k = -sum_t sum_y p(y|s) ln q_k(y)`, where `s` is the state in which the token was chosen. For tokens that the
    model has sampled, both losses have the same mean, and the second varies less.

    The LM head is most of the cost. With a `share` below 1 each head takes `m = ceil(share n)` of its n labels, drawn
    at random without a change to the global random numbers. The sum is multiplied by `n / m`, so that its mean over
    the draws is the sum over all labels.

    Args:
        features: Gives the inputs of the LM head (N, D) for the head's index and the rows and columns (N,) of its
            labels, so that positions without a label cost nothing.
        labels: Token of every head (B, T, K), -100 where there is none.
        lm_head: The model's output embedding.
        temperature: Sampling temperature that the main head's log-probabilities are taken at.
        cap: Soft cap of the logits, `cap tanh(logits / cap)`; `None` for none.
        share: Share of the labels that are used, above 0 and at most 1.
        teacher: The model's own states (B, T, D) at the positions of `labels`; `None` learns the tokens.
        ahead: Number of tokens by which each head looks further than the one before it. With a `teacher`, head k
            learns at t what the model says at `t + k ahead`.

    Returns:
        Summed losses (K,) and numbers of labels (K,), float32.
    """
    losses, counts = [], []
    generator = draw_beside(labels) if share < 1.0 else None
    with constant_lm_head(lm_head, temperature=temperature, cap=cap) as cross_entropy:
        for k in range(labels.shape[-1]):
            rows, columns = torch.nonzero(labels[..., k] != -100, as_tuple=True)
            count, weight = len(rows), 1.0
            if share < 1.0 and count:
                drawn = torch.randperm(count, device=rows.device, generator=generator)[: math.ceil(share * count)]
                rows, columns, weight = rows[drawn], columns[drawn], count / len(drawn)
            targets = labels[rows, columns, k] if teacher is None else teacher[rows, columns + (k + 1) * ahead]
            losses.append(weight * cross_entropy(features(k, (rows, columns)), targets))
            counts.append(count)
    return torch.stack(losses), torch.tensor(counts, dtype=torch.float32, device=labels.device)


@contextmanager
def constant_lm_head(lm_head: nn.Module, *, temperature: float = 1.0, cap: float | None = None) -> Iterator[LabelLoss]:
    """Compute cross-entropies through a model's LM head, which learns nothing from them, in chunks of bounded size.

    Args:
        lm_head: The model's output embedding.
        temperature: Divisor of the logits.
        cap: Soft cap of the logits, before the temperature; `None` for none.

    Yields:
        Function that gives `sum_n -ln softmax(W x_n / temperature)[y_n]` of features `x` (N, D) and labels
        `y` (N,), or, for the model's own states `h` (N, D) in place of labels,
        `-sum_n softmax(W h_n / temperature) . ln softmax(W x_n / temperature)`.
    """
    weight, bias = cast(Tensor, lm_head.weight), cast(Tensor | None, getattr(lm_head, "bias", None))
    with whole_parameters([p for p in (weight, bias) if p is not None]) as (weight, *rest):
        dtype = _compute_dtype(weight)
        table, offset = weight.detach().to(dtype), rest[0].detach().to(dtype) if rest else None
        rows = max(1, CHUNK_LOGITS // table.shape[0])
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=rows)

        def cross_entropy(features: Tensor, targets: Tensor) -> Tensor:
            if cap is not None or targets.is_floating_point():
                whole = features.to(dtype), table, offset, targets.detach()
                return cast(Tensor, _CrossEntropy.apply(*whole, temperature, cap, rows))
            scaled = (features / temperature).to(dtype)
            shift = None if offset is None else offset / temperature
            return F.linear_cross_entropy(
                scaled, table, targets, linear_bias=shift, reduction="sum", options=options
            ).float()

        yield cross_entropy


def _compute_dtype(weight: Tensor) -> torch.dtype:
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy of capped logits, or with a distribution in place of a label, for which torch has no function.

    The gradient is made in the forward pass, chunk by chunk, so that logits are computed once and none are kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        table: Tensor,
        offset: Tensor | None,
        targets: Tensor,
        temperature: float,
        cap: float | None,
        rows: int,
    ) -> Tensor:
        def scores(x: Tensor) -> tuple[Tensor, Tensor | float]:
            """Capped and divided logits, and their derivative with respect to the logits."""
            logits = F.linear(x, table, offset).float()
            if cap is None:
                return logits / temperature, 1.0 / temperature
            tanh = torch.tanh(logits / cap)
            return cap * tanh / temperature, (1.0 - tanh.square()) / temperature

        loss, gradient = torch.zeros((), device=features.device), torch.empty_like(features)
        chunks = zip(features.split(rows), targets.split(rows), gradient.split(rows), strict=True)
        for x, y, out in chunks:
            score, slope = scores(x)
            log_probs = score.log_softmax(-1)
            errors = log_probs.exp()
            if y.is_floating_point():
                wanted = scores(y.to(table.dtype))[0].softmax(-1)
                loss = loss - (wanted * log_probs).sum()
                errors -= wanted
            else:
                loss = loss - log_probs.gather(1, y[:, None]).sum()
                errors.scatter_add_(1, y[:, None], -torch.ones_like(y[:, None], dtype=errors.dtype))
            out.copy_((errors * slope).to(table.dtype) @ table)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (grads[0] * gradient).to(gradient.dtype), None, None, None, None, None, None


def logit_cap(config: PretrainedConfig) -> float | None:
    """Return the soft cap of a model's logits (Gemma 2, RecurrentGemma, xLSTM); `None` where there is none."""
    text_config = config.get_text_config()
    names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return next((float(cap) for name in names if (cap := getattr(text_config, name, None))), None)


def logit_divisor(config: PretrainedConfig, temperature: float = 1.0) -> float:
    """Return the divisor of the features before the LM head: temperature over the model's own logit multiplier."""
    text_config = config.get_text_config()
    scale = getattr(text_config, "logit_scale", None) or getattr(text_config, "lm_head_multiplier", None) or 1.0
    return temperature * float(getattr(text_config, "logits_scaling", None) or 1.0) / float(scale)
