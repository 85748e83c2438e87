"""Planning with a limited number of steps.

Shapes: `S` states, `A` actions, `H` steps.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rl_plugins.tabular.bellman import action_values, greedy_policy, state_values
from rl_plugins.tabular.mdp import MDP


class FiniteHorizon(NamedTuple):
    """Values by the number of steps done, `(H + 1, S)`, the last row 0, and the policy of each step, `(H, S, A)`."""

    values: Tensor
    policy: Tensor


def finite_horizon_values(mdp: MDP, horizon: int, policy: Tensor | None = None) -> FiniteHorizon:
    """Compute exact values if episodes are cut off after `H` steps, by backward induction from the last step.

    `v_H = 0`, `v_t(s) = max_a (r(s, a) + gamma sum_s' p(s'|s, a) v_{t+1}(s'))`, or the policy's mean in place of the
    maximum. With a reward of 1 for success and `gamma = 1` the value is the probability of success within the limit.
    The optimal policy depends on the number of steps that are left.

    Args:
        mdp: the process.
        horizon: `H`.
        policy: `pi(a|s) (S, A)`, the policy to evaluate; by default the optimal one.

    Raises:
        ValueError: `horizon` is negative, or `policy` is not a table of probabilities.
    """
    if horizon < 0:
        raise ValueError(f"horizon={horizon}: give a number of steps, 0 or more, after which episodes are cut off.")
    given = None if policy is None else mdp.check_policy(policy)
    values = torch.zeros(horizon + 1, mdp.n_states, dtype=torch.float64)
    policies = torch.zeros(horizon, mdp.n_states, mdp.n_actions, dtype=torch.float64)
    for t in reversed(range(horizon)):
        q = action_values(mdp, values[t + 1])
        policies[t] = greedy_policy(q) if given is None else given
        values[t] = state_values(policies[t], q)
    return FiniteHorizon(values, policies)
