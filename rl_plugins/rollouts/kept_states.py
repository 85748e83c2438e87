"""States of completions that are kept for later, within a bound on memory."""

import torch
from torch import Tensor


class KeptStates:
    """The states of a rollout's tokens, collected as they come: only those of the first rows, where there are too
    many.

    Generation brings one state of every row at a time, and nobody knows the lengths in advance. Whenever the states
    exceed the limit, the last rows are given up. With room for 6 states:

        step 0 of rows 0 1 2    3 states
        step 1 of rows 0 1 2    6 states
        step 2 of rows 0 1 2    9 states are too many: row 2 goes, 6 are left
        step 3 of rows 0 1      8 are too many: row 1 goes, 4 are left

    Args:
        limit: Most states to keep. The first row is kept whatever its length.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.reset()

    def reset(self) -> None:
        """Forget all states."""
        self._states: list[Tensor] = []
        self._steps: list[Tensor] = []
        self._rows: list[Tensor] = []
        self._count = 0
        self._num_rows: int | None = None  # rows that fit; `None` while all do

    def add(self, states: Tensor, steps: Tensor, rows: Tensor) -> None:
        """Add states.

        Args:
            states: (A, S, ...).
            steps: Index t of the token that is chosen in each state (A, S); below 0 for none.
            rows: Rows of the batch that they belong to (A,).
        """
        wanted = steps >= 0
        if self._num_rows is not None:
            wanted &= (rows < self._num_rows)[:, None]
        self._states.append(states[wanted].detach())
        self._steps.append(steps[wanted])
        self._rows.append(rows[:, None].expand_as(steps)[wanted])
        self._count += len(self._states[-1])
        if self._count > self.limit:
            self._shrink()

    def _shrink(self) -> None:
        """Keep as many rows as fit."""
        rows = torch.cat(self._rows)
        totals = rows.bincount().cumsum(0)
        self._num_rows = max(1, int((totals <= self.limit).sum()))
        chosen = rows < self._num_rows
        self._states = [torch.cat(self._states)[chosen]]
        self._steps, self._rows = [torch.cat(self._steps)[chosen]], [rows[chosen]]
        self._count = len(self._rows[0])

    def of(self, mask: Tensor) -> tuple[Tensor, int]:
        """Return the states of the real tokens of the rows that were kept, row by row.

        Args:
            mask: Real tokens of all rows (B, T), bool.

        Returns:
            States (N, ...), and the number of rows R that they belong to: `N = mask[:R].sum()`.

        Raises:
            RuntimeError: If a state of these rows was not seen.
        """
        if not self._rows:
            raise RuntimeError("The states of the completions were not seen.")
        num_rows = len(mask) if self._num_rows is None else min(self._num_rows, len(mask))
        place = mask.new_full((num_rows, mask.shape[1]), -1, dtype=torch.long)
        rows, steps = torch.cat(self._rows), torch.cat(self._steps)
        known = (rows < num_rows) & (steps < mask.shape[1])
        place[rows[known], steps[known]] = known.nonzero().squeeze(1)
        index = place[mask[:num_rows]]
        if (index < 0).any():
            raise RuntimeError("Some states of the completions were not seen.")
        return torch.cat(self._states)[index], num_rows
