"""Multi-token-prediction heads that also output a value: the critic inside the policy."""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from rl_plugins.nn.attachment import Attachment, base_model_of, find_file
from rl_plugins.nn.gradient import clamp_gradient
from rl_plugins.nn.head_run import HeadRun
from rl_plugins.nn.native_mtp import NativeMTP
from rl_plugins.nn.seeding import fixed_seed
from rl_plugins.nn.token_loss import head_token_loss

logger = logging.getLogger(__name__)

CONFIG_NAME = "mtp_heads_config.json"
"""File of the heads' shape, beside their weights."""


@dataclass(frozen=True)
class MTPHeadsConfig:
    """Shape of a set of heads.

    Args:
        num_heads: K, the number of heads; head k predicts token `y_{t+k}` and the value of `s_{t+k-1}`.
        hidden_size: D of the trunk.
        inner_size: Width of each head's residual block.
        norm_eps: Epsilon of the RMS norms.
    """

    num_heads: int
    hidden_size: int
    inner_size: int
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("num_heads", "hidden_size", "inner_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")

    def to_dict(self) -> dict[str, int | float]:
        """Plain dictionary for a JSON file."""
        return asdict(self)


class ValueHead(nn.Module):
    """Scalar value of a head's features: `v = w . RMSNorm(x) + b`, in float32 whatever the model's dtype.

    The parameters keep the model's dtype, since an fp32 module inside a bf16 model breaks ZeRO-3; they belong to this
    module directly, so that ZeRO-3's pre-forward hook gathers them.
    """

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        # The name is one that the host's optimizer leaves out of weight decay.
        self.rmsnorm_weight = nn.Parameter(torch.ones(hidden_size))
        self.weight = nn.Parameter(torch.zeros(hidden_size))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, features: Tensor) -> Tensor:
        """Map features (..., D) to float32 values (...)."""
        with torch.autocast(features.device.type, enabled=False):
            x = F.rms_norm(features.float(), (features.shape[-1],), self.rmsnorm_weight.float(), self.eps)
            return x @ self.weight.float() + self.bias.float()


class MTPHead(nn.Module):
    """One head: `x = h + W_down silu(W_up RMSNorm(h))`; the LM head reads `x` for tokens, `ValueHead` for the value.

    `W_down` starts at zero, so `x = h`: the token logits start as an exact copy of the main head's, and the value
    weights start at zero, so the value starts at 0.
    """

    def __init__(self, config: MTPHeadsConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.up = nn.Linear(config.hidden_size, config.inner_size, bias=False)
        self.down = nn.Linear(config.inner_size, config.hidden_size, bias=False)
        self.value = ValueHead(config.hidden_size, config.norm_eps)
        nn.init.normal_(self.up.weight, std=config.hidden_size**-0.5)
        nn.init.zeros_(self.down.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map trunk states (..., D) to features (..., D), the input of the LM head."""
        return hidden + self.down(F.silu(self.up(self.norm(hidden))))

    def values(self, hidden: Tensor) -> Tensor:
        """Map trunk states (..., D) to float32 values (...)."""
        return self.value(self(hidden))


class MTPHeads(Attachment):
    """K parallel heads on the trunk's hidden state: `[logits_k, v_k] = head_k(h_t)`.

    Head k reads `h_t` alone. Its logits predict `y_{t+k}` (Gloeckle et al., 2404.19737, section 2; the main head
    predicts `y_t`) and its value forecasts the return from `r_{t+k-1}` on, so `v_1[t]` estimates `V(s_t)`.

    Args:
        config: Shape of the heads.
        seed: Seed of the initial weights. Fixed, so that every rank starts from the same heads and the caller's
            random state is left alone.
    """

    name = "mtp_heads"
    mark = "mtp_heads.safetensors"

    def __init__(self, config: MTPHeadsConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        with fixed_seed(seed):
            self.heads = nn.ModuleList(MTPHead(config) for _ in range(config.num_heads))

    def forward(self, hidden: Tensor) -> Tensor:
        """Values of all heads.

        Args:
            hidden: Trunk states (B, T, D).

        Returns:
            Values (B, T, K), float32.
        """
        return torch.stack([head.values(hidden) for head in self], dim=-1)

    def features(self, hidden: Tensor) -> Tensor:
        """Inputs of the LM head, one per head.

        Args:
            hidden: Trunk states (B, T, D).

        Returns:
            Features (B, T, K, D).
        """
        return torch.stack([head(hidden) for head in self], dim=-2)

    def draft_only(self) -> None:
        """Leave the value weights as they are: where nothing learns values, they get no gradient, which DDP would
        wait for."""
        for head in self:
            head.value.requires_grad_(False)

    def __iter__(self) -> Iterator[MTPHead]:
        """The heads in order, k = 1..K."""
        return (cast(MTPHead, head) for head in self.heads)

    @contextmanager
    def running(
        self,
        select: Callable[[Tensor], Tensor],
        *,
        lm_head: nn.Module | None = None,
        labels: Tensor | None = None,
        divisor: float = 1.0,
        detach_tokens: bool = True,
        value_grad_scale: float = 1.0,
        value_grad_norm: Tensor | None = None,
        target: Callable[[Tensor], Tensor] | None = None,
        with_values: bool = True,
    ) -> Iterator[HeadRun]:
        """Run the heads in the next forward of the model inside the block: values, and the token loss where labels are
        given. Only the first forward counts.

        Args:
            select: Picks the states from the trunk's hidden states, (B, S, D) -> (B, T, D).
            lm_head: The model's output embedding, for the token loss.
            labels: Token of each head (B, T, K), -100 where there is none; `None` skips the token loss.
            divisor: See [`~rl_plugins.nn.logit_divisor`].
            detach_tokens: Keep the token loss out of the trunk.
            value_grad_scale: Scale of the value gradient into the trunk; 0 detaches it.
            value_grad_norm: Per-token clamp of that gradient, in the units of the scaled loss.
            target: Slow heads to run on the same states, where the bootstrap is not taken from a rollout.
            with_values: Whether the values are computed; heads that only draft have no use for them.

        Yields:
            The results, empty until the forward has run.
        """
        run = HeadRun()

        def observe(hidden: Tensor) -> tuple[Tensor | None, ...]:
            if run.is_filled:
                return ()
            states = select(hidden)
            if with_values:
                tamed = clamp_gradient(states, max_norm=value_grad_norm, scale=value_grad_scale, stats=run.stats)
                run.values = self(tamed)
            if target is not None:
                run.target_values = target(states)
            if labels is not None and lm_head is not None:
                run.token_losses, run.token_counts = head_token_loss(
                    self, states.detach() if detach_tokens else states, labels, lm_head, temperature=divisor
                )
            return run.values, run.token_losses

        with self.watching(observe):
            yield run

    # In a model

    def _fit(self, base: PreTrainedModel) -> None:
        lm_head = base.get_output_embeddings()
        if lm_head is None:
            raise ValueError(
                f"{type(base).__name__} has no LM head. Load the model with AutoModelForCausalLM, not AutoModel."
            )
        hidden_size = base.config.get_text_config().hidden_size
        if self.config.hidden_size != hidden_size:
            raise ValueError(
                f"These heads were made for hidden size {self.config.hidden_size}, but {type(base).__name__} has "
                f"{hidden_size}. Attach new heads, or load the model that the heads were trained with."
            )
        super()._fit(base)
        self.to(device=lm_head.weight.device)  # which a device map may have put elsewhere than the first layers

    @classmethod
    def prepare(
        cls,
        model: nn.Module,
        num_heads: int,
        *,
        inner_size: int | None = None,
        path: str | Path | None = None,
        seed: int = 0,
    ) -> "MTPHeads":
        """The MTP heads that a training starts from: those attached, those saved in `path`, or new ones.

        Args:
            model: Causal LM, or a PEFT model around one.
            num_heads: K.
            inner_size: Width of each new head's residual block; the trunk's hidden size by default.
            path: Folder of saved heads.
            seed: Of new heads.

        Raises:
            FileNotFoundError: If there are no heads in `path`.
            ValueError: If the model comes with another number of heads, or with native MTP layers, or the saved heads
                do not fit.
        """
        if NativeMTP.of(model) is not None:
            raise ValueError(
                "The model has native MTP layers, which would not be trained beside MTP heads, but would draft. "
                "NativeMTP.detach(model) first, or train the native layers."
            )
        heads = cls.of(model)
        if heads is None:
            heads = attach_mtp_heads(model, num_heads, inner_size=inner_size, seed=seed)
            if path is not None:
                heads.load(path)
                logger.info("Loaded MTP heads from %s.", path)
        elif heads.config.num_heads != num_heads:
            raise ValueError(
                f"The model comes with {heads.config.num_heads} MTP heads, but {num_heads} are asked for. Ask for "
                f"{heads.config.num_heads}, or MTPHeads.detach(model) to start with new ones."
            )
        return heads.requires_grad_(True)

    # Files

    def save(self, directory: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> Path:
        """Write weights and shape of the heads into `directory`, two files beside `model.safetensors`; see
        [`Attachment.save`]."""
        path = super().save(directory, state_dict)
        path.with_name(CONFIG_NAME).write_text(json.dumps(self.config.to_dict(), indent=2) + "\n")
        return path

    @classmethod
    def saved_config(cls, directory: str | Path) -> MTPHeadsConfig:
        """Shape of saved heads.

        Raises:
            FileNotFoundError: If `directory` holds none.
        """
        cls.check_saved(directory)
        return MTPHeadsConfig(**json.loads((Path(directory) / CONFIG_NAME).read_text()))

    def load(self, directory: str | Path) -> None:
        """Read heads that [`save`] wrote into these.

        Raises:
            FileNotFoundError: If `directory` holds no heads.
            ValueError: If they are of another number, width or hidden size.
        """
        config = self.saved_config(directory)
        if config.hidden_size != self.config.hidden_size:
            raise ValueError(
                f"The heads in {directory} were trained for hidden size {config.hidden_size}, but this model has "
                f"{self.config.hidden_size}. Load the model they belong to, or train new heads for this one."
            )
        if config != self.config:
            raise ValueError(
                f"The heads in {directory} are {config}, but the attached ones are {self.config}. Ask for "
                f"{config.num_heads} heads with inner size {config.inner_size}, or MTPHeads.detach(model) before "
                "loading."
            )
        super().load(directory)

    @classmethod
    def find(cls, path: str | os.PathLike[str], *, revision: str | None = None) -> str | None:
        """The folder of heads that were saved with a model, with both files fetched; see [`Attachment.find`]."""
        folder = super().find(path, revision=revision)
        if folder is not None:
            find_file(path, CONFIG_NAME, revision=revision)
        return folder


def attach_mtp_heads(
    model: nn.Module,
    num_heads: int = 2,
    *,
    inner_size: int | None = None,
    seed: int = 0,
    heads: MTPHeads | None = None,
) -> MTPHeads:
    """Attach MTP value heads to a causal language model; see [`Attachment`] for what that means.

    Args:
        model: Causal LM, or a PEFT model around one.
        num_heads: K, at least 1.
        inner_size: Width of each head's residual block; the trunk's hidden size by default.
        seed: Seed of the initial weights; equal on all ranks.
        heads: Attach these instead of new ones (they must fit the trunk).

    Returns:
        The attached heads, in the model's dtype and on its device.

    Raises:
        TypeError: If `model` is not a transformers model.
        ValueError: If K < 1, the model has no LM head, it has heads already, or `heads` do not fit the trunk.
    """
    if heads is None:
        hidden_size = base_model_of(model).config.get_text_config().hidden_size
        config = MTPHeadsConfig(num_heads, hidden_size, hidden_size if inner_size is None else inner_size)
        heads = MTPHeads(config, seed=seed)
    return heads.attach(model)


def load_mtp_heads(model: nn.Module, directory: str | Path) -> MTPHeads:
    """Load saved heads into a model, attaching them if the model has none.

    Args:
        model: Causal LM, with or without heads.
        directory: Where the heads were saved.

    Returns:
        The heads of `model`.

    Raises:
        FileNotFoundError: If `directory` holds no heads.
        ValueError: If the file's hidden size does not fit the model, or its K or width those of the attached heads.
    """
    heads = MTPHeads.of(model)
    if heads is None:
        heads = MTPHeads(MTPHeads.saved_config(directory)).attach(model)
    heads.load(directory)
    return heads
