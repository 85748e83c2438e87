"""Training signals: what a scored batch of completions teaches the policy."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rl_plugins.functional.advantages.tracked import policy_distance
from rl_plugins.functional.log_probs import kl_k1
from rl_plugins.functional.masking import masked_moments
from rl_plugins.functional.rewards import kl_shaped_rewards
from rl_plugins.nn.head_run import HeadRun
from rl_plugins.nn.mtp_heads import MTPHeads
from rl_plugins.rollouts.batch import Batch, loss_mask
from rl_plugins.signals.advantages import ADVANTAGES, advantages_of, advantages_of_rewards
from rl_plugins.signals.heads import HeadTraining
from rl_plugins.signals.host import Host
from rl_plugins.signals.metrics import Metrics
from rl_plugins.signals.options import DraftOptions, HeadOptions, VariantOptions
from rl_plugins.signals.value_tracker import TrackedAdvantages, ValueTracker, prompt_key

if TYPE_CHECKING:
    from rl_plugins.rollouts.speculative.decoder import SpeculativeDecoder
    from rl_plugins.signals.critics import Critic


class Signal(ABC):
    """Base class of training signals: a signal makes the advantages of a batch, and may add losses of its own."""

    critic: "Critic | None" = None
    """The critic that is trained with the policy, if there is one."""

    @property
    def kl_in_reward(self) -> bool:
        """Whether the KL is subtracted from the rewards instead of added to the loss."""
        return False

    @property
    def keeps_host_advantages(self) -> bool:
        """Whether the host's own advantages are used."""
        return False

    @property
    def bootstrap_truncated(self) -> bool | None:
        """Whether episodes that were cut are worth V(s_T) after their last token: the option of that name in
        [`~rl_plugins.signals.OnlineValueOptions`]. `False` for signals without values."""
        return False

    def before_rollout(self, host: Host) -> Metrics:
        """Update the signal, now that the policy has learnt from the last training batch."""
        return Metrics()

    @abstractmethod
    def advantages(self, batch: Batch, scores: Tensor, prompts: Sequence[Any], host: Host) -> Metrics:
        """Put `advantages` (B,) or (B, T) into a batch just generated, and whatever else the loss needs.

        Args:
            batch: Prompts, completions, `rewards` and `paid` (B, T), and log-probabilities where the host has computed
                them.
            scores: One number per completion (B,), NaN where it cannot be scored.
            prompts: The prompts as the data has them, text or messages.
            host: The trainer or module.

        Returns:
            Metrics of all ranks.
        """

    @property
    def warmup_steps(self) -> int:
        """Number of optimizer steps at the start in which the policy does not change."""
        return 0

    def warming_up(self, host: Host) -> bool:
        """Return whether training is in the warm-up, in which the policy does not change."""
        return host.training and host.step < self.warmup_steps

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint that is equal on all ranks."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore [`state_dict`]."""

    def rank_state(self) -> dict[str, Any]:
        """Return the state for a checkpoint that differs from rank to rank."""
        return {}

    def load_rank_state(self, state: Mapping[str, Any]) -> None:
        """Restore [`rank_state`]."""


class GroupSignal(Signal):
    """Advantages from rewards alone: of groups of completions, of whole batches, or of tracked prompts.

    Args:
        options: The advantage, by name; without a name the advantages stay as the host made them.
    """

    def __init__(self, options: VariantOptions) -> None:
        self.options = options
        tracks = options.advantage is not None and ADVANTAGES[options.advantage].tracks_prompts
        self.tracked = TrackedAdvantages(options.advantage_options) if tracks else None

    @property
    def kl_in_reward(self) -> bool:
        """Whether the KL is subtracted from the rewards instead of added to the loss."""
        return self.options.kl_in_reward

    @property
    def keeps_host_advantages(self) -> bool:
        """Whether the host's own advantages are used, since no advantage is named."""
        return self.options.advantage is None

    @property
    def value_tracker(self) -> ValueTracker | None:
        """Tracker of the success of every prompt; `None` for an advantage that tracks none."""
        return None if self.tracked is None else self.tracked.tracker

    def before_rollout(self, host: Host) -> Metrics:
        """Count the rewards of the last training batch, now that the policy has learnt from it."""
        if self.tracked is None or not host.training:
            return Metrics()
        return Metrics(self.tracked.absorb(lambda rows: self._distances(rows, host)))

    def _distances(self, rows: Batch, host: Host) -> Tensor:
        """Measure how far the policy has moved on completions of all ranks (N,)."""
        distance = policy_distance(rows["old_per_token_logps"], host.log_probs(rows), loss_mask(rows))
        return host.gather_rows(distance)

    def advantages(self, batch: Batch, scores: Tensor, prompts: Sequence[Any], host: Host) -> Metrics:
        """Put one advantage per completion or token into a batch."""
        name, metrics = self.options.advantage, Metrics()
        if name is None:
            return metrics
        mask = loss_mask(batch).bool()
        if self.tracked is not None:
            advantages, metrics = self._of_prompts(self.tracked, batch, scores, prompts, host)
        elif self.kl_in_reward or ADVANTAGES[name].only_of_rewards:
            advantages, metrics = self._of_rewards(name, batch, mask & scores.isfinite().unsqueeze(1), host)
        else:
            advantages = advantages_of(
                name,
                scores,
                host.group_size,
                mask,
                rewards=batch["rewards"],
                paid=batch["paid"],
                options=self.options.advantage_options,
                gather=host.gather_rows,
                own=host.own_rows,
            )
        # Scores may be wider than float32, in which the losses expect advantages.
        batch["advantages"] = advantages.to(torch.float32)
        return metrics

    def _of_rewards(self, name: str, batch: Batch, mask: Tensor, host: Host) -> tuple[Tensor, Metrics]:
        """Compute advantages from the rewards of tokens, minus the KL penalties with `kl_in_reward`."""
        rewards, metrics = batch["rewards"], Metrics()
        if self.kl_in_reward:
            if "old_per_token_logps" not in batch:
                batch["old_per_token_logps"] = host.log_probs(batch)
            logps, ref_logps = batch["old_per_token_logps"], batch["ref_per_token_logps"]
            metrics["kl"] = masked_moments(kl_k1(logps, ref_logps), mask, reduce=host.sum_over_ranks)[0]
            rewards = kl_shaped_rewards(rewards, logps, ref_logps, mask, beta=host.beta)
        options = self.options.advantage_options
        return advantages_of_rewards(name, rewards, mask, options=options, reduce=host.sum_over_ranks), metrics

    def _of_prompts(
        self, tracked: TrackedAdvantages, batch: Batch, scores: Tensor, prompts: Sequence[Any], host: Host
    ) -> tuple[Tensor, Metrics]:
        """Compute advantages over each prompt's tracked success, and keep the scores for the tracker to count next."""
        keys, every = host.gather_objects([prompt_key(prompt) for prompt in prompts]), host.gather_rows(scores)
        advantages, metrics = tracked.advantages(keys, every)
        if host.training:
            rows: Batch | None = None
            if tracked.needs_rows:
                if "old_per_token_logps" not in batch:
                    batch["old_per_token_logps"] = host.log_probs(batch)
                rows = batch.copy()
            tracked.remember(keys, every, rows)
        return host.own_rows(advantages), Metrics(metrics)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts of the tracked prompts."""
        return {} if self.tracked is None else {"prompts": self.tracked.tracker.counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the counts."""
        if self.tracked is not None:
            self.tracked.tracker.counts = {key: (a, b) for key, (a, b) in state["prompts"].items()}

    def rank_state(self) -> dict[str, Any]:
        """Return the batch that the tracker counts next."""
        return {} if self.tracked is None else {"unabsorbed": self.tracked.unabsorbed}

    def load_rank_state(self, state: Mapping[str, Any]) -> None:
        """Restore that batch."""
        if self.tracked is not None:
            self.tracked.unabsorbed = state["unabsorbed"]


class DraftHeads:
    """MTP heads that only draft completions; their token loss on every rollout keeps their drafts good.

    Args:
        options: Which heads, and how they learn.
        temperature: Temperature of sampling.
    """

    def __init__(self, options: HeadOptions, *, temperature: float = 1.0) -> None:
        self.training = HeadTraining(options, temperature=temperature, draft_only=True)
        self.learning_rate = options.head_learning_rate

    @property
    def learns(self) -> bool:
        """Whether the heads have a loss."""
        return bool(self.training.options.mtp_loss_coef)

    def prepare(self, policy: Any, revision: str | None = None) -> None:
        """Find saved heads, before the policy is loaded."""
        self.training.prepare(policy, revision)

    def attach(self, model: nn.Module, *, seed: int = 0) -> MTPHeads:
        """Give the policy heads, or go on with those that it has."""
        return self.training.attach(model, seed=seed)

    def learning(self, batch: Batch, *, alone: bool) -> AbstractContextManager[HeadRun]:
        """Run the heads in the policy's forward; `alone` keeps their gradient out of the trunk."""
        select, labels = self.training.completions(batch)
        return self.training.running(select, labels, alone=alone)

    def loss(self, run: HeadRun, num_items: Tensor, host: Host) -> tuple[Tensor | float, Metrics]:
        """Compute lambda_1 L_MTP of a run, and its metrics."""
        return self.training.loss(run, num_items, host)


def make_decoder(options: DraftOptions) -> "SpeculativeDecoder | None":
    """Make the decoder of a training run; `None` without speculation.

    The decoder's choices depend on the run's seed alone, unless `draft_cost` is `None`: then they depend on measured
    times.
    """
    if not options.speculative:
        return None
    from rl_plugins.rollouts.speculative.decoder import SpeculativeDecoder  # see rl_plugins.rollouts

    return SpeculativeDecoder(options.num_draft_tokens, draft_cost=options.draft_cost)
