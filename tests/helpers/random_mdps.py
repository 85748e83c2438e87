"""Random decision processes and policies, as tables."""

import torch
from torch import Tensor

from rl_plugins.tabular import MDP


def random_tables(
    n_states: int = 6, n_actions: int = 3, seed: int = 0, end: bool = True, weight_of_last: float = 0.05
) -> tuple[Tensor, Tensor]:
    """Random `p(s'|s, a)` with some zeros, and `r(s, a, s')`; with `end` the last state is terminal."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n_states, n_actions, n_states)
    weights = torch.rand(shape, generator=generator, dtype=torch.float64)
    transitions = torch.where(weights < 0.3, 0.0, weights**2)
    transitions[:, :, 0] += 0.01  # no row is empty, and every state leads to the first one
    transitions[:, :, -1] += weight_of_last
    rewards = torch.randn(shape, generator=generator, dtype=torch.float64)
    if end:
        transitions[-1], rewards[-1] = 0.0, 0.0
        transitions[-1, :, -1] = 1.0
    return transitions / transitions.sum(-1, keepdim=True), rewards


def random_mdp(n_states: int = 6, n_actions: int = 3, seed: int = 0, gamma: float = 0.9, end: bool = True) -> MDP:
    return MDP(*random_tables(n_states, n_actions, seed, end), gamma)


def random_policy(mdp: MDP, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.softmax(torch.randn(mdp.n_states, mdp.n_actions, generator=generator, dtype=torch.float64), -1)
