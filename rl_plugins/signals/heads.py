"""MTP heads in training: which heads, how they run in a training forward, and their token loss."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch import Tensor, nn

from rl_plugins.functional.alignment import completion_labels, completion_states
from rl_plugins.nn.attaching import prepare_mtp_heads
from rl_plugins.nn.attachment import base_model_of
from rl_plugins.nn.head_run import HeadRun
from rl_plugins.nn.mtp_heads import MTPHeads
from rl_plugins.nn.token_loss import logit_cap, logit_divisor
from rl_plugins.rollouts.batch import Batch, loss_mask
from rl_plugins.signals.host import Ranks
from rl_plugins.signals.metrics import Metrics, head_metrics
from rl_plugins.signals.options import HeadOptions


class HeadTraining:
    """The heads of a policy while it is trained.

    Args:
        options: Which heads, and how they learn tokens.
        temperature: Temperature of sampling, at which log-probabilities are taken.
        draft_only: Whether the heads only draft, so that their values stay as they are.

    Attributes:
        heads: The heads, once they are attached.
        fresh: Whether the heads were new when they were attached, with weights that have never learned.
    """

    heads: MTPHeads
    fresh = False

    def __init__(self, options: HeadOptions, *, temperature: float = 1.0, draft_only: bool = False) -> None:
        self.options, self.temperature, self.draft_only = options, temperature, draft_only
        self.learning_rate = options.head_learning_rate
        self._saved: str | None = None

    def prepare(self, policy: Any, revision: str | None = None) -> None:
        """Find saved heads, before the policy is loaded.

        Args:
            policy: Model or path, as the user gave it; heads that are saved beside a path's weights are used.
            revision: Revision of the repository on the hub.

        Raises:
            FileNotFoundError: If `mtp_heads_path` holds no heads.
        """
        given = self.options.mtp_heads_path
        if given is not None:
            MTPHeads.check_saved(given)
        self._saved = given or (MTPHeads.find(policy, revision=revision) if isinstance(policy, str) else None)

    def attach(self, model: nn.Module, *, seed: int = 0) -> MTPHeads:
        """Give the policy heads, or go on with those that it has.

        Raises:
            ValueError: If existing heads do not fit the options.
        """
        options = self.options
        self.fresh = self._saved is None and MTPHeads.of(model) is None
        self.heads = prepare_mtp_heads(
            model,
            options.num_mtp_heads,
            head_type=options.mtp_head_type,
            inner_size=options.mtp_inner_size,
            path=self._saved,
            seed=seed,
        )
        base = base_model_of(model)
        self._lm_head: Any = base.get_output_embeddings
        self._divisor, self._cap = logit_divisor(base.config, self.temperature), logit_cap(base.config)
        if self.draft_only:
            self.heads.draft_only()
            if not options.mtp_loss_coef:
                self.heads.requires_grad_(False)  # DDP would wait for their gradient
        return self.heads

    def running(
        self, select: Callable[[Tensor], Tensor], labels: Tensor | None, *, alone: bool = False, **values: Any
    ) -> AbstractContextManager[HeadRun]:
        """Run the heads in the model's next forward.

        Args:
            select: Picks the states from the trunk's hidden states.
            labels: Token of each head (B, T, K), -100 where there is none.
            alone: Keep the gradient of the token loss out of the trunk, whatever the options say.
            values: Arguments about the values; see [`~rl_plugins.nn.MTPHeads.running`].
        """
        return self.heads.running(
            select,
            lm_head=self._lm_head(),
            labels=labels if self.options.mtp_loss_coef else None,
            divisor=self._divisor,
            cap=self._cap,
            share=self.options.mtp_loss_share,
            distilled=self.options.mtp_loss_type == "distribution",
            detach_tokens=alone or self.options.mtp_detach_trunk,
            with_values=not self.draft_only,
            **values,
        )

    def completions(self, batch: Batch) -> tuple[Callable[[Tensor], Tensor], Tensor | None]:
        """Pick the states of a batch of completions, and label them with the tokens of each head."""
        num_tokens, labels = batch["completion_ids"].shape[1], None
        if self.options.mtp_loss_coef:
            num_heads, ahead = self.heads.config.num_heads, self.heads.ahead
            mask = loss_mask(batch)
            labels = completion_labels(batch["prompt_ids"], batch["completion_ids"], mask, num_heads, ahead=ahead)
        return partial(completion_states, num_tokens=num_tokens), labels

    def loss(self, run: HeadRun, num_items: Tensor, ranks: Ranks) -> tuple[Tensor | float, Metrics]:
        """Compute lambda_1 L_MTP of a run, `L_MTP = 1 / (K N) sum_k L_k`, and its metrics.

        Args:
            run: The run, after its forward.
            num_items: N, real tokens that the loss is averaged over.
            ranks: Sums over ranks.
        """
        if run.token_losses is None or run.token_counts is None:
            return 0.0, Metrics()
        metrics = head_metrics("mtp/token_loss", run.token_losses.detach(), run.token_counts, ranks.sum_over_ranks)
        return self.options.mtp_loss_coef * run.token_losses.sum() / (len(run.token_losses) * num_items), metrics
