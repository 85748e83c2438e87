"""Online training with values: what `MTPCriticTrainer` and `PPOTrainer` share, wherever the values come from."""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rl_plugins.functional.log_probs import kl_k1
from rl_plugins.functional.rewards import kl_shaped_rewards, terminal_rewards
from rl_plugins.signals.critic_targets import critic_signal, initial_values, sequence_means
from rl_plugins.signals.warmup import pause_weight_decay
from rl_plugins.trl.policy_trainer import Batch, PolicyLossTrainer
from rl_plugins.trl.rollouts import RolloutFunc, fill_empty

VALUE_COLUMN = "critic_value"
"""Of the host's table of completions; reward functions have their own columns there (`log_extra`)."""


class ValueTrainer(PolicyLossTrainer):
    """`GRPOTrainer` with an advantage for every token from values, and a value loss.

    A subclass says where values come from: `_recorded_values` for a batch just generated, `_training_values` inside
    the training forward.
    """

    last_rollout: Batch
    _in_rollout = False

    @property
    @abstractmethod
    def critic_module(self) -> nn.Module | None:
        """The critic; `None` while there is none."""

    @abstractmethod
    def _recorded_values(self, output: Batch) -> tuple[Tensor, Tensor]:
        """Online values and those to bootstrap from, both (B, T, K), of a batch just generated."""

    @abstractmethod
    @contextmanager
    def _training_values(self, inputs: Batch, *, warming_up: bool) -> Iterator[Any]:
        """Make the training forward inside the block compute values, and give what `_critic_loss` needs."""

    @abstractmethod
    def _critic_loss(self, record: Any, inputs: Batch) -> Tensor:
        """The critic's own loss, from what `_training_values` gave."""

    def _set_up_rollouts(self) -> None:
        """Make rollout functions safe."""
        self.last_rollout = {}
        custom: RolloutFunc | None = self.rollout_func
        self.rollout_func: RolloutFunc | None = custom and fill_empty(custom, self.eos_token_ids[0])

    # Rollout

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Batch:
        if self.critic_module is None:
            return super()._generate_and_score_completions(inputs)
        self._in_rollout = True
        try:
            output = super()._generate_and_score_completions(inputs)
            self._add_critic_targets(output)
        finally:
            self._in_rollout = False
        return output

    def _token_rewards(self, output: Batch, scores: Tensor, mask: Tensor) -> Tensor:
        rewards = terminal_rewards(scores.nan_to_num(0.0), mask)
        if not self.args.kl_in_reward or self.beta == 0.0:
            return rewards
        logps, ref_logps = output["old_per_token_logps"], output["ref_per_token_logps"]
        self._log_mean("kl", kl_k1(logps, ref_logps), mask)
        return kl_shaped_rewards(rewards, logps, ref_logps, mask, beta=self.beta)

    def _add_critic_targets(self, output: Batch) -> None:
        args = self.args
        assert self._scores is not None
        scores = self._own_rows(self._scores)
        values, target_values = self._recorded_values(output)
        mask = self._loss_mask(output).bool() & scores.isfinite().unsqueeze(1)
        targets, output["advantages"], metrics = critic_signal(
            self._token_rewards(output, scores, mask),
            values,
            target_values,
            mask,
            scaling=args.advantage_scaling,
            reward_range=(args.reward_range[0], args.reward_range[1]),
            reduce=self._sum_over_ranks,
            estimator=args.advantage_estimator,
            gamma=args.gamma,
            lam_policy=args.lam_policy,
            lam_value=args.lam_value,
            length_alpha=args.length_adaptive_alpha,
            lookahead=getattr(args, "bootstrap_lookahead", False),
            discounted_objective=args.discounted_objective,
        )
        self._log_metrics(metrics)
        output.update(returns=targets.returns, old_values=values, critic_mask=mask)
        images = self._modality_inputs(output)  # large, and nothing that looks at values needs them
        kept = {name: tensor for name, tensor in output.items() if name not in images}
        self.last_rollout = {**kept, "td_errors": targets.td_errors, "scores": scores}
        self._log_completion_values(output["advantages"], initial_values(values[..., 0], mask), mask)

    def _log_completion_values(self, advantages: Tensor, start_values: Tensor, mask: Tensor) -> None:
        """Complete the host's table: with one generation its own advantages are all zero."""
        rows = self.accelerator.gather(torch.stack([sequence_means(advantages, mask), start_values], dim=1))
        self._retable_advantages(rows[:, 0])
        self._logs["extra"][VALUE_COLUMN].extend(rows[:, 1].tolist())

    # Loss

    @property
    def _warming_up(self) -> bool:
        if self.critic_module is None:
            return False
        return self.model.training and self.state.global_step < self.args.value_warmup_steps

    def _objective(self, model: nn.Module, inputs: Batch) -> Tensor:
        if self.critic_module is None:
            return super()._objective(model, inputs)
        warming_up = self._warming_up
        with self._training_values(inputs, warming_up=warming_up) as record, self._without_kl_term():
            policy_loss = super()._objective(model, inputs)
        # Times zero, not dropped: every parameter stays in the graph, which DDP and ZeRO count on.
        return (0.0 if warming_up else 1.0) * policy_loss + self._critic_loss(record, inputs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the host's step; while only the critic learns, without weight decay, which needs no gradient."""
        if self.critic_module is not None and self.args.value_warmup_steps:
            warming_up = self.state.global_step < self.args.value_warmup_steps
            pause_weight_decay(self.optimizer, warming_up)
        return super().training_step(*args, **kwargs)
