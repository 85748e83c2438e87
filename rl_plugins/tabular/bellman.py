"""Bellman's operators, and the policies that a table of action values implies.

Shapes: `S` states, `A` actions, at most `K` successors of a state and an action.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rl_plugins.tabular.mdp import MDP


def action_values(mdp: MDP, values: Tensor) -> Tensor:
    """Compute action values from state values: `q(s, a) = r(s, a) + gamma sum_s' p(s'|s, a) v(s')`.

    Sutton and Barto 2018, eq. 4.6.

    Args:
        mdp: the process.
        values: `v(s) (S,)`, 0 in terminal states.

    Returns:
        `(S, A)`.

    Raises:
        ValueError: `values` is not `(S,)`.
    """
    if values.shape != (mdp.n_states,):
        raise ValueError(f"values {tuple(values.shape)}: give one for each of the {mdp.n_states} states, (S,).")
    return backup(mdp.rewards, mdp.probabilities, mdp.successors, values, mdp.gamma)


def backup(rewards: Tensor, probabilities: Tensor, successors: Tensor, values: Tensor, gamma: float) -> Tensor:
    """Look one step ahead over lists of successors: `r + gamma sum_k p_k v(s'_k)`.

    Args:
        rewards: `(...)`.
        probabilities: `(K, ...)`.
        successors: `(K, ...)`.
        values: `v(s) (S,)`.
        gamma: discount.

    Returns:
        `(...)`.
    """
    following = values.index_select(0, successors.flatten()).view_as(successors)
    return torch.add(rewards, (probabilities * following).sum(0), alpha=gamma)


def state_values(policy: Tensor, q: Tensor) -> Tensor:
    """Compute state values from action values: `v(s) = sum_a pi(a|s) q(s, a)`.

    Args:
        policy: `pi(a|s) (S, A)`.
        q: `(S, A)`.

    Returns:
        `(S,)`.
    """
    return (policy * q).sum(-1)


def bellman_expectation(mdp: MDP, policy: Tensor, values: Tensor) -> Tensor:
    """Do one sweep of policy evaluation: `T_pi v = r_pi + gamma P_pi v` (Sutton and Barto 2018, eq. 4.5).

    Args:
        mdp: the process.
        policy: `pi(a|s) (S, A)`.
        values: `v(s) (S,)`.

    Returns:
        `(S,)`; `v_pi` is the only fixed point if `gamma < 1`.

    Raises:
        ValueError: `policy` is not a table of probabilities, or a shape does not fit.
    """
    return state_values(mdp.check_policy(policy), action_values(mdp, values))


def bellman_optimality(mdp: MDP, values: Tensor) -> Tensor:
    """Do one sweep of value iteration: `T v = max_a q(s, a)` (Sutton and Barto 2018, eq. 4.10).

    Args:
        mdp: the process.
        values: `v(s) (S,)`.

    Returns:
        `(S,)`; `v_*` is the only fixed point if `gamma < 1`.

    Raises:
        ValueError: a shape does not fit.
    """
    return action_values(mdp, values).amax(-1)


def bellman_expectation_q(mdp: MDP, policy: Tensor, q: Tensor) -> Tensor:
    """Apply the expectation operator to action values: `r(s, a) + gamma E[sum_a' pi(a'|s') q(s', a')]`.

    The result is the mean of the targets of Sarsa, and of expected Sarsa.

    Args:
        mdp: the process.
        policy: `pi(a|s) (S, A)`.
        q: `(S, A)`.

    Returns:
        `(S, A)`; `q_pi` is the only fixed point if `gamma < 1`.

    Raises:
        ValueError: `policy` is not a table of probabilities, or a shape does not fit.
    """
    return action_values(mdp, state_values(mdp.check_policy(policy), q))


def bellman_optimality_q(mdp: MDP, q: Tensor) -> Tensor:
    """Apply the optimality operator to action values: `r(s, a) + gamma E[max_a' q(s', a')]`.

    Sutton and Barto 2018, eq. 3.20. The result is the mean of the targets of Q-learning.

    Args:
        mdp: the process.
        q: `(S, A)`.

    Returns:
        `(S, A)`; `q_*` is the only fixed point if `gamma < 1`.

    Raises:
        ValueError: a shape does not fit.
    """
    return action_values(mdp, q.amax(-1))


def greedy_policy(q: Tensor) -> Tensor:
    """Give all probability to the best action, or to the first of several best ones.

    Args:
        q: `(S, A)`.

    Returns:
        `(S, A)`.
    """
    return F.one_hot(q.argmax(-1), q.shape[-1]).to(q.dtype)


def epsilon_greedy_policy(q: Tensor, epsilon: float) -> Tensor:
    """Take the best action, or with probability `epsilon` a random one: `(1 - epsilon) greedy + epsilon / A`.

    Sutton and Barto 2018, section 5.4.

    Args:
        q: `(S, A)`.
        epsilon: in `[0, 1]`; 1 is uniform.

    Returns:
        `(S, A)`.

    Raises:
        ValueError: `epsilon` is out of range.
    """
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon={epsilon}: give the share of random actions in [0, 1].")
    return (1 - epsilon) * greedy_policy(q) + epsilon / q.shape[-1]
