"""One differentiable run of the native MTP layers inside the model's forward pass, and their token loss."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rl_plugins.functional.alignment import mtp_labels
from rl_plugins.nn.head_pass import constant_lm_head
from rl_plugins.nn.native_mtp import NativeMTP


def native_token_loss(
    native: NativeMTP,
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


@dataclass
class NativePass:
    """Tap that takes the token loss of the native layers on one training forward.

    Use with `native.watching(native_pass)`; read `token_losses` and `token_counts` after the forward.

    Args:
        native: The attached layers.
        lm_head: The model's output embedding.
        input_ids: See [`native_token_loss`], as for the next three.
        labels: Labels aligned with `input_ids`.
        attention_mask: Real tokens.
        position_ids: Positions of packed rows.
        divisor: See [`logit_divisor`].
        detach_trunk: Keep the token loss out of the trunk.
    """

    native: NativeMTP
    lm_head: nn.Module
    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    divisor: float = 1.0
    detach_trunk: bool = True
    token_losses: Tensor | None = None
    token_counts: Tensor | None = None

    def __call__(self, hidden: Tensor) -> tuple[Tensor | None, ...]:
        """Run the layers on the trunk's hidden states (B, L, D); only the first forward counts."""
        if self.token_losses is not None:
            return ()
        self.token_losses, self.token_counts = native_token_loss(
            self.native,
            hidden.detach() if self.detach_trunk else hidden,
            self.input_ids,
            self.labels,
            self.lm_head,
            attention_mask=self.attention_mask,
            position_ids=self.position_ids,
            temperature=self.divisor,
        )
        return (self.token_losses,)
