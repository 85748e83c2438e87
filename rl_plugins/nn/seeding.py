"""Random numbers without a trace in the caller's: initial weights that every rank draws alike, and choices of
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

    Whatever is sampled afterwards is what it would be without the draws. The seed comes from the state of the global
    generator, which hosts save and restore with a checkpoint, and from the data, so that a resumed run draws what an
    uninterrupted one does, and other draws come with every batch and epoch.

    Args:
        data: Integers on the device of the draws.
    """
    state = zlib.crc32(torch.get_rng_state().numpy().tobytes())
    return torch.Generator(data.device).manual_seed(state ^ (int(data.sum()) & 0xFFFFFFFF))
