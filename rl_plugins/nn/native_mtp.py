"""Native MTP layers: the depth modules that DeepSeek-V3 and GLM-4.5 are released with, as sequential heads."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from rl_plugins.hooks import NATIVE_MTP, require_hooks
from rl_plugins.nn.attach import add_submodule, base_model_of, remove_submodule, trunk_of
from rl_plugins.nn.cache_name import cache_name
from rl_plugins.nn.seeding import fixed_seed
from rl_plugins.nn.trunk_tap import TrunkTap

NATIVE_ATTRIBUTE = "native_mtp"
"""Name of the submodule, and so the prefix of the layers' keys in the model's state dict."""

NATIVE_ARCHITECTURES = ("deepseek_v3", "glm4_moe")
"""Model types whose native layers are tested."""


class NativeMTP(TrunkTap):
    """K sequential depth modules (DeepSeek-V3, 2412.19437, section 2.2).

    `h^k_p = block_k(M_k [RMSNorm(Emb(x_{p+k})); RMSNorm(h^{k-1}_p)])` (equations 21 and 22), where `h^0` is the last
    hidden state of the trunk; the LM head reads `h^k_p` for the token `x_{p+k+1}` (equation 23). Position p has then
    seen the k tokens that follow it, unlike that of the parallel heads of [`MTPHeads`].

    Only the depth modules are registered here. Embedding, rotary embedding and LM head are the model's own, looked up
    at every call, so that no optimizer and no checkpoint meets them twice.

    Args:
        base: The causal LM that the layers belong to.
        layers: transformers' depth modules in order, k = 1..K.
    """

    def __init__(self, base: PreTrainedModel, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers
        self.config: PreTrainedConfig = base.config.get_mtp_config()
        # In a tuple, so that it is no submodule; a deep copy of the model still refers to the copy.
        self._base = (base,)

    @property
    def num_layers(self) -> int:
        """K."""
        return len(self.layers)

    def run(
        self,
        depth: int,
        hidden: Tensor,
        next_tokens: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None = None,
    ) -> Tensor:
        """One depth module on all positions.

        The embeddings are held constant; whether the trunk learns is up to `hidden`.

        Args:
            depth: k, from 1 to K.
            hidden: What depth k-1 returned (B, S, D); the trunk's last hidden state for depth 1.
            next_tokens: The token k places ahead of every position (B, S).
            position_ids: Positions of those tokens (B, S), as transformers' `MtpModel.forward_layer` takes them.
            attention_mask: Which slots are real (B, L): all of the cache and then the new ones, so L = S without a
                cache. May have holes. `None` where all are real, and in rows of packed documents, which
                `position_ids` then tell apart.
            cache: Keys and values of earlier slots, to which these S are appended: in its layer k-1, so that all
                depths can share one `DynamicCache`, whatever their lengths.

        Returns:
            `h^k` (B, S, D).

        Raises:
            ValueError: If there is no such depth, or `attention_mask` does not cover the slots.
        """
        if not 1 <= depth <= self.num_layers:
            raise ValueError(f"depth={depth}: the model has native MTP layers of depth 1 to {self.num_layers}.")
        slots = hidden.shape[1] + (0 if cache is None else int(cache.get_seq_length(depth - 1)))
        if attention_mask is not None and attention_mask.shape[1] != slots:
            raise ValueError(
                f"attention_mask covers {attention_mask.shape[1]} slots, but cache and input have {slots}: give it "
                "for all of them."
            )
        from transformers.masking_utils import create_causal_mask

        base: Any = self._base[0]
        # Under no_grad rather than detached, so that a sharded embedding has nothing to do in the backward pass.
        with torch.no_grad():
            embeds = base.get_input_embeddings()(next_tokens)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            layer_idx=depth - 1,
            **{cache_name(): cache},
        )
        return self.layers[depth - 1](
            embeds,
            hidden,
            position_embeddings=base.get_decoder().rotary_emb(embeds, position_ids=position_ids),
            attention_mask=causal_mask,
            position_ids=position_ids,
            **{cache_name(): cache},
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Token logits (..., V) of what a depth returned (..., D), by the model's own LM head."""
        return self._base[0].get_output_embeddings()(hidden)


def attach_native_mtp(model: nn.Module, num_layers: int | None = None, *, seed: int = 0) -> NativeMTP:
    """Give a causal language model new native MTP layers, initialised as its own layers are.

    They become the submodule `native_mtp`, so that optimizers, DDP and DeepSpeed see them. Logits, generation and
    `save_pretrained` stay as they were, but for `config.num_mtp_layers`: [`save_native_mtp`] writes the layers.

    Args:
        model: Causal LM, or a PEFT model around one.
        num_layers: K; `config.num_mtp_layers` by default.
        seed: Seed of the initial weights; equal on all ranks. The caller's random state is left alone.

    Returns:
        The attached layers, in the model's dtype and on its device.

    Raises:
        TypeError: If `model` is not a transformers model.
        ValueError: If the architecture has no native layers, K < 1, or the model has native layers already.
    """
    base = base_model_of(model)
    check_can_attach(base)
    # Here, as elsewhere in this file: the rest of the package runs with a transformers that has no native layers.
    from transformers.modeling_layers import MtpLayer

    num_layers = base.config.num_mtp_layers if num_layers is None else num_layers
    if not num_layers or num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, got {num_layers}.")
    base.config.num_mtp_layers = num_layers
    config, decoder = base.config.get_mtp_config(), base.get_decoder()
    block, norm = type(decoder.layers[-1]), type(decoder.norm)
    with fixed_seed(seed):
        layers = nn.ModuleList(MtpLayer(config, block, norm, k) for k in range(num_layers))
        with torch.no_grad():  # transformers leaves it to the caller since 5.24
            for module in layers.modules():
                base._init_weights(module)
    return add_native_layers(base, layers)


def check_can_attach(base: PreTrainedModel) -> None:
    """See that a model can be given native MTP layers.

    Raises:
        ImportError: If this release of transformers has them in another form.
        ValueError: If the architecture has none, or the model has its own already.
    """
    require_hooks(NATIVE_MTP)
    if base.config.model_type not in NATIVE_ARCHITECTURES:
        raise ValueError(
            f"Native MTP layers are supported for {' and '.join(NATIVE_ARCHITECTURES)}, not for "
            f"{base.config.model_type}. Give this model parallel heads with attach_mtp_heads(model) instead."
        )
    if get_native_mtp(base) is not None:
        raise ValueError(
            f"{type(base).__name__} has native MTP layers already. Use get_native_mtp(model) to reach them, or "
            "detach_native_mtp(model) first."
        )


def add_native_layers(base: PreTrainedModel, layers: nn.ModuleList) -> NativeMTP:
    """Make depth modules the model's submodule `native_mtp`, run in its forward whenever they are tapped."""
    native = NativeMTP(base, layers)
    native.to(device=base.device, dtype=base.dtype).requires_grad_(True).train(base.training)
    _checkpoint_gradients_alike(base, native)
    add_submodule(base, NATIVE_ATTRIBUTE, native)
    native.hook(trunk_of(base))
    return native


def _checkpoint_gradients_alike(base: PreTrainedModel, native: NativeMTP) -> None:
    """Recompute activations of the layers as in the trunk, which was told to before they were there."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    def blocks(module: nn.Module) -> list[Any]:
        return [x for x in module.modules() if isinstance(x, GradientCheckpointingLayer)]

    told = [block for block in blocks(trunk_of(base)) if block.gradient_checkpointing]
    for block in blocks(native) if told else ():
        block.gradient_checkpointing = True
        block._gradient_checkpointing_func = told[0]._gradient_checkpointing_func


def get_native_mtp(model: nn.Module) -> NativeMTP | None:
    """The native MTP layers attached to `model`, or `None`."""
    native = base_model_of(model)._modules.get(NATIVE_ATTRIBUTE)
    return native if isinstance(native, NativeMTP) else None


def detach_native_mtp(model: nn.Module) -> NativeMTP:
    """Take the native MTP layers off.

    Raises:
        ValueError: If there are none.
    """
    base, native = base_model_of(model), get_native_mtp(model)
    if native is None:
        raise ValueError(f"{type(base).__name__} has no native MTP layers to detach.")
    native.unhook()
    remove_submodule(base, NATIVE_ATTRIBUTE)
    return native
