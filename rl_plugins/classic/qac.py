"""Actor-critic with action values."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from gymnasium.spaces import Discrete
from torch import Tensor, nn

from rl_plugins.classic.agent import Agent
from rl_plugins.classic.agent_settings import PolicySettings, Schedule
from rl_plugins.classic.environments import EnvSpec
from rl_plugins.classic.networks import Policy, evaluation_mode, make_normalizer, make_policy
from rl_plugins.classic.rollouts import Rollout, collect, next_values, update_normalizer
from rl_plugins.functional.masking import masked_whiten
from rl_plugins.functional.policy_losses.clip import vanilla
from rl_plugins.functional.returns import check_trace_decay, lambda_returns
from rl_plugins.functional.value_losses import squared_error


@dataclass(frozen=True, kw_only=True)
class QACSettings(PolicySettings):
    """Settings of `QACAgent`."""

    rollout_steps: int = 64
    q_lambda: float = 0.0
    """Trace decay of the critic's targets in [0, 1]: 0 is Sarsa, more is Sarsa(lambda)."""
    critic_updates: int = 4
    """Gradient steps of the critic in an iteration, before the one of the policy."""
    learning_rate: Schedule = 1e-3
    """Learning rate of the policy, a number or a function of the share of training that remains."""
    critic_learning_rate: Schedule = 3e-3
    """Learning rate of the critic, a number or a function of the share of training that remains."""
    normalize_advantages: bool = False
    """Whether the `q` of an update are scaled to zero mean and unit variance over all states. In our trials this hid
    the differences between actions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts("critic_updates")
        check_trace_decay(self.q_lambda, "q_lambda")


class QACAgent(Agent):
    """QAC lets the policy follow a critic `q(s, a)`, which learns by Sarsa.

    `L_policy = mean(-q(s, a) ln pi(a | s) - entropy_coef H)`, `L_critic = mean((q(s, a) - r - gamma q(s', a'))^2)`
    (Sutton and Barto 2018, eq. 6.7), with stopped gradients on `q` in the first loss and on the target in the second.
    `a'` is the action taken next; after the last step of a row, and where an episode was cut off, `a'` is drawn from
    the policy. For other losses, override `policy_loss` or `critic_loss`.

    Without a baseline, an action is also reinforced for the value of its state. QAC needs large rollouts, and a critic
    that learns faster than the policy; A2CAgent needs neither.

    Args:
        env: The id of a registered environment, or a callable that makes one.
        settings: The fields of `QACSettings`.

    Raises:
        TypeError: If a setting is unknown, or text where a number is needed.
        ValueError: If the spaces of the environment are not supported, or a setting is out of range.
    """

    settings: QACSettings

    def __init__(self, env: EnvSpec, **settings: Any) -> None:
        super().__init__(env, QACSettings(**settings))
        self.normalizer = make_normalizer(self.observation_size, normalize=self.settings.normalize_observations)
        with self.seeded():
            self.policy = self.build_policy()
            self.critic = self.build_critic()

    def build_policy(self) -> Policy:
        """Make the policy; its first actions are close to uniform, or to a mean of 0."""
        return make_policy(self.build_network(self.observation_size, self.action_size, gain=0.01), self.action_space)

    def build_critic(self) -> nn.Module:
        """Make the critic: observations to `q` of all Discrete actions, or observations and Box actions to one `q`."""
        if isinstance(self.action_space, Discrete):
            return self.build_network(self.observation_size, self.action_size, gain=1.0)
        return self.build_network(self.observation_size + self.action_size, 1, gain=1.0)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Make Adam for the policy, and Adam for the critic."""
        return [torch.optim.Adam(network.parameters(), fused=True) for network in (self.policy, self.critic)]

    @property
    def learning_rates(self) -> list[Schedule]:
        """The learning rates of the policy and of the critic."""
        return [self.settings.learning_rate, self.settings.critic_learning_rate]

    def act(self, observations: Tensor, deterministic: bool = False) -> Tensor:
        """Sample from the policy, or take its most likely actions."""
        return self.policy.act(self.normalizer(observations), None if deterministic else self.generator)

    def action_values(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Return `q(s, a) (...)`.

        Args:
            observations: `(..., D)`, as `normalizer` returns them.
            actions: Indices `(...)`, or vectors `(..., A)`.
        """
        if isinstance(self.action_space, Discrete):
            return self.critic(observations).gather(-1, actions.unsqueeze(-1)).squeeze(-1)
        return self.critic(torch.cat([observations, actions], dim=-1)).squeeze(-1)

    @torch.no_grad()
    def targets(self, rollout: Rollout, q: Tensor) -> Tensor:
        """Return Sarsa's targets of a rollout.

        Args:
            rollout: `N` rows of `T` steps.
            q: `q(s_t, a_t) (N, T)` of its steps.

        Returns:
            `(N, T)`.
        """
        last, final = rollout.observations[:, -1], rollout.final_observations
        with evaluation_mode(self):
            last_q = self.action_values(self.normalizer(last), self.act(last))
            final_q = self.action_values(self.normalizer(final), self.act(final)) if len(final) else last_q[:0]
        following = next_values(rollout, torch.cat([q, last_q[:, None]], dim=1), final_q)
        lam = torch.where(rollout.ends, 0.0, self.settings.q_lambda)  # no trace crosses the end of an episode
        gamma = self.settings.gamma
        return lambda_returns(rollout.rewards, q, rollout.mask, gamma=gamma, lam=lam, next_values=following)

    def critic_loss(self, rollout: Rollout) -> Tensor:
        """Return the squared error of Sarsa, 0-d."""
        q = self.action_values(self.normalizer(rollout.observations[:, :-1]), rollout.actions)
        return squared_error(q, self.targets(rollout, q.detach())).mean()

    def policy_loss(self, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss whose gradient is the policy gradient with the critic's `q`, and the metrics for the log."""
        settings = self.settings
        observations = self.normalizer(rollout.observations[:, :-1])
        with torch.no_grad(), evaluation_mode(self.critic):
            weights = self.action_values(observations, rollout.actions)
        if settings.normalize_advantages:
            weights = masked_whiten(weights, rollout.mask)
        distribution = self.policy(observations)
        loss = vanilla(distribution.log_prob(rollout.actions), weights).mean()
        metrics = {"policy_loss": loss}
        if settings.entropy_coef:  # the entropy costs time, so it is computed only where it counts
            metrics["entropy"] = distribution.entropy().mean()
            loss = loss - settings.entropy_coef * metrics["entropy"]
        return loss, metrics

    def iterate(self) -> Mapping[str, Tensor | float]:
        """Collect a rollout, then take `critic_updates` gradient steps of the critic and one of the policy."""
        rollout = collect(self, self.settings.rollout_steps)
        optimizers = self.optimizers()
        assert isinstance(optimizers, list)
        policy_optimizer, critic_optimizer = optimizers
        for _ in range(self.settings.critic_updates):
            value_loss = self.critic_loss(rollout)
            self.optimize(value_loss, critic_optimizer, list(self.critic.parameters()))
        loss, metrics = self.policy_loss(rollout)
        self.optimize(loss, policy_optimizer, list(self.policy.parameters()))
        update_normalizer(self.normalizer, rollout)
        return {**metrics, "value_loss": value_loss}
