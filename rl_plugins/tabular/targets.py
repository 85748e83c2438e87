"""The target that each method takes for `q(s_t, a_t)`: the only difference between the methods.

A target function maps `(q, policy, rollout, gamma)` to targets `(B, T)`; those outside the rollout's mask are ignored.
Shapes: `B` copies, `T` steps of a rollout, `S` states, `A` actions.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rl_plugins import functional
from rl_plugins.tabular.sampling import Rollout

Target = Callable[[Tensor, Tensor, Rollout, float], Tensor]
"""A function from `q (S, A)`, the policy that acts `(S, A)`, a rollout and the discount to targets `(B, T)`."""


def sarsa(q: Tensor, policy: Tensor, rollout: Rollout, gamma: float) -> Tensor:
    """Learn `q` of the policy that acts: `r_t + gamma q(s_{t+1}, a_{t+1})`. See `functional.sarsa_targets`."""
    return functional.sarsa_targets(
        rollout.rewards, q[rollout.next_states], rollout.next_actions, rollout.terminated, gamma=gamma
    )


def expected_sarsa(q: Tensor, policy: Tensor, rollout: Rollout, gamma: float) -> Tensor:
    """Learn like Sarsa, without the noise of the next action: `r_t + gamma sum_a pi(a|s_{t+1}) q(s_{t+1}, a)`.

    See `functional.expected_sarsa_targets`.
    """
    next_states = rollout.next_states
    return functional.expected_sarsa_targets(
        rollout.rewards, q[next_states], policy[next_states], rollout.terminated, gamma=gamma
    )


def q_learning(q: Tensor, policy: Tensor, rollout: Rollout, gamma: float) -> Tensor:
    """Learn `q_*`, whatever policy acts: `r_t + gamma max_a q(s_{t+1}, a)`. See `functional.q_learning_targets`."""
    return functional.q_learning_targets(rollout.rewards, q[rollout.next_states], rollout.terminated, gamma=gamma)


def n_step_sarsa(n: int) -> Target:
    """Make the target `r_t + ... + gamma^(n-1) r_{t+n-1} + gamma^n q(s_{t+n}, a_{t+n})`.

    See `functional.n_step_returns`. Near the end of a rollout, where fewer than `n` steps are left, the target has
    only these: let rollouts be `n` steps long or longer.

    Args:
        n: rewards to sum; 1 is Sarsa.

    Returns:
        the target.

    Raises:
        ValueError: `n` is below 1.
    """
    if n < 1:
        raise ValueError(f"n={n}: give at least 1, which is Sarsa.")

    def target(q: Tensor, policy: Tensor, rollout: Rollout, gamma: float) -> Tensor:
        following = torch.where(rollout.terminated, 0.0, q[rollout.next_states, rollout.next_actions])
        values = q[rollout.states, rollout.actions]
        return functional.n_step_returns(
            rollout.rewards, values, rollout.mask, n=n, gamma=gamma, next_values=following
        )

    return target


def monte_carlo(q: Tensor, policy: Tensor, rollout: Rollout, gamma: float) -> Tensor:
    """Take the return of the rest of the episode: `sum_i gamma^i r_{t+i}`. See `functional.discounted_returns`.

    Rollouts must be as long as episodes; rewards after a cut count as 0.
    """
    return functional.discounted_returns(rollout.rewards, rollout.mask, gamma=gamma)
