"""Advantage actor-critic."""

from typing import Any

import torch
from torch import Tensor

from rl_plugins.classic.actor_critic import ActorCriticModule
from rl_plugins.classic.environments import EnvSpec
from rl_plugins.classic.rollouts import Rollout
from rl_plugins.classic.schedules import Schedule
from rl_plugins.functional.masking import masked_whiten
from rl_plugins.functional.policy_losses.clip import vanilla
from rl_plugins.functional.value_losses import squared_error


class A2CModule(ActorCriticModule):
    """A2C: one gradient step on short rollouts, the synchronous form of A3C (Mnih et al., arXiv 1602.01783).

    `L = mean(-A ln pi(a | s) + value_coef (V(s) - R)^2 - entropy_coef H)`; at `gae_lambda = 1` the advantage is the
    n-step return less the value, at 0 the TD error (Sutton and Barto 2018, section 13.5). For another loss,
    override `loss`.

    Args:
        env: The id of a registered environment, or a callable that makes one.
        num_envs: Environments that are stepped side by side.
        rollout_steps: Steps of each environment in an iteration.
        gae_lambda: Trace decay of the advantages in [0, 1].
        value_coef: Weight of the critic's loss.
        learning_rate: Of RMSprop, a number or a function of the share of training that remains.
        settings: Those of `ActorCriticModule`, `PolicyGradientModule` and `ClassicModule`.

    Raises:
        ValueError: If the spaces of the environment are not supported, or a setting is out of range.
    """

    def __init__(
        self,
        env: EnvSpec,
        *,
        num_envs: int = 8,
        rollout_steps: int = 5,
        gae_lambda: float = 1.0,
        value_coef: float = 0.5,
        learning_rate: Schedule = 7e-4,
        **settings: Any,
    ) -> None:
        super().__init__(
            env,
            num_envs=num_envs,
            rollout_steps=rollout_steps,
            gae_lambda=gae_lambda,
            learning_rate=learning_rate,
            **settings,
        )
        self.value_coef = value_coef

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """RMSprop, as in A3C."""
        return torch.optim.RMSprop(self.parameters(), alpha=0.99, eps=1e-5)

    def loss(self, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a rollout, and what is logged of it."""
        observations = self.normalizer(rollout.observations)
        values = self.values(observations)  # (N, T + 1)
        advantages = self.advantages(rollout, values.detach())
        returns = advantages + values.detach()[:, :-1]
        if self.normalize_advantages:
            advantages = masked_whiten(advantages, rollout.mask)
        distribution = self.policy(observations[:, :-1])
        policy_loss = vanilla(distribution.log_prob(rollout.actions), advantages).mean()
        value_loss = squared_error(values[:, :-1], returns).mean()
        metrics = {"policy_loss": policy_loss, "value_loss": value_loss}
        return self.with_entropy_bonus(policy_loss + self.value_coef * value_loss, distribution, metrics)

    def iterate(self) -> dict[str, Tensor | float]:
        """Collect, then one gradient step."""
        rollout = self.collect()
        loss, metrics = self.loss(rollout)
        self.optimize(loss, self.optimizer, list(self.parameters()))
        self.update_normalizer(rollout)
        return {name: value.detach() for name, value in metrics.items()}
