"""The load of the experts over a run: summed between two log entries, appended to a file, and read again.

The file is `moe_load.jsonl`, one line per log entry: `{"step": 10, "layers": [name, ...], "counts": [[tokens of each
expert], ...]}`, with the tokens of all ranks since the line before. `rl_plugins.report` draws it.

Legend: `S` logged steps, `L` layers, `E` experts of a layer (layers may differ).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rl_plugins.functional.routing import max_violation

LOAD_FILE_NAME = "moe_load.jsonl"


class ExpertLoadLog:
    """Averages the metrics of balancing and adds up expert loads between two log entries.

    Everything stays on its device until [`flush`]: reading a number off a GPU after every optimizer step would make
    the GPU wait.
    """

    def __init__(self) -> None:
        self._metrics: dict[str, list[Tensor]] = {}
        self._counts: list[Tensor] = []

    def add(self, metrics: Mapping[str, Tensor], counts: Sequence[Tensor]) -> None:
        """Take in one optimizer step.

        Args:
            metrics: 0-d tensors by name.
            counts: Tokens per expert (E,) of each layer.
        """
        for name, value in metrics.items():
            self._metrics.setdefault(name, []).append(value)
        self._counts = [a + b for a, b in zip(self._counts, counts, strict=True)] if self._counts else list(counts)

    def flush(self) -> tuple[dict[str, float], list[list[int]]]:
        """Return mean metrics and summed loads since the last call; both are empty where no step was made."""
        names = list(self._metrics)
        # One tensor, so that the device is waited for once and not once per metric.
        means = torch.stack([torch.stack(self._metrics[name]).mean() for name in names]).tolist() if names else []
        counts = [layer.tolist() for layer in self._counts]
        self._metrics, self._counts = {}, []
        return dict(zip(names, means, strict=True)), counts


@dataclass(frozen=True)
class ExpertLoadHistory:
    """Tokens of every expert over a run.

    Args:
        steps: (S,) optimizer steps, increasing.
        layers: (L,) names of the routers.
        counts: (S, L, E) tokens since the step before, nested lists because `E` may differ between layers.
    """

    steps: list[int]
    layers: list[str]
    counts: list[list[list[int]]]

    def tokens(self, layer: str) -> NDArray[np.int64]:
        """Return the counts of one layer, (S, E).

        Raises:
            ValueError: There is no such layer.
        """
        if layer not in self.layers:
            raise ValueError(f"no layer {layer!r}; there are {', '.join(self.layers)}")
        index = self.layers.index(layer)
        return np.array([step[index] for step in self.counts], dtype=np.int64)

    def max_violation(self) -> NDArray[np.float64]:
        """Compute `max_e load_e - 1` (see `rl_plugins.functional.max_violation`) of every step and layer, (S, L)."""
        columns = [max_violation(torch.from_numpy(self.tokens(layer))).double().numpy() for layer in self.layers]
        return np.stack(columns, axis=1)


def append_expert_load(path: str | Path, step: int, layers: Sequence[str], counts: Sequence[Sequence[int]]) -> None:
    """Append the counts since the last line to the log; missing folders are made.

    A last line that a killed run left incomplete is removed first, since it would spoil the new one.

    Args:
        path: The log, usually `moe_load.jsonl`.
        step: Optimizer steps done.
        layers: (L,) names of the routers.
        counts: (L, E) tokens of each expert since the line before, on all ranks.

    Raises:
        ValueError: There is not one list of counts for each layer.
    """
    if len(layers) != len(counts):
        raise ValueError(f"{len(layers)} layers but {len(counts)} lists of counts: give one list for each layer")
    tokens = [[int(count) for count in row] for row in counts]
    # The whole line in one write, so that a killed run leaves at most its last line incomplete.
    line = json.dumps({"step": int(step), "layers": list(layers), "counts": tokens})
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        _drop_cut_line(file)
        file.write(line.encode() + b"\n")


def _drop_cut_line(file: BinaryIO) -> None:
    """Cut a file back to its last line end; the file is open for appending, at its end."""
    if file.tell() == 0:
        return
    file.seek(-1, 2)
    if file.read(1) != b"\n":
        file.seek(0)
        # Without any line end `rfind` gives -1, and the file becomes empty.
        file.truncate(file.read().rfind(b"\n") + 1)


def read_expert_load(path: str | Path) -> ExpertLoadHistory:
    """Read the log of a run.

    A resumed run repeats steps: a line replaces all earlier lines that have its step or a later one. A last line
    without an end, which a killed run leaves, is ignored.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: No complete line, a broken line before the last, or layers or numbers of experts that change.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: balanced training writes it, unless record_load=False")
    rows: list[dict[str, Any]] = []
    for number, line in _complete_lines(path):
        row = _parse(line, f"{path}, line {number}")
        # The run was resumed from a checkpoint before these steps.
        while rows and rows[-1]["step"] >= row["step"]:
            rows.pop()
        # Checked after the repeated steps are gone: a new run in the same folder, from step 1, may have another model.
        if rows and _shape(rows[0]) != _shape(row):
            raise ValueError(
                f"{path}, line {number}: other layers or numbers of experts than at step {rows[0]['step']}; "
                "runs of different models need different folders"
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no complete line: train until the first logging step")
    return ExpertLoadHistory([row["step"] for row in rows], rows[0]["layers"], [row["counts"] for row in rows])


def _complete_lines(path: Path) -> list[tuple[int, str]]:
    """Lines with their numbers, without what follows the last line end."""
    # Text behind the last line end comes from a killed run; the last part is empty where all lines are complete.
    return [(i + 1, line) for i, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1])]


def _parse(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        step, layers, counts = row["step"], row["layers"], row["counts"]
        if not (isinstance(step, int) and len(layers) == len(counts) and all(map(len, counts))):
            raise TypeError("it needs a whole number as step, and a list of counts for each layer")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{place} is broken ({error}). Delete this line to read the other lines.") from error
    return {"step": step, "layers": layers, "counts": counts}


def _shape(row: dict[str, Any]) -> list[tuple[str, int]]:
    return [(layer, len(counts)) for layer, counts in zip(row["layers"], row["counts"], strict=True)]
