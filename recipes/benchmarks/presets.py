"""Compare variants of GRPO, PPO and the MTP critic: same task, same warm start, same number of optimizer steps.

    python recipes/benchmarks/presets.py --methods mtp_critic ppo dapo gspo maxrl --seeds 42 1

A method is a preset of `GRPOVariantConfig`, or `mtp_critic`, `ppo` or `vpg`. Every run is one of the recipes with its
own defaults, from the warm start of its seed; other options (`--max_steps 300`, `--use_cpu True`) go to all of them.
Methods differ in time and in how many tokens (prompts and completions) they need for a step: dynamic sampling draws
more, PPO with its epochs fewer. So the table has time and tokens beside the accuracy. Runs that are done already are
not repeated.

The benchmark writes `presets.png`, `presets.json` and one folder per run.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RECIPES = Path(__file__).parents[1]
CRITICS = {"mtp_critic": ("mtp_critic.py",), "ppo": ("ppo.py",), "vpg": ("ppo.py", "--preset=vpg")}
ACCURACY = "eval_rewards/accuracy/mean"


def run(method: str, seed: int, root: Path, options: list[str]) -> dict[str, Any]:
    """Run a recipe unless its results exist, and read them."""
    output = root / f"{method}_{seed}"
    if not (output / "summary.json").is_file():
        script, *own = CRITICS.get(method, ("grpo_variants.py", f"--preset={method}"))
        warm_start = root / f"warm_start_{seed}"
        if (warm_start / "config.json").is_file():
            own.append(f"--model={warm_start}")
        command = [sys.executable, str(RECIPES / script), *own, f"--seed={seed}", f"--output_dir={output}", *options]
        done = subprocess.run([*command, "--disable_tqdm=True"], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
        if not (warm_start / "config.json").is_file():
            (output / "warm_start").rename(warm_start)
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    seconds = next(entry["train_runtime"] for entry in history if "train_runtime" in entry)
    return {
        "method": method,
        "seed": seed,
        "curve": [(entry["step"], entry[ACCURACY]) for entry in history if ACCURACY in entry],
        "million_tokens": max(entry.get("num_tokens", 0) for entry in history) / 1e6,
        "minutes": seconds / 60,
    }


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Make one row per method: means over seeds, best final accuracy first."""
    rows = []
    for method in dict.fromkeys(run["method"] for run in runs):
        mine = [run for run in runs if run["method"] == method]
        final = [run["curve"][-1][1] for run in mine]
        rows.append(
            {
                "method": method,
                "before": statistics.mean(run["curve"][0][1] for run in mine),
                "after": statistics.mean(final),
                "lowest": min(final),
                "highest": max(final),
                "million_tokens": statistics.mean(run["million_tokens"] for run in mine),
                "minutes": statistics.mean(run["minutes"] for run in mine),
            }
        )
    return sorted(rows, key=lambda row: -row["after"])


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the rows as Markdown."""
    print("| method | before | after (range) | million tokens | minutes |\n|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['method']} | {row['before']:.1%} | {row['after']:.1%} ({row['lowest']:.1%} to "
            f"{row['highest']:.1%}) | {row['million_tokens']:.2f} | {row['minutes']:.1f} |"
        )


def draw(runs: list[dict[str, Any]], rows: list[dict[str, Any]], path: Path) -> None:
    """Draw held-out accuracy over optimizer steps, mean over seeds, one line per method in the order of the table."""
    colors = plt.get_cmap("tab10" if len(rows) <= 10 else "tab20")
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for i, row in enumerate(rows):
        curves = [run["curve"] for run in runs if run["method"] == row["method"]]
        steps = [step for step, _ in curves[0]]
        means = [statistics.mean(curve[k][1] for curve in curves) for k in range(len(steps))]
        style = "-" if row["method"] in CRITICS else "--"
        axes.plot(steps, means, style, color=colors(i % 20), label=f"{row['method']} {row['after']:.1%}")
    axes.set(xlabel="optimizer step", ylabel="held-out accuracy")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["mtp_critic", "ppo", "dapo", "gspo"], help="what to compare")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42], help="seeds of warm start and training")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/presets"), help="where to write")
    args, options = parser.parse_known_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    runs = []
    for seed in args.seeds:
        for method in args.methods:
            runs.append(run(method, seed, args.output_dir, options))
            print(f"{method}, seed {seed}: {runs[-1]['curve'][-1][1]:.1%}", file=sys.stderr)
    rows = summarise(runs)
    print_table(rows)
    draw(runs, rows, args.output_dir / "presets.png")
    (args.output_dir / "presets.json").write_text(json.dumps({"rows": rows, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
