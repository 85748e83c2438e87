"""Values of a policy as the solution of Bellman's linear system.

Shapes: `S` states, `A` actions, `L` states that are not terminal.
"""

import torch
from torch import Tensor

from rl_plugins.tabular.mdp import MDP


def solve_values(mdp: MDP, policy: Tensor) -> Tensor:
    """Solve for the values of a policy, differentiably in the policy: `v_pi = (I - gamma P_pi)^-1 r_pi`.

    The linear system is Bellman's expectation equation over the states that are not terminal. It is dense: `8 S^2`
    bytes and `O(S^3)` operations, so beyond some thousand states use `policy_evaluation`.

    Args:
        mdp: the process.
        policy: `pi(a|s) (S, A)`.

    Returns:
        `(S,)`, 0 in terminal states.

    Raises:
        ValueError: `policy` is not a table of probabilities, or at `gamma = 1` it never ends from some state.
    """
    live, system, rewards = live_system(mdp, policy)
    return torch.zeros(mdp.n_states, dtype=torch.float64).index_put((live,), torch.linalg.solve(system, rewards))


def live_system(mdp: MDP, policy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Build the linear system `(I - gamma P_pi) v = r_pi` over the `L` states that are not terminal.

    Args:
        mdp: the process.
        policy: `pi(a|s) (S, A)`.

    Returns:
        indices of those states `(L,)`, `I - gamma P_pi (L, L)`, and `r_pi (L,)`.

    Raises:
        ValueError: `policy` is not a table of probabilities, or at `gamma = 1` it never ends from some state.
    """
    matrix, rewards = mdp.chain(policy)
    live = (~mdp.terminal).nonzero().flatten()
    if mdp.gamma == 1:
        _check_proper(matrix.detach() > 0, mdp.terminal)
    return live, torch.eye(len(live), dtype=torch.float64) - mdp.gamma * matrix[live][:, live], rewards[live]


def _check_proper(edges: Tensor, terminal: Tensor) -> None:
    """Refuse a chain `(S, S)` that does not end from every state: at `gamma = 1` its system has no unique solution."""
    ends = terminal
    while True:
        further = ends | (edges & ends).any(1)
        if torch.equal(further, ends):
            break
        ends = further
    if not bool(ends.all()):
        states = (~ends).nonzero().flatten().tolist()
        raise ValueError(f"at gamma = 1 this policy never ends from states {states[:5]}: give gamma < 1.")
