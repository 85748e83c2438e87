"""Trust region policy optimisation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, kl_divergence
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from rl_plugins.classic.actor_critic import Estimates, estimate
from rl_plugins.classic.agent import Agent
from rl_plugins.classic.agent_settings import PolicySettings, Schedule
from rl_plugins.classic.environments import EnvSpec
from rl_plugins.classic.networks import Policy, evaluation_mode, make_normalizer, make_policy
from rl_plugins.classic.rollouts import collect, update_normalizer
from rl_plugins.functional.natural_gradient import flat_gradient, hessian_product, trust_region_step
from rl_plugins.functional.ratios import log_ratios
from rl_plugins.functional.returns import check_trace_decay
from rl_plugins.functional.value_losses import squared_error


@dataclass(frozen=True, kw_only=True)
class TRPOSettings(PolicySettings):
    """Settings of `TRPOAgent`."""

    num_envs: int = 2
    rollout_steps: int = 512
    gae_lambda: float = 0.98
    """Trace decay of the advantages in [0, 1]: 1 is Monte Carlo, 0 is the TD error."""
    max_kl: float = 0.01
    """Size of the trust region."""
    cg_steps: int = 15
    """Largest number of steps of conjugate gradient."""
    cg_damping: float = 1e-3
    """Number added to the diagonal of the Fisher information."""
    line_search_steps: int = 10
    """Largest number of trials of the line search."""
    line_search_shrink: float = 0.8
    """Factor in (0, 1) from one trial to the next."""
    critic_epochs: int = 20
    """Passes of the critic over each rollout."""
    batch_size: int = 512
    """Transitions in each gradient step of the critic."""
    normalize_advantages: bool = True
    learning_rate: Schedule = 1e-3
    """Learning rate of the critic, a number or a function of the share of training that remains."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts("cg_steps", "line_search_steps", "critic_epochs", "batch_size")
        check_trace_decay(self.gae_lambda, "gae_lambda")
        if self.max_kl <= 0 or self.cg_damping < 0 or not 0 < self.line_search_shrink < 1:
            raise ValueError(
                f"max_kl={self.max_kl}, cg_damping={self.cg_damping}, line_search_shrink={self.line_search_shrink}: "
                "give a positive bound, a damping that is not negative, and a factor between 0 and 1."
            )


class TRPOAgent(Agent):
    """TRPO takes the largest step that keeps the policy near the old one (Schulman et al., arXiv 1502.05477).

    Maximise `mean(rho A)` subject to `mean(KL(pi_old || pi)) <= max_kl` (eq. 14), with `rho = pi / pi_old` and
    advantages `A` from GAE. The direction of the step comes from conjugate gradient on the Fisher information, its
    length from a line search (appendix C). The critic learns by Adam: `L = mean((V(s) - R)^2)`, `R = A + V_old`.

    Args:
        env: The id of a registered environment, or a callable that makes one.
        settings: The fields of `TRPOSettings`.

    Raises:
        TypeError: If a setting is unknown, or text where a number is needed.
        ValueError: If the spaces of the environment are not supported, or a setting is out of range.
    """

    settings: TRPOSettings

    def __init__(self, env: EnvSpec, **settings: Any) -> None:
        super().__init__(env, TRPOSettings(**settings))
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
        """Make Adam, for the critic."""
        return torch.optim.Adam(self.critic.parameters(), fused=True)

    def act(self, observations: Tensor, deterministic: bool = False) -> Tensor:
        """Sample from the policy, or take its most likely actions."""
        return self.policy.act(self.normalizer(observations), None if deterministic else self.generator)

    def values(self, observations: Tensor) -> Tensor:
        """Return `V(s) (...)` of observations `(..., D)`, as `normalizer` returns them."""
        return self.critic(observations).squeeze(-1)

    def surrogate(self, batch: Estimates) -> Tensor:
        """Return the objective, to be maximised: `mean(rho A) + entropy_coef H`, 0-d."""
        distribution = self.policy(batch.observations)
        ratios = log_ratios(distribution.log_prob(batch.actions), batch.logps).exp()
        objective = (ratios * batch.advantages).mean()
        if self.settings.entropy_coef:
            objective = objective + self.settings.entropy_coef * distribution.entropy().mean()
        return objective

    def update_policy(self, batch: Estimates) -> Mapping[str, Tensor | float]:
        """Take one natural gradient step, shortened until it stays in the trust region and improves the surrogate.

        The policy is in evaluation mode: dropout would move it out of the trust region without any step.

        Args:
            batch: A rollout, which the present policy sampled.

        Returns:
            `kl` and `improvement` of the step, and `step_share`, the share of its full length; all are 0 where no
            length would do.
        """
        with evaluation_mode(self.policy):
            return self._step(batch)

    def _step(self, batch: Estimates) -> Mapping[str, Tensor | float]:
        parameters = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        with torch.no_grad():
            old = self.policy(batch.observations)
        before = self.surrogate(batch)
        gradient = flat_gradient(before, parameters)
        kl = kl_divergence(old, self.policy(batch.observations)).mean()
        kl_gradient = flat_gradient(kl, parameters, create_graph=True)

        def product(vector: Tensor) -> Tensor:
            return hessian_product(kl_gradient, parameters, vector, damping=self.settings.cg_damping)

        step = trust_region_step(product, gradient, max_kl=self.settings.max_kl, steps=self.settings.cg_steps)
        return self._line_search(batch, old, parameters, step, before.detach())

    @torch.no_grad()
    def _line_search(
        self,
        batch: Estimates,
        old: Distribution,
        parameters: list[nn.Parameter],
        step: Tensor,
        before: Tensor,
    ) -> Mapping[str, Tensor | float]:
        start, share = parameters_to_vector(parameters), 1.0
        for _ in range(self.settings.line_search_steps):
            vector_to_parameters(start + share * step, parameters)
            kl = kl_divergence(old, self.policy(batch.observations)).mean()
            improvement = self.surrogate(batch) - before
            if kl <= self.settings.max_kl and improvement > 0:
                return {"kl": kl, "improvement": improvement, "step_share": share}
            share *= self.settings.line_search_shrink
        vector_to_parameters(start, parameters)
        return {"kl": 0.0, "improvement": 0.0, "step_share": 0.0}

    def update_critic(self, batch: Estimates) -> Tensor:
        """Train the critic in `critic_epochs` passes over the rollout; return the last loss."""
        parameters = list(self.critic.parameters())
        for _ in range(self.settings.critic_epochs):
            for minibatch in batch.minibatches(self.settings.batch_size, self.generator):
                loss = squared_error(self.values(minibatch.observations), minibatch.returns).mean()
                self.optimize(loss, self.optimizer, parameters)
        return loss.detach()

    def iterate(self) -> Mapping[str, Tensor | float]:
        """Collect a rollout, then take one step of the policy and several of the critic."""
        settings = self.settings
        rollout = collect(self, settings.rollout_steps)
        batch = estimate(
            self,
            rollout,
            gamma=settings.gamma,
            gae_lambda=settings.gae_lambda,
            normalize_advantages=settings.normalize_advantages,
        )
        metrics = self.update_policy(batch)
        value_loss = self.update_critic(batch)
        update_normalizer(self.normalizer, rollout)
        return {**metrics, "value_loss": value_loss}
