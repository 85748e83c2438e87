"""Online training with values in Lightning: what `MTPCriticModule` and `PPOModule` share."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rl_plugins.functional.log_probs import kl_k1
from rl_plugins.functional.masking import masked_moments
from rl_plugins.functional.rewards import kl_shaped_rewards, terminal_rewards
from rl_plugins.lightning.heads import head_means
from rl_plugins.lightning.online_module import Metrics, OnlineModule
from rl_plugins.lightning.prompts import Row
from rl_plugins.lightning.ranks import sum_over_ranks
from rl_plugins.rollouts.batch import Batch
from rl_plugins.rollouts.rewards import RewardFunc
from rl_plugins.signals.checks import check_above, check_at_least, check_choice, check_unit_interval
from rl_plugins.signals.critic_targets import (
    ESTIMATORS,
    SCALINGS,
    critic_signal,
    value_loss,
    value_losses,
)
from rl_plugins.signals.warmup import pause_weight_decay


class ValueModule(OnlineModule):
    """An [`OnlineModule`] with an advantage for every token from values, and a value loss.

    `L = L_policy + lambda_2 L_value`; a subclass says where the values come from.

    Args:
        model: See [`OnlineModule`].
        tokenizer: See [`OnlineModule`].
        reward_funcs: See [`OnlineModule`].
        gamma: Discount factor, in [0, 1].
        advantage_estimator: `gae`, `td` (one step, both lambdas 0) or `mc` (Monte Carlo, both 1).
        lam_policy: Lambda of the policy's advantages, in [0, 1].
        lam_value: Lambda of the value targets, in [0, 1].
        length_adaptive_alpha: Replaces `lam_policy` by VAPO's `1 - 1 / (alpha * length)`.
        discounted_objective: Whether the advantage of token `t` weighs `gamma^t`, as the gradient of the discounted
            return has it; most code leaves it out, so that late tokens count as much as early ones.
        advantage_scaling: `whiten` over the batch, `value` (divide by what V(s_0) implies) or `none`.
        reward_range: Smallest and largest reward, for `advantage_scaling="value"`.
        kl_in_reward: Subtract `beta` times the KL from the token rewards instead of adding it to the loss.
        value_loss_coef: lambda_2, weight of the value loss.
        value_loss_type: `squared`, `clipped` (PPO2) or `huber`.
        value_clip_range: Range around the old value, for `clipped`.
        value_warmup_steps: Optimizer steps in which only the critic learns.
        num_generations: Completions per prompt; a critic needs one.
        kwargs: For [`OnlineModule`].

    Raises:
        ValueError: As [`OnlineModule`]; if a setting is unknown or out of range.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        reward_funcs: RewardFunc | PreTrainedModel | str | list[RewardFunc | PreTrainedModel | str] | None = None,
        *,
        gamma: float = 1.0,
        advantage_estimator: str = "gae",
        lam_policy: float = 0.95,
        lam_value: float = 1.0,
        length_adaptive_alpha: float | None = None,
        discounted_objective: bool = False,
        advantage_scaling: str = "whiten",
        reward_range: tuple[float, float] = (0.0, 1.0),
        kl_in_reward: bool = False,
        value_loss_coef: float = 0.1,
        value_loss_type: str = "squared",
        value_clip_range: float = 0.2,
        value_warmup_steps: int = 0,
        num_generations: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, tokenizer, reward_funcs, num_generations=num_generations, **kwargs)
        check_choice("advantage_estimator", advantage_estimator, ESTIMATORS)
        check_choice("advantage_scaling", advantage_scaling, SCALINGS)
        check_choice("value_loss_type", value_loss_type, tuple(value_losses()))
        check_unit_interval(gamma=gamma, lam_policy=lam_policy, lam_value=lam_value)
        check_at_least(0, value_loss_coef=value_loss_coef, value_warmup_steps=value_warmup_steps)
        check_above(0, length_adaptive_alpha=length_adaptive_alpha, value_clip_range=value_clip_range)
        if len(reward_range) != 2 or reward_range[0] >= reward_range[1]:
            raise ValueError(f"reward_range must be (smallest, largest), got {reward_range}.")
        if kl_in_reward and self.beta == 0.0:
            raise ValueError("kl_in_reward=True subtracts beta * KL from the rewards, but beta is 0. Set beta > 0.")
        if self.policy_loss.name == "gvpo":
            raise ValueError(
                "policy_loss='gvpo' compares the completions of a prompt as wholes; a critic's advantages are one per "
                "token. Choose another loss, or GRPOModule(advantage='group_centered', policy_loss='gvpo')."
            )
        self.kl_in_reward, self.value_loss_coef = kl_in_reward, value_loss_coef
        self.value_warmup_steps = value_warmup_steps
        self.value_loss = value_losses(value_clip_range)[value_loss_type]
        self.signal: dict[str, Any] = {
            "estimator": advantage_estimator,
            "gamma": gamma,
            "lam_policy": lam_policy,
            "lam_value": lam_value,
            "length_alpha": length_adaptive_alpha,
            "discounted_objective": discounted_objective,
            "scaling": advantage_scaling,
            "reward_range": (reward_range[0], reward_range[1]),
        }

    @abstractmethod
    def recorded_values(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Online values and those to bootstrap from, both (B, T, K), of a batch just generated."""

    @abstractmethod
    @contextmanager
    def training_values(self, inputs: Batch, *, warming_up: bool) -> Iterator[Any]:
        """Make the training forward inside the block compute values, and give what `critic_loss` needs."""

    @abstractmethod
    def critic_loss(self, record: Any, inputs: Batch) -> tuple[Tensor, Metrics]:
        """The critic's own loss, from what `training_values` gave."""

    def _token_rewards(self, batch: Batch, scores: Tensor, mask: Tensor) -> tuple[Tensor, Metrics]:
        rewards = terminal_rewards(scores.nan_to_num(0.0), mask)
        if not self.kl_in_reward:
            return rewards, {}
        logps, ref_logps = batch["old_per_token_logps"], batch["ref_per_token_logps"]
        kl = masked_moments(kl_k1(logps, ref_logps), mask, reduce=sum_over_ranks)[0]
        return kl_shaped_rewards(rewards, logps, ref_logps, mask, beta=self.beta), {"kl": kl}

    def add_advantages(self, batch: Batch, scores: Tensor, rows: Sequence[Row]) -> Metrics:
        """Advantages and value targets of every token."""
        values, target_values = self.recorded_values(batch)
        mask = batch["completion_mask"].bool() & scores.isfinite().unsqueeze(1)
        rewards, kl = self._token_rewards(batch, scores, mask)
        targets, batch["advantages"], metrics = critic_signal(
            rewards, values, target_values, mask, reduce=sum_over_ranks, **self.signal
        )
        batch.update(returns=targets.returns, old_values=values, critic_mask=mask)
        self.last_rollout["td_errors"] = targets.td_errors
        return {**metrics, **kl}

    def _value_term(self, values: Tensor, inputs: Batch) -> tuple[Tensor, Metrics]:
        """lambda_2 L_TD of values (B, T, K) with gradient."""
        loss, sums, counts = value_loss(
            values,
            inputs["returns"],
            inputs["critic_mask"],
            num_items=inputs["num_items"],
            loss=self.value_loss,
            old_values=inputs["old_values"],
        )
        metrics, weights = head_means("critic/value_loss", sums, counts)
        self.metric_weights |= weights
        return self.value_loss_coef * loss, metrics

    @property
    def warming_up(self) -> bool:
        """Whether only the critic learns for now."""
        return self._trainer is not None and self.trainer.global_step < self.value_warmup_steps

    def loss(self, inputs: Batch) -> tuple[Tensor, Metrics]:
        """Policy and critic on one forward pass."""
        warming_up = self.warming_up
        with self.training_values(inputs, warming_up=warming_up) as record:
            logps, entropies = self._pass(inputs, entropy=True)
        beta = 0.0 if self.kl_in_reward else self.beta
        policy, metrics = self.policy_objective(logps, entropies, inputs, beta=beta)
        critic, critic_metrics = self.critic_loss(record, inputs)
        # Times zero, not dropped: every parameter stays in the graph, which DDP and ZeRO count on.
        return (0.0 if warming_up else 1.0) * policy + critic, {**metrics, **critic_metrics}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """As [`OnlineModule.training_step`]; while only the critic learns, without weight decay."""
        if self.value_warmup_steps:
            for optimizer in self.trainer.optimizers:  # `self.optimizers()` is a list with DeepSpeed's, else none
                pause_weight_decay(optimizer, self.warming_up)
        return super().training_step(batch, batch_idx)
