"""What balancing tells between two log entries."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class LoadLog:
    """Averages metrics and adds up loads over optimizer steps, on their device, until someone asks."""

    def __init__(self) -> None:
        self._metrics: dict[str, list[Tensor]] = {}
        self._counts: list[Tensor] = []

    def add(self, metrics: Mapping[str, Tensor], counts: Sequence[Tensor]) -> None:
        """One optimizer step: 0-d metrics, and tokens per expert (E,) of each layer."""
        for name, value in metrics.items():
            self._metrics.setdefault(name, []).append(value)
        self._counts = [a + b for a, b in zip(self._counts, counts, strict=True)] if self._counts else list(counts)

    def flush(self) -> tuple[dict[str, float], list[list[int]]]:
        """Mean metrics and summed loads since the last call; empty where no step was made."""
        names = list(self._metrics)
        means = torch.stack([torch.stack(self._metrics[name]).mean() for name in names]).tolist() if names else []
        counts = [layer.tolist() for layer in self._counts]
        self._metrics, self._counts = {}, []
        return dict(zip(names, means, strict=True)), counts
