"""Small environments of known processes."""

import torch

from rl_plugins.tabular import MDP, ParallelMDP


def copies_of(mdp: MDP, copies: int, seed: int = 0, **options: object) -> ParallelMDP:
    return ParallelMDP(mdp, copies, generator=torch.Generator().manual_seed(seed), **options)  # type: ignore[arg-type]


def corridor(length: int, gamma: float = 1.0) -> MDP:
    """States 0 .. length in a row; the only action steps on and pays the number of the state; the last is the end."""
    transitions = torch.zeros(length + 1, 1, length + 1)
    for state in range(length + 1):
        transitions[state, 0, min(state + 1, length)] = 1.0
    rewards = torch.arange(length + 1).double()
    rewards[-1] = 0.0
    start = torch.zeros(length + 1)
    start[0] = 1.0
    return MDP(transitions, rewards[:, None], gamma, start=start)
