"""One differentiable run of the heads inside the model's forward pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig

from rl_plugins.nn.gradient import GradientStats, clamp_gradient
from rl_plugins.nn.mtp_heads import MTPHeads
from rl_plugins.nn.sharding import whole_parameters
from rl_plugins.nn.target_heads import PolyakTarget

LabelLoss = Callable[[Tensor, Tensor], Tensor]
"""Summed cross-entropy of features (N, D) against labels (N,), in float32."""

CHUNK_LOGITS = 2**23
"""Logits held at once by the token loss: 32 MiB in float32, so that the heads add next to nothing to peak memory."""


def head_token_loss(
    heads: MTPHeads,
    hidden: Tensor,
    labels: Tensor,
    lm_head: nn.Module,
    *,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of each head's token logits, without building (B, T, K, V).

    `L_k = -sum_t ln softmax(W x_k[t] / temperature)[y_{t+k}]` (Gloeckle et al., 2404.19737, equation 2), with the
    model's own LM head `W` held constant: the heads learn to speak its language, not the other way round.

    Args:
        heads: The heads.
        hidden: Trunk states (B, T, D); detach them to keep the loss out of the trunk.
        labels: Token of every head (B, T, K), -100 where there is none.
        lm_head: The model's output embedding.
        temperature: Sampling temperature that the main head's log-probabilities are taken at.

    Returns:
        Summed losses (K,) and numbers of labels (K,), float32.
    """
    losses, counts = [], []
    with constant_lm_head(lm_head, temperature=temperature) as cross_entropy:
        for k, head in enumerate(heads):
            chosen = labels[..., k] != -100
            # Select before the block: positions without a label cost nothing.
            losses.append(cross_entropy(head(hidden[chosen]), labels[..., k][chosen]))
            counts.append(chosen.sum())
    return torch.stack(losses), torch.stack(counts).float()


@contextmanager
def constant_lm_head(lm_head: nn.Module, *, temperature: float = 1.0) -> Iterator[LabelLoss]:
    """Cross-entropy through a model's LM head that learns nothing from it, in chunks of bounded logits.

    Args:
        lm_head: The model's output embedding.
        temperature: What the features are divided by.

    Yields:
        `sum_n -ln softmax(W x_n / temperature)[y_n]` of features `x` (N, D) and labels `y` (N,).
    """
    weight, bias = cast(Tensor, lm_head.weight), cast(Tensor | None, getattr(lm_head, "bias", None))
    with whole_parameters([p for p in (weight, bias) if p is not None]) as (weight, *rest):
        bias = rest[0] if rest else None
        dtype = _compute_dtype(weight)
        table = weight.detach().to(dtype)
        offset = None if bias is None else bias.detach().to(dtype) / temperature
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=max(1, CHUNK_LOGITS // table.shape[0]))

        def cross_entropy(features: Tensor, labels: Tensor) -> Tensor:
            scaled = (features / temperature).to(dtype)
            return F.linear_cross_entropy(
                scaled, table, labels, linear_bias=offset, reduction="sum", options=options
            ).float()

        yield cross_entropy


def _compute_dtype(weight: Tensor) -> torch.dtype:
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def logit_divisor(config: PretrainedConfig, temperature: float = 1.0) -> float:
    """What the features are divided by before the LM head: temperature over the model's own logit multiplier.

    Raises:
        ValueError: If the model caps its logits (Gemma 2), which a linear cross-entropy cannot express.
    """
    text_config = config.get_text_config()
    if getattr(text_config, "final_logit_softcapping", None):
        raise ValueError(
            f"{text_config.model_type} caps its logits (final_logit_softcapping), which the heads' token loss does "
            "not support. Set mtp_loss_coef=0 to train the values only."
        )
    scale = getattr(text_config, "logit_scale", None) or getattr(text_config, "lm_head_multiplier", None) or 1.0
    return temperature * float(getattr(text_config, "logits_scaling", None) or 1.0) / float(scale)


@dataclass
class HeadPass:
    """Tap that runs the heads on one training forward: values, and the token loss where labels are given.

    Use with `heads.tapped(head_pass)`; read `values` and `token_losses` after the forward.

    Args:
        heads: The attached heads.
        select: Picks the states from the trunk's hidden states, (B, S, D) -> (B, T, D).
        lm_head: The model's output embedding, for the token loss.
        labels: Token of each head (B, T, K), -100 where there is none; `None` skips the token loss.
        divisor: See [`logit_divisor`].
        detach_tokens: Keep the token loss out of the trunk.
        value_grad_scale: Scale of the value gradient into the trunk; 0 detaches it.
        value_grad_norm: Per-token clamp of that gradient, in the units of the scaled loss.
        target: Slow heads to run on the same states, where the bootstrap is not taken from a rollout.
        with_values: Whether the values are computed; heads that only draft have no use for them.
    """

    heads: MTPHeads
    select: Callable[[Tensor], Tensor]
    lm_head: nn.Module | None = None
    labels: Tensor | None = None
    divisor: float = 1.0
    detach_tokens: bool = True
    value_grad_scale: float = 1.0
    value_grad_norm: Tensor | None = None
    target: PolyakTarget | None = None
    with_values: bool = True
    stats: GradientStats = field(default_factory=GradientStats)
    values: Tensor | None = None
    target_values: Tensor | None = None
    token_losses: Tensor | None = None
    token_counts: Tensor | None = None

    def __call__(self, hidden: Tensor) -> tuple[Tensor | None, ...]:
        """Run the heads on the trunk's hidden states (B, S, D); only the first forward counts."""
        if self.values is not None or self.token_losses is not None:
            return ()
        states = self.select(hidden)
        if self.with_values:
            tamed = clamp_gradient(
                states, max_norm=self.value_grad_norm, scale=self.value_grad_scale, stats=self.stats
            )
            self.values = self.heads(tamed)
        if self.target is not None:
            self.target_values = self.target(states)
        if self.labels is not None and self.lm_head is not None:
            self.token_losses, self.token_counts = head_token_loss(
                self.heads,
                states.detach() if self.detach_tokens else states,
                self.labels,
                self.lm_head,
                temperature=self.divisor,
            )
        return self.values, self.token_losses
