"""Speculative rollouts in Lightning: the decoder, the heads that draft, and a base of the modules that have them."""

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rl_plugins.functional.alignment import completion_labels, completion_states
from rl_plugins.lightning.heads import HeadTraining, TokenTerm
from rl_plugins.lightning.language_module import LanguageModule
from rl_plugins.lightning.ranks import sum_over_ranks
from rl_plugins.nn.head_run import HeadRun
from rl_plugins.nn.mtp_heads import MTPHeads
from rl_plugins.rollouts.batch import Batch
from rl_plugins.signals.checks import check_at_least
from rl_plugins.signals.online import draft_metrics

if TYPE_CHECKING:
    from rl_plugins.rollouts.speculative.decoder import SpeculativeDecoder

DECODING = ("num_draft_tokens", "draft_cost", "adaptive")
"""Options of the decoder; all others are those of the heads."""


class DraftHeads:
    """MTP heads that only draft, kept sharp by their token loss on fresh rollouts.

    Args:
        model: The policy.
        source: What it was made from: heads beside a path's weights are loaded.
        temperature: Of sampling.
        num_mtp_heads: K.
        mtp_inner_size: Width of each head's residual block; the model's hidden size by default.
        mtp_heads_path: Folder of heads saved by an earlier run.
        head_learning_rate: Learning rate of the heads; `None` for the module's.
        mtp_loss_coef: Weight of their token loss.
        mtp_detach_trunk: Keep the token loss out of the trunk.

    Raises:
        ValueError: If a setting is out of range, or the model's heads are others.
    """

    def __init__(
        self,
        model: nn.Module,
        source: object,
        temperature: float,
        *,
        num_mtp_heads: int = 2,
        mtp_inner_size: int | None = None,
        mtp_heads_path: str | None = None,
        head_learning_rate: float | None = 1e-4,
        mtp_loss_coef: float = 0.1,
        mtp_detach_trunk: bool = True,
    ) -> None:
        check_at_least(0, head_learning_rate=head_learning_rate)
        self.learning_rates = {MTPHeads.name: head_learning_rate}
        self.training = HeadTraining(
            model,
            source,
            num_heads=num_mtp_heads,
            inner_size=mtp_inner_size,
            heads_path=mtp_heads_path,
            token_loss_coef=mtp_loss_coef,
            detach_trunk=mtp_detach_trunk,
            temperature=temperature,
            draft_only=True,
        )
        if not mtp_loss_coef:
            self.training.heads.requires_grad_(False)  # DDP would wait for their gradient

    def running(self, inputs: Batch, *, heads_only: bool = False) -> AbstractContextManager[HeadRun]:
        """Run the heads in the training forward on completions inside the block; `heads_only` keeps their gradient out
        of the trunk."""
        num_tokens, mask = inputs["completion_ids"].shape[1], inputs["completion_mask"]
        num_heads = self.training.heads.config.num_heads
        labels = completion_labels(inputs["prompt_ids"], inputs["completion_ids"], mask, num_heads)
        select = partial(completion_states, num_tokens=num_tokens)
        return self.training.running(select, labels, inputs["num_items"], heads_only=heads_only)

    def token_term(self, run: HeadRun, inputs: Batch) -> TokenTerm:
        """lambda_1 L_MTP, its metrics and their weights."""
        return self.training.token_term(run, inputs["num_items"])

    def save(self, directory: Path) -> None:
        """Write the heads beside the model."""
        self.training.save(directory)


def make_decoder(options: Mapping[str, Any]) -> "SpeculativeDecoder":
    """The decoder of a training run, whose choices depend on its seed alone unless `draft_cost` is `None`."""
    from rl_plugins.rollouts.speculative.decoder import SpeculativeDecoder  # see rl_plugins.rollouts

    given = {key: options[key] for key in DECODING if key in options}
    return SpeculativeDecoder(**{"draft_cost": 0.2, **given}, values=False)


class DraftingModule(LanguageModule):
    """A [`LanguageModule`] whose completions MTP heads may draft: its own, or [`DraftHeads`].

    Attributes:
        decoder: Decodes speculatively; `None` without speculation.
        draft_heads: Heads that only draft; `None` where there are others, or no speculation.
    """

    decoder: "SpeculativeDecoder | None" = None
    draft_heads: DraftHeads | None = None

    def set_up_drafting(self, source: object, temperature: float, options: Mapping[str, Any]) -> None:
        """Decode speculatively from now on.

        Args:
            source: What the policy was made from: heads beside a path's weights are loaded.
            temperature: Of sampling.
            options: `speculative_kwargs` of [`OnlineModule`].

        Raises:
            ValueError: If an option is unknown or out of range, or the model cannot be decoded like this.
        """
        self.decoder = make_decoder(options)
        own = {key: value for key, value in options.items() if key not in DECODING}
        self._set_up_draft_heads(source, temperature, own)

    def _set_up_draft_heads(self, source: object, temperature: float, options: dict[str, Any]) -> None:
        """Attach heads for drafting; a module that has heads of its own drafts with those."""
        accepted = inspect.signature(DraftHeads).parameters.values()
        names = [param.name for param in accepted if param.kind is param.KEYWORD_ONLY]
        if unknown := sorted(set(options) - set(names)):
            raise ValueError(
                f"speculative_kwargs has {', '.join(unknown)}, but its options are {', '.join([*DECODING, *names])}."
            )
        self.draft_heads = DraftHeads(self.model, source, temperature, **options)
        self.check_drafting()

    def check_drafting(self) -> None:
        """See that the model can be decoded as the settings say, if they ask for speculation; its heads are there.

        Raises:
            ValueError: If it cannot.
        """
        if self.decoder is not None:
            self.decoder.check(self.model)

    def learning_rates(self) -> dict[str, float | None]:
        """Heads that draft have their own."""
        return {**super().learning_rates(), **(self.draft_heads.learning_rates if self.draft_heads else {})}

    def restore_hooks(self) -> None:
        """Heads that draft run in a hook of the trunk."""
        super().restore_hooks()
        if self.draft_heads is not None:
            self.draft_heads.training.hook()

    @property
    def warming_up(self) -> bool:
        """Whether the policy stays as it is for now."""
        return False

    def loss_with_drafts(
        self, loss: Callable[[Batch], tuple[Tensor, dict[str, Tensor]]], inputs: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """An objective, and the token loss of heads that draft, on one forward pass; and the metrics of both."""
        if self.draft_heads is None:
            return loss(inputs)
        with self.draft_heads.running(inputs, heads_only=self.warming_up) as run:
            total, metrics = loss(inputs)
        token_term, token_metrics, weights = self.draft_heads.token_term(run, inputs)
        self.metric_weights |= weights
        return total + token_term, {**metrics, **token_metrics}

    def acceptance_metrics(self) -> dict[str, Tensor]:
        """[`~rl_plugins.signals.online.draft_metrics`] of the newest rollout of all ranks; none where it was not
        decoded speculatively."""
        if self.decoder is None or self.decoder.last is None:
            return {}
        assert self.decoder.last.statistics is not None
        return draft_metrics(sum_over_ranks(torch.tensor(self.decoder.last.statistics.counts, device=self.device)))

    # Checkpoints

    def on_validation_start(self) -> None:
        """As [`LanguageModule.on_validation_start`]; how many tokens training drafts is training's business, too."""
        super().on_validation_start()
        self._draft_length = self._draft_state()

    def on_validation_end(self) -> None:
        """As [`LanguageModule.on_validation_end`]."""
        super().on_validation_end()
        self._load_draft_state(self._draft_length)

    def _draft_state(self) -> dict[str, Any]:
        return {} if self.decoder is None else self.decoder.state_dict()

    def _load_draft_state(self, state: dict[str, Any]) -> None:
        if self.decoder is not None:
            self.decoder.load_state_dict(state)

    def rank_state(self) -> dict[str, Any]:
        """With how well drafts have been received."""
        return {**super().rank_state(), "draft_length": self._draft_state()}

    def load_rank_state(self, state: dict[str, Any]) -> None:
        """Go on drafting as many tokens; a checkpoint from before speculation says nothing about it."""
        super().load_rank_state(state)
        self._load_draft_state(state.get("draft_length", {}))

    # Export

    def _save_extras(self, directory: Path) -> None:
        super()._save_extras(directory)
        if self.draft_heads is not None:
            self.draft_heads.save(directory)
