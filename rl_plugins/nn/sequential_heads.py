"""Sequential heads: decoder layers of the model's own kind, one behind the other (DeepSeek-V3, 2412.19437)."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from rl_plugins.nn.attachment import trunk_of
from rl_plugins.nn.decoder_layers import DecoderStack
from rl_plugins.nn.mtp_heads import MTPHeads, MTPHeadsConfig, Select
from rl_plugins.nn.released_layers import (
    add_to_checkpoint,
    count_released_layers,
    has_checkpoint,
    is_released_with_layers,
    read_released_layers,
    tell_number_of_layers,
)
from rl_plugins.nn.seeding import fixed_seed
from rl_plugins.nn.value_head import ValueHead, ValueHeads


class DepthModule(nn.Module):
    """One depth: `h^k = block(W [RMSNorm(Emb(y)); RMSNorm(h^{k-1})])`, then a norm for the LM head.

    The parts have the names that transformers' `MtpLayer` gives them.

    Args:
        stack: Layers of the model; the block is a new layer like the last of them.
        index: Place of the depth's keys and values in a cache, k - 1.
    """

    def __init__(self, stack: DecoderStack, index: int) -> None:
        super().__init__()
        size = stack.hidden_size
        self.enorm, self.hnorm = stack.new_norm(), stack.new_norm()
        self.eh_proj = nn.Linear(2 * size, size, bias=False)
        self.mtp_block = stack.new_layer(index)
        self.post_norm = stack.new_norm()

    @torch.no_grad()
    def start_as_main_head(self, final_norm: nn.Module) -> None:
        """Make a new depth pass on the state that it reads, so that its logits begin close to the main head's.

        The trunk's last states have been through its final norm, `h = g x / rms(x)`. The depth divides by the gain g,
        adds a projection of the token's embedding and the output of its block, and ends with the same norm.

        Args:
            final_norm: Norm after the trunk's last layer, with its weights.
        """
        size, weight = self.eh_proj.out_features, getattr(self.hnorm, "weight", None)
        if weight is not None:  # or else all gains are 1
            gain = norm_gain(final_norm, self.eh_proj.weight)
            scale = gain.square().mean().sqrt()
            safe = torch.where(gain.abs() > 0.1 * scale, gain, torch.where(gain < 0, -0.1, 0.1) * scale)
            weight += scale / safe - norm_gain(self.hnorm, self.eh_proj.weight)  # Gemma's gain is 1 + weight
        self.eh_proj.weight[:, size:] = torch.eye(size)
        self.post_norm.load_state_dict(final_norm.state_dict())

    def forward(self, embeds: Tensor, hidden: Tensor, **context: Any) -> Tensor:
        """Map embeddings and states (B, S, D) to the next depth's states (B, S, D).

        Args:
            embeds: Embeddings of the tokens that this depth reads.
            hidden: States of the depth before it.
            context: Arguments of a decoder layer besides hidden states.
        """
        joined = torch.cat([self.enorm(embeds), self.hnorm(hidden)], dim=-1)
        output = self.mtp_block(self.eh_proj(joined), **context)
        return self.post_norm(output[0] if isinstance(output, tuple) else output)


def norm_gain(norm: nn.Module, like: Tensor) -> Tensor:
    """Read off the factors (D,) by which a norm multiplies the entries of a normalised vector."""
    ones = torch.ones(like.shape[0], dtype=like.dtype, device=like.device)
    ones[1::2] = -1.0  # of mean 0 and root mean square 1, for layer norms and RMS norms alike
    return (norm(ones[None]) - norm(-ones[None]))[0] / (2 * ones)


class _Slots(NamedTuple):
    """Slots of a row that the depths may use.

    Attributes:
        rank: Number of real tokens before each of the newest slots in its row (B, S); below 0 for padding.
        mask: Slots that are real (B, L), those of a cache first; `None` for packed rows.
        positions: Positions (B, S) of packed rows; `None` where `mask` tells.
    """

    rank: Tensor
    mask: Tensor | None
    positions: Tensor | None

    @classmethod
    def of(
        cls, mask: Tensor | None, positions: Tensor | None, batch: int, width: int, past: int | None = None
    ) -> "_Slots":
        """Describe rows of which `past` slots are in a cache; `None` means that there is no cache. Only then rows may
        be packed, since transformers treats no row with a cache as packed."""
        device = mask.device if mask is not None else None if positions is None else positions.device
        if mask is not None:
            real = mask.bool()
            return cls((real.cumsum(1) - 1).masked_fill(~real, -1)[:, -width:], real, None)
        if positions is not None and positions.ndim == 2 and past is None:
            # Positions start again with every packed document: 0 1 2 0 1 has its second document from slot 3 on.
            slot = torch.arange(width, device=device)
            starts = positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1
            first = torch.where(starts, slot, 0).cummax(1).values
            return cls((slot - first).expand(batch, -1), None, positions.expand(batch, -1))
        real = torch.ones(batch, (past or 0) + width, dtype=torch.bool, device=device)
        return cls(real.cumsum(1)[:, -width:] - 1, real, None)

    def for_depth(self, depth: int) -> tuple[Tensor | None, Tensor | None]:
        """Return mask and positions from which attention masks are made. They leave out the first slots of every row,
        at which the depth has not read enough tokens."""
        if self.mask is not None:
            return self.mask & (self.mask.cumsum(1) > depth), None
        assert self.positions is not None
        # Each slot that is left out gets a position that no neighbour continues, and so is a document of its own.
        alone = -2 * (torch.arange(self.rank.shape[1], device=self.rank.device) + 5)
        return None, torch.where(self.rank >= depth, self.positions, alone)


class FeatureStream:
    """Features of rows that come in pieces, such as the passes of `generate`, with a cache of keys and values.

    Args:
        heads: Sequential heads.
    """

    def __init__(self, heads: "SequentialHeads") -> None:
        from transformers import DynamicCache

        self.heads, self.cache = heads, DynamicCache()
        # For each depth, the newest state of the depth before it (B, 1, D).
        self._last: list[Tensor | None] = [None] * heads.config.num_heads

    @torch.no_grad()
    def __call__(
        self, hidden: Tensor, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> Tensor:
        """Compute features (B, S, K, D) at the newest positions.

        Args:
            hidden: States of the trunk (B, S, D).
            input_ids: The tokens there (B, S).
            attention_mask: Real tokens since the beginning (B, L), padded on the left; `None` for all.
            position_ids: Positions of the newest tokens (B, S); `None` for their places in the row.
        """
        return self.heads.deepen(hidden, input_ids, attention_mask, position_ids, self.cache, self._last)


class SequentialHeads(MTPHeads):
    """K sequential heads (DeepSeek-V3, 2412.19437, section 2.2), which draft tokens and return values.

    `m^k_p = block_k(W_k [RMSNorm(Emb(x_p)); RMSNorm(m^{k-1}_{p-1})])`, where `m^0` is the trunk's last hidden state,
    and every block is a decoder layer of the model's own class. The paper writes `h^k_{p-k}` for `m^k_p` (equations 21
    and 22). Here the index of a state is the position of the last token that it has read. So at p all heads have read
    the tokens up to p, as the trunk's own state has. They predict the next token (equation 23), and judge the state
    that these tokens lead to: in the state `s_t` of a completion, every `v_k[t]` estimates `V(s_t)` and has not seen
    `y_t`.

    At the first k positions of a row, head k has not read k tokens yet. Its features are zero there, and its value is
    the bias.

    Only depth modules and value heads are registered here. Embedding, rotary embedding and LM head are the model's
    own. They are looked up at every call, so that optimizers and checkpoints hold them once. The embedding is held
    constant.

    Args:
        base: The causal LM that the heads are for.
        num_heads: K.
        seed: Seed of the initial weights; equal on all ranks. The caller's random state is left alone.

    Raises:
        ValueError: If the model's trunk is no stack of decoder layers that can be built once more; the message says
            why.
    """

    ahead = 0
    reads_rows = True

    def __init__(self, base: PreTrainedModel, num_heads: int = 1, *, seed: int = 0) -> None:
        super().__init__()
        stack = DecoderStack(base)
        stack.check(base)
        self.config = MTPHeadsConfig(num_heads, stack.hidden_size, head_type="sequential")
        with fixed_seed(seed):
            self.layers = nn.ModuleList(DepthModule(stack, k) for k in range(num_heads))
            with torch.no_grad():
                for module in self.layers.modules():
                    base._init_weights(module)
            self.value_heads = ValueHeads(ValueHead(stack.hidden_size, 1e-6) for _ in range(num_heads))
        final_norm = stack.new_norm()
        for depth in self:
            depth.start_as_main_head(final_norm)
        # Selection biases of experts: no gradient reaches them, and DDP would wait for one.
        self._constant = frozenset(name for name, p in self.named_parameters() if not p.requires_grad)
        # In a tuple, so that the model is no submodule. In a deep copy of the model, the heads refer to the copy.
        self._base = (base,)

    def __iter__(self) -> Iterator[DepthModule]:
        """Go through the depth modules in order, k = 1..K."""
        return (cast(DepthModule, layer) for layer in self.layers)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, T, K, D), which [`states`] makes, to float32 values (B, T, K)."""
        return self.value_heads(features)

    @property
    def value_path(self) -> nn.Module:
        """The value heads, which turn features into values."""
        return self.value_heads

    def draft_only(self) -> None:
        """Freeze the value weights."""
        self.value_heads.requires_grad_(False)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Change whether the weights learn, except for those that never do."""
        super().requires_grad_(requires_grad)
        for name, p in self.named_parameters():
            if name in self._constant:
                p.requires_grad = False
        return self

    # Features

    def run(
        self,
        depth: int,
        hidden: Tensor,
        tokens: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None = None,
        *,
        mask_positions: Tensor | None = None,
    ) -> Tensor:
        """Run one depth module on some slots.

        The trunk learns from the result, unless `hidden` is detached.

        Args:
            depth: k, from 1 to K.
            hidden: States of depth k-1 at the tokens before `tokens` (B, S, D); the trunk's states for depth 1.
            tokens: Tokens that this depth reads (B, S).
            position_ids: Positions of `tokens` (B, S).
            attention_mask: Slots to attend to (B, L): all of the cache and then the new ones, so L = S without a
                cache. May have holes. `None` for all.
            cache: Keys and values of earlier slots, to which these S are appended, in layer k-1 of the cache. So all
                depths can share one cache, whatever their lengths.
            mask_positions: Positions (B, S) that tell packed documents apart, without `attention_mask`.

        Returns:
            `m^k` (B, S, D).

        Raises:
            ValueError: If there is no such depth, or `attention_mask` does not cover the slots.
        """
        if not 1 <= depth <= self.config.num_heads:
            raise ValueError(f"depth={depth}: the model has sequential heads of depth 1 to {self.config.num_heads}.")
        slots = hidden.shape[1] + (0 if cache is None else int(cache.get_seq_length(depth - 1)))
        if attention_mask is not None and attention_mask.shape[1] != slots:
            raise ValueError(
                f"attention_mask covers {attention_mask.shape[1]} slots, but cache and input have {slots}: give it "
                "for all of them."
            )
        base = self._base[0]
        # Under no_grad rather than detached, so that a sharded embedding has nothing to do in the backward pass.
        with torch.no_grad():
            embeds = cast(Tensor, base.get_input_embeddings()(tokens))
        stack = DecoderStack(base)
        context = stack.context(embeds, position_ids, attention_mask, cache, depth - 1, mask_positions)
        return self.layers[depth - 1](embeds.to(hidden.device), hidden, **context)

    def deepen(
        self,
        hidden: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None = None,
        last: list[Tensor | None] | None = None,
    ) -> Tensor:
        """Compute the features (B, S, K, D) of all depths at consecutive positions.

        They are zero where a depth has not read enough tokens.

        Args:
            hidden: The trunk's states (B, S, D).
            input_ids: The tokens at these positions (B, S).
            attention_mask: Real tokens (B, L), those of the cache included, padded on either side, without holes;
                `None` for all, and for packed rows.
            position_ids: Positions (B, S), which start again with every document of packed rows.
            cache: Keys and values of the slots before these.
            last: For every depth, the state that it reads at the first position (B, 1, D), `None` for none; replaced
                by those for the next call.
        """
        batch, width = input_ids.shape
        past = None if cache is None else int(cache.get_seq_length(0))
        slots = _Slots.of(attention_mask, position_ids, batch, width, past)
        if position_ids is None:
            first_position = past or 0
            position_ids = torch.arange(first_position, first_position + width, device=input_ids.device)
            position_ids = position_ids.expand(batch, -1)
        below, features = hidden, []
        for k in range(1, self.config.num_heads + 1):
            before = None if last is None else last[k - 1]
            first = torch.zeros_like(below[:, :1]) if before is None else before
            if last is not None:
                last[k - 1] = below[:, -1:]
            mask, mask_positions = slots.for_depth(k)
            state = self.run(
                k,
                torch.cat([first, below[:, :-1]], dim=1),
                input_ids,
                position_ids,
                mask,
                cache,
                mask_positions=mask_positions,
            )
            below = torch.where((slots.rank >= k)[..., None], state, 0.0)
            features.append(below)
        return torch.stack(features, dim=2)

    def states(self, hidden: Tensor) -> Tensor:
        """Compute the features (B, S, K, D) of the rows whose forward runs now.

        Raises:
            ValueError: If the rows came without token ids, or with a prepared attention mask.
        """
        ids, mask, positions = self.row_inputs()
        return self.deepen(hidden, ids, mask, positions)

    def has_read(self) -> Tensor | None:
        """Mark the positions at which depth k has read k tokens."""
        ids, mask, positions = self.row_inputs()
        batch, width = ids.shape
        rank = _Slots.of(mask, positions, batch, width).rank.to(ids.device)
        return rank[..., None] >= torch.arange(1, self.config.num_heads + 1, device=ids.device)

    def row_inputs(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Give token ids, mask and positions of the rows whose forward runs now.

        Raises:
            ValueError: If the rows came without token ids, or with a prepared attention mask.
        """
        given = self.inputs
        if given is None or given.input_ids is None:
            raise ValueError(
                "Sequential heads read the tokens of the rows, but the model was called without input_ids. Call it "
                "with token ids, or use parallel heads."
            )
        mask = given.attention_mask
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise ValueError(
                "Sequential heads make attention masks of their own from the mask of the real tokens (B, L), but the "
                "model was called with a prepared one. Give it the mask of the tokens."
            )
        return given.input_ids, mask, given.position_ids

    def stream(self) -> FeatureStream:
        """Begin to compute features of rows that come in pieces."""
        return FeatureStream(self)

    def token_features(self, states: Tensor, head: int, chosen: tuple[Tensor, Tensor]) -> Tensor:
        """Take the features (N, D) of one depth at some positions."""
        return states[..., head, :][chosen]

    def _selected(self, hidden: Tensor, select: Select, tame: Callable[[Tensor], Tensor]) -> Tensor:
        return select(self.states(tame(hidden)))

    # Files

    def read_released(self, path: str | Path) -> None:
        """Load into these heads the depth modules that a model was released with, from the model's own checkpoint.

        Args:
            path: Folder or hub id of the checkpoint.

        Raises:
            ImportError: If this release of transformers has them in another form.
            ValueError: If the checkpoint has no depth modules, or another number of them.
        """
        base, num_heads = self._base[0], self.config.num_heads
        found = count_released_layers(base, path)
        if found != num_heads:
            have = f"has {found} MTP layers" if found else "has no MTP layers"
            raise ValueError(
                f"{path} {have} after layer {base.config.num_hidden_layers - 1}, but {num_heads} sequential heads are "
                f"asked for. Set num_mtp_heads={found}, or mtp_head_type='parallel' for heads of another number."
                if found
                else f"{path} {have} after layer {base.config.num_hidden_layers - 1}. Train new ones: "
                "attach_mtp_heads(model, head_type='sequential')."
            )
        self.layers.load_state_dict(read_released_layers(base, str(path), num_heads))

    def save(self, directory: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> Path:
        """Write weights and shape of the heads into `directory`; see [`Attachment.save`].

        Where the architecture is released with such heads (DeepSeek-V3, GLM-4.5) and the model has been saved there,
        the depth modules also become layers of its checkpoint, which `generate(use_mtp=True)` of transformers reads.
        """
        path, base = super().save(directory, state_dict), self._base[0]
        if is_released_with_layers(base) and has_checkpoint(path.parent):
            weights = self._whole_weights(state_dict)
            layers = {k.removeprefix("layers."): x for k, x in weights.items() if k.startswith("layers.")}
            add_to_checkpoint(base, path.parent, layers)
        return path

    # In a model

    def _fit(self, base: PreTrainedModel) -> None:
        super()._fit(base)
        self.requires_grad_(True)
        tell_number_of_layers(base, self.config.num_heads)
        self._base = (base,)
        _checkpoint_gradients_alike(base, self)


def _checkpoint_gradients_alike(base: PreTrainedModel, heads: SequentialHeads) -> None:
    """Turn on gradient checkpointing in the heads, if it was turned on in the trunk before they were attached."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    def blocks(module: nn.Module) -> list[Any]:
        return [x for x in module.modules() if isinstance(x, GradientCheckpointingLayer)]

    told = [block for block in blocks(trunk_of(base)) if block.gradient_checkpointing]
    for block in blocks(heads) if told else ():
        block.gradient_checkpointing = True
        block._gradient_checkpointing_func = told[0]._gradient_checkpointing_func
