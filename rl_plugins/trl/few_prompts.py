"""Datasets with fewer prompts than one generation batch takes."""

import warnings
from typing import Any

from datasets import IterableDataset


def filling(dataset: Any, prompts: int) -> Any:
    """Repeat a dataset until it fills a generation batch, with a warning; a larger one stays as it is.

    TRL drops prompts that do not fill a batch, and would train for no step at all. With one completion per prompt, a
    batch takes many more prompts than with groups. A prompt that occurs twice has two completions, as in a group.

    Args:
        dataset: The training dataset; of a stream the first `prompts` rows are read.
        prompts: Number of different prompts in one generation batch of all processes.
    """
    found = sum(1 for _ in dataset.take(prompts)) if isinstance(dataset, IterableDataset) else len(dataset)
    if not 0 < found < prompts:
        return dataset
    times = -(-prompts // found)
    warnings.warn(
        f"The dataset has {found} prompts, but a generation batch takes {prompts} (generation_batch_size / "
        f"num_generations): the dataset is repeated {times} times for each epoch. For every prompt once, lower "
        "per_device_train_batch_size or steps_per_generation, or give more prompts.",
        stacklevel=2,
    )
    return dataset.repeat(times)
