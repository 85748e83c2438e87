"""Measure the cost of the critic: `MTPCriticTrainer` beside stock `GRPOTrainer`, in runs of `measured_run.py`.

    python recipes/benchmarks/overhead.py --json outputs/overhead.json

Both trainers get the same randomly initialised Qwen3 (41M parameters, 32k vocabulary, tied embeddings), the same
reward function and the same optimizer. A step of GRPO samples `--generations` completions for each of its prompts,
`--completions` in all. The critic's dataset has every prompt that many times instead, with one completion each.
End-of-text is suppressed, so every completion has `--completion-length` tokens. The policy's learning rate is 0, which
costs an optimizer as much as any other. So with equal seeds both trainers sample the same tokens in every step. The
hashes of all prompts and completions are compared, and a difference is an error.

Every run is a fresh process, the trainers take turns (A B B A ...), and the first step of each run is not counted.
The benchmark prints medians over all counted steps. A ratio is taken within each repetition, whose runs follow each
other, so that other work of the machine slows both; the median over the repetitions is printed.

    step      from the end of one optimizer step to the end of the next: everything
    rollout   generation, rewards, and for the critic its values, targets and advantages
    update    the rest: forward, backward, optimizer, target heads
    memory    peak above the memory of the process with the loaded model: resident memory, or CUDA's allocations
    cpu       processor time of the same steps, which depends less on other work of the machine

Goals: a step takes at most 1.06 times as long as GRPO's, and memory is at most 1.05 times GRPO's.
`--trainers grpo critic sequential` adds a critic with one sequential head, which is one more decoder layer. Its goals
are 1.15 for the step and 1.08 for memory. `--trainers grpo sequential replay --steps 14 --repeats 1` adds a replay of
this head's values, whose first eight steps take less time than later ones: it learns from the last eight rollouts.

The cost of the critic is that of the heads' token loss: each head multiplies its features with the LM head once
forward and once backward. So the overhead grows with the embedding's share of the parameters (0.31 here, 0.26 in
Qwen3-0.6B, less in larger models) and shrinks with the share of generation. `--loss-share` is the share of the tokens
that have this loss, a quarter by default. `--trainers grpo critic values-only` adds a critic with `mtp_loss_coef=0`,
which has no such loss.

A critic whose heads also draft the completions needs heads that have learnt the task: those of `speculative.py`.

    python recipes/benchmarks/overhead.py --model outputs/benchmarks/speculative/small --temperature 1e-5 \
        --completion-length 128 --trainers grpo critic speculative

So close to temperature 0 all trainers get the same completions, and the hashes are compared as above. At
`--temperature 1` drafting draws other random numbers: the completions have the same number and lengths, but other
tokens.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measured_run import TRAINERS, Settings, add_settings, read_settings, spawn

GOALS = {
    ("critic", "step"): 1.06,
    ("critic", "memory"): 1.05,
    ("sequential", "step"): 1.15,
    ("sequential", "memory"): 1.08,
}
"""Goals for the model of the default settings."""


def compare(runs: list[dict[str, Any]], exempt: Collection[str] = ()) -> dict[str, Any]:
    """Compute medians per trainer over all steps, and the median over repetitions of their ratios to GRPO's.

    Args:
        runs: Results of the trainers' processes.
        exempt: Trainers whose completions may differ.

    Raises:
        RuntimeError: If two runs trained on different completions.
    """
    if len({tuple(run["completions"]) for run in runs if run["trainer"] not in exempt}) != 1:
        raise RuntimeError("The trainers sampled different completions, so their times cannot be compared.")
    quantities = ("step", "rollout", "update", "cpu", "memory")
    by_trainer: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        by_trainer.setdefault(run["trainer"], []).append(run)
    median = {
        name: {q: statistics.median(x for run in mine for x in run[q]) for q in quantities}
        for name, mine in by_trainer.items()
    }
    ratio = {
        name: {
            q: statistics.median(
                statistics.median(run[q]) / statistics.median(stock[q])
                for run, stock in zip(mine, by_trainer["grpo"], strict=True)
            )
            for q in quantities
        }
        for name, mine in by_trainer.items()
    }
    return {"median": median, "ratio": ratio}


def print_table(report: dict[str, Any], settings: Settings) -> None:
    print(f"{'':20}{'step s':>9}{'rollout s':>11}{'update s':>10}{'cpu s':>8}{'memory MiB':>12}")
    for name, m in report["median"].items():
        print(f"{name:20}{m['step']:9.3f}{m['rollout']:11.3f}{m['update']:10.3f}{m['cpu']:8.3f}{m['memory']:12.0f}")
    for name, r in report["ratio"].items():
        if name != "grpo":
            label = f"{name} / grpo"
            print(
                f"{label:20}{r['step']:9.3f}{r['rollout']:11.3f}{r['update']:10.3f}{r['cpu']:8.3f}{r['memory']:12.3f}"
            )
    goals = {("speculative", "step"): 1.0, **({} if settings.model else GOALS)}
    for (name, quantity), goal in goals.items():
        if name not in report["ratio"]:
            continue
        ratio = report["ratio"][name][quantity]
        print(f"{name}, {quantity} {ratio:.3f}, goal {goal:.2f}: {'met' if ratio <= goal else 'missed'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_settings(parser, Settings())
    parser.add_argument("--repeats", type=int, default=3, help="runs per trainer")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=TRAINERS[:2], help="what to compare")
    args = parser.parse_args()
    settings = read_settings(args)
    if settings.completions % settings.generations:
        parser.error("--completions must be a multiple of --generations")
    if "grpo" not in args.trainers:
        parser.error("--trainers must include grpo, which the others are compared with")
    runs = []
    for repeat in range(args.repeats):
        for name in args.trainers if repeat % 2 == 0 else args.trainers[::-1]:
            runs.append(spawn(name, settings))
            print(f"{name}: {statistics.median(runs[-1]['step']):.2f} s per step", file=sys.stderr)
    drawn_otherwise = ("speculative",) if settings.temperature > 0.01 else ()
    report = compare(runs, drawn_otherwise)
    identical = sum(run["trainer"] not in drawn_otherwise for run in runs)
    share = f"all {len(runs)}" if identical == len(runs) else f"{identical} of {len(runs)}"
    print(
        f"{runs[0]['parameters'] / 1e6:.1f}M parameters, {settings.completions} completions of "
        f"{'' if settings.model else f'{settings.prompt_length} + '}{settings.completion_length} tokens, "
        f"{settings.device}, {settings.threads} threads; identical completions in {share} runs"
    )
    print_table(report, settings)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"settings": asdict(settings), **report, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
