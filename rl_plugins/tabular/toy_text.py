"""Reader of the tables of Gymnasium's toy-text environments."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def read_toy_text(env: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Read the table `env.unwrapped.P`, in which `P[s][a]` lists `(probability, next state, reward, terminated)`.

    A state in which some transition ends the episode becomes terminal: no action leaves it, and its rewards are 0.
    Where a next state is listed several times, its probabilities are summed and its rewards averaged.

    Args:
        env: environment whose `env.unwrapped` has `P` and `initial_state_distrib`.

    Returns:
        `p(s'|s, a) (S, A, S)` and `r(s, a, s') (S, A, S)`, both sparse COO, and the distribution of the first state
        `(S,)`.

    Raises:
        ValueError: the environment has no table, or an episode can end in a state that others pass through.
    """
    table = getattr(env.unwrapped, "P", None)
    if table is None:
        raise ValueError(
            f"{env.unwrapped} has no table P of transitions: use FrozenLake, CliffWalking or Taxi, "
            "or build MDP(transitions, rewards, gamma) yourself."
        )
    shape = (len(table), len(table[0]), len(table))
    states, actions, next_states, chances, rewards, ends = _columns(table)
    start = torch.as_tensor(env.unwrapped.initial_state_distrib, dtype=torch.float64)
    terminal = torch.zeros(len(table), dtype=torch.bool)
    terminal[next_states[ends]] = True
    _check_ends(terminal, _passed_through(start > 0, states[~ends], next_states[~ends]))

    # Transitions that the table lists after the end are replaced by transitions of a terminal state to itself.
    left, pairs = ~terminal[states], torch.cartesian_prod(terminal.nonzero().flatten(), torch.arange(shape[1]))
    kept, own_actions = pairs.unbind(1)
    joined = ((states[left], kept), (actions[left], own_actions), (next_states[left], kept))
    index = torch.stack([torch.cat(columns) for columns in joined])
    ones = torch.ones(len(kept), dtype=torch.float64)
    weights = _sparse(index, torch.cat([chances[left], ones]), shape)
    weighted = _sparse(index, torch.cat([(chances * rewards)[left], 0 * ones]), shape)
    return weights, _sparse(weights.indices(), weighted.values() / weights.values(), shape), start


def _columns(table: Mapping[int, Mapping[int, Sequence[Any]]]) -> tuple[Tensor, ...]:
    """Return states, actions, next states, probabilities, rewards and ends of the outcomes that can happen."""
    listed = [(s, a, *outcome) for s, row in table.items() for a, outcomes in row.items() for outcome in outcomes]
    numbers = torch.tensor([[float(x) for x in outcome] for outcome in listed if outcome[2] > 0], dtype=torch.float64)
    states, actions, chances, next_states, rewards, ends = numbers.unbind(1)
    return states.long(), actions.long(), next_states.long(), chances, rewards, ends.bool()


def _sparse(index: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Make a sparse tensor, with the sum of the entries at the same index."""
    return torch.sparse_coo_tensor(index, values, shape, check_invariants=True).coalesce()


def _passed_through(reached: Tensor, states: Tensor, next_states: Tensor) -> Tensor:
    """Find all states that can be reached from those in `reached (S,)` along the edges `states -> next_states`."""
    while True:
        further = reached.clone()
        further[next_states[reached[states]]] = True
        if torch.equal(further, reached):
            return reached
        reached = further


def _check_ends(terminal: Tensor, passed: Tensor) -> None:
    both = (terminal & passed).nonzero().flatten().tolist()
    if both:
        raise ValueError(
            f"episodes end in states {both[:5]}, which can also be passed through: "
            "let P end them in a state of its own."
        )
