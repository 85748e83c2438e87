"""The Monte Carlo policy gradient."""

from typing import Any

import torch
from torch import Tensor

from rl_plugins.classic.environments import EnvSpec
from rl_plugins.classic.policy_gradient import PolicyGradientModule
from rl_plugins.classic.rollouts import Rollout, collect, episode_steps
from rl_plugins.classic.schedules import Schedule
from rl_plugins.functional.masking import masked_mean, masked_whiten
from rl_plugins.functional.policy_losses.aggregation import aggregate
from rl_plugins.functional.policy_losses.clip import vanilla
from rl_plugins.functional.returns import lambda_returns


class ReinforceModule(PolicyGradientModule):
    """REINFORCE: whole episodes, their returns, no critic (Williams 1992; Sutton and Barto 2018, section 13.3).

    `L = mean(-G_t ln pi(a_t | s_t) - entropy_coef H)`. Normalised returns, the default, have a constant baseline and
    an own scale. An episode that a time limit cuts off counts as it is; without a limit of the environment's own it is
    10,000 steps, or `max_episode_steps`.

    An iteration stands for `num_envs rollout_steps` environment steps; as episodes are not cut, one may take more,
    and those after it then less, or nothing.

    Args:
        env: The id of a registered environment, or a callable that makes one.
        num_envs: Environments that are stepped side by side.
        rollout_steps: Steps after which an environment finishes its episode, then waits for the others.
        discounted_objective: Whether step `t` of an episode weighs `gamma^t`, as the gradient of the discounted return
            has it; most code leaves it out, so that late steps count as much as early ones.
        normalize_advantages: Whether the returns of an update are scaled to zero mean and unit variance.
        learning_rate: Of Adam, a number or a function of the share of training that remains.
        settings: Those of `PolicyGradientModule` and `ClassicModule`.

    Raises:
        ValueError: If the spaces of the environment are not supported, or a setting is out of range.
    """

    whole_episodes = True

    def __init__(
        self,
        env: EnvSpec,
        *,
        num_envs: int = 8,
        rollout_steps: int = 128,
        discounted_objective: bool = False,
        normalize_advantages: bool = True,
        learning_rate: Schedule = 3e-3,
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
        self.discounted_objective = discounted_objective

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), fused=True)

    def collect(self) -> Rollout:
        """Rows of whole episodes."""
        return collect(self, self.rollout_steps, whole_episodes=True)

    def returns(self, rollout: Rollout) -> Tensor:
        """`G_t (N, T)`, each to the end of its own episode."""
        nothing = torch.zeros_like(rollout.rewards)
        lam = torch.where(rollout.ends, 0.0, 1.0)
        return lambda_returns(rollout.rewards, nothing, rollout.mask, gamma=self.gamma, lam=lam, next_values=nothing)

    def loss(self, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a rollout, and what is logged of it."""
        weights = self.returns(rollout)
        if self.normalize_advantages:
            weights = masked_whiten(weights, rollout.mask)
        if self.discounted_objective:
            weights = weights * self.gamma ** episode_steps(rollout)
        distribution = self.policy(self.normalizer(rollout.observations[:, :-1]))
        token_loss = vanilla(distribution.log_prob(rollout.actions), weights, rollout.mask)
        policy_loss = aggregate(token_loss, rollout.mask, "token")
        metrics = {"policy_loss": policy_loss}
        if not self.entropy_coef:
            return policy_loss, metrics
        metrics["entropy"] = masked_mean(distribution.entropy(), rollout.mask)
        return policy_loss - self.entropy_coef * metrics["entropy"], metrics

    def iterate(self) -> dict[str, Tensor | float]:
        """Episodes and gradient steps until the environment steps of this iteration are used up."""
        metrics: dict[str, Tensor] = {}
        while self.runner.steps < self.iteration * self.steps_per_iteration:
            rollout = self.collect()
            loss, metrics = self.loss(rollout)
            self.optimize(loss, self.optimizer, list(self.parameters()))
            self.update_normalizer(rollout)
        return {name: value.detach() for name, value in metrics.items()}
