"""Time `gae` against the plain Python loop over tokens, on the CPU.

    OMP_NUM_THREADS=1 python recipes/benchmarks/gae_speed.py

The benchmark prints the median time of each and the ratio, at 64 sequences of 2048 tokens with holes in the mask.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from rl_plugins.functional import gae

BATCH, LENGTH = 64, 2048
GAMMA, LAM = 0.99, 0.95


def loop_gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> Tensor:
    """Compute GAE by the usual loop over `T`, vectorised over `B`, skipping masked tokens."""
    advantages = torch.zeros_like(values)
    running = next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        real = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = torch.where(real, delta + gamma * lam * running, running)
        next_value = torch.where(real, values[:, t], next_value)
        advantages[:, t] = torch.where(real, running, 0.0)
    return advantages


def median_seconds(function: Callable[[], Tensor], repeats: int) -> float:
    function()  # warm up
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(repeats: int = 7) -> tuple[float, float]:
    """Measure the median seconds of the loop and of `gae`."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, BATCH, LENGTH, generator=generator)
    mask = torch.rand(BATCH, LENGTH, generator=generator) < 0.9
    loop = median_seconds(lambda: loop_gae(rewards, values, mask, gamma=GAMMA, lam=LAM), repeats)
    scan = median_seconds(lambda: gae(rewards, values, mask, gamma=GAMMA, lam=LAM), 5 * repeats)
    return loop, scan


if __name__ == "__main__":
    loop, scan = measure()
    print(f"({BATCH}, {LENGTH}), {torch.get_num_threads()} threads")
    print(f"loop {1e3 * loop:.1f} ms, gae {1e3 * scan:.2f} ms")
    print(f"ratio {loop / scan:.1f}")
