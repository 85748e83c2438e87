"""Token losses of parallel heads and of native MTP layers, through the model's own LM head."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig

from rl_plugins.functional.alignment import mtp_labels
from rl_plugins.nn.sharding import whole_parameters

if TYPE_CHECKING:
    from rl_plugins.nn.native_mtp import NativeMTP

LabelLoss = Callable[[Tensor, Tensor], Tensor]
"""Summed cross-entropy of features (N, D) against labels (N,), in float32."""

CHUNK_LOGITS = 2**23
"""Logits held at once by the token loss: 32 MiB in float32, so that the heads add next to nothing to peak memory."""


def head_token_loss(
    heads: Iterable[nn.Module],
    hidden: Tensor,
    labels: Tensor,
    lm_head: nn.Module,
    *,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of each head's token logits, without building (B, T, K, V).

    `L_k = -sum_t ln softmax(W x_k[t] / temperature)[y_{t+k}]` (Gloeckle et al., 2404.19737, equation 2), with the
    model's own LM head `W` held constant: only the heads learn from the loss.

    Args:
        heads: The heads in order, k = 1..K.
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


def native_token_loss(
    native: "NativeMTP",
    hidden: Tensor,
    input_ids: Tensor,
    labels: Tensor,
    lm_head: nn.Module,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of each depth's token logits, without building (B, L, K, V).

    `L_k = -sum_p ln softmax(W h^k_p / temperature)[x_{p+1+k}]` (DeepSeek-V3, 2412.19437, equations 24 and 25, which
    take the mean over tokens and depths), with the model's embedding and LM head `W` held constant, as for the
    parallel heads.

    Args:
        native: The layers.
        hidden: Last hidden states of the trunk (B, L, D); detach them to keep the loss out of the trunk.
        input_ids: Tokens (B, L).
        labels: Labels aligned with `input_ids` (B, L), -100 where there is none; depth k takes the one 1 + k ahead.
        lm_head: The model's output embedding.
        attention_mask: Real tokens (B, L), padded on either side, without holes; `None` for all.
        position_ids: Positions of packed rows (B, L), which start again with every document.
        temperature: What the logits are divided by.

    Returns:
        Summed losses (K,) and numbers of labels (K,), float32.
    """
    targets = mtp_labels(labels, native.num_layers, position_ids)
    if attention_mask is not None:
        # With padding on the left, the labels of a row's first tokens are those of padding further back.
        targets = targets.masked_fill(~attention_mask.bool()[..., None], -100)
    if position_ids is None:
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    losses, counts = [], []
    with constant_lm_head(lm_head, temperature=temperature) as cross_entropy:
        for k in range(native.num_layers):
            depth = k + 1
            # The end of a row, or of a document, gets tokens from elsewhere: positions without a label, which no
            # position with one attends to.
            hidden = native.run(depth, hidden, input_ids.roll(-depth, dims=1), position_ids + depth, attention_mask)
            chosen = targets[..., k] != -100
            losses.append(cross_entropy(hidden[chosen], targets[..., k][chosen]))
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
    """Divisor of the features before the LM head: temperature over the model's own logit multiplier.

    Raises:
        ValueError: If the model caps its logits (Gemma 2), which a linear cross-entropy cannot express.
    """
    text_config = config.get_text_config()
    if getattr(text_config, "final_logit_softcapping", None):
        raise ValueError(
            f"{text_config.model_type} caps its logits (final_logit_softcapping), which the heads' token loss does "
            "not support. Leave the token loss out and train the values only."
        )
    scale = getattr(text_config, "logit_scale", None) or getattr(text_config, "lm_head_multiplier", None) or 1.0
    return temperature * float(getattr(text_config, "logits_scaling", None) or 1.0) / float(scale)
