"""Trust region policy optimisation."""

from typing import Any

import torch
from torch import Tensor
from torch.distributions import kl_divergence
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from rl_plugins.classic.actor_critic import ActorCriticModule, Batch
from rl_plugins.classic.environments import EnvSpec
from rl_plugins.classic.networks import evaluation_mode
from rl_plugins.classic.schedules import Schedule
from rl_plugins.functional.natural_gradient import flat_gradient, hessian_product, trust_region_step
from rl_plugins.functional.ratios import log_ratios
from rl_plugins.functional.value_losses import squared_error


class TRPOModule(ActorCriticModule):
    """TRPO: the policy takes the largest step that keeps it near the old one (Schulman et al., arXiv 1502.05477).

    Maximise `mean(rho A)` subject to `mean(KL(pi_old || pi)) <= max_kl` (eq. 14): the direction by conjugate gradient
    on the Fisher information, the length by a line search (appendix C). The critic learns by Adam.

    Args:
        env: The id of a registered environment, or a callable that makes one.
        num_envs: Environments that are stepped side by side.
        rollout_steps: Steps of each environment in an iteration.
        gae_lambda: Trace decay of the advantages in [0, 1].
        max_kl: Size of the trust region.
        cg_steps: Most steps of conjugate gradient.
        cg_damping: Added to the diagonal of the Fisher information.
        line_search_steps: Most trials of the line search.
        line_search_shrink: Factor in (0, 1) from one trial to the next.
        critic_epochs: Passes of the critic over each rollout.
        batch_size: Transitions of a gradient step of the critic.
        normalize_advantages: Whether each rollout's advantages are scaled to zero mean and unit variance.
        learning_rate: Of the critic, a number or a function of the share of training that remains.
        settings: Those of `ActorCriticModule`, `PolicyGradientModule` and `ClassicModule`.

    Raises:
        ValueError: If the spaces of the environment are not supported, or a setting is out of range.
    """

    def __init__(
        self,
        env: EnvSpec,
        *,
        num_envs: int = 2,
        rollout_steps: int = 512,
        gae_lambda: float = 0.98,
        max_kl: float = 0.01,
        cg_steps: int = 15,
        cg_damping: float = 1e-3,
        line_search_steps: int = 10,
        line_search_shrink: float = 0.8,
        critic_epochs: int = 20,
        batch_size: int = 512,
        normalize_advantages: bool = True,
        learning_rate: Schedule = 1e-3,
        **settings: Any,
    ) -> None:
        super().__init__(
            env,
            num_envs=num_envs,
            rollout_steps=rollout_steps,
            gae_lambda=gae_lambda,
            normalize_advantages=normalize_advantages,
            learning_rate=learning_rate,
            **settings,
        )
        if max_kl <= 0 or cg_damping < 0 or not 0 < line_search_shrink < 1:
            raise ValueError(
                f"max_kl={max_kl}, cg_damping={cg_damping}, line_search_shrink={line_search_shrink}: give a positive "
                "bound, a damping that is not negative, and a factor between 0 and 1."
            )
        self.max_kl, self.cg_steps, self.cg_damping = max_kl, cg_steps, cg_damping
        self.line_search_steps, self.line_search_shrink = line_search_steps, line_search_shrink
        self.critic_epochs, self.batch_size = critic_epochs, batch_size

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, for the critic."""
        return torch.optim.Adam(self.critic.parameters(), fused=True)

    def surrogate(self, batch: Batch) -> Tensor:
        """The objective, to be maximised: `mean(rho A) + entropy_coef H`, 0-d."""
        distribution = self.policy(batch.observations)
        ratios = log_ratios(distribution.log_prob(batch.actions), batch.logps).exp()
        objective = (ratios * batch.advantages).mean()
        return objective + self.entropy_coef * distribution.entropy().mean() if self.entropy_coef else objective

    def update_policy(self, batch: Batch) -> dict[str, Tensor | float]:
        """One natural gradient step, shortened until it stays in the trust region and improves the surrogate.

        The policy is in evaluation mode: dropout would move it out of the trust region without any step.

        Args:
            batch: A rollout, which the present policy sampled.

        Returns:
            `kl` and `improvement` of the step, both 0 where no length would do, and `step_share`, that length.
        """
        with evaluation_mode(self.policy):
            return self._step(batch)

    def _step(self, batch: Batch) -> dict[str, Tensor | float]:
        parameters = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        with torch.no_grad():
            old = self.policy(batch.observations)
        before = self.surrogate(batch)
        gradient = flat_gradient(before, parameters)
        kl = kl_divergence(old, self.policy(batch.observations)).mean()
        kl_gradient = flat_gradient(kl, parameters, create_graph=True)

        def product(vector: Tensor) -> Tensor:
            return hessian_product(kl_gradient, parameters, vector, damping=self.cg_damping)

        step = trust_region_step(product, gradient, max_kl=self.max_kl, steps=self.cg_steps)
        return self._line_search(batch, old, parameters, step, before.detach())

    @torch.no_grad()
    def _line_search(
        self,
        batch: Batch,
        old: torch.distributions.Distribution,
        parameters: list[torch.nn.Parameter],
        step: Tensor,
        before: Tensor,
    ) -> dict[str, Tensor | float]:
        start, share = parameters_to_vector(parameters), 1.0
        for _ in range(self.line_search_steps):
            vector_to_parameters(start + share * step, parameters)
            kl = kl_divergence(old, self.policy(batch.observations)).mean()
            improvement = self.surrogate(batch) - before
            if kl <= self.max_kl and improvement > 0:
                return {"kl": kl, "improvement": improvement, "step_share": share}
            share *= self.line_search_shrink
        vector_to_parameters(start, parameters)
        return {"kl": 0.0, "improvement": 0.0, "step_share": 0.0}

    def update_critic(self, batch: Batch) -> Tensor:
        """`critic_epochs` passes over the rollout; returns the last loss."""
        parameters = list(self.critic.parameters())
        for _ in range(self.critic_epochs):
            for minibatch in batch.minibatches(self.batch_size, self.generator):
                loss = squared_error(self.values(minibatch.observations), minibatch.returns).mean()
                self.optimize(loss, self.optimizer, parameters)
        return loss.detach()

    def iterate(self) -> dict[str, Tensor | float]:
        """Collect, then a step of the policy and several of the critic."""
        rollout = self.collect()
        batch = self.estimate(rollout)
        metrics = self.update_policy(batch)
        value_loss = self.update_critic(batch)
        self.update_normalizer(rollout)
        return metrics | {"value_loss": value_loss}
