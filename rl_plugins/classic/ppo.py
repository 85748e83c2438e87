"""Proximal policy optimisation."""

from typing import Any

import torch
from torch import Tensor

from rl_plugins.classic.actor_critic import ActorCriticModule, Batch
from rl_plugins.classic.environments import EnvSpec
from rl_plugins.classic.schedules import Schedule, value_at
from rl_plugins.functional.policy_losses.clip import ppo_clip
from rl_plugins.functional.value_losses import squared_error


class PPOModule(ActorCriticModule):
    """PPO: several epochs on each rollout, with a clipped ratio (Schulman et al., arXiv 1707.06347).

    `L = mean(-min(rho A, clip(rho, 1 - c, 1 + c) A) + value_coef (V - R)^2 - entropy_coef H)` (eq. 7 and 9), with
    advantages `A` from GAE and `R = A + V_old`. For another loss, override `loss`.

    Args:
        env: The id of a registered environment, or a callable that makes one.
        num_envs: Environments that are stepped side by side.
        rollout_steps: Steps of each environment in an iteration.
        epochs: Passes over each rollout.
        batch_size: Transitions of a gradient step.
        clip_range: `c`, a number or a function of the share of training that remains.
        value_coef: Weight of the critic's loss.
        normalize_advantages: Whether each rollout's advantages are scaled to zero mean and unit variance.
        learning_rate: Of Adam, a number or a function of the share of training that remains.
        settings: Those of `ActorCriticModule`, `PolicyGradientModule` and `ClassicModule`.

    Raises:
        ValueError: If the spaces of the environment are not supported, or a setting is out of range.
    """

    def __init__(
        self,
        env: EnvSpec,
        *,
        num_envs: int = 8,
        rollout_steps: int = 128,
        epochs: int = 10,
        batch_size: int = 256,
        clip_range: Schedule = 0.2,
        value_coef: float = 0.5,
        normalize_advantages: bool = True,
        learning_rate: Schedule = 3e-4,
        **settings: Any,
    ) -> None:
        super().__init__(
            env,
            num_envs=num_envs,
            rollout_steps=rollout_steps,
            normalize_advantages=normalize_advantages,
            learning_rate=learning_rate,
            **settings,
        )
        if epochs < 1 or batch_size < 1:
            raise ValueError(f"epochs={epochs}, batch_size={batch_size}: give at least 1 epoch and 1 transition.")
        self.epochs, self.batch_size = epochs, batch_size
        self.clip_range, self.value_coef = clip_range, value_coef

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, with the epsilon of PPO's first code; fused, which is faster on a CPU as well."""
        return torch.optim.Adam(self.parameters(), eps=1e-5, fused=True)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a minibatch, and what is logged of it."""
        distribution = self.policy(batch.observations)
        logps = distribution.log_prob(batch.actions)
        clip = value_at(self.clip_range, self.remaining)
        policy_loss = ppo_clip(logps, batch.logps, batch.advantages, epsilon_low=clip, epsilon_high=clip).mean()
        value_loss = squared_error(self.values(batch.observations), batch.returns).mean()
        metrics = {"policy_loss": policy_loss, "value_loss": value_loss}
        return self.with_entropy_bonus(policy_loss + self.value_coef * value_loss, distribution, metrics)

    def iterate(self) -> dict[str, Tensor | float]:
        """Collect, then `epochs` passes over the rollout in minibatches; the metrics are those of the last one."""
        rollout = self.collect()
        batch = self.estimate(rollout)
        parameters = list(self.parameters())
        for _ in range(self.epochs):
            for minibatch in batch.minibatches(self.batch_size, self.generator):
                loss, metrics = self.loss(minibatch)
                self.optimize(loss, self.optimizer, parameters)
        self.update_normalizer(rollout)
        return {name: value.detach() for name, value in metrics.items()}
