"""Actor-critic with action values."""

from typing import Any

import torch
from gymnasium.spaces import Discrete
from torch import Tensor, nn

from rl_plugins.classic.environments import EnvSpec
from rl_plugins.classic.networks import evaluation_mode
from rl_plugins.classic.policy_gradient import PolicyGradientModule
from rl_plugins.classic.rollouts import Rollout, next_values
from rl_plugins.classic.schedules import Schedule, set_rate, value_at
from rl_plugins.functional.masking import masked_whiten
from rl_plugins.functional.policy_losses.clip import vanilla
from rl_plugins.functional.returns import lambda_returns
from rl_plugins.functional.value_losses import squared_error


class QACModule(PolicyGradientModule):
    """QAC: the policy follows a critic `q(s, a)`, which learns by Sarsa.

    `L_policy = mean(-q(s, a) ln pi(a | s) - entropy_coef H)`, `L_critic = mean((q(s, a) - r - gamma q(s', a'))^2)`
    (Sutton and Barto 2018, eq. 6.7), with stopped gradients on `q` in the first and on the target in the second. `a'`
    is the action taken next; after the last step of a row, and where an episode was cut off, one is drawn. For other
    losses, override `policy_loss` or `critic_loss`.

    Without a baseline, an action is reinforced for what its state is worth. Large rollouts, and a critic that learns
    faster than the policy, are what makes it work; A2CModule needs neither.

    Args:
        env: The id of a registered environment, or a callable that makes one.
        num_envs: Environments that are stepped side by side.
        rollout_steps: Steps of each environment in an iteration.
        q_lambda: Trace decay of the critic's targets in [0, 1]: 0 is Sarsa, more is Sarsa(lambda).
        critic_updates: Gradient steps of the critic in an iteration, before the one of the policy.
        learning_rate: Of Adam for the policy, a number or a function of the share of training that remains.
        critic_learning_rate: Of Adam for the critic, likewise.
        settings: Those of `PolicyGradientModule` and `ClassicModule`; `normalize_advantages` scales the `q` of an
            update, over all states, which has hidden the difference between actions in our trials.

    Raises:
        ValueError: If the spaces of the environment are not supported, or a setting is out of range.
    """

    critic: nn.Module

    def __init__(
        self,
        env: EnvSpec,
        *,
        num_envs: int = 8,
        rollout_steps: int = 64,
        q_lambda: float = 0.0,
        critic_updates: int = 4,
        learning_rate: Schedule = 1e-3,
        critic_learning_rate: Schedule = 3e-3,
        **settings: Any,
    ) -> None:
        super().__init__(env, num_envs=num_envs, rollout_steps=rollout_steps, learning_rate=learning_rate, **settings)
        if not 0 <= q_lambda <= 1:
            raise ValueError(f"q_lambda={q_lambda}: give a trace decay in [0, 1].")
        if critic_updates < 1:
            raise ValueError(f"critic_updates={critic_updates}: give at least 1.")
        self.q_lambda, self.critic_updates = q_lambda, critic_updates
        self.critic_learning_rate = critic_learning_rate
        with self.seeded():
            self.critic = self.build_critic()

    def build_critic(self) -> nn.Module:
        """From observations to `q` of all Discrete actions, or from observations and actions of a Box to one."""
        if isinstance(self.action_space, Discrete):
            return self.build_network(self.observation_size, self.action_size, gain=1.0)
        return self.build_network(self.observation_size + self.action_size, 1, gain=1.0)

    def action_values(self, observations: Tensor, actions: Tensor) -> Tensor:
        """`q(s, a) (...)` of observations `(..., D)` as the networks take them, and actions `(...)` or `(..., A)`."""
        if isinstance(self.action_space, Discrete):
            return self.critic(observations).gather(-1, actions.unsqueeze(-1)).squeeze(-1)
        return self.critic(torch.cat([observations, actions], dim=-1)).squeeze(-1)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Adam for the policy, and Adam for the critic."""
        return [torch.optim.Adam(network.parameters(), fused=True) for network in (self.policy, self.critic)]

    def set_learning_rates(self) -> None:
        """Set each optimizer to its own rate."""
        for optimizer, rate in zip(
            self.trainer.optimizers, (self.learning_rate, self.critic_learning_rate), strict=True
        ):
            set_rate(optimizer, value_at(rate, self.remaining))

    @torch.no_grad()
    def targets(self, rollout: Rollout, q: Tensor) -> Tensor:
        """Sarsa's targets of a rollout.

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
        lam = torch.where(rollout.ends, 0.0, self.q_lambda)
        return lambda_returns(rollout.rewards, q, rollout.mask, gamma=self.gamma, lam=lam, next_values=following)

    def critic_loss(self, rollout: Rollout) -> Tensor:
        """The squared error of Sarsa, 0-d."""
        q = self.action_values(self.normalizer(rollout.observations[:, :-1]), rollout.actions)
        return squared_error(q, self.targets(rollout, q.detach())).mean()

    def policy_loss(self, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy gradient with the critic's `q`, and what is logged of it."""
        observations = self.normalizer(rollout.observations[:, :-1])
        with torch.no_grad(), evaluation_mode(self.critic):
            weights = self.action_values(observations, rollout.actions)
        if self.normalize_advantages:
            weights = masked_whiten(weights, rollout.mask)
        distribution = self.policy(observations)
        loss = vanilla(distribution.log_prob(rollout.actions), weights).mean()
        return self.with_entropy_bonus(loss, distribution, {"policy_loss": loss})

    def iterate(self) -> dict[str, Tensor | float]:
        """Collect, then `critic_updates` gradient steps of the critic and one of the policy."""
        rollout = self.collect()
        optimizers = self.optimizers()
        assert isinstance(optimizers, list)
        policy_optimizer, critic_optimizer = optimizers
        for _ in range(self.critic_updates):
            value_loss = self.critic_loss(rollout)
            self.optimize(value_loss, critic_optimizer, list(self.critic.parameters()))
        loss, metrics = self.policy_loss(rollout)
        self.optimize(loss, policy_optimizer, list(self.policy.parameters()))
        self.update_normalizer(rollout)
        return {name: value.detach() for name, value in (metrics | {"value_loss": value_loss}).items()}
