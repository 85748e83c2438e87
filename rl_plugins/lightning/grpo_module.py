"""GRPO and its variants in Lightning."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rl_plugins.functional.advantages.group import batch_normalized, group_normalized
from rl_plugins.functional.advantages.traces import lambda_trace
from rl_plugins.functional.advantages.tracked import policy_distance
from rl_plugins.functional.log_probs import kl_k1
from rl_plugins.functional.masking import masked_moments
from rl_plugins.lightning.online_module import Metrics, OnlineModule
from rl_plugins.lightning.prompts import Row
from rl_plugins.lightning.ranks import gather_objects, gather_rows, own_rows, rank, sum_over_ranks
from rl_plugins.rollouts.batch import Batch
from rl_plugins.rollouts.rewards import RewardFunc
from rl_plugins.settings import with_numbers
from rl_plugins.signals.advantages import (
    GROUPLESS,
    check_advantage,
    group_advantages,
    penalised_returns,
)
from rl_plugins.signals.value_tracker import TrackedAdvantages, prompt_key


class GRPOModule(OnlineModule):
    r"""Group Relative Policy Optimization (2402.03300) and its variants: any advantage and any policy loss of the
    package, by name.

    `A_i = (r_i - mean(r_1..r_G)) / std(r_1..r_G)` by default; [`~rl_plugins.signals.ADVANTAGES`] and
    [`~rl_plugins.signals.POLICY_LOSSES`] list what there is.

    ```python
    from lightning.pytorch import Trainer
    from rl_plugins.lightning import GRPOModule, PromptDataModule

    module = GRPOModule("Qwen/Qwen3-0.6B", reward_funcs=accuracy_reward, policy_loss="dr_grpo")
    Trainer(max_steps=1000, gradient_clip_val=1.0).fit(module, PromptDataModule(dataset, batch_size=8))
    ```

    Args:
        model: See [`OnlineModule`].
        tokenizer: See [`OnlineModule`].
        reward_funcs: See [`OnlineModule`].
        advantage: One of [`~rl_plugins.signals.ADVANTAGES`].
        advantage_kwargs: Its options, such as `{"k": 4}` for `pass_at_k`.
        kl_in_reward: Subtract `beta` times the KL from the token rewards instead of adding it to the loss
            (`batch_normalized` only: REINFORCE++).
        kwargs: For [`OnlineModule`].

    Raises:
        ValueError: As [`OnlineModule`]; for an unknown advantage, options that do not suit it, or one completion per
            prompt where it compares several.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        reward_funcs: RewardFunc | PreTrainedModel | str | list[RewardFunc | PreTrainedModel | str] | None = None,
        *,
        advantage: str = "group_normalized",
        advantage_kwargs: dict[str, Any] | None = None,
        kl_in_reward: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, tokenizer, reward_funcs, **kwargs)
        self.advantage, self.advantage_kwargs = advantage, with_numbers(advantage_kwargs or {})
        self.kl_in_reward = kl_in_reward
        check_advantage(advantage, self.advantage_kwargs, self.num_generations)
        self._check_combinations()
        tracked = advantage == "value_tracker"
        self.tracked = TrackedAdvantages(self.advantage_kwargs) if tracked else None

    def _check_combinations(self) -> None:
        if self.num_generations == 1 and self.advantage not in GROUPLESS:
            raise ValueError(
                f"advantage={self.advantage!r} compares the completions of a prompt, but num_generations is 1. Set it "
                f"to at least 2, or choose one of {', '.join(GROUPLESS)}."
            )
        if self.kl_in_reward and (self.advantage != "batch_normalized" or self.beta == 0.0):
            raise ValueError(
                "kl_in_reward=True subtracts beta * KL from token rewards, which needs advantage='batch_normalized' "
                f"and beta > 0; they are {self.advantage!r} and {self.beta}."
            )
        if self.policy_loss.name == "gvpo" and (self.advantage == "lambda_trace" or self.kl_in_reward):
            raise ValueError(
                "policy_loss='gvpo' compares whole completions: it takes one advantage for each, and "
                "advantage='lambda_trace' or kl_in_reward=True gives one for each token."
            )

    def add_advantages(self, batch: Batch, scores: Tensor, rows: Sequence[Row]) -> Metrics:
        """Advantages of the variant."""
        mask, metrics = batch["completion_mask"].bool(), Metrics()
        if self.tracked is not None:
            batch["advantages"], metrics = self._tracked_advantages(self.tracked, batch, scores, rows)
        elif self.kl_in_reward:
            batch["advantages"], metrics = self._token_returns(batch, scores, mask)
        elif self.advantage == "lambda_trace":
            whole = own_rows(group_normalized(gather_rows(scores), self.num_generations))
            batch["advantages"] = lambda_trace(whole, mask, **self.advantage_kwargs)
        else:
            lengths = gather_rows(mask.sum(1))
            every = group_advantages(
                self.advantage, gather_rows(scores), self.num_generations, lengths, options=self.advantage_kwargs
            )
            batch["advantages"] = own_rows(every)
        if self.policy_loss.name == "gvpo":
            groups = torch.arange(len(scores) // self.num_generations, device=scores.device)
            batch["groups"] = groups.repeat_interleave(self.num_generations) + rank() * len(groups)
        return metrics

    def _token_returns(self, batch: Batch, scores: Tensor, mask: Tensor) -> tuple[Tensor, Metrics]:
        """REINFORCE++: what is left of score and KL penalties at each token, normalised over the batch."""
        if "old_per_token_logps" not in batch:
            batch["old_per_token_logps"] = self.log_probs(batch)
        logps, ref_logps = batch["old_per_token_logps"], batch["ref_per_token_logps"]
        mask = mask & ~scores.isnan().unsqueeze(1)
        returns = penalised_returns(scores, logps, ref_logps, mask, beta=self.beta)
        advantages = batch_normalized(returns, mask=mask, reduce=sum_over_ranks, **self.advantage_kwargs)
        return advantages, {"kl": masked_moments(kl_k1(logps, ref_logps), mask, reduce=sum_over_ranks)[0]}

    # Value tracker

    def _tracked_advantages(
        self, tracked: TrackedAdvantages, batch: Batch, scores: Tensor, rows: Sequence[Row]
    ) -> tuple[Tensor, Metrics]:
        parts = gather_objects([prompt_key(row["prompt"]) for row in rows])
        keys, scores = [key for part in parts for key in part], gather_rows(scores)
        advantages, metrics = tracked.advantages(keys, scores)
        if self.training:
            kept = None
            if tracked.needs_rows:
                if "old_per_token_logps" not in batch:
                    batch["old_per_token_logps"] = self.log_probs(batch)
                kept = dict(batch)
            tracked.remember(keys, scores, kept)
        return own_rows(advantages).float(), metrics

    def _policy_distances(self, rows: Batch) -> Tensor:
        """How far the policy has moved on completions of all ranks (N,)."""
        distance = policy_distance(rows["old_per_token_logps"], self.log_probs(rows), rows["completion_mask"])
        return gather_rows(distance)

    def rollout(self, rows: Sequence[Row]) -> tuple[Batch, Metrics]:
        """As [`OnlineModule.rollout`], after the tracker has taken in the batch before."""
        absorbed = self.tracked.absorb(self._policy_distances) if self.tracked is not None and self.training else {}
        batch, metrics = super().rollout(rows)
        return batch, {**absorbed, **metrics}

    def loss(self, inputs: Batch) -> tuple[Tensor, Metrics]:
        """The objective; without its KL term where the rewards carry it."""
        logps, entropies = self._pass(inputs, entropy=True)
        return self.policy_objective(logps, entropies, inputs, beta=0.0 if self.kl_in_reward else self.beta)

    # Checkpoints

    def rank_state(self) -> dict[str, Any]:
        """With the tracker, which is the same on every rank."""
        state = super().rank_state()
        if self.tracked is not None:
            state |= {"tracker": self.tracked.tracker.counts, "unabsorbed": self.tracked.unabsorbed}
        return state

    def load_rank_state(self, state: dict[str, Any]) -> None:
        """Go on with the tracker's counts."""
        super().load_rank_state(state)
        if self.tracked is not None:
            self.tracked.tracker.counts = dict(state["tracker"])
            self.tracked.unabsorbed = move_data_to_device(state["unabsorbed"], self.device)
