"""Time every policy loss against the plain clipped loss, forward and backward, at 64 sequences of 4096 tokens.

    OMP_NUM_THREADS=1 python recipes/benchmarks/functional_speed.py

The losses take turns within each repetition. The benchmark prints the median milliseconds of each loss, and its ratio
to `ppo_clip` within a repetition, as the median over repetitions. There is one advantage per token, and sequences have
different lengths.

Goal: no loss takes more than 3 times as long as the clipped loss.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rl_plugins.functional import aggregate
from rl_plugins.signals import POLICY_LOSSES, PolicyLoss

BASE, GOAL, GROUP = "ppo_clip", 3.0, 8


def make_batch(rows: int, length: int, device: str) -> dict[str, Tensor]:
    """Make log-probabilities before and after an update, advantages, masks of different lengths, and group ids."""
    g = torch.Generator().manual_seed(0)
    logps = -torch.rand(rows, length, generator=g) * 3
    batch = {
        "old_logps": logps + 0.1 * torch.randn(rows, length, generator=g),
        "logps": logps,
        "advantages": torch.randn(rows, length, generator=g),
        "mask": torch.arange(length) < torch.randint(length // 2, length, (rows, 1), generator=g),
        "groups": torch.arange(rows) // GROUP,
    }
    return {key: value.to(device) for key, value in batch.items()}


def seconds(loss: PolicyLoss, batch: dict[str, Tensor]) -> float:
    """Time one forward and backward pass from log-probabilities to the aggregated loss."""
    logps = batch["logps"].clone().requires_grad_()
    # GVPO is defined on one advantage per sequence.
    advantages = batch["advantages"][:, 0] if loss.name == "gvpo" else batch["advantages"]
    on_gpu = logps.is_cuda
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    token_loss = loss.per_token(logps, batch["old_logps"], advantages, batch["mask"], batch)
    aggregate(token_loss, batch["mask"], "token").backward()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(rows: int = 64, length: int = 4096, repeats: int = 15, device: str = "cpu") -> dict[str, dict[str, float]]:
    """Measure the median milliseconds of each loss, and its median ratio to the clipped loss."""
    batch = make_batch(rows, length, device)
    losses = {name: PolicyLoss(name) for name in POLICY_LOSSES}
    times: dict[str, list[float]] = {name: [] for name in losses}
    for repeat in range(repeats + 1):
        for name, loss in losses.items():
            elapsed = seconds(loss, batch)
            if repeat:  # the first round warms up
                times[name].append(elapsed)
    return {
        name: {
            "ms": 1e3 * statistics.median(mine),
            "ratio": statistics.median(a / b for a, b in zip(mine, times[BASE], strict=True)),
        }
        for name, mine in times.items()
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64, help="sequences")
    parser.add_argument("--length", type=int, default=4096, help="tokens per sequence")
    parser.add_argument("--repeats", type=int, default=15, help="rounds")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    report: dict[str, Any] = measure(args.rows, args.length, args.repeats, args.device)
    print(f"({args.rows}, {args.length}), {args.device}, {torch.get_num_threads()} threads; times {BASE}'s")
    for name, figures in sorted(report.items(), key=lambda item: item[1]["ratio"]):
        print(f"{name:12}{figures['ms']:8.2f} ms{figures['ratio']:7.2f}")
    worst = max(report, key=lambda name: report[name]["ratio"])
    ratio = report[worst]["ratio"]
    print(f"slowest: {worst}, {ratio:.2f}, goal {GOAL:.0f}: {'met' if ratio <= GOAL else 'missed'}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
