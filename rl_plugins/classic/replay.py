"""A buffer of past transitions, from which DQN samples uniformly to learn from each transition more than once.

Legend: `N` transitions, `O` numbers of an observation.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Transitions(NamedTuple):
    """Steps `(s, a, r, s', d)`, `N` of them, in no particular order.

    Where an episode is cut by a time limit, `s'` is its real last observation and `d` is false: this state has a
    value, from which targets bootstrap. `d` is true only where the environment ends the episode.

    Args:
        observations: `s (N, O)`, float32.
        actions: `a (N,)`, int64.
        rewards: `r (N,)`, float32.
        next_observations: `s' (N, O)`, float32.
        terminated: `d (N,)`, bool.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    next_observations: Tensor
    terminated: Tensor

    def to(self, device: torch.device) -> "Transitions":
        """Copy the transitions to another device."""
        return Transitions(*(rows.to(device) for rows in self))


class ReplayBuffer:
    """A ring of the last `capacity` transitions, sampled uniformly with replacement (Mnih et al., Nature 518, 2015).

    Args:
        capacity: transitions to keep; the oldest go first.
        observation_size: `O`.
        seed: the seed of the draws.

    Raises:
        ValueError: `capacity` is below 1.
    """

    def __init__(self, capacity: int, observation_size: int, *, seed: int = 0) -> None:
        if capacity < 1:
            raise ValueError(f"capacity={capacity}: give room for at least one transition.")
        self.capacity = capacity
        self.storage = Transitions(
            observations=torch.zeros(capacity, observation_size),
            actions=torch.zeros(capacity, dtype=torch.int64),
            rewards=torch.zeros(capacity),
            next_observations=torch.zeros(capacity, observation_size),
            terminated=torch.zeros(capacity, dtype=torch.bool),
        )
        self.added = 0  # in total; the next transition goes to row `added % capacity`
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    def add(self, transitions: Transitions) -> None:
        """Store `N` transitions, from the oldest to the newest, of any number of environments.

        Args:
            transitions: `N` rows.

        Raises:
            ValueError: `N` exceeds the capacity.
        """
        count = len(transitions.actions)
        if count > self.capacity:
            raise ValueError(
                f"{count} transitions at once do not fit into a buffer of {self.capacity}: make it larger, "
                "or collect fewer steps between updates."
            )
        rows = torch.arange(self.added, self.added + count) % self.capacity
        for stored, new in zip(self.storage, transitions, strict=True):
            stored[rows] = new.to(stored)
        self.added += count

    def sample(self, count: int) -> Transitions:
        """Draw `count` transitions uniformly, with replacement.

        Args:
            count: `N`.

        Returns:
            `N` rows, copied.

        Raises:
            ValueError: nothing has been stored yet.
        """
        if self.added == 0:
            raise ValueError("The buffer is empty: add transitions before sampling.")
        rows = torch.randint(len(self), (count,), generator=self.generator)
        return Transitions(*(stored.index_select(0, rows) for stored in self.storage))

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint: the rows in use, the number of rows ever added, and the generator."""
        return {
            # Cloned: a slice would be saved with the whole storage behind it.
            "rows": {name: rows[: len(self)].clone() for name, rows in self.storage._asdict().items()},
            "added": self.added,
            "capacity": self.capacity,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: the state is of a buffer of another capacity or with other observations.
        """
        size = state["rows"]["observations"].shape[1]
        if (state["capacity"], size) != (self.capacity, self.storage.observations.shape[1]):
            raise ValueError(
                f"The checkpoint's buffer holds {state['capacity']} transitions with observations of {size} numbers, "
                f"this one {self.capacity} with {self.storage.observations.shape[1]}: build it with the same settings."
            )
        self.added = state["added"]
        for name, rows in state["rows"].items():
            getattr(self.storage, name)[: len(self)] = rows
        self.generator.set_state(state["generator"].cpu())
