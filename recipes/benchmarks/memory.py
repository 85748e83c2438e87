"""Compare the peak memory of PPO with a separate critic, GRPO and the MTP critic, in runs of `measured_run.py`.

    python recipes/benchmarks/memory.py --json outputs/memory.json

Every run is a fresh process with the same model, optimizer, prompts and completions, and without a reference model.
The hashes of the completions are compared, and a difference is an error. PPO's value model is a copy of the policy's
trunk with a scalar head. The benchmark measures the peak of resident memory (or of CUDA's allocations) above the
memory of the process before the model was made: weights, gradients, optimizer states and activations, without Python
and its libraries. It prints the median over `--repeats` runs.

Goals: the MTP critic needs at most 0.6 of the memory of PPO, and at most 1.05 of that of GRPO.
"""

import argparse
import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measured_run import Settings, add_settings, read_settings, spawn

TRAINERS = ("grpo", "critic", "ppo")
GOALS = {"ppo": 0.6, "grpo": 1.05}


def compare(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Compute the median peak per trainer in MiB, and the critic's as a share of the others'.

    Raises:
        RuntimeError: If two runs trained on different completions.
    """
    if len({tuple(run["completions"]) for run in runs}) != 1:
        raise RuntimeError("The trainers sampled different completions, so their memory cannot be compared.")
    peak = {
        name: statistics.median(run["total_memory"] for run in runs if run["trainer"] == name) for name in TRAINERS
    }
    return {"peak_mib": peak, "critic_over": {name: peak["critic"] / peak[name] for name in GOALS}}


def print_table(report: dict[str, Any], parameters: dict[str, int]) -> None:
    """Print the results as a table."""
    print(f"{'':8}{'parameters':>12}{'peak MiB':>10}")
    for name, peak in report["peak_mib"].items():
        print(f"{name:8}{parameters[name] / 1e6:11.1f}M{peak:10.0f}")
    for name, ratio in report["critic_over"].items():
        print(f"critic / {name} {ratio:.3f}, goal {GOALS[name]:.2f}: {'met' if ratio <= GOALS[name] else 'missed'}")


def main() -> None:
    """Run all trainers in turns and compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_settings(parser, Settings(steps=1, hidden_size=640, layers=24))
    parser.add_argument("--repeats", type=int, default=3, help="runs per trainer")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    settings = read_settings(args)
    runs = []
    for _ in range(args.repeats):
        for name in TRAINERS:
            runs.append(spawn(name, settings))
            print(f"{name}: {runs[-1]['total_memory']:.0f} MiB", file=sys.stderr)
    report = compare(runs)
    print(
        f"{settings.completions} completions of {settings.prompt_length} + {settings.completion_length} tokens, "
        f"{settings.device}; identical completions in all {len(runs)} runs"
    )
    print_table(report, {run["trainer"]: run["parameters"] for run in runs})
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"settings": asdict(settings), **report, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
