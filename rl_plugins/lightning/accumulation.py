"""Accumulation windows: all micro-batches of an optimizer step are fetched before the first of their losses."""

import math
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor


class Lookahead(Iterator[Any]):
    """Iterator that can show its next items without consuming them.

    Args:
        iterator: Source of the items.

    Attributes:
        counts: Result of [`~rl_plugins.lightning.language.window_counts`] for the newest window: the number of the
            window, the place in it of the first micro-batch that is counted, the counts of each micro-batch, and
            their sum over micro-batches and ranks.
    """

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._iterator = iterator
        self._waiting: deque[Any] = deque()
        self.counts: tuple[int, int, list[Tensor], Tensor] | None = None

    def __next__(self) -> Any:
        return self._waiting.popleft() if self._waiting else next(self._iterator)

    def peek(self, number: int) -> list[Any]:
        """Return the next `number` items, or as many as there are. The iterator still gives them afterwards."""
        while len(self._waiting) < number:
            try:
                self._waiting.append(next(self._iterator))
            except StopIteration:
                break
        return list(islice(self._waiting, number))


def is_accumulating(module: LightningModule) -> bool:
    """Return whether `Trainer.fit` is training with several micro-batches for each optimizer step."""
    trainer = module._trainer
    return trainer is not None and bool(trainer.training) and trainer.accumulate_grad_batches > 1


def window_size(module: LightningModule) -> int:
    """Return the number of micro-batches by which Lightning divides the loss; 1 outside of `Trainer.fit`."""
    return module.trainer.accumulate_grad_batches if is_accumulating(module) else 1


def micro_step(module: LightningModule) -> int:
    """Return the number of the current micro-batch in its epoch, counted from 0."""
    return int(module.trainer.fit_loop.epoch_loop.batch_progress.current.ready) - 1


def lookahead(module: LightningModule) -> Lookahead:
    """Return the iterator of the training loader, which can look ahead from now on."""
    fetcher: Any = module.trainer.fit_loop._data_fetcher
    if not isinstance(fetcher.iterator, Lookahead):
        fetcher.iterator = Lookahead(fetcher.iterator)
    return fetcher.iterator


def batches_ahead(module: LightningModule) -> list[Any]:
    """Return the batches of this window that come after the current one.

    They are converted, moved and changed by the module's own hooks, as Lightning will do it. At the end of an epoch
    there may be fewer of them. Lightning still gives each of them to the module in its turn.
    """
    trainer, size, step = module.trainer, window_size(module), micro_step(module)
    limit = trainer.num_training_batches - step - 1
    number = int(min(size - step % size - 1, limit))
    fetcher: Any = trainer.fit_loop._data_fetcher
    waiting = list(getattr(fetcher, "batches", []))  # Lightning has fetched these where the loader has no length
    waiting = (waiting + lookahead(module).peek(max(number - len(waiting), 0)))[:number]
    batches = []
    for batch, *_ in waiting:
        batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        batches.append(trainer.strategy.batch_to_device(batch, dataloader_idx=0))
    return batches


def ends_window(module: LightningModule) -> bool:
    """Return whether the optimizer makes a step after this micro-batch."""
    return not is_accumulating(module) or not module.trainer.fit_loop._should_accumulate()


def check_windows_fit(trainer: Trainer) -> None:
    """Check under DeepSpeed that the last window of an epoch is full, since DeepSpeed's engine knows no epochs.

    Otherwise the engine would make a step in the middle of a window of the next epoch, and Lightning would count this
    step later.

    Raises:
        ValueError: If micro-batches are left over at the end of an epoch that another one follows.
    """
    size, batches = trainer.accumulate_grad_batches, trainer.num_training_batches
    if not trainer.strategy.handles_gradient_accumulation or math.isinf(batches) or batches % size == 0:
        return
    whole = int(batches) // size
    one_epoch = trainer.max_epochs == 1 or 0 < trainer.max_steps <= whole
    if not one_epoch:
        fewer = f"Set limit_train_batches={whole * size} of the Trainer, or another" if whole else "Choose another"
        raise ValueError(
            f"An epoch has {batches} batches on each rank, which accumulate_grad_batches={size} does not divide, and "
            f"DeepSpeed would carry the rest into the next epoch. {fewer} accumulate_grad_batches, which divides "
            "the number of batches."
        )


class WindowMeans:
    """Mean of every metric over the micro-batches of a window, weighted by the number of items in each micro-batch.

    Metrics such as `completions/min_length` and `completions/max_length` are combined by minimum and maximum.
    """

    def __init__(self) -> None:
        self._newest: dict[str, Tensor] = {}
        self._number = 0
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, metrics: Mapping[str, Tensor], weights: Mapping[str, Tensor], default: Tensor) -> None:
        """Add the metrics of a micro-batch.

        Args:
            metrics: 0-d tensors; NaN where undefined.
            weights: Number of items that a metric is a mean over, by name.
            default: This number for all other metrics.
        """
        self._newest, self._number = dict(metrics), self._number + 1
        for name, value in metrics.items():
            value = value.detach().float()
            limit = _extreme(name)
            if limit is not None:
                self._sums[name] = limit(self._sums.get(name, value), value)
                self._weights[name] = torch.ones_like(value)
                continue
            weight = weights.get(name, default).to(value).float().masked_fill(value.isnan(), 0.0)
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value.nan_to_num() * weight
            self._weights[name] = self._weights.get(name, torch.zeros_like(value)) + weight

    def flush(self) -> dict[str, Tensor]:
        """Return the means and begin a new window.

        The metrics of a window of one micro-batch are returned as they are. A mean is NaN where all weights are 0.
        """
        single, self._number = self._number == 1, 0
        sums, weights, self._sums, self._weights = self._sums, self._weights, {}, {}
        return self._newest if single else {name: total / weights[name] for name, total in sums.items()}


def _extreme(name: str) -> Any:
    """Return the function that combines a minimum or maximum over micro-batches; `None` for a mean."""
    last = name.rpartition("/")[2]
    return torch.fmin if last.startswith("min_") else torch.fmax if last.startswith("max_") else None
