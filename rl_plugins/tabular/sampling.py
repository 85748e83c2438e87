"""Experience from parallel copies of an MDP.

Shapes: `B` copies, one row each; `T` steps; `S` states, `A` actions. A row never goes beyond the end of an episode, so
it can be given to `rl_plugins.functional.gae` and similar functions unchanged.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rl_plugins.tabular.mdp import MDP


class Rollout(NamedTuple):
    """Rows `(B, T)` of experience; entries outside the mask, after the end of an episode, mean nothing.

    Attributes:
        states: `s_t`.
        actions: `a_t`.
        rewards: `r_t`, paid after `a_t`.
        next_states: `s_{t+1}`.
        next_actions: `a_{t+1}`, drawn from the policy, also after the last step.
        terminated: whether the episode ended in `s_{t+1}`.
        mask: whether the step was made.
    """

    states: Tensor
    actions: Tensor
    rewards: Tensor
    next_states: Tensor
    next_actions: Tensor
    terminated: Tensor
    mask: Tensor


class ParallelMDP:
    """Copies of an MDP that step together; where an episode has ended, the next rollout starts another one.

    Args:
        mdp: the process.
        copies: `B`.
        exploring_starts: begin episodes with a random state that is not terminal and a random action, both uniform,
            instead of a state from `mdp.start`.
        max_episode_steps: steps after which an episode is cut off and another one starts; unlimited by default.
        generator: source of random numbers.

    Raises:
        ValueError: `copies` or `max_episode_steps` is below 1, or every state is terminal.
    """

    def __init__(
        self,
        mdp: MDP,
        copies: int,
        *,
        exploring_starts: bool = False,
        max_episode_steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if copies < 1 or (max_episode_steps is not None and max_episode_steps < 1):
            raise ValueError(f"copies={copies}, max_episode_steps={max_episode_steps}: give at least 1.")
        if bool(mdp.terminal.all()):
            raise ValueError("every state of the MDP is terminal: there is nothing to sample.")
        self.mdp, self.copies, self.generator = mdp, copies, generator
        self.exploring_starts, self.max_episode_steps = exploring_starts, max_episode_steps
        self._thresholds = _thresholds(mdp.probabilities)
        self.reset()

    def reset(self) -> None:
        """Start a new episode in every copy."""
        self._states = torch.zeros(self.copies, dtype=torch.long)
        self._actions = torch.full((self.copies,), -1)  # -1: to be drawn from the policy
        self._steps = torch.zeros(self.copies, dtype=torch.long)
        self._start(torch.ones(self.copies, dtype=torch.bool))

    def set(self, states: Tensor, actions: Tensor) -> None:
        """Continue from given states with given actions.

        Args:
            states: `(B,)`.
            actions: `(B,)`; the policy is asked from the second step on.

        Raises:
            ValueError: the shapes are not `(B,)`, or an entry is out of range.
        """
        for name, index, n in (("states", states, self.mdp.n_states), ("actions", actions, self.mdp.n_actions)):
            if index.shape != (self.copies,) or not bool(((index >= 0) & (index < n)).all()):
                raise ValueError(f"{name} {tuple(index.shape)}: give {self.copies} numbers in 0 .. {n - 1}.")
        self._states, self._actions = states.clone(), actions.clone()
        self._steps = torch.zeros_like(states)

    def rollout(self, policy: Tensor, steps: int = 1) -> Rollout:
        """Step every copy until its episode ends, `steps` times at most.

        A copy whose episode has not ended begins with the last `next_actions` of the previous rollout, as in Sarsa.

        Args:
            policy: `pi(a|s) (S, A)`.
            steps: `T`; fewer are returned if all episodes end before.

        Raises:
            ValueError: `policy` is not a table of probabilities, or `steps` is below 1.
        """
        if steps < 1:
            raise ValueError(f"steps={steps}: make at least 1 step.")
        policy = self.mdp.check_policy(policy)
        self._actions = torch.where(self._actions < 0, self._draw(policy[self._states]), self._actions)
        running, columns = ~self.mdp.terminal[self._states], []
        for _ in range(steps):
            columns.append(self._step(policy, running))
            running = running & ~columns[-1].terminated & ~self._cut_off()
            if not bool(running.any()):
                break
        self._start(~running)
        return Rollout(*(torch.stack(column, dim=1) for column in zip(*columns, strict=True)))

    def _step(self, policy: Tensor, running: Tensor) -> Rollout:
        """Make one column `(B,)` of a rollout; copies that do not run stay where they are."""
        states, actions = self._states, self._actions
        draw = torch.rand(self.copies, dtype=torch.float64, generator=self.generator)
        place = (draw >= self._thresholds[:, states, actions]).sum(0)
        next_states = torch.where(running, self.mdp.successors[place, states, actions], states)
        next_actions = self._draw(policy[next_states])
        rewards = torch.where(running, self.mdp.outcome_rewards[place, states, actions], 0.0)
        self._states, self._actions, self._steps = next_states, next_actions, self._steps + 1
        ended = running & self.mdp.terminal[next_states]
        return Rollout(states, actions, rewards, next_states, next_actions, ended, running)

    def _cut_off(self) -> Tensor:
        limit = torch.iinfo(torch.long).max if self.max_episode_steps is None else self.max_episode_steps
        return self._steps >= limit

    def _start(self, where: Tensor) -> None:
        """Begin new episodes in the copies `where (B,)`."""
        begin = (~self.mdp.terminal).double() if self.exploring_starts else self.mdp.start
        states = torch.multinomial(begin, self.copies, replacement=True, generator=self.generator)
        actions = torch.randint(self.mdp.n_actions, (self.copies,), generator=self.generator)
        if not self.exploring_starts:
            actions = torch.full_like(actions, -1)
        self._states = torch.where(where, states, self._states)
        self._actions = torch.where(where, actions, self._actions)
        self._steps = torch.where(where, 0, self._steps)

    def _draw(self, weights: Tensor) -> Tensor:
        """Draw an index from each row `(B, n)` of weights."""
        return torch.multinomial(weights, 1, generator=self.generator).squeeze(1)


def _thresholds(probabilities: Tensor) -> Tensor:
    """Compute thresholds `(K, S, A)`: a number in [0, 1) draws successor `k` if it reaches exactly `k` of them.

    The last real successor has an infinite threshold, so that rounding never draws the padding behind it.
    """
    is_last = probabilities.flip(0).cumsum(0).flip(0) - probabilities <= 0
    return probabilities.cumsum(0).masked_fill(is_last, torch.inf)
