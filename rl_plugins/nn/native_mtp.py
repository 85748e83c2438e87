"""Native MTP layers: the depth modules that DeepSeek-V3 and GLM-4.5 are released with, as sequential heads."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from rl_plugins.hooks import NATIVE_MTP, require_hooks
from rl_plugins.nn.attachment import Attachment, base_model_of, trunk_of
from rl_plugins.nn.cache_name import cache_name
from rl_plugins.nn.head_run import HeadRun
from rl_plugins.nn.native_mtp_files import (
    PROJECTION,
    add_to_checkpoint,
    checkpoint_file,
    checkpoint_keys,
    count_layers,
    layer_prefix,
    read_layers,
)
from rl_plugins.nn.seeding import fixed_seed
from rl_plugins.nn.token_loss import native_token_loss

NATIVE_ARCHITECTURES = ("deepseek_v3", "glm4_moe")
"""Model types whose native layers are tested."""


class NativeMTP(Attachment):
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

    name = "native_mtp"

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

    @contextmanager
    def running(
        self,
        lm_head: nn.Module,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        divisor: float = 1.0,
        detach_trunk: bool = True,
    ) -> Iterator[HeadRun]:
        """Take the token loss of all depths in the next forward of the model inside the block. Only the first forward
        counts.

        Args:
            lm_head: The model's output embedding.
            input_ids: Tokens (B, L) of that forward.
            labels: Labels aligned with `input_ids` (B, L), -100 where there is none.
            attention_mask: Real tokens (B, L); `None` for all.
            position_ids: Positions of packed rows (B, L), which start again with every document.
            divisor: See [`~rl_plugins.nn.logit_divisor`].
            detach_trunk: Keep the token loss out of the trunk.

        Yields:
            The results, empty until the forward has run; without values.
        """
        run = HeadRun()

        def observe(hidden: Tensor) -> tuple[Tensor | None, ...]:
            if run.is_filled:
                return ()
            run.token_losses, run.token_counts = native_token_loss(
                self,
                hidden.detach() if detach_trunk else hidden,
                input_ids,
                labels,
                lm_head,
                attention_mask=attention_mask,
                position_ids=position_ids,
                temperature=divisor,
            )
            return (run.token_losses,)

        with self.watching(observe):
            yield run

    # In a model

    def _fit(self, base: PreTrainedModel) -> None:
        super()._fit(base)
        self.requires_grad_(True)
        self._base = (base,)
        _checkpoint_gradients_alike(base, self)

    @classmethod
    def prepare(cls, model: nn.Module, num_layers: int, *, seed: int = 0) -> "NativeMTP":
        """The native MTP layers that a training starts from: those attached, those of the model's checkpoint, or new
        ones.

        Args:
            model: Causal LM.
            num_layers: K.
            seed: Of new layers.

        Raises:
            ValueError: If the model is a PEFT model, its architecture has no native layers, or it has another number
                of them.
        """
        base, native = base_model_of(model), cls.of(model)
        if model is not base:
            raise ValueError(
                "Native MTP layers are saved in the model's own checkpoint, which an adapter's folder has not. "
                "merge_and_unload() the adapter first, or train parallel heads."
            )
        if native is None:
            check_can_attach(base)
        found = cls.layers_in(base) if native is None else native.num_layers
        if found not in (0, num_layers):
            raise ValueError(f"The model comes with {found} native MTP layers, not {num_layers}. Ask for {found}.")
        if native is not None:
            return native.requires_grad_(True)
        return cls.from_checkpoint(base) if found else attach_native_mtp(base, num_layers, seed=seed)

    # Files

    @classmethod
    def layers_in(cls, model: nn.Module, path: str | Path | None = None) -> int:
        """Number of native MTP layers in a checkpoint of a model, judged by its names of tensors.

        Args:
            model: Causal LM, which tells where its own layers end.
            path: Folder or hub id; where the model came from by default. A model that came from nowhere has none.
        """
        base = base_model_of(model)
        return count_layers(base, str(path or base.config.name_or_path))

    @classmethod
    def from_checkpoint(cls, model: nn.Module, path: str | Path | None = None) -> "NativeMTP":
        """Load native MTP layers from a checkpoint, by transformers' own `MtpModel.from_pretrained`.

        They are attached, or loaded into those that are. `generate(use_mtp=True)` of this model finds them, too, if
        it reads the same checkpoint, however many layers the model has (see [`expect_keys`]).

        Args:
            model: Causal LM.
            path: Folder or hub id of the checkpoint; where the model came from by default.

        Returns:
            The layers of `model`, in its dtype and on its device.

        Raises:
            ValueError: If the architecture has no native layers, there are none in the checkpoint, or other numbers
                of layers are attached.
        """
        base, native = base_model_of(model), cls.of(model)
        if native is not None:
            native.load(str(path or base.config.name_or_path))
            return native
        check_can_attach(base)
        return cls(base, _read(base, str(path or base.config.name_or_path))).attach(base)

    def load(self, directory: str | Path) -> None:
        """Read the layers of a checkpoint, a folder or a hub id, into these.

        Raises:
            ValueError: If it has none, or another number of them.
        """
        base, path = self._base[0], str(directory)
        self.layers.load_state_dict(_read(base, path, self.num_layers).state_dict())

    def save(self, directory: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> Path:
        """Add the layers to the checkpoint that `save_pretrained` has written into `directory`.

        They become layers N, N+1, ... after the N of the model, in a shard of their own and under the names of the
        released checkpoints. A single `model.safetensors` is renamed for that, and an index is written.

        Args:
            directory: Where the model was saved.
            state_dict: Whole weights of the model, as an engine gathers them under ZeRO-3; the layers' own by
                default.

        Returns:
            Path of the new shard.

        Raises:
            FileNotFoundError: If the model was not saved there.
            ValueError: If `state_dict` lacks some of the layers' weights.
        """
        return add_to_checkpoint(self._base[0], Path(directory), self._whole_weights(state_dict))

    @classmethod
    def find(cls, path: str | os.PathLike[str], *, revision: str | None = None) -> str | None:
        """The folder of a checkpoint with native MTP layers, of any architecture; `None` where there are none.

        Args:
            path: Folder or hub id of the model.
            revision: Of the hub's repository.
        """
        if not any(key.endswith(f".{PROJECTION}") for key in checkpoint_keys(os.fspath(path), revision=revision)):
            return None
        return str(Path(str(checkpoint_file(os.fspath(path), revision=revision))).parent)

    @classmethod
    def expect_keys(cls, model: nn.Module) -> None:
        """Tell a model under which names its native MTP layers are on disk.

        transformers takes them for those of the released models only: the classes name layer 61 (DeepSeek-V3), 46 and
        92 (GLM-4.5), one depth each. Models of other sizes, and with more depths, need this before
        `generate(use_mtp=True)`.
        """
        base = base_model_of(model)
        names = {re.escape(layer_prefix(base, k)) for k in range(base.config.num_mtp_layers)}
        base._keys_to_ignore_on_load_unexpected = [
            *names,
            *(pattern for pattern in base._keys_to_ignore_on_load_unexpected or () if pattern not in names),
        ]


def _read(base: PreTrainedModel, path: str, attached: int | None = None) -> nn.ModuleList:
    """Layers of a checkpoint, as many as are attached where that is given, and what a model must know of them."""
    found = count_layers(base, path)
    if found == 0:
        raise ValueError(
            f"{path or 'This model came from no checkpoint, which'} has no native MTP layers after layer "
            f"{base.config.num_hidden_layers - 1}. Give new ones to the model with attach_native_mtp(model)."
        )
    if attached not in (None, found):
        raise ValueError(
            f"{path} has {found} native MTP layers, but {attached} are attached. NativeMTP.detach(model) first."
        )
    base.config.num_mtp_layers = found
    NativeMTP.expect_keys(base)
    return read_layers(base, path)


def attach_native_mtp(model: nn.Module, num_layers: int | None = None, *, seed: int = 0) -> NativeMTP:
    """Give a causal language model new native MTP layers, initialised as its own layers are.

    They become the submodule `native_mtp`, so that optimizers, DDP and DeepSpeed see them. Logits, generation and
    `save_pretrained` stay as they were, but for `config.num_mtp_layers`: [`NativeMTP.save`] writes the layers.

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
    return NativeMTP(base, layers).attach(base)


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
    if NativeMTP.of(base) is not None:
        raise ValueError(
            f"{type(base).__name__} has native MTP layers already. Use NativeMTP.of(model) to reach them, or "
            "NativeMTP.detach(model) first."
        )


def _checkpoint_gradients_alike(base: PreTrainedModel, native: NativeMTP) -> None:
    """Recompute activations of the layers as in the trunk, which was told to before they were there."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    def blocks(module: nn.Module) -> list[Any]:
        return [x for x in module.modules() if isinstance(x, GradientCheckpointingLayer)]

    told = [block for block in blocks(trunk_of(base)) if block.gradient_checkpointing]
    for block in blocks(native) if told else ():
        block.gradient_checkpointing = True
        block._gradient_checkpointing_func = told[0]._gradient_checkpointing_func
