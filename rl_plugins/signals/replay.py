"""A buffer of groups of completions whose rewards differ, to learn from once more."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from rl_plugins.rollouts.batch import LEFT_PADDED, Batch


@dataclass(eq=False)  # compared by identity, since comparing tensors gives no single truth value
class StoredGroup:
    """Completions of one prompt.

    Args:
        rows: Their rows of a batch, without the padding that all of them share.
        priority: Spread of their rewards; groups are drawn in proportion to it.
        step: Optimizer step at which they were generated.
    """

    rows: Batch
    priority: float
    step: int


def trimmed(batch: Batch) -> Batch:
    """Cut the padding that all rows of a batch share."""
    num_tokens = batch["completion_mask"].shape[1]
    real_prompt = batch["prompt_mask"].any(dim=0).nonzero()
    real = batch["completion_mask"].any(dim=0).nonzero()
    start = int(real_prompt[0]) if len(real_prompt) else 0
    stop = int(real[-1]) + 1 if len(real) else 1
    cut: dict[str, Any] = {}
    for key, value in batch.items():
        if key in LEFT_PADDED and isinstance(value, Tensor):
            value = value[:, start:]
        elif isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] == num_tokens:
            value = value[:, :stop]
        cut[key] = value.clone() if isinstance(value, Tensor) else value
    return cast(Batch, cut)


class ReplayBuffer:
    """Keeps the groups with the widest spread of rewards, and draws from them in proportion to the spread.

    Args:
        capacity: Groups to keep. The group with the smallest spread is dropped first; of equal ones, the oldest.
        max_age: Groups older than this many optimizer steps are dropped, since the policy has changed.
        seed: Seed of the draws.
    """

    def __init__(self, capacity: int, max_age: int, seed: int = 0) -> None:
        self.capacity, self.max_age = capacity, max_age
        self.groups: list[StoredGroup] = []
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.groups)

    def add(self, rows: Batch, priority: float, step: int) -> None:
        """Store one group."""
        self.groups.append(StoredGroup(trimmed(rows), priority, step))
        while len(self.groups) > self.capacity:  # once, or more often after resuming with a smaller capacity
            self.groups.remove(min(self.groups, key=lambda group: (group.priority, group.step)))

    def draw(self, count: int, step: int) -> list[Batch]:
        """Draw up to `count` different groups that are not too old."""
        self.groups = [group for group in self.groups if step - group.step <= self.max_age]
        count = min(count, len(self.groups))
        if count == 0:
            return []
        # Not 0: a penalty on length may make the scores of a group equal although its rewards differ.
        weights = torch.tensor([group.priority for group in self.groups]).clamp(min=1e-6)
        chosen = torch.multinomial(weights, count, generator=self.generator)
        return [self.groups[i].rows for i in chosen.tolist()]

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {
            "groups": [(group.rows, group.priority, group.step) for group in self.groups],
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore [`state_dict`]."""
        self.groups = [StoredGroup(*group) for group in state["groups"]]
        self.generator.set_state(state["generator"].cpu())
