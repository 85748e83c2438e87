"""GRPO's trainer with other advantages, policy losses and sampling."""

import textwrap
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedModel

from rl_plugins.functional.advantages.group import batch_normalized, group_normalized
from rl_plugins.functional.advantages.traces import lambda_trace
from rl_plugins.functional.advantages.tracked import policy_distance
from rl_plugins.functional.log_probs import kl_k1
from rl_plugins.rollouts.batch import Batch, num_rows, reordered
from rl_plugins.signals.advantages import group_advantages, penalised_returns
from rl_plugins.signals.critic_targets import sequence_means
from rl_plugins.signals.value_tracker import TrackedAdvantages, ValueTracker, prompt_key
from rl_plugins.trl.heads_trainer import complete_args
from rl_plugins.trl.sampling_trainer import INFORMATIVE, SCORES, TABLE_ROW, SamplingTrainer
from rl_plugins.trl.variant_config import GRPOVariantConfig

TRACKER_NAME = "value_tracker.json"


class GRPOVariantTrainer(SamplingTrainer):
    r"""
    Trainer for the variants of GRPO: an advantage, a policy loss and a way of sampling, each by name, or all of a
    paper's by `preset`.

    Takes the arguments of [`~trl.GRPOTrainer`], with a [`GRPOVariantConfig`] for `args`. Whatever a variant does not
    change is TRL's: KL term, entropy bonus, router loss, masks, vLLM, logging.

    Example:

    ```python
    from rl_plugins.trl import GRPOVariantConfig, GRPOVariantTrainer

    trainer = GRPOVariantTrainer(
        model="Qwen/Qwen3-0.6B",
        reward_funcs=accuracy_reward,
        args=GRPOVariantConfig("qwen3-dapo", preset="dapo"),
        train_dataset=dataset,
    )
    trainer.train()
    ```

    Raises:
        TypeError: If `args` is not a `GRPOVariantConfig`, or `dynamic_sampling` has a dataset without a length.
    """

    _tag_names = ["trl", "grpo-variant"]
    _name = "GRPO variant"
    _paper = {
        "title": "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
        "id": "2402.03300",
        "citation": textwrap.dedent("""\
            @article{shao2024deepseekmath,
                title   = {{DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models}},
                author  = {Zhihong Shao and Peiyi Wang and Qihao Zhu and Runxin Xu and Junxiao Song and others},
                year    = 2024,
                journal = {arXiv preprint},
                eprint  = {arXiv:2402.03300},
            }"""),
    }

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        reward_funcs: Any = None,
        args: GRPOVariantConfig | None = None,
        *host_args: Any,
        **host_kwargs: Any,
    ) -> None:
        args = complete_args(args, GRPOVariantConfig, model, "GRPOVariant")
        super().__init__(model, reward_funcs, args, *host_args, **host_kwargs)
        tracked = args.advantage == "value_tracker"
        options: Any = args.advantage_kwargs or {}
        self._tracked = TrackedAdvantages(options) if tracked else None

    @property
    def value_tracker(self) -> ValueTracker | None:
        """Success of every prompt so far; `None` where the advantage does not track it."""
        return None if self._tracked is None else self._tracked.tracker

    # Advantages

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Batch:
        if self._tracked is not None and self.model.training:
            self._log_metrics(self._tracked.absorb(self._policy_distances))
        batch = super()._generate_and_score_completions(inputs)
        if self.args.advantage is not None:
            self._set_advantages(batch, inputs)
        if self.args.policy_loss == "gvpo":
            batch["groups"] = self._group_ids(num_rows(batch)).to(batch["advantages"].device)
        return {key: value for key, value in batch.items() if key not in (SCORES, INFORMATIVE, TABLE_ROW)}

    def _set_advantages(self, batch: Batch, inputs: list[dict[str, Any]]) -> None:
        mask = self._loss_mask(batch).bool()
        name, options = self.args.advantage, dict(self.args.advantage_kwargs or {})
        if name == "value_tracker":
            advantages = self._tracked_advantages(batch, inputs)
        elif name == "batch_normalized" and self.args.kl_in_reward:
            advantages = self._token_returns(batch, mask, options)
        else:
            scores, lengths = self.accelerator.gather(batch[SCORES]), self.accelerator.gather(mask.sum(dim=1))
            if name == "lambda_trace":
                whole = self._own_rows(group_normalized(scores, self._group_size))
                advantages = lambda_trace(whole, mask, **options)
            else:
                advantages = self._own_rows(group_advantages(name, scores, self._group_size, lengths, options=options))
        # Scores come in float32 or wider, the host's own advantages in float32.
        batch["advantages"] = advantages.to(torch.float32)
        self._tabulate(batch, mask)

    def _token_returns(self, batch: Batch, mask: Tensor, options: dict[str, Any]) -> Tensor:
        """REINFORCE++: what is left of score and KL penalties at each token, normalised over the batch."""
        if "old_per_token_logps" not in batch:
            batch["old_per_token_logps"] = self._score(batch)
        logps, ref_logps = batch["old_per_token_logps"], batch["ref_per_token_logps"]
        mask = mask & ~batch[SCORES].isnan().unsqueeze(1)
        self._log_mean("kl", kl_k1(logps, ref_logps), mask)
        returns = penalised_returns(batch[SCORES], logps, ref_logps, mask, beta=self.beta)
        return batch_normalized(returns, mask=mask, reduce=self._sum_over_ranks, **options)

    def _tabulate(self, batch: Batch, mask: Tensor) -> None:
        """The advantages that were used, in the host's table of completions; 0 for those that were not."""
        advantages = batch["advantages"]
        if advantages.ndim == 2:
            advantages = sequence_means(advantages, mask)
        used = self.accelerator.gather(torch.stack([batch[TABLE_ROW].double(), advantages.double()], dim=1))
        used = used[used[:, 0] >= 0]  # replayed completions are in no table
        table = torch.zeros(self._table_rows, dtype=torch.float64, device=used.device)
        table[used[:, 0].long()] = used[:, 1]
        self._retable_advantages(table)

    # Value tracker

    def _tracked_advantages(self, batch: Batch, inputs: list[dict[str, Any]]) -> Tensor:
        assert self._tracked is not None
        keys = gather_object([prompt_key(row["prompt"]) for row in inputs])
        scores = self.accelerator.gather(batch[SCORES])
        advantages, metrics = self._tracked.advantages(keys, scores)
        self._log_metrics(metrics)
        if self.model.training:
            rows = None
            if self._tracked.needs_rows:
                if "old_per_token_logps" not in batch:
                    batch["old_per_token_logps"] = self._score(batch)
                images = self._modality_inputs(batch)
                rows = {key: value for key, value in batch.items() if isinstance(value, Tensor) or key in images}
            self._tracked.remember(keys, scores, rows)
        return self._own_rows(advantages)

    def _policy_distances(self, rows: Batch) -> Tensor:
        """How far the policy has moved on completions of all ranks (N,)."""
        distance = policy_distance(rows["old_per_token_logps"], self._score(rows), self._loss_mask(rows))
        return self.accelerator.gather(distance)

    # Loss

    def _compute_loss(self, model: nn.Module, inputs: Batch) -> Tensor:
        with self._without_kl_term():
            return super()._compute_loss(model, inputs)

    def _prepare_inputs(self, generation_batch: Any) -> Batch:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if not self.model.training or self.args.policy_loss != "gvpo" or self._buffered_inputs is before:
            return inputs
        # The host has shuffled the batch; this loss needs the completions of a prompt in one slice.
        groups = torch.cat([batch["groups"] for batch in self._buffered_inputs])
        self._buffered_inputs = reordered(self._buffered_inputs, torch.argsort(groups, stable=True))
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    # Checkpoints

    def _own_files(self) -> dict[str, bool]:
        return super()._own_files() | ({} if self._tracked is None else {TRACKER_NAME: True})

    def _rollout_state(self) -> dict[str, Any]:
        return {**super()._rollout_state(), "unabsorbed": self._tracked and self._tracked.unabsorbed}

    def _load_rollout_state(self, state: dict[str, Any]) -> None:
        super()._load_rollout_state(state)
        if self._tracked is not None:
            self._tracked.unabsorbed = state["unabsorbed"]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.value_tracker is not None and self.args.should_save:
            directory = self._checkpoint_dir(trial)
            directory.mkdir(parents=True, exist_ok=True)
            self.value_tracker.save(directory / TRACKER_NAME)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.value_tracker is not None:
            self.value_tracker.load(Path(checkpoint) / TRACKER_NAME)
