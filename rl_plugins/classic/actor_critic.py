"""Advantages from a critic of state values, which A2C, PPO, TRPO and the off-policy agent share."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from rl_plugins.classic.networks import HasModules, Policy, evaluation_mode
from rl_plugins.classic.rollouts import Rollout, next_values
from rl_plugins.functional.masking import masked_whiten
from rl_plugins.functional.returns import gae


class ActorCritic(HasModules, Protocol):
    """The parts of an agent that the functions of this file use."""

    policy: Policy
    normalizer: nn.Module

    def values(self, observations: Tensor) -> Tensor:
        """Return `V(s) (...)` of observations `(..., D)`, as `normalizer` returns them."""


class Estimates(NamedTuple):
    """`M` transitions to learn from, with the results of policy and critic from before they learn."""

    observations: Tensor
    """`(M, D)`, as the normalizer returns them."""
    actions: Tensor
    """`(M,)` indices, or `(M, A)` vectors."""
    logps: Tensor
    """`ln pi_old(a | s) (M,)`."""
    advantages: Tensor
    """`(M,)`."""
    returns: Tensor
    """Targets of the critic `(M,)`."""

    def minibatches(self, size: int, generator: torch.Generator) -> Iterator["Estimates"]:
        """Yield the transitions in random order, `size` at a time."""
        if size >= len(self.logps):
            yield self  # the order does not matter in one batch, and a new one costs a copy
            return
        order = torch.randperm(len(self.logps), generator=generator).to(self.logps.device)
        for indices in order.split(size):
            yield Estimates(*(tensor[indices] for tensor in self))


def final_values(agent: ActorCritic, rollout: Rollout) -> Tensor:
    """Return `V (M,)` of the states in which the episodes of a rollout were cut off."""
    final = rollout.final_observations
    if not len(final):  # a user's network may not accept zero rows
        return final.new_zeros(0)
    with evaluation_mode(agent):  # statistics of so small a batch would mean little
        return agent.values(agent.normalizer(final))


@torch.no_grad()
def gae_advantages(agent: ActorCritic, rollout: Rollout, values: Tensor, *, gamma: float, gae_lambda: float) -> Tensor:
    """Estimate advantages over the episodes of each row by GAE (Schulman et al., arXiv 1506.02438, eq. 16).

    Args:
        agent: The agent, whose critic gives the values of the states in which episodes were cut off.
        rollout: `N` rows of `T` steps.
        values: `V(s_t) (N, T + 1)` of its observations.
        gamma: Discount in [0, 1].
        gae_lambda: Trace decay in [0, 1]: 1 is Monte Carlo, 0 is the TD error.

    Returns:
        `(N, T)`, not normalised.
    """
    return gae(
        rollout.rewards,
        values[:, :-1],
        rollout.mask,
        gamma=gamma,
        lam=torch.where(rollout.ends, 0.0, gae_lambda),  # a row holds several episodes: no trace crosses their ends
        next_values=next_values(rollout, values, final_values(agent, rollout)),
    )


@torch.no_grad()
def estimate(
    agent: ActorCritic, rollout: Rollout, *, gamma: float, gae_lambda: float, normalize_advantages: bool
) -> Estimates:
    """Compute log-probabilities, advantages and returns of a rollout, before policy and critic learn from it.

    Args:
        agent: The agent, with policy and critic.
        rollout: `N` rows of `T` steps, `M = N T`.
        gamma: Discount in [0, 1].
        gae_lambda: Trace decay of the advantages in [0, 1].
        normalize_advantages: Whether the advantages are scaled to zero mean and unit variance; returns are not.

    Returns:
        The transitions, with `returns = advantages + values`.
    """
    observations = agent.normalizer(rollout.observations)
    with evaluation_mode(agent):  # as when the policy sampled
        values = agent.values(observations)  # (N, T + 1)
        logps = agent.policy(observations[:, :-1]).log_prob(rollout.actions)
    advantages = gae_advantages(agent, rollout, values, gamma=gamma, gae_lambda=gae_lambda)
    returns = advantages + values[:, :-1]
    if normalize_advantages:
        advantages = masked_whiten(advantages, rollout.mask)
    return Estimates(
        observations=observations[:, :-1].flatten(0, 1),
        actions=rollout.actions.flatten(0, 1),
        logps=logps.flatten(),
        advantages=advantages.flatten(),
        returns=returns.flatten(),
    )
