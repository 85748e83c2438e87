"""Draw the pictures of the page on logs from the logs of three runs of the demo, one healthy and two that are not.

    make demo
    for run in "healthy" "high_rate --learning_rate 2e-2" "bad_critic --head_learning_rate 1.0 --lam_policy 0.5"; do
        set -- $run
        python recipes/mtp_critic.py --model outputs/demo/warm_start --max_steps 300 --logging_steps 10 \
            --eval_strategy no --eval_on_start False --output_dir outputs/logs/$1 ${@:2}
    done
    python docs/site/log_pictures.py outputs/logs
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

IMAGES = Path(__file__).parents[1] / "images"
RUNS = {
    "healthy": ("healthy", "#0072B2", "-"),
    "high_rate": ("learning rate 40 times too high", "#D55E00", "--"),
    "bad_critic": ("the critic's learning rate 1000 times too high", "#009E73", "-."),
}
"""Folder, label, colour and style of each run."""
PICTURES = {
    "logs_rewards.png": {
        "reward": "reward",
        "completions/mean_length": "completions/mean_length (limit 24)",
        "entropy": "entropy, nats",
    },
    "logs_policy.png": {
        "clip_ratio/region_mean": "clip_ratio/region_mean",
        "grad_norm": "grad_norm, before clipping",
        "critic/advantage_std": "critic/advantage_std",
    },
    "logs_critic.png": {
        "critic/explained_variance": "critic/explained_variance",
        "critic/value_loss": "critic/value_loss",
        "critic/grad_clamped": "critic/grad_clamped",
    },
}
LOGARITHMIC = ("grad_norm", "critic/value_loss", "critic/advantage_std")
FLOOR = -1.0
"""Explained variance below it is drawn at it: the bad critic begins at minus two thousand."""


def main(folder: Path) -> None:
    """Draw all pictures from `folder/<run>/trainer_state.json`."""
    logs = {run: json.loads((folder / run / "trainer_state.json").read_text())["log_history"] for run in RUNS}
    for name, panels in PICTURES.items():
        figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
        for axis, (key, title) in zip(axes, panels.items(), strict=True):
            for run, (label, color, style) in RUNS.items():
                points = [(entry["step"], max(entry[key], FLOOR)) for entry in logs[run] if key in entry]
                axis.plot(*zip(*points, strict=True), color=color, linestyle=style, linewidth=1.8, label=label)
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("optimizer step", fontsize=9)
            axis.tick_params(labelsize=8)
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.25)
            if key in LOGARITHMIC:
                axis.set_yscale("log")
            if key == "critic/explained_variance":
                axis.axhline(0, color="#555555", linewidth=1, linestyle=":")
        figure.legend(
            *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9
        )
        figure.savefig(IMAGES / name, dpi=110)
        plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
