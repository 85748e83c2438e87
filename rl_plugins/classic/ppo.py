"""Proximal policy optimisation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rl_plugins.classic.actor_critic import Estimates, estimate
from rl_plugins.classic.agent import Agent
from rl_plugins.classic.agent_settings import PolicySettings, Schedule, value_at
from rl_plugins.classic.environments import EnvSpec
from rl_plugins.classic.networks import Policy, make_normalizer, make_policy
from rl_plugins.classic.rollouts import collect, update_normalizer
from rl_plugins.functional.policy_losses.clip import ppo_clip
from rl_plugins.functional.returns import check_trace_decay
from rl_plugins.functional.value_losses import squared_error


@dataclass(frozen=True, kw_only=True)
class PPOSettings(PolicySettings):
    """Settings of `PPOAgent`."""

    epochs: int = 10
    """Passes over each rollout."""
    batch_size: int = 256
    """Transitions in each gradient step."""
    clip_range: Schedule = 0.2
    """Largest distance of the ratio from 1, a number or a function of the share of training that remains."""
    gae_lambda: float = 0.95
    """Trace decay of the advantages in [0, 1]: 1 is Monte Carlo, 0 is the TD error."""
    value_coef: float = 0.5
    """Weight of the critic's loss."""
    normalize_advantages: bool = True
    learning_rate: Schedule = 3e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts("epochs", "batch_size")
        check_trace_decay(self.gae_lambda, "gae_lambda")


class PPOAgent(Agent):
    """PPO learns for several epochs from each rollout, with a clipped ratio (Schulman et al., arXiv 1707.06347).

    `L = mean(-min(rho A, clip(rho, 1 - c, 1 + c) A) + value_coef (V - R)^2 - entropy_coef H)` (eq. 7 and 9), with
    `rho = pi(a | s) / pi_old(a | s)`, advantages `A` from GAE and `R = A + V_old`. For another loss, override `loss`.

    Args:
        env: The id of a registered environment, or a callable that makes one.
        settings: The fields of `PPOSettings`.

    Raises:
        TypeError: If a setting is unknown, or text where a number is needed.
        ValueError: If the spaces of the environment are not supported, or a setting is out of range.
    """

    settings: PPOSettings

    def __init__(self, env: EnvSpec, **settings: Any) -> None:
        super().__init__(env, PPOSettings(**settings))
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
        """Make Adam, with the epsilon of the first PPO code; it is fused, which is faster on a CPU as well."""
        return torch.optim.Adam(self.parameters(), eps=1e-5, fused=True)

    def act(self, observations: Tensor, deterministic: bool = False) -> Tensor:
        """Sample from the policy, or take its most likely actions."""
        return self.policy.act(self.normalizer(observations), None if deterministic else self.generator)

    def values(self, observations: Tensor) -> Tensor:
        """Return `V(s) (...)` of observations `(..., D)`, as `normalizer` returns them."""
        return self.critic(observations).squeeze(-1)

    def loss(self, batch: Estimates) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a minibatch, and the metrics for the log."""
        settings = self.settings
        distribution = self.policy(batch.observations)
        logps = distribution.log_prob(batch.actions)
        clip = value_at(settings.clip_range, self.remaining)
        policy_loss = ppo_clip(logps, batch.logps, batch.advantages, epsilon_low=clip, epsilon_high=clip).mean()
        value_loss = squared_error(self.values(batch.observations), batch.returns).mean()
        loss = policy_loss + settings.value_coef * value_loss
        metrics = {"policy_loss": policy_loss, "value_loss": value_loss}
        if settings.entropy_coef:  # the entropy costs time, so it is computed only where it counts
            metrics["entropy"] = distribution.entropy().mean()
            loss = loss - settings.entropy_coef * metrics["entropy"]
        return loss, metrics

    def iterate(self) -> Mapping[str, Tensor | float]:
        """Collect a rollout, then make `epochs` passes over it in minibatches; return the metrics of the last one."""
        settings = self.settings
        rollout = collect(self, settings.rollout_steps)
        batch = estimate(
            self,
            rollout,
            gamma=settings.gamma,
            gae_lambda=settings.gae_lambda,
            normalize_advantages=settings.normalize_advantages,
        )
        parameters = list(self.parameters())
        for _ in range(settings.epochs):
            for minibatch in batch.minibatches(settings.batch_size, self.generator):
                loss, metrics = self.loss(minibatch)
                self.optimize(loss, self.optimizer, parameters)
        update_normalizer(self.normalizer, rollout)
        return metrics
