"""Multi-token-prediction heads that also output a value: the critic inside the policy."""

import json
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from rl_plugins.nn.attachment import Attachment, find_file
from rl_plugins.nn.gradient import clamp_gradient
from rl_plugins.nn.head_run import HeadRun
from rl_plugins.nn.token_loss import head_token_loss

CONFIG_NAME = "mtp_heads_config.json"
"""File with the shape of the heads, beside the file of their weights."""

HEAD_TYPES = ("parallel", "sequential")

Select = Callable[[Tensor], Tensor]
"""Picks positions of rows: (B, S, ...) -> (B, T, ...)."""


@dataclass(frozen=True)
class MTPHeadsConfig:
    """Shape of a set of heads.

    Args:
        num_heads: K, the number of heads.
        hidden_size: D of the trunk.
        inner_size: Width of each parallel head's residual block; `None` for sequential heads, which are decoder
            layers of the model's own shape.
        norm_eps: Epsilon of the RMS norms.
        head_type: `parallel` (Gloeckle et al., 2404.19737) or `sequential` (DeepSeek-V3, 2412.19437).
    """

    num_heads: int
    hidden_size: int
    inner_size: int | None = None
    norm_eps: float = 1e-6
    head_type: str = "parallel"

    def __post_init__(self) -> None:
        if self.head_type not in HEAD_TYPES:
            raise ValueError(f"Unknown head_type {self.head_type!r}; choose one of {', '.join(HEAD_TYPES)}.")
        if self.head_type == "sequential" and self.inner_size is not None:
            raise ValueError(
                f"inner_size={self.inner_size} is the width of a parallel head. Sequential heads are decoder layers "
                "of the model's own shape: leave it out."
            )
        if self.head_type == "parallel" and self.inner_size is None:
            object.__setattr__(self, "inner_size", self.hidden_size)
        for name in ("num_heads", "hidden_size", "inner_size"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}.")

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dictionary for a JSON file."""
        return asdict(self)


class MTPHeads(Attachment):
    """K heads on the trunk of a language model, each of which predicts tokens and a value.

    [`ParallelHeads`] are small blocks that read one hidden state. [`SequentialHeads`] are whole decoder layers that
    also read the tokens after it. Both kinds draft tokens for speculative decoding, and both can be the critic.

    Attributes:
        config: Shape of the heads.
        ahead: Number of tokens by which each head looks further than the one before it: 1 for parallel heads, of
            which head k judges `s_{t+k-1}` and predicts `y_{t+k}`; 0 for sequential heads, which have read the tokens
            in between, so that all of them judge `s_t` and predict `y_t`.
        reads_rows: Whether a head reads the whole row up to a position, and not only the hidden state there.
    """

    name = "mtp_heads"
    mark = "mtp_heads.safetensors"
    ahead: ClassVar[int]
    reads_rows: ClassVar[bool]
    config: MTPHeadsConfig

    @property
    @abstractmethod
    def value_path(self) -> nn.Module:
        """The part that turns [`states`] into values (B, T, K); target heads copy it."""

    @abstractmethod
    def draft_only(self) -> None:
        """Freeze the value weights: where nothing learns values, they get no gradient, and DDP would wait for one."""

    @abstractmethod
    def token_features(self, states: Tensor, head: int, chosen: tuple[Tensor, Tensor]) -> Tensor:
        """Compute the inputs of the LM head at some positions.

        Args:
            states: Result of [`states`], cut to (B, T, ...).
            head: Index of the head, k - 1.
            chosen: Rows and columns of the positions, two index tensors (N,).

        Returns:
            Features (N, D).
        """

    def has_read(self) -> Tensor | None:
        """Mark the positions (B, S, K) at which a head has read all that it needs, in the forward that runs now.
        `None` stands for all positions of all heads."""
        return None

    @abstractmethod
    def _selected(self, hidden: Tensor, select: Select, tame: Callable[[Tensor], Tensor]) -> Tensor:
        """Compute states at the selected positions, with `tame` between them and the trunk."""

    @contextmanager
    def running(
        self,
        select: Select,
        *,
        lm_head: nn.Module | None = None,
        labels: Tensor | None = None,
        divisor: float = 1.0,
        cap: float | None = None,
        share: float = 1.0,
        distilled: bool = False,
        detach_tokens: bool = True,
        value_grad_scale: float = 1.0,
        value_grad_norm: Tensor | None = None,
        target: Callable[[Tensor], Tensor] | None = None,
        with_values: bool = True,
    ) -> Iterator[HeadRun]:
        """Run the heads in the next forward of the model inside the block: values, and the token loss where labels are
        given. Only the first forward counts.

        Args:
            select: Picks positions, (B, S, ...) -> (B, T, ...).
            lm_head: The model's output embedding, for the token loss.
            labels: Token of each head (B, T, K), -100 where there is none; `None` skips the token loss.
            divisor: See [`~rl_plugins.nn.logit_divisor`].
            cap: See [`~rl_plugins.nn.logit_cap`].
            share: Share of the labels that the token loss is taken at, drawn at random; see
                [`~rl_plugins.nn.head_token_loss`].
            distilled: Whether the heads learn the model's own distribution of the tokens instead of the tokens.
            detach_tokens: Keep the token loss out of the trunk.
            value_grad_scale: Scale of the value gradient into the trunk; 0 detaches it.
            value_grad_norm: Per-token clamp of that gradient, in the units of the scaled loss.
            target: Slow heads to run on the same states, where the bootstrap is not taken from a rollout.
            with_values: Whether the values are computed; heads that only draft have no use for them.

        Yields:
            The results, empty until the forward has run.
        """
        run = HeadRun()
        tame = partial(clamp_gradient, max_norm=value_grad_norm, scale=value_grad_scale)
        detached = detach_tokens and value_grad_scale == 0.0

        def observe(hidden: Tensor) -> tuple[Tensor | None, ...]:
            if run.is_filled:
                return ()
            # Values and tokens may send different gradients into the trunk, and then need separate states. States of
            # heads that read whole rows cost decoder layers: they are made once where neither sends a gradient.
            shared = self.reads_rows and (detached or not hidden.requires_grad)
            states: Tensor | None = None
            if with_values:
                states = self._selected(hidden, select, Tensor.detach if shared else partial(tame, stats=run.stats))
                run.values = self.value_path(states)
                if target is not None:
                    run.target_values = target(states)
            if labels is not None and lm_head is not None:
                if states is None or not shared:
                    states = self._selected(hidden, select, Tensor.detach if detach_tokens else lambda x: x)
                read = self.has_read()
                run.token_losses, run.token_counts = head_token_loss(
                    partial(self.token_features, states),
                    labels if read is None else labels.masked_fill(~select(read), -100),
                    lm_head,
                    temperature=divisor,
                    cap=cap,
                    share=share,
                    teacher=select(hidden.detach()) if distilled else None,
                    ahead=self.ahead,
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
        self.to(device=lm_head.weight.device)  # a device map may have put it elsewhere than the first layers

    # Files

    def save(self, directory: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> Path:
        """Write weights and shape of the heads into `directory`, two files beside `model.safetensors`; see
        [`Attachment.save`]."""
        path = super().save(directory, state_dict)
        path.with_name(CONFIG_NAME).write_text(json.dumps(self.config.to_dict(), indent=2) + "\n")
        return path

    @classmethod
    def saved_config(cls, directory: str | Path) -> MTPHeadsConfig:
        """Read the shape of saved heads.

        Raises:
            FileNotFoundError: If `directory` holds none.
        """
        cls.check_saved(directory)
        return MTPHeadsConfig(**json.loads((Path(directory) / CONFIG_NAME).read_text()))

    def load(self, directory: str | Path) -> None:
        """Load into these heads the weights that [`save`] wrote.

        Raises:
            FileNotFoundError: If `directory` holds no heads.
            ValueError: If the saved heads have another type, number, width or hidden size.
        """
        config = self.saved_config(directory)
        if config.hidden_size != self.config.hidden_size:
            raise ValueError(
                f"The heads in {directory} were trained for hidden size {config.hidden_size}, but this model has "
                f"{self.config.hidden_size}. Load the model they belong to, or train new heads for this one."
            )
        if config.head_type != self.config.head_type:
            raise ValueError(
                f"The heads in {directory} are {config.head_type}, but {self.config.head_type} ones are asked for. "
                f"Set mtp_head_type={config.head_type!r}, or train new heads in another folder."
            )
        if config != self.config:
            inner = "" if config.inner_size is None else f" with inner size {config.inner_size}"
            raise ValueError(
                f"The heads in {directory} are {config}, but the attached ones are {self.config}. Ask for "
                f"{config.num_heads} heads{inner}, or call MTPHeads.detach(model) before loading."
            )
        super().load(directory)

    @classmethod
    def find(cls, path: str | os.PathLike[str], *, revision: str | None = None) -> str | None:
        """Find the folder of heads that were saved with a model, and fetch both files; see [`Attachment.find`]."""
        folder = super().find(path, revision=revision)
        if folder is not None:
            find_file(path, CONFIG_NAME, revision=revision)
        return folder
