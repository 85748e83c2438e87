"""Logs of training runs, read from files, and grouped where only the seed differs.

This file imports nothing but the standard library, so that the command line answers at once.
"""

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RunLog = list[dict[str, Any]]
TRL_LOG, LIGHTNING_LOG = "trainer_state.json", "metrics.csv"
SEED = re.compile(r"(?:^|[-_.=])seed[-_.=]?\d+(?=$|[-_.])|^\d+$", re.IGNORECASE)
NO_NAMES = re.compile(rf"{re.escape(TRL_LOG)}|{re.escape(LIGHTNING_LOG)}|checkpoint-\d+|lightning_logs")


def find_log(run: str | Path) -> Path:
    """Find the log of a run.

    Args:
        run: The log itself, a `trainer_state.json` of TRL or a `metrics.csv` of Lightning; or a folder with a log. In
            an `output_dir` with checkpoints the last checkpoint counts, and in a folder of Lightning the last
            `version_N`.

    Raises:
        FileNotFoundError: There is no log; the message says how logs are written.
    """
    run = Path(run)
    if run.is_file():
        return run
    if not run.exists():
        raise FileNotFoundError(f"{run} does not exist. Give the output_dir of a run, or its {TRL_LOG}.")
    for pattern in (TRL_LOG, f"checkpoint-*/{TRL_LOG}", LIGHTNING_LOG, f"version_*/{LIGHTNING_LOG}"):
        found = [path for path in [*run.glob(pattern), *run.glob(f"lightning_logs/{pattern}")] if path.is_file()]
        if found:
            return max(found, key=lambda path: [int(part) for part in re.findall(r"\d+", path.parent.name)])
    raise FileNotFoundError(
        f"{run} has no {TRL_LOG}, which TRL writes with every checkpoint and with trainer.save_state(), and no "
        f"{LIGHTNING_LOG}, which Lightning writes with its CSVLogger."
    )


def read_run(run: str | Path) -> RunLog:
    """Read the log of a run: dicts with `step` and metric names, as in `trainer.state.log_history`.

    Args:
        run: A file or folder, as for `find_log`.

    Raises:
        FileNotFoundError: There is no log.
        ValueError: The file is no log of TRL or Lightning.
    """
    path = find_log(run)
    try:
        rows = _read_csv(path) if path.suffix == ".csv" else json.loads(path.read_text("utf-8"))["log_history"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is neither a {TRL_LOG} of TRL nor a {LIGHTNING_LOG} of Lightning "
            f"({type(error).__name__}: {error})."
        ) from error
    if not rows:
        raise ValueError(f"{path} has no logged metrics yet. Lower logging_steps, or wait for the first entry.")
    return rows


def _read_csv(path: Path) -> RunLog:
    with path.open(newline="", encoding="utf-8") as file:
        rows = [{name: text for name, text in row.items() if text} for row in csv.DictReader(file)]
    return [{name: int(x) if name == "step" else float(x) for name, x in row.items()} for row in rows if "step" in row]


def label_runs(runs: Sequence[str | Path]) -> list[str]:
    """Name the setting of each run by its path without the seed: runs with equal names differ in the seed only.

    Parts such as `seed1`, `seed_1`, `seed-1` and `seed=1` are left out of the names of folders. Folders whose name is
    a number, and folders that all runs have in common, are left out as a whole.
    """
    paths = [
        [SEED.sub("", part).strip("-_.=") for part in Path(run).resolve().parts if not NO_NAMES.fullmatch(part)]
        for run in runs
    ]
    kept = [[part for part in parts if part] for parts in paths]
    common = 0
    while len({tuple(parts[: common + 1]) for parts in kept}) == 1 and common < min(map(len, kept)):
        common += 1
    return ["/".join(parts[common:] or parts[-1:]) for parts in kept]


def group_runs(runs: Sequence[str | Path], labels: Sequence[str] | None = None) -> dict[str, list[RunLog]]:
    """Read runs and group them by setting, for `plot_training_curves`.

    Args:
        runs: Files or folders, as for `find_log`.
        labels: Name of each run's setting; by default `label_runs` makes the names from the paths.

    Returns:
        Name of a setting -> logs of its runs, in the order of `runs`.

    Raises:
        FileNotFoundError: A run has no log.
        ValueError: A log cannot be read, or `labels` and `runs` are not equally many.
    """
    names = label_runs(runs) if labels is None else list(labels)
    if len(names) != len(runs):
        raise ValueError(f"{len(names)} labels for {len(runs)} runs: give one label for each run, in their order.")
    settings: dict[str, list[RunLog]] = {}
    for name, run in zip(names, runs, strict=True):
        settings.setdefault(name, []).append(read_run(run))
    return settings
