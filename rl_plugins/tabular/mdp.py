"""Finite Markov decision processes as tensors.

Shapes: `S` states, `A` actions, at most `K` successors of a state and an action. A policy is a table of probabilities
`(S, A)`. Everything is float64 on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rl_plugins.functional.returns import check_discount
from rl_plugins.tabular.toy_text import read_toy_text


class MDP:
    """A finite MDP: `p(s'|s, a)`, `r(s, a)`, a discount, and where episodes start.

    Only successors of positive probability are stored, so a table of thousands of states with a few successors each
    takes megabytes. A state is terminal if no action leaves it and all of its rewards are 0: episodes end there, and
    its value is 0.

    Args:
        transitions: `p(s'|s, a) (S, A, S)`, dense or sparse COO; rows sum to 1.
        rewards: `r(s, a) (S, A)`, or `r(s, a, s') (S, A, S)`, dense or sparse COO.
        gamma: discount in `[0, 1]`.
        start: distribution of the first state `(S,)`; by default uniform over the states that are not terminal.

    Attributes:
        n_states: `S`.
        n_actions: `A`.
        gamma: the discount.
        successors: `s' (K, S, A)`; shorter lists are filled up with state 0 at probability 0.
        probabilities: `p(s'|s, a) (K, S, A)`.
        outcome_rewards: `r(s, a, s') (K, S, A)`.
        rewards: `r(s, a) (S, A)`, the mean over `s'`.
        terminal: whether a state is terminal, bool `(S,)`.
        start: `(S,)`.

    Raises:
        ValueError: shapes do not fit, `gamma` is out of range, rows are not probabilities, or a number is not finite.
    """

    def __init__(self, transitions: Tensor, rewards: Tensor, gamma: float, *, start: Tensor | None = None) -> None:
        check_discount(gamma)
        _check_shapes(transitions, rewards)
        transitions, rewards = transitions.detach().cpu(), rewards.detach().cpu()
        self.gamma = gamma
        self.n_states, self.n_actions, _ = transitions.shape
        states, actions, next_states, chances = _entries(transitions)
        paid = _rewards_of(rewards, states, actions, next_states)
        _check_rows(states, actions, chances, paid, (self.n_states, self.n_actions))
        # Successors are the leading dimension: sums over it run through memory in order, and are several times faster.
        place, n_places = _place_in_row(states * self.n_actions + actions)
        index, shape = (place, states, actions), (n_places, self.n_states, self.n_actions)
        self.successors = torch.zeros(shape, dtype=torch.long).index_put(index, next_states)
        self.probabilities = torch.zeros(shape, dtype=torch.float64).index_put(index, chances)
        self.probabilities /= self.probabilities.sum(0)  # a float32 softmax is off by 1e-7
        self.outcome_rewards = torch.zeros(shape, dtype=torch.float64).index_put(index, paid)
        self.rewards = (self.probabilities * self.outcome_rewards).sum(0)
        leaves = (self.probabilities > 0) & (self.successors != torch.arange(self.n_states)[:, None])
        self.terminal = ~leaves.any(0).any(1) & (self.rewards == 0).all(1)
        self.start = self._start_distribution(start)

    @classmethod
    def from_gymnasium(cls, env: Any, gamma: float) -> MDP:
        """Read the table of a Gymnasium toy-text environment: FrozenLake, CliffWalking, Taxi.

        A state in which a transition ends the episode becomes terminal. Time limits are not part of the table: see
        `finite_horizon_values`.

        Args:
            env: environment whose `env.unwrapped` has `P` and `initial_state_distrib`.
            gamma: discount in `[0, 1]`.

        Raises:
            ValueError: the environment has no table, or an episode can end in a state that others pass through.
        """
        transitions, rewards, start = read_toy_text(env)
        return cls(transitions, rewards, gamma, start=start)

    def transitions(self) -> Tensor:
        """Return `p(s'|s, a) (S, A, S)` as a dense tensor of `8 S^2 A` bytes."""
        dense = torch.zeros(self.n_states, self.n_actions, self.n_states, dtype=torch.float64)
        return dense.scatter_add(2, self.successors.movedim(0, 2), self.probabilities.movedim(0, 2))

    def chain(self, policy: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the Markov chain that the MDP becomes under a policy; differentiable in the policy.

        `P_pi(s'|s) = sum_a pi(a|s) p(s'|s, a)`, `r_pi(s) = sum_a pi(a|s) r(s, a)`.

        Args:
            policy: `pi(a|s) (S, A)`.

        Returns:
            `P_pi (S, S)` and `r_pi (S,)`.

        Raises:
            ValueError: `policy` is not a table of probabilities.
        """
        policy = self.check_policy(policy)
        states = torch.arange(self.n_states)[:, None].expand_as(self.successors)
        matrix = torch.zeros(self.n_states, self.n_states, dtype=torch.float64)
        matrix = matrix.index_put((states, self.successors), self.probabilities * policy, accumulate=True)
        return matrix, (policy * self.rewards).sum(-1)

    def check_policy(self, policy: Tensor) -> Tensor:
        """Check a policy, and return it in float64.

        Args:
            policy: `pi(a|s) (S, A)`.

        Raises:
            ValueError: the shape is not `(S, A)`, or rows are not probabilities that sum to 1.
        """
        if policy.shape != (self.n_states, self.n_actions):
            raise ValueError(f"policy {tuple(policy.shape)}: expected {self.n_states, self.n_actions}, (S, A).")
        if not bool((policy >= 0).all()) or not bool(((policy.sum(-1) - 1).abs() < 1e-5).all()):
            raise ValueError("policy has rows that are not probabilities that sum to 1: apply a softmax.")
        return policy.double()

    def _start_distribution(self, start: Tensor | None) -> Tensor:
        if start is None:
            start = torch.ones(self.n_states) if bool(self.terminal.all()) else ~self.terminal
            return start.double() / start.double().sum()
        if start.shape != (self.n_states,) or not bool((start >= 0).all()) or abs(float(start.sum()) - 1) > 1e-5:
            raise ValueError(f"start {tuple(start.shape)}: give {self.n_states} probabilities that sum to 1, (S,).")
        return start.double()


def _check_shapes(transitions: Tensor, rewards: Tensor) -> None:
    shape = transitions.shape
    if len(shape) != 3 or shape[0] != shape[2] or 0 in shape:
        raise ValueError(f"transitions {tuple(shape)}: give p(s'|s, a) as (S, A, S).")
    if rewards.shape not in (shape, shape[:2]):
        raise ValueError(f"rewards {tuple(rewards.shape)}: give {tuple(shape[:2])}, (S, A), or (S, A, S).")


def _entries(table: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return indices `s, a, s'` and values of the entries of an `(S, A, S)` table that are not 0, in their order."""
    table = (table if table.is_sparse else table.to_sparse()).coalesce()
    kept = table.values() != 0
    states, actions, next_states = table.indices()[:, kept]
    return states, actions, next_states, table.values()[kept].double()


def _rewards_of(rewards: Tensor, states: Tensor, actions: Tensor, next_states: Tensor) -> Tensor:
    """Look up the reward of each transition."""
    if rewards.ndim == 2:
        return rewards.to_dense()[states, actions].double()
    if not rewards.is_sparse:
        return rewards[states, actions, next_states].double()
    _, n_actions, n_states = rewards.shape
    *given, values = _entries(rewards)
    keys, wanted = ((s * n_actions + a) * n_states + t for s, a, t in (given, (states, actions, next_states)))
    place = torch.searchsorted(keys, wanted).clamp(max=max(len(keys) - 1, 0))
    return torch.where(keys[place] == wanted, values[place], 0.0) if len(keys) else torch.zeros(len(wanted)).double()


def _check_rows(states: Tensor, actions: Tensor, chances: Tensor, paid: Tensor, shape: tuple[int, int]) -> None:
    totals = torch.zeros(shape, dtype=torch.float64).index_put((states, actions), chances, accumulate=True)
    wrong = (totals - 1).abs() >= 1e-5
    wrong[states[chances < 0], actions[chances < 0]] = True
    wrong |= totals.isnan()
    if bool(wrong.any()):
        state, action = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"transitions of state {state}, action {action} are not probabilities that sum to 1: "
            "a terminal state needs a transition to itself."
        )
    if not bool(paid.isfinite().all()):
        raise ValueError("rewards have entries that are not finite: forbid an action by a large negative reward.")


def _place_in_row(rows: Tensor) -> tuple[Tensor, int]:
    """Return the position of each entry in its row (rows are sorted), and the length of the longest row."""
    _, counts = rows.unique_consecutive(return_counts=True)
    first = counts.cumsum(0) - counts
    return torch.arange(len(rows)) - first.repeat_interleave(counts), int(counts.max())
