"""`rl-plugins plot RUN...`: draw learning curves from the logs that runs have written, without training anything."""

import argparse
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from rl_plugins.run_logs import RunLog, find_log, group_runs, label_runs
from rl_plugins.usage import OneLineErrors

DESCRIPTION = """\
Draw the learning curves of runs into one PNG: a panel for each metric, a line for each setting.

A RUN is an output_dir of TRL (or one of its checkpoints, or a trainer_state.json), or a folder of
Lightning's CSVLogger (or its metrics.csv). Of several checkpoints or versions, the last counts.
"""
GROUPING = """\
which runs become one line:
  Runs whose paths differ only in the seed become one line, their mean, with a band around it.
  A seed is "seed" and a number in a folder's name (seed1, run_seed-2, seed=3), or a folder
  whose name is a number. All other runs have a line of their own, named by the folders in which
  their paths differ. --labels replaces the names: runs with equal labels become one line.

    rl-plugins plot outputs/demo
    rl-plugins plot outputs/critic/seed* outputs/grpo/seed*          two lines with bands
    rl-plugins plot runs/a runs/b runs/c --labels critic critic grpo
    rl-plugins plot outputs/demo --metrics reward kl "rewards/*/mean" --smooth 1
"""


def make_parser(prog: str = "rl-plugins plot") -> argparse.ArgumentParser:
    """Make the parser of the command."""
    parser = OneLineErrors(
        prog=prog,
        description=DESCRIPTION,
        epilog=GROUPING,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output_dir, trainer_state.json or metrics.csv")
    parser.add_argument("--output", default="curves.png", metavar="PNG", help="file to write (default: curves.png)")
    parser.add_argument(
        "--metrics",
        nargs="+",
        metavar="KEY",
        help="metrics as they are logged, one panel each; * stands for a head's number or a reward's name "
        "(default: rewards, the critic's quality, entropy, KL, length, load of experts, where logged)",
    )
    parser.add_argument(
        "--smooth",
        type=_odd,
        metavar="N",
        help="odd number of points of the moving average; 1 is none (default: a twentieth of the run)",
    )
    parser.add_argument("--labels", nargs="+", metavar="NAME", help="name of each RUN's setting, in their order")
    parser.add_argument(
        "--spread",
        choices=("range", "stderr"),
        default="range",
        help="bands from the smallest to the largest run, or the standard error of the mean (default: range)",
    )
    parser.add_argument("--title", help="heading of the picture")
    return parser


def _odd(text: str) -> int:
    if not text.isdigit() or int(text) % 2 == 0:
        raise argparse.ArgumentTypeError(f"must be an odd number such as 1 or 11, not {text!r}")
    return int(text)


def main(argv: Sequence[str] | None = None, prog: str = "rl-plugins plot") -> None:
    """Read the runs, draw, and say which runs became which line.

    Args:
        argv: Arguments; those of the process by default.
        prog: Name of the command in messages.
    """
    parser = make_parser(prog)
    options = parser.parse_args(argv)
    try:
        names = label_runs(options.runs) if options.labels is None else options.labels
        settings = group_runs(options.runs, names)
        _refuse_doubles(options.runs)
        _refuse_unknown(options.metrics or [], settings, options.runs)
        # This import loads torch, which takes time; mistakes are reported before it.
        from rl_plugins.report.curves import DEFAULT_PANELS, EVALUATION_PANELS, panel_of, plot_training_curves

        panels = [panel_of(key) for key in options.metrics or []] or (*EVALUATION_PANELS, *DEFAULT_PANELS)
        path = plot_training_curves(
            settings,
            options.output,
            title=options.title,
            panels=panels,
            window=options.smooth,
            spread=options.spread,
        )
    except (OSError, ValueError, ImportError) as error:
        parser.error(str(error))
    for name, logs in settings.items():
        runs = [run for run, label in zip(options.runs, names, strict=True) if label == name]
        print(f"{name}: {'mean of ' if len(runs) > 1 else ''}{', '.join(runs)}")
        _tell_ends(runs, logs)
    print(f"The curves are in {path}.")


def _refuse_doubles(runs: Sequence[str]) -> None:
    logs: dict[Path, str] = {}
    for run in runs:
        log = find_log(run).resolve()
        if log in logs:
            raise ValueError(f"{run} and {logs[log]} are the log {log}: name each run once.")
        logs[log] = run


def _refuse_unknown(metrics: Sequence[str], settings: dict[str, list[RunLog]], runs: Sequence[str]) -> None:
    known = {key for logs in settings.values() for log in logs for row in log for key in row} - {"step", "epoch"}
    for metric in metrics:
        if not any(fnmatchcase(key, metric) for key in known):
            files = ", ".join(str(find_log(run)) for run in runs)
            raise ValueError(f"no run has the metric {metric!r}. {files} has: {', '.join(sorted(known))}")


def _tell_ends(runs: Sequence[str], logs: Sequence[RunLog]) -> None:
    """Warn of runs that ended before the others of their setting, since the mean ends there as well."""
    ends = [max(int(row["step"]) for row in log) for log in logs]
    for run, end in zip(runs, ends, strict=True):
        if end < max(ends):
            note = f"note: {run} ends at step {end}, others of its setting at {max(ends)}; their mean ends there."
            print(note, file=sys.stderr)
