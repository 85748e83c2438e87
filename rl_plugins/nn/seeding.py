"""Initial weights that every rank draws alike, without a trace in the caller's random state."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def fixed_seed(seed: int) -> Iterator[None]:
    """Draw new weights on the CPU from `seed`, and leave every generator as it was.

    `torch.manual_seed` would seed the generators of all GPUs too, and nothing restores those: afterwards every rank
    would sample its completions with the same random numbers.

    Args:
        seed: Seed of the CPU's generator.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield
