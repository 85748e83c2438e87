"""Discounted and average reward of a policy, their exact gradients, and the states in which the policy spends time.

Shapes: `S` states, `A` actions. Everything is dense linear algebra over the states, and differentiable in the policy.
"""

import torch
from torch import Tensor

from rl_plugins.tabular.bellman import action_values, backup, state_values
from rl_plugins.tabular.closed_form import live_system, solve_values
from rl_plugins.tabular.mdp import MDP


def discounted_objective(mdp: MDP, policy: Tensor) -> Tensor:
    """Compute the discounted return from the first state: `J = sum_s d(s) v_pi(s) = E[sum_t gamma^t r_t]`.

    Args:
        mdp: the process; `d` is its `start`.
        policy: `pi(a|s) (S, A)`.

    Returns:
        0-d.

    Raises:
        ValueError: `policy` is not a table of probabilities, or at `gamma = 1` it never ends from some state.
    """
    return mdp.start @ solve_values(mdp, policy)


def discounted_visitation(mdp: MDP, policy: Tensor) -> Tensor:
    """Sum the discounted visits of each state: `eta(s) = sum_t gamma^t Pr(s_t = s)`, `eta = (I - gamma P_pi^T)^-1 d`.

    Sutton and Barto 2018, eq. 9.2 and the box on page 325. `eta` sums to `1 / (1 - gamma)` where no episode ends.

    Args:
        mdp: the process; `d` is its `start`.
        policy: `pi(a|s) (S, A)`.

    Returns:
        `(S,)`, 0 in terminal states.

    Raises:
        ValueError: `policy` is not a table of probabilities, or at `gamma = 1` it never ends from some state.
    """
    live, system, _ = live_system(mdp, policy)
    visits = torch.linalg.solve(system.T, mdp.start[live])
    return torch.zeros(mdp.n_states, dtype=torch.float64).index_put((live,), visits)


def stationary_distribution(mdp: MDP, policy: Tensor) -> Tensor:
    """Compute the share of time spent in each state in the long run: `d_pi = P_pi^T d_pi`, `sum_s d_pi(s) = 1`.

    Terminal states are never left, so an episodic MDP spends the long run in them.

    Args:
        mdp: the process.
        policy: `pi(a|s) (S, A)`.

    Returns:
        `(S,)`.

    Raises:
        ValueError: `policy` is not a table of probabilities, or where the chain ends up depends on where it starts.
    """
    matrix, _ = mdp.chain(policy)
    flow = torch.eye(mdp.n_states, dtype=torch.float64) - matrix.T
    if int(torch.linalg.matrix_rank(flow.detach())) < mdp.n_states - 1:
        raise ValueError(
            "the chain has several sets of states that it never leaves, so its long run depends on the start: "
            "use discounted_objective, or let episodes start again."
        )
    # The rows of `flow` add up to 0. With 1 added to every entry, the equations add up to the constraint that d sums
    # to 1.
    return torch.linalg.solve(flow + 1, torch.ones(mdp.n_states, dtype=torch.float64))


def average_reward(mdp: MDP, policy: Tensor) -> Tensor:
    """Compute the reward per step in the long run: `r_bar = sum_s d_pi(s) r_pi(s)` (Sutton and Barto 10.6).

    Args:
        mdp: the process; its discount plays no part.
        policy: `pi(a|s) (S, A)`.

    Returns:
        0-d.

    Raises:
        ValueError: in the cases of `stationary_distribution`.
    """
    return stationary_distribution(mdp, policy) @ mdp.chain(policy)[1]


def differential_values(mdp: MDP, policy: Tensor) -> Tensor:
    """Compute how much more than the average reward each state earns: `h(s) = E[sum_t (r_t - r_bar) | s_0 = s]`.

    `h = r_pi - r_bar + P_pi h`, `sum_s d_pi(s) h(s) = 0` (Sutton and Barto 2018, section 10.3).

    Args:
        mdp: the process; its discount plays no part.
        policy: `pi(a|s) (S, A)`.

    Returns:
        `(S,)`.

    Raises:
        ValueError: in the cases of `stationary_distribution`.
    """
    share = stationary_distribution(mdp, policy)
    matrix, rewards = mdp.chain(policy)
    system = torch.eye(mdp.n_states, dtype=torch.float64) - matrix + share.expand_as(matrix)
    return torch.linalg.solve(system, rewards - share @ rewards)


def policy_gradient(mdp: MDP, logits: Tensor) -> Tensor:
    """Compute the exact gradient of `discounted_objective` for a softmax table (policy gradient theorem).

    `dJ / dtheta_sa = eta(s) pi(a|s) (q_pi(s, a) - v_pi(s))`, with the discounted visits `eta`.

    Args:
        mdp: the process.
        logits: `theta (S, A)`, `pi = softmax(theta)`.

    Returns:
        `(S, A)`; rows sum to 0.

    Raises:
        ValueError: the shape does not fit, or at `gamma = 1` the policy never ends from some state.
    """
    policy = torch.softmax(logits.detach().double(), dim=-1)
    q = action_values(mdp, solve_values(mdp, policy))
    return _theorem(discounted_visitation(mdp, policy), policy, q)


def average_reward_gradient(mdp: MDP, logits: Tensor) -> Tensor:
    """Compute the exact gradient of `average_reward` for a softmax table (policy gradient theorem).

    `dr_bar / dtheta_sa = d_pi(s) pi(a|s) (q(s, a) - h(s))`, with the differential action values
    `q(s, a) = r(s, a) - r_bar + sum_s' p(s'|s, a) h(s')` (Sutton and Barto 2018, section 13.6).

    Args:
        mdp: the process; its discount plays no part.
        logits: `theta (S, A)`, `pi = softmax(theta)`.

    Returns:
        `(S, A)`; rows sum to 0.

    Raises:
        ValueError: the shape does not fit, or `stationary_distribution` raises it.
    """
    policy = torch.softmax(logits.detach().double(), dim=-1)
    # Without r_bar, which is equal for all actions and cancels.
    q = backup(mdp.rewards, mdp.probabilities, mdp.successors, differential_values(mdp, policy), gamma=1.0)
    return _theorem(stationary_distribution(mdp, policy), policy, q)


def _theorem(weights: Tensor, policy: Tensor, q: Tensor) -> Tensor:
    """Compute `w(s) sum_b dpi(b|s)/dtheta_sa q(s, b)` for a softmax table."""
    return weights[:, None] * policy * (q - state_values(policy, q)[:, None])
