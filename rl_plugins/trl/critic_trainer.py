"""GRPO's trainer with the critic inside the policy."""

import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from rl_plugins.functional.divergences import kl_k1, kl_to_sampler
from rl_plugins.functional.mtp import completion_states, mtp_labels
from rl_plugins.functional.rewards import kl_shaped_rewards, terminal_rewards
from rl_plugins.generation.value_capture import ValuePass, ValueRecorder
from rl_plugins.modules.head_pass import HeadPass, logit_divisor
from rl_plugins.objectives.critic import (
    critic_targets,
    initial_values,
    rollout_metrics,
    scale_advantages,
    sequence_means,
)
from rl_plugins.trl.critic_config import MTPCriticConfig
from rl_plugins.trl.heads_trainer import MTPHeadsTrainer, complete_args, find_saved_heads
from rl_plugins.trl.host import hide_heads_from_vllm
from rl_plugins.trl.phasic import PhasicSchedule
from rl_plugins.trl.rewards import naming
from rl_plugins.trl.rollouts import RolloutFunc, fill_empty

Batch = dict[str, Any]


@dataclass
class Rollout:
    """What one call of generate-and-score leaves behind for the critic."""

    scores: Tensor | None = None
    recorders: list[ValueRecorder | None] = field(default_factory=list)
    passes: list[ValuePass] = field(default_factory=list)


class MTPCriticTrainer(MTPHeadsTrainer, GRPOTrainer):
    r"""
    Trainer for online reinforcement learning with a critic inside the policy: multi-token-prediction heads that also
    output a value. One network, one completion per prompt, an advantage for every token.

    `L = L_policy + lambda_1 L_MTP + lambda_2 L_TD`, where `L_policy` is any TRL loss type on the critic's advantages
    (see [`~rl_plugins.objectives.critic_targets`] for the equations).

    Takes the arguments of [`~trl.GRPOTrainer`], with an [`MTPCriticConfig`] for `args`. With `use_critic=False` it is
    that trainer.

    Example:

    ```python
    from rl_plugins.trl import MTPCriticConfig, MTPCriticTrainer

    trainer = MTPCriticTrainer(
        model="Qwen/Qwen3-0.6B",
        reward_funcs=accuracy_reward,
        args=MTPCriticConfig("qwen3-critic"),
        train_dataset=dataset,
    )
    trainer.train()
    ```

    Attributes:
        last_rollout: The newest batch of completions of this process (train or eval): the host's tensors without
            images, and `old_values` (B, T, K), `returns`, `td_errors`, `critic_mask` (B, T) and `scores` (B,).

    Raises:
        TypeError: If `args` is not an `MTPCriticConfig`.
        ValueError: If the model has no LM head, or its heads do not fit the config.
    """

    _tag_names = ["trl", "mtp-critic"]
    _name = "MTPCritic"
    _paper = {
        "title": "High-Dimensional Continuous Control Using Generalized Advantage Estimation",
        "id": "1506.02438",
        "citation": textwrap.dedent("""\
            @inproceedings{schulman2016gae,
                title     = {{High-Dimensional Continuous Control Using Generalized Advantage Estimation}},
                author    = {John Schulman and Philipp Moritz and Sergey Levine and Michael Jordan and Pieter Abbeel},
                year      = 2016,
                booktitle = {International Conference on Learning Representations},
                eprint    = {arXiv:1506.02438},
            }"""),
    }

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        reward_funcs: Any = None,
        args: MTPCriticConfig | None = None,
        *host_args: Any,
        **host_kwargs: Any,
    ) -> None:
        args = complete_args(args, MTPCriticConfig, model, "MTPCritic")
        if isinstance(reward_funcs, list):
            reward_funcs = [naming(func) for func in reward_funcs]
        else:
            reward_funcs = naming(reward_funcs)
        saved_heads = find_saved_heads(model, args) if args.use_critic else None
        super().__init__(model, reward_funcs, args, *host_args, **host_kwargs)
        self._rollout: Rollout | None = None
        self.last_rollout: Batch = {}
        self._phasic: PhasicSchedule | None = None
        if args.use_critic:
            self._set_up_heads(saved_heads)
            if args.mtp_loss_coef:
                self._logit_divisor = logit_divisor(self.model.config, self.temperature)
            custom: RolloutFunc | None = self.rollout_func
            self.rollout_func: RolloutFunc | None = custom and fill_empty(custom, self.eos_token_ids[0])
            if self.use_vllm:
                hide_heads_from_vllm(self.vllm_generation)
            if args.phasic_every:
                cycle = args.steps_per_generation * self.num_iterations
                self._phasic = PhasicSchedule(args.phasic_every, args.phasic_epochs, cycle)

    # Rollout: values saved while generating, then targets for policy and critic

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Batch:
        if self.mtp_heads is None:
            return super()._generate_and_score_completions(inputs)
        self._rollout = Rollout()
        try:
            output = super()._generate_and_score_completions(inputs)
            self._add_critic_targets(output, self._rollout)
        finally:
            self._rollout = None
        return output

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        if self._rollout is None or self.mtp_heads is None:
            return super()._generate_single_turn(*args, **kwargs)
        if self.use_vllm or self.use_transformers_continuous_batching:
            self._rollout.recorders.append(None)
            return super()._generate_single_turn(*args, **kwargs)
        recorder = ValueRecorder(self.mtp_heads, self.polyak_target)
        self._rollout.recorders.append(recorder)
        with self.mtp_heads.tapped(recorder):
            return super()._generate_single_turn(*args, **kwargs)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self._rollout is None:
            return rewards
        infinite = rewards.isinf()
        weighted = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        unusable = rewards.isnan().all(dim=1) | infinite.any(dim=1)
        start = self.accelerator.process_index * len(prompts)
        self._rollout.scores = weighted.masked_fill(unusable, torch.nan)[start : start + len(prompts)]
        # The host leaves NaN out of its means, but not infinity.
        return rewards.masked_fill(infinite, torch.nan)

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        host_pass = super()._get_per_token_logps_and_entropies
        if self._rollout is None or self.mtp_heads is None or model is not self.model:
            return host_pass(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        record = ValuePass(self.mtp_heads, self.polyak_target, logits_to_keep)
        self._rollout.passes.append(record)
        with self.mtp_heads.tapped(record):
            return host_pass(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)

    def _modality_inputs(self, batch: Batch) -> Batch:
        """Keyword arguments of the log-probability pass that a batch carries (images and the like)."""
        accepted = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters
        own = ("model", "input_ids", "attention_mask", "logits_to_keep", "batch_size")
        return {name: batch[name] for name in accepted if name in batch and name not in own}

    def _logps(self, model: nn.Module, batch: Batch, batch_size: int | None = None) -> Tensor:
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        return self._get_per_token_logps_and_entropies(
            model, ids, mask, batch["completion_ids"].shape[1], batch_size, **self._modality_inputs(batch)
        )[0]

    def _score(self, batch: Batch) -> Tensor:
        """Log-probabilities of a batch under the current policy, without gradient, in training-sized chunks."""
        train = self.model.training
        size = self.args.per_device_train_batch_size if train else self.args.per_device_eval_batch_size
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
        ):
            return self._logps(self.model, batch, size)

    def _rollout_values(self, output: Batch, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Online and target values (B, T, K): saved while generating where one turn made the whole completion,
        else from the host's pass for the old log-probabilities, else from a pass of our own."""
        rows, num_tokens = output["completion_ids"].shape
        needs_logps = self.args.kl_in_reward and "old_per_token_logps" not in output
        recorder = rollout.recorders[0] if len(rollout.recorders) == 1 else None
        saved = recorder.finish(num_tokens) if recorder is not None else None
        if needs_logps or (saved is None and "old_per_token_logps" not in output):
            rollout.passes.clear()
            output["old_per_token_logps"] = self._score(output)
        # The first pass is the policy's; a second one is the reference of a PEFT model.
        return saved if saved is not None else rollout.passes[0].finish(rows)

    def _loss_mask(self, batch: Batch) -> Tensor:
        mask = batch["completion_mask"]
        return mask * batch["tool_mask"] if "tool_mask" in batch else mask

    def _add_critic_targets(self, output: Batch, rollout: Rollout) -> None:
        args, scores = self.args, rollout.scores
        assert scores is not None
        values, target_values = self._rollout_values(output, rollout)
        mask = self._loss_mask(output).bool() & scores.isfinite().unsqueeze(1)
        rewards = terminal_rewards(scores.nan_to_num(0.0), mask)
        if args.kl_in_reward:
            logps, ref_logps = output["old_per_token_logps"], output["ref_per_token_logps"]
            rewards = kl_shaped_rewards(rewards, logps, ref_logps, mask, beta=self.beta)
            self._log_mean("kl", kl_k1(logps, ref_logps), mask)
        targets = critic_targets(
            rewards,
            values,
            target_values,
            mask,
            estimator=args.advantage_estimator,
            gamma=args.gamma,
            lam_policy=args.lam_policy,
            lam_value=args.lam_value,
            length_alpha=args.length_adaptive_alpha,
            lookahead=args.bootstrap_lookahead,
        )
        output["advantages"] = scale_advantages(
            targets.advantages,
            values[..., 0],
            mask,
            scaling=args.advantage_scaling,
            reward_range=(args.reward_range[0], args.reward_range[1]),
            reduce=self._sum_over_ranks,
        )
        output.update(returns=targets.returns, old_values=values, critic_mask=mask)
        images = self._modality_inputs(output)  # large, and nothing that looks at values needs them
        kept = {name: tensor for name, tensor in output.items() if name not in images}
        self.last_rollout = {**kept, "td_errors": targets.td_errors, "scores": scores}
        metrics = rollout_metrics(targets, values, target_values, mask, reduce=self._sum_over_ranks)
        metrics["critic/skipped_completions"] = self._sum_over_ranks((~mask.any(dim=1)).sum().float().view(1))[0]
        self._log_metrics(metrics)
        self._log_completion_values(output["advantages"], initial_values(values[..., 0], mask), mask)

    # Loss

    def _compute_loss(self, model: nn.Module, inputs: Batch) -> Tensor:
        if self.mtp_heads is None:
            return super()._compute_loss(model, inputs)
        if "held_logps" in inputs:
            return self._auxiliary_loss(model, inputs)
        warming_up = self.model.training and self.state.global_step < self.args.value_warmup_steps
        head_pass = self._head_pass(inputs, self.args.value_grad_scale, heads_only=warming_up)
        with self.mtp_heads.tapped(head_pass), self._without_kl_term():
            policy_loss = super()._compute_loss(model, inputs)
        # Times zero, not dropped: every parameter stays in the graph, which DDP and ZeRO count on.
        return (0.0 if warming_up else 1.0) * policy_loss + self._critic_loss(head_pass, inputs)

    def _num_items(self, inputs: Batch) -> Tensor:
        """Real tokens that a loss is averaged over: the accumulation window's, over all ranks, as DAPO counts them."""
        items = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if self.model.training:
            items = items * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return items

    def _head_pass(self, inputs: Batch, value_grad_scale: float, *, heads_only: bool = False) -> HeadPass:
        assert self.mtp_heads is not None
        args, num_tokens = self.args, inputs["completion_ids"].shape[1]
        labels = None
        if args.mtp_loss_coef:
            real = self._loss_mask(inputs).bool()
            tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"].masked_fill(~real, -100)], dim=1)
            labels = completion_states(mtp_labels(tokens, args.num_mtp_heads), num_tokens)
        select = partial(completion_states, num_tokens=num_tokens)
        return self._make_head_pass(select, labels, self._num_items(inputs), value_grad_scale, heads_only=heads_only)

    def _critic_loss(self, head_pass: HeadPass, inputs: Batch) -> Tensor:
        num_items = self._num_items(inputs)
        value_term = self._value_term(
            head_pass, inputs["returns"], inputs["critic_mask"], num_items, inputs["old_values"]
        )
        return value_term + self._token_term(head_pass, num_items)

    @contextmanager
    def _without_kl_term(self) -> Iterator[None]:
        """Leave the KL out of the host's loss where the rewards carry it."""
        beta: float = self.beta
        if self.args.kl_in_reward:
            self.beta: float = 0.0
        try:
            yield
        finally:
            self.beta = beta

    # Phasic mode

    def _prepare_inputs(self, generation_batch: Any) -> Batch:
        if self._phasic is None or not self.model.training:
            return super()._prepare_inputs(generation_batch)
        if self._phasic.auxiliary:
            if self._phasic.starting:
                for batch in self._phasic.stored:
                    batch["held_logps"] = self._score(batch)
            return self._phasic.next_slice()
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        # Copies, since the auxiliary phase adds a key that must not reach the policy's loss.
        new = None if self._buffered_inputs is before else [dict(batch) for batch in self._buffered_inputs]
        self._phasic.policy_step(new)
        return inputs

    def _auxiliary_loss(self, model: nn.Module, inputs: Batch) -> Tensor:
        """Value loss into heads and trunk, and a KL term that holds the policy (PPG, 2009.04416, equation 4)."""
        assert self.mtp_heads is not None
        head_pass = self._head_pass(inputs, 1.0)
        with self.mtp_heads.tapped(head_pass):
            logps = self._logps(model, inputs)
        mask = self._loss_mask(inputs)
        divergence = kl_to_sampler(logps, inputs["held_logps"])
        self._log_mean("phasic/kl", divergence, mask)
        hold = divergence.masked_fill(~mask.bool(), 0.0).sum() / self._num_items(inputs)
        return self.args.phasic_kl_coef * hold + self._critic_loss(head_pass, inputs)

    # Metrics

    def _log_completion_values(self, advantages: Tensor, start_values: Tensor, mask: Tensor) -> None:
        """Complete the host's table: with one generation its own advantages are all zero."""
        rows = self.accelerator.gather(torch.stack([sequence_means(advantages, mask), start_values], dim=1))
        table = self._logs["advantages"]
        for _ in range(min(len(rows), len(table))):
            table.pop()
        table.extend(rows[:, 0].tolist())
        self._logs["extra"]["value"].extend(rows[:, 1].tolist())

    # Checkpoints

    def _rollout_state(self) -> dict[str, Any]:
        cycle = self.args.steps_per_generation * self.num_iterations
        return {
            "step": self._step,
            # Between two generations the rest of the batch is still to be learnt from.
            "buffered_inputs": self._buffered_inputs if self._step % cycle else None,
            "phasic": None if self._phasic is None else self._phasic.state_dict(),
        }

    def _rollout_file(self, directory: Path) -> Path:
        return directory / f"rollout_{self.accelerator.process_index}.pt"

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.mtp_heads is not None:
            directory = self._checkpoint_dir(trial)
            directory.mkdir(parents=True, exist_ok=True)
            torch.save(self._rollout_state(), self._rollout_file(directory))
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.mtp_heads is None:
            return
        path = self._rollout_file(Path(checkpoint))
        if not path.is_file():
            raise FileNotFoundError(
                f"{checkpoint} has no {path.name}. Resume with as many processes as wrote the checkpoint, from "
                "storage that all of them see."
            )
        # Not map_location=device: torch does not know the "cpu:0" that accelerate names a rank's CPU.
        state = send_to_device(torch.load(path, map_location="cpu", weights_only=True), self.accelerator.device)
        self._step, self._buffered_inputs = state["step"], state["buffered_inputs"]
        if self._phasic is not None and state["phasic"] is not None:
            self._phasic.load_state_dict(state["phasic"])
