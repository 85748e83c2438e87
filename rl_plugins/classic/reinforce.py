"""The Monte Carlo policy gradient."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rl_plugins.classic.agent import Agent
from rl_plugins.classic.agent_settings import PolicySettings, Schedule
from rl_plugins.classic.environments import EnvSpec
from rl_plugins.classic.networks import Policy, make_normalizer, make_policy
from rl_plugins.classic.rollouts import Rollout, collect, episode_steps, update_normalizer
from rl_plugins.functional.masking import masked_mean, masked_whiten
from rl_plugins.functional.policy_losses.aggregation import aggregate
from rl_plugins.functional.policy_losses.clip import vanilla
from rl_plugins.functional.returns import lambda_returns


@dataclass(frozen=True, kw_only=True)
class ReinforceSettings(PolicySettings):
    """Settings of `ReinforceAgent`."""

    rollout_steps: int = 128
    """Steps after which an environment finishes its episode, then waits for the others."""
    discounted_objective: bool = False
    """Whether step `t` of an episode has the weight `gamma^t`, as in the gradient of the discounted return. Most code
    leaves this weight out, so that late steps count as much as early ones."""
    normalize_advantages: bool = True
    """Whether the returns of an update are scaled to zero mean and unit variance."""
    learning_rate: Schedule = 3e-3


class ReinforceAgent(Agent):
    """REINFORCE learns from the returns of whole episodes (Williams 1992; Sutton and Barto 2018, section 13.3).

    `L = mean(-G_t ln pi(a_t | s_t) - entropy_coef H)`. By default the returns are normalised: their mean is subtracted
    as a baseline, and they are divided by their deviation. An episode that a time limit cuts off counts as it is; the
    limits are the environment's own and `max_episode_steps`, or 10,000 steps where there is neither.

    An iteration stands for `num_envs rollout_steps` environment steps. Since rollouts have whole episodes, an
    iteration may take more steps, and the next iterations then fewer, or none.

    Args:
        env: The id of a registered environment, or a callable that makes one.
        settings: The fields of `ReinforceSettings`.

    Raises:
        TypeError: If a setting is unknown, or text where a number is needed.
        ValueError: If the spaces of the environment are not supported, or a setting is out of range.
    """

    whole_episodes = True
    settings: ReinforceSettings

    def __init__(self, env: EnvSpec, **settings: Any) -> None:
        super().__init__(env, ReinforceSettings(**settings))
        self.normalizer = make_normalizer(self.observation_size, normalize=self.settings.normalize_observations)
        with self.seeded():
            self.policy = self.build_policy()

    def build_policy(self) -> Policy:
        """Make the policy; its first actions are close to uniform, or to a mean of 0."""
        return make_policy(self.build_network(self.observation_size, self.action_size, gain=0.01), self.action_space)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make Adam."""
        return torch.optim.Adam(self.parameters(), fused=True)

    def act(self, observations: Tensor, deterministic: bool = False) -> Tensor:
        """Sample from the policy, or take its most likely actions."""
        return self.policy.act(self.normalizer(observations), None if deterministic else self.generator)

    def returns(self, rollout: Rollout) -> Tensor:
        """Return `G_t (N, T)`, each to the end of its own episode."""
        # Lambda-returns with values of 0 are plain returns, and a trace decay of 0 stops them where an episode ends.
        nothing = torch.zeros_like(rollout.rewards)
        lam = torch.where(rollout.ends, 0.0, 1.0)
        gamma = self.settings.gamma
        return lambda_returns(rollout.rewards, nothing, rollout.mask, gamma=gamma, lam=lam, next_values=nothing)

    def loss(self, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a rollout, and the metrics for the log."""
        settings = self.settings
        weights = self.returns(rollout)
        if settings.normalize_advantages:
            weights = masked_whiten(weights, rollout.mask)
        if settings.discounted_objective:
            weights = weights * settings.gamma ** episode_steps(rollout)
        distribution = self.policy(self.normalizer(rollout.observations[:, :-1]))
        step_loss = vanilla(distribution.log_prob(rollout.actions), weights, rollout.mask)
        loss = aggregate(step_loss, rollout.mask, "token")  # the mean over all steps that are learned from
        metrics = {"policy_loss": loss}
        if settings.entropy_coef:  # the entropy costs time, so it is computed only where it counts
            metrics["entropy"] = masked_mean(distribution.entropy(), rollout.mask)
            loss = loss - settings.entropy_coef * metrics["entropy"]
        return loss, metrics

    def iterate(self) -> Mapping[str, Tensor | float]:
        """Collect episodes and take gradient steps until the environment steps of this iteration are used up."""
        metrics: dict[str, Tensor] = {}
        while self.runner.steps < self.iteration * self.steps_per_iteration:
            rollout = collect(self, self.settings.rollout_steps, whole_episodes=True)
            loss, metrics = self.loss(rollout)
            self.optimize(loss, self.optimizer, list(self.parameters()))
            update_normalizer(self.normalizer, rollout)
        return metrics
