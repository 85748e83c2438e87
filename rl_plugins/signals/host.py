"""The interface by which signals and critics use the trainer (TRL) or the module (Lightning) that holds them."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from rl_plugins.rollouts.batch import Batch


class Ranks(Protocol):
    """One rank, that is, one of the processes that train the same model together."""

    @property
    def device(self) -> torch.device:
        """Device of this rank."""

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        """Sum a tensor over all ranks."""


class Host(Ranks, Protocol):
    """A trainer of TRL or a module of Lightning, as signals see it; our trainers and modules have these methods."""

    @property
    def model(self) -> Any:
        """The policy; with adapters, the PEFT model around it."""

    @property
    def training(self) -> bool:
        """Whether this is training, and not an evaluation."""

    @property
    def step(self) -> int:
        """Number of optimizer steps so far."""

    @property
    def group_size(self) -> int:
        """Completions per prompt."""

    @property
    def beta(self) -> float:
        """Coefficient of the KL to the reference."""

    def gather_rows(self, x: Tensor) -> Tensor:
        """Join the rows (B, ...) of all ranks, in their order."""

    def own_rows(self, x: Tensor) -> Tensor:
        """Pick this rank's rows from those of all ranks."""

    def gather_objects(self, x: Sequence[Any]) -> list[Any]:
        """Join lists of all ranks, in their order."""

    def log_probs(self, batch: Batch) -> Tensor:
        """Compute `ln pi(y_t|s_t)` (B, T) under the current policy, without gradient."""
