"""Random draws that leave the caller's random numbers as they are: initial weights, equal on all ranks, and choices of
tokens."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


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


def draw_beside(data: Tensor) -> torch.Generator:
    """Make a generator for draws that leave the global random numbers as they are.

    The draws change nothing that is sampled later. The seed comes from the data and from the state of the global
    generator, which hosts save and restore with a checkpoint. So a resumed run draws the same numbers as an
    uninterrupted one, and each batch and epoch has other draws.

    Args:
        data: Integers on the device of the draws.
    """
    state = zlib.crc32(torch.get_rng_state().numpy().tobytes())
    return torch.Generator(data.device).manual_seed(state ^ (int(data.sum()) & 0xFFFFFFFF))
