"""What all our trainers share: how they log, and where their checkpoints are."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer.base_trainer import _BaseTrainer

from rl_plugins.functional.masking import masked_moments


class PluginTrainer(_BaseTrainer):
    """A TRL trainer that appends numbers, reduced over ranks, to the host's metrics, which are averaged until the next
    log."""

    args: Any
    _metrics: Any

    def _sum_over_ranks(self, x: Tensor) -> Tensor:
        return self.accelerator.reduce(x, reduction="sum")

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _log_metrics(self, metrics: dict[str, Tensor]) -> None:
        for name, value in metrics.items():
            # Explained variance of a constant return is undefined; a hole says so without spoiling the mean.
            if not value.isnan():
                self._metrics[self._mode][name].append(value.item())

    def _log_mean(self, name: str, x: Tensor, mask: Tensor) -> None:
        self._log_metrics({name: masked_moments(x.detach(), mask, reduce=self._sum_over_ranks)[0]})

    def _log_per_head(self, name: str, sums: Tensor, counts: Tensor) -> None:
        sums, counts = self._sum_over_ranks(torch.stack([sums, counts]).flatten()).view(2, -1)
        self._log_metrics({f"{name}/head_{k + 1}": mean for k, mean in enumerate(sums / counts.clamp(min=1.0))})
        self._log_metrics({name: sums.sum() / counts.sum().clamp(min=1.0)})

    def _checkpoint_dir(self, trial: Any) -> Path:
        return Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
