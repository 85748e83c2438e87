"""Accumulation windows: all micro-batches of an optimizer step are known before the first of them is learnt from."""

import math
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor


class Lookahead(Iterator[Any]):
    """An iterator that can show what it will give next.

    Args:
        iterator: Where the items come from.

    Attributes:
        counts: Of [`~rl_plugins.lightning.language.window_counts`] for the newest window: its number, the place of the
            first micro-batch that is counted, the counts of each, and their sum over all ranks.
    """

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._iterator = iterator
        self._waiting: deque[Any] = deque()
        self.counts: tuple[int, int, list[Tensor], Tensor] | None = None

    def __next__(self) -> Any:
        return self._waiting.popleft() if self._waiting else next(self._iterator)

    def peek(self, number: int) -> list[Any]:
        """The next `number` items, or as many as there are; they are still given afterwards."""
        while len(self._waiting) < number:
            try:
                self._waiting.append(next(self._iterator))
            except StopIteration:
                break
        return list(islice(self._waiting, number))


def is_accumulating(module: LightningModule) -> bool:
    """Whether a training step of `Trainer.fit` runs that shares its optimizer step with others."""
    trainer = module._trainer
    return trainer is not None and bool(trainer.training) and trainer.accumulate_grad_batches > 1


def window_size(module: LightningModule) -> int:
    """A, the number of micro-batches that Lightning divides the loss by: 1 outside of `Trainer.fit`."""
    return module.trainer.accumulate_grad_batches if is_accumulating(module) else 1


def micro_step(module: LightningModule) -> int:
    """Number of the micro-batch in its epoch, from 0."""
    return int(module.trainer.fit_loop.epoch_loop.batch_progress.current.ready) - 1


def lookahead(module: LightningModule) -> Lookahead:
    """The training loader's iterator, able to look ahead from now on."""
    fetcher: Any = module.trainer.fit_loop._data_fetcher
    if not isinstance(fetcher.iterator, Lookahead):
        fetcher.iterator = Lookahead(fetcher.iterator)
    return fetcher.iterator


def batches_ahead(module: LightningModule) -> list[Any]:
    """The batches of this window that come after the one at hand, as Lightning will hand them over: converted, moved
    and with the module's own hooks. Fewer at the end of an epoch. They come again, each in its turn."""
    trainer, size, step = module.trainer, window_size(module), micro_step(module)
    limit = trainer.num_training_batches - step - 1
    number = int(min(size - step % size - 1, limit))
    fetcher: Any = trainer.fit_loop._data_fetcher
    waiting = list(getattr(fetcher, "batches", []))  # fetched by Lightning, where the loader has no length
    waiting = (waiting + lookahead(module).peek(max(number - len(waiting), 0)))[:number]
    batches = []
    for batch, *_ in waiting:
        batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        batches.append(trainer.strategy.batch_to_device(batch, dataloader_idx=0))
    return batches


def ends_window(module: LightningModule) -> bool:
    """Whether the optimizer makes a step after this micro-batch."""
    return not is_accumulating(module) or not module.trainer.fit_loop._should_accumulate()


def check_windows_fit(trainer: Trainer) -> None:
    """Check that windows end with the epoch under DeepSpeed, whose engine does not know of epochs.

    The engine would make a step in the middle of a window of the next epoch, and Lightning would count it later.

    Raises:
        ValueError: If micro-batches are left over at the end of an epoch that another one follows.
    """
    size, batches = trainer.accumulate_grad_batches, trainer.num_training_batches
    if not trainer.strategy.handles_gradient_accumulation or math.isinf(batches) or batches % size == 0:
        return
    whole = int(batches) // size
    one_epoch = trainer.max_epochs == 1 or 0 < trainer.max_steps <= whole
    if not one_epoch:
        raise ValueError(
            f"An epoch has {batches} batches on each rank, which accumulate_grad_batches={size} does not divide, and "
            f"DeepSpeed would carry the rest into the next epoch. Set limit_train_batches={whole * size} of the "
            "Trainer, or another accumulate_grad_batches."
        )


class WindowMeans:
    """Means over the micro-batches of a window: of every metric, weighed by what it is a mean over."""

    def __init__(self) -> None:
        self._newest: dict[str, Tensor] = {}
        self._number = 0
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, metrics: Mapping[str, Tensor], weights: Mapping[str, Tensor], default: Tensor) -> None:
        """Take in a micro-batch.

        Args:
            metrics: 0-d tensors; NaN where undefined.
            weights: How many items a metric is a mean over, by name.
            default: The same for all others.
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
        """The means, of a single micro-batch as they are; NaN where nothing was weighed. A new window begins."""
        single, self._number = self._number == 1, 0
        sums, weights, self._sums, self._weights = self._sums, self._weights, {}, {}
        return self._newest if single else {name: total / weights[name] for name, total in sums.items()}


def _extreme(name: str) -> Any:
    """Function that combines a smallest or largest number over micro-batches; `None` for a mean."""
    last = name.rpartition("/")[2]
    return torch.fmin if last.startswith("min_") else torch.fmax if last.startswith("max_") else None
