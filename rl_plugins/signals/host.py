"""The few things that signals and critics ask of the trainer or module that holds them."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from rl_plugins.rollouts.batch import Batch


class Ranks(Protocol):
    """A process among others that train the same model."""

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        """Sum a tensor over all ranks."""


class Host(Ranks, Protocol):
    """A trainer of TRL or a module of Lightning, as signals see it; both hosts' classes are one."""

    @property
    def model(self) -> Any:
        """The policy; a PEFT model around it where there are adapters."""

    @property
    def training(self) -> bool:
        """Whether this is training, and not an evaluation."""

    @property
    def step(self) -> int:
        """Optimizer steps that have been made."""

    @property
    def group_size(self) -> int:
        """Completions per prompt."""

    @property
    def beta(self) -> float:
        """Coefficient of the KL to the reference."""

    def gather_rows(self, x: Tensor) -> Tensor:
        """Join the rows (B, ...) of all ranks, in their order."""

    def own_rows(self, x: Tensor) -> Tensor:
        """Take this rank's rows out of those of all ranks."""

    def gather_objects(self, x: Sequence[Any]) -> list[Any]:
        """Join lists of all ranks, in their order."""

    def log_probs(self, batch: Batch) -> Tensor:
        """`ln pi(y_t|s_t)` (B, T) under the policy as it is, without gradient."""
