"""Batches of prompts for the online modules, and a loader that repeats batches and resumes exactly."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader, DistributedSampler

from rl_plugins.signals.checks import check_at_least

Row = Mapping[str, Any]


def rows_of(batch: Any) -> list[Row]:
    """Return the rows of a batch: a list of rows, or a dictionary of columns as torch's default collation makes it.

    Raises:
        TypeError: If the batch is neither.
        ValueError: If the batch has no rows, or rows without a `prompt`.
    """
    if isinstance(batch, Mapping):
        columns = {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
        lengths = {len(column) for column in columns.values()}
        if len(lengths) != 1:
            raise ValueError(f"The columns of a batch must be equally long, got lengths {sorted(lengths)}.")
        batch = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if not isinstance(batch, Sequence) or not all(isinstance(row, Mapping) for row in batch):
        raise TypeError(
            f"A batch must be a list of rows or a dictionary of columns, got {type(batch).__name__}. Use "
            "PromptDataModule(dataset), or DataLoader(dataset, collate_fn=list)."
        )
    if not batch:
        raise ValueError("A batch is empty: there must be at least one row.")
    for row in batch:
        if "prompt" not in row:
            raise ValueError(f"Every row of a batch needs a `prompt`, and one has only {', '.join(row) or 'nothing'}.")
    return list(batch)


def check_rows(name: str, dataset: Any) -> None:
    """Refuse a dataset without rows.

    Args:
        name: Name of the setting, for the message.
        dataset: Rows with a length.

    Raises:
        TypeError: If the dataset is not a sequence of rows.
        ValueError: If it is empty.
    """
    if isinstance(dataset, str | Mapping) or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"{name} must be a sequence of rows, such as a list of dictionaries or a datasets.Dataset, got "
            f"{type(dataset).__name__}."
        )
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty. Give it at least one row.")
    if not isinstance(dataset[0], Mapping):
        raise TypeError(
            f"The rows of {name} must be dictionaries such as {{'prompt': ...}}, got {type(dataset[0]).__name__}."
        )


class RepeatSampler(DistributedSampler):
    """Sampler that repeats batches: it cuts the indices of each rank into runs of one batch, and gives each run
    several times.

    Args:
        dataset: Something with a length.
        batch_size: Number of indices in a run. Indices that do not fill a last run are left out.
        repeats: Number of times that each run is given.
        auxiliary: `(n, m)`: every n-th run is given m times more.
        shuffle: Whether to draw a new order for every epoch.
        seed: Seed of the order.
        num_replicas: Number of ranks.
        rank: Number of this rank.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        repeats: int = 1,
        auxiliary: tuple[int, int] = (1, 0),
        *,
        shuffle: bool = True,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=shuffle, seed=seed, drop_last=True)
        self.batch_size, self.repeats, self.auxiliary = batch_size, repeats, auxiliary
        self.resumed = (0, 0)  # an epoch, and the batches of it that a resumed run has had

    @property
    def start(self) -> int:
        """Number of batches of this epoch that a resumed run leaves out; 0 in an epoch that it begins itself."""
        epoch, batches = self.resumed
        return batches if epoch == self.epoch else 0

    def __len__(self) -> int:
        runs, (every, extra) = self.num_samples // self.batch_size, self.auxiliary
        return (runs * self.repeats + runs // every * extra) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        indices = list(super().__iter__())
        start, self.resumed = self.start, (0, 0)
        for batch in range(start, len(self) // self.batch_size):
            first = self._run(batch) * self.batch_size
            yield from indices[first : first + self.batch_size]

    def _run(self, batch: int) -> int:
        """Return the number of the run that a batch is.

        With repeats = 2 and auxiliary = (2, 3), batches 0 .. 7 are runs 0 0 1 1 1 1 1 2: the second run comes three
        times more.
        """
        every, extra = self.auxiliary
        cycle, place = divmod(batch, every * self.repeats + extra)
        return cycle * every + min(place // self.repeats, every - 1)


class PromptLoader(DataLoader):
    """Loader of rows that can continue in the middle of an epoch, as Lightning requires when it resumes a run.

    Args:
        sampler: Chooses the rows of each batch.
        dataset: The rows.
    """

    def __init__(self, dataset: Any, sampler: RepeatSampler) -> None:
        # An iterator draws a seed for its workers when it starts, and a resumed run starts one iterator more. The seed
        # must not come from the generator with which completions are sampled.
        own = torch.Generator()
        super().__init__(dataset, batch_size=sampler.batch_size, sampler=sampler, collate_fn=list, generator=own)
        self._batches = 0

    def __iter__(self) -> Iterator[list[Row]]:  # type: ignore[override]
        assert isinstance(self.sampler, RepeatSampler)
        self._batches = self.sampler.start
        for batch in super().__iter__():
            self._batches += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the number of the epoch, and of its batches so far."""
        assert isinstance(self.sampler, RepeatSampler)
        return {"epoch": self.sampler.epoch, "batches": self._batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Leave out the batches that the run has had already."""
        assert isinstance(self.sampler, RepeatSampler)
        self.sampler.resumed = (state["epoch"], state["batches"])


class PromptDataModule(LightningDataModule):
    """Prompts for an [`RLModule`]. Each batch is repeated as often as the module makes training steps on it.

    Args:
        train_dataset: Rows with a `prompt`, and what the reward functions read.
        eval_dataset: Rows to validate on.
        batch_size: Prompts of one batch on each rank.
        eval_batch_size: Prompts of one batch on each rank in validation; `batch_size` by default.
        shuffle: Whether to shuffle the training prompts anew for every epoch.
        seed: Seed of that order.

    Raises:
        TypeError: If a dataset is not a sequence of rows.
        ValueError: If a dataset is empty. When training starts, also if the training data do not fill one batch on
            every rank.
    """

    def __init__(
        self,
        train_dataset: Any,
        eval_dataset: Any = None,
        *,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        shuffle: bool = True,
        seed: int = 42,
    ) -> None:
        super().__init__()
        check_at_least(1, batch_size=batch_size, eval_batch_size=eval_batch_size)
        check_rows("train_dataset", train_dataset)
        if eval_dataset is not None:
            check_rows("eval_dataset", eval_dataset)
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.shuffle, self.seed = shuffle, seed
        self._train_loader: PromptLoader | None = None
        self._resumed: dict[str, int] = {}
        if eval_dataset is None:
            self.val_dataloader = None  # type: ignore[assignment,method-assign]  # Lightning then skips validation

    @property
    def _ranks(self) -> tuple[int, int]:
        """Number of ranks, and number of this rank."""
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def train_dataloader(self) -> PromptLoader:
        """Make the loader of the training batches, each repeated as often as the module makes steps on it."""
        ranks, rank = self._ranks
        if len(self.train_dataset) < self.batch_size * ranks:
            raise ValueError(
                f"{len(self.train_dataset)} prompts do not fill one batch of {self.batch_size} on each of {ranks} "
                "ranks: lower the batch size, or give more prompts."
            )
        module = None if self.trainer is None else self.trainer.lightning_module
        sampler = RepeatSampler(
            self.train_dataset,
            self.batch_size,
            getattr(module, "batch_repeats", 1),  # a module that only fine-tunes has no rollouts
            getattr(module, "auxiliary_repeats", (1, 0)),
            shuffle=self.shuffle,
            seed=self.seed,
            num_replicas=ranks,
            rank=rank,
        )
        self._train_loader = PromptLoader(self.train_dataset, sampler)
        if self._resumed:
            self._train_loader.load_state_dict(self._resumed)
            self._resumed = {}
        return self._train_loader

    # The data module keeps the state of the loader as well. Lightning gives a resumed loader its state only if nothing
    # has asked for the loader before. With max_epochs the learning-rate schedule has asked for it, to count the steps.

    def state_dict(self) -> dict[str, int]:
        """Return the position of the training loader."""
        return {} if self._train_loader is None else self._train_loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue from that position, if the run trains."""
        fitting = self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        self._resumed = state_dict if fitting else {}

    def val_dataloader(self) -> Any:
        """Make the loader of the validation rows, in order. All ranks get equally many, so a few may come twice."""
        sampler: DistributedSampler = DistributedSampler(self.eval_dataset, *self._ranks, shuffle=False)
        # The loader has a generator of its own, so that validation does not change the random numbers of training.
        return DataLoader(
            self.eval_dataset, self.eval_batch_size, sampler=sampler, collate_fn=list, generator=torch.Generator()
        )
