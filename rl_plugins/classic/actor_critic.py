"""The base of the agents with a state value: a critic beside the policy, and advantages from it."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rl_plugins.classic.environments import EnvSpec
from rl_plugins.classic.networks import evaluation_mode
from rl_plugins.classic.policy_gradient import PolicyGradientModule
from rl_plugins.classic.rollouts import Rollout, next_values
from rl_plugins.functional.masking import masked_whiten
from rl_plugins.functional.returns import gae


class Batch(NamedTuple):
    """Transitions to learn from, `M` of them."""

    observations: Tensor
    """`(M, D)`, as the networks take them."""
    actions: Tensor
    """`(M,)` indices, or `(M, A)` vectors."""
    logps: Tensor
    """`ln pi_old(a | s) (M,)`."""
    advantages: Tensor
    """`(M,)`."""
    returns: Tensor
    """Targets of the critic `(M,)`."""

    def minibatches(self, size: int, generator: torch.Generator) -> Iterator["Batch"]:
        """The transitions in random order, `size` at a time."""
        if size >= len(self.logps):
            yield self  # its order would not matter, and costs a copy
            return
        order = torch.randperm(len(self.logps), generator=generator).to(self.logps.device)
        for indices in order.split(size):
            yield Batch(*(tensor[indices] for tensor in self))


class ActorCriticModule(PolicyGradientModule):
    """A policy `pi(a | s)` and a critic `V(s)` that learn from rollouts of the policy.

    For another critic, override `build_critic`.

    Args:
        env: The id of a registered environment, or a callable that makes one.
        gae_lambda: Trace decay of the advantages in [0, 1]: 1 is Monte Carlo, 0 is the TD error.
        settings: Those of `PolicyGradientModule` and `ClassicModule`.

    Raises:
        ValueError: If the spaces of the environment are not supported, or a setting is out of range.
    """

    critic: nn.Module

    def __init__(self, env: EnvSpec, *, gae_lambda: float = 0.95, **settings: Any) -> None:
        super().__init__(env, **settings)
        if not 0 <= gae_lambda <= 1:
            raise ValueError(f"gae_lambda={gae_lambda}: give a trace decay in [0, 1].")
        self.gae_lambda = gae_lambda
        with self.seeded():
            self.critic = self.build_critic()

    def build_critic(self) -> nn.Module:
        """From observations `(..., D)` to values `(..., 1)`."""
        return self.build_network(self.observation_size, 1, gain=1.0)

    def values(self, observations: Tensor) -> Tensor:
        """`V(s) (...)` of observations `(..., D)` as the networks take them."""
        return self.critic(observations).squeeze(-1)

    def final_values(self, rollout: Rollout) -> Tensor:
        """`V (M,)` of the states in which episodes were cut off."""
        final = rollout.final_observations
        if not len(final):  # a network of one's own need not take zero rows
            return final.new_zeros(0)
        with evaluation_mode(self):  # batch statistics of so few states would mean little
            return self.values(self.normalizer(final))

    @torch.no_grad()
    def advantages(self, rollout: Rollout, values: Tensor) -> Tensor:
        """GAE over the episodes of each row.

        Args:
            rollout: `N` rows of `T` steps.
            values: `V(s_t) (N, T + 1)` of its observations.

        Returns:
            `(N, T)`, not normalised.
        """
        final_values = self.final_values(rollout)
        return gae(
            rollout.rewards,
            values[:, :-1],
            rollout.mask,
            gamma=self.gamma,
            lam=torch.where(rollout.ends, 0.0, self.gae_lambda),
            next_values=next_values(rollout, values, final_values),
        )

    @torch.no_grad()
    def estimate(self, rollout: Rollout) -> Batch:
        """The transitions of a rollout, with what the present policy and critic say of them."""
        observations = self.normalizer(rollout.observations)
        with evaluation_mode(self):  # as when the policy sampled
            values = self.values(observations)  # (N, T + 1)
            logps = self.policy(observations[:, :-1]).log_prob(rollout.actions)
        advantages = self.advantages(rollout, values)
        returns = advantages + values[:, :-1]
        if self.normalize_advantages:
            advantages = masked_whiten(advantages, rollout.mask)
        return Batch(
            observations=observations[:, :-1].flatten(0, 1),
            actions=rollout.actions.flatten(0, 1),
            logps=logps.flatten(),
            advantages=advantages.flatten(),
            returns=returns.flatten(),
        )
