"""Advantage actor-critic."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rl_plugins.classic.actor_critic import gae_advantages
from rl_plugins.classic.agent import Agent
from rl_plugins.classic.agent_settings import PolicySettings, Schedule
from rl_plugins.classic.environments import EnvSpec
from rl_plugins.classic.networks import Policy, make_normalizer, make_policy
from rl_plugins.classic.rollouts import Rollout, collect, update_normalizer
from rl_plugins.functional.masking import masked_whiten
from rl_plugins.functional.policy_losses.clip import vanilla
from rl_plugins.functional.returns import check_trace_decay
from rl_plugins.functional.value_losses import squared_error


@dataclass(frozen=True, kw_only=True)
class A2CSettings(PolicySettings):
    """Settings of `A2CAgent`."""

    rollout_steps: int = 5
    gae_lambda: float = 1.0
    """Trace decay of the advantages in [0, 1]: 1 is the n-step return minus the value, 0 is the TD error."""
    value_coef: float = 0.5
    """Weight of the critic's loss."""
    learning_rate: Schedule = 7e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_trace_decay(self.gae_lambda, "gae_lambda")


class A2CAgent(Agent):
    """A2C takes one gradient step on each short rollout; it is A3C, made synchronous (Mnih et al., arXiv 1602.01783).

    `L = mean(-A ln pi(a | s) + value_coef (V(s) - R)^2 - entropy_coef H)` with `R = A + V(s)`, both under
    stop-gradient. The advantage `A` is the n-step return minus the value at `gae_lambda = 1`, and the TD error at 0
    (Sutton and Barto 2018, section 13.5). For another loss, override `loss`.

    Args:
        env: The id of a registered environment, or a callable that makes one.
        settings: The fields of `A2CSettings`.

    Raises:
        TypeError: If a setting is unknown, or text where a number is needed.
        ValueError: If the spaces of the environment are not supported, or a setting is out of range.
    """

    settings: A2CSettings

    def __init__(self, env: EnvSpec, **settings: Any) -> None:
        super().__init__(env, A2CSettings(**settings))
        self.normalizer = make_normalizer(self.observation_size, normalize=self.settings.normalize_observations)
        with self.seeded():
            self.policy = self.build_policy()
            self.critic = self.build_critic()

    def build_policy(self) -> Policy:
        """Make the policy; its first actions are close to uniform, or to a mean of 0."""
        return make_policy(self.build_network(self.observation_size, self.action_size, gain=0.01), self.action_space)

    def build_critic(self) -> nn.Module:
        """Make the critic, from observations `(..., D)` to values `(..., 1)`."""
        return self.build_network(self.observation_size, 1, gain=1.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make RMSprop, as in A3C."""
        return torch.optim.RMSprop(self.parameters(), alpha=0.99, eps=1e-5)

    def act(self, observations: Tensor, deterministic: bool = False) -> Tensor:
        """Sample from the policy, or take its most likely actions."""
        return self.policy.act(self.normalizer(observations), None if deterministic else self.generator)

    def values(self, observations: Tensor) -> Tensor:
        """Return `V(s) (...)` of observations `(..., D)`, as `normalizer` returns them."""
        return self.critic(observations).squeeze(-1)

    def loss(self, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a rollout, and the metrics for the log."""
        settings = self.settings
        observations = self.normalizer(rollout.observations)
        values = self.values(observations)  # (N, T + 1)
        fixed = values.detach()
        advantages = gae_advantages(self, rollout, fixed, gamma=settings.gamma, gae_lambda=settings.gae_lambda)
        returns = advantages + fixed[:, :-1]
        if settings.normalize_advantages:
            advantages = masked_whiten(advantages, rollout.mask)
        distribution = self.policy(observations[:, :-1])
        policy_loss = vanilla(distribution.log_prob(rollout.actions), advantages).mean()
        value_loss = squared_error(values[:, :-1], returns).mean()
        loss = policy_loss + settings.value_coef * value_loss
        metrics = {"policy_loss": policy_loss, "value_loss": value_loss}
        if settings.entropy_coef:  # the entropy costs time, so it is computed only where it counts
            metrics["entropy"] = distribution.entropy().mean()
            loss = loss - settings.entropy_coef * metrics["entropy"]
        return loss, metrics

    def iterate(self) -> Mapping[str, Tensor | float]:
        """Collect a rollout, then take one gradient step."""
        rollout = collect(self, self.settings.rollout_steps)
        loss, metrics = self.loss(rollout)
        self.optimize(loss, self.optimizer, list(self.parameters()))
        update_normalizer(self.normalizer, rollout)
        return metrics
