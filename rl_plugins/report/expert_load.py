"""How evenly a mixture of experts spreads its tokens: the log that the trainers write and the pictures read.

`MoEBalancingCallback` appends one line to `moe_load.jsonl` per logged step, `{"step": 10, "layers": [name, ...],
"counts": [[tokens of each expert], ...]}`, with the tokens of all ranks since the line before.

Legend: `S` logged steps, `L` layers, `E` experts of a layer (layers may differ).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rl_plugins.functional import max_violation

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

LOAD_FILE_NAME = "moe_load.jsonl"


@dataclass(frozen=True)
class LoadHistory:
    """Tokens of every expert over a run.

    Args:
        steps: (S,) optimizer steps, increasing.
        layers: (L,) names of the routers.
        counts: (S, L, E) tokens since the step before, nested lists because `E` may differ between layers.
    """

    steps: list[int]
    layers: list[str]
    counts: list[list[list[int]]]

    def tokens(self, layer: str) -> IntArray:
        """Counts of one layer, (S, E).

        Raises:
            ValueError: There is no such layer.
        """
        if layer not in self.layers:
            raise ValueError(f"no layer {layer!r}; there are {', '.join(self.layers)}")
        index = self.layers.index(layer)
        return np.array([step[index] for step in self.counts], dtype=np.int64)

    def load(self, layer: str) -> FloatArray:
        """`E n_e / sum(n)`: tokens relative to the mean of the layer, (S, E); 1 is balanced, NaN without tokens.

        Raises:
            ValueError: There is no such layer.
        """
        return relative_load(self.tokens(layer))

    def max_violation(self) -> FloatArray:
        """`max_e load_e - 1` (see `rl_plugins.functional.max_violation`) of every step and layer, (S, L)."""
        columns = [max_violation(torch.from_numpy(self.tokens(layer))).double().numpy() for layer in self.layers]
        return np.stack(columns, axis=1)


def relative_load(counts: IntArray) -> FloatArray:
    """Counts over their mean, (..., E) -> (..., E); NaN where nothing was counted."""
    mean = counts.mean(axis=-1, keepdims=True)
    return np.divide(counts, mean, out=np.full(counts.shape, np.nan), where=mean > 0)


# ---------------------------------------------------------------------------------------------- file


def append_load(path: str | Path, step: int, layers: Sequence[str], counts: Sequence[Sequence[int]]) -> None:
    """Append the counts of one step to the log; missing folders are made.

    A last line that a killed run left incomplete is removed first, since it would spoil the new one.

    Args:
        path: The log, usually `moe_load.jsonl`.
        step: Optimizer steps done.
        layers: (L,) names of the routers.
        counts: (L, E) tokens of each expert since the line before, on all ranks.

    Raises:
        ValueError: Not one list of counts for each layer.
    """
    if len(layers) != len(counts):
        raise ValueError(f"{len(layers)} layers but {len(counts)} lists of counts: give one list for each layer")
    tokens = [[int(count) for count in row] for row in counts]
    line = json.dumps({"step": int(step), "layers": list(layers), "counts": tokens})
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        _drop_cut_line(file)
        file.write(line.encode() + b"\n")


def _drop_cut_line(file: Any) -> None:
    if file.tell() == 0:
        return
    file.seek(-1, 2)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def read_loads(path: str | Path) -> LoadHistory:
    """Read the log of a run.

    A resumed run repeats steps: a line replaces all earlier ones at its step or a later one. A last line
    without an end, as a killed run leaves it, is ignored.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: No complete line, a broken line before the last, or layers or numbers of experts that change.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: MoEBalancingCallback writes it during training")
    rows: list[dict[str, Any]] = []
    for number, line in _complete_lines(path):
        row = _parse(line, f"{path}, line {number}")
        while rows and rows[-1]["step"] >= row["step"]:
            rows.pop()
        if rows and _shape(rows[0]) != _shape(row):
            raise ValueError(
                f"{path}, line {number}: other layers or numbers of experts than at step {rows[0]['step']}; "
                "runs of different models need different folders"
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no complete line: train until the first logging step")
    return LoadHistory([row["step"] for row in rows], rows[0]["layers"], [row["counts"] for row in rows])


def _complete_lines(path: Path) -> list[tuple[int, str]]:
    """Lines with their numbers, without what follows the last line end."""
    return [(i + 1, line) for i, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1])]


def _parse(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        step, layers, counts = row["step"], row["layers"], row["counts"]
        if not (isinstance(step, int) and len(layers) == len(counts) and all(map(len, counts))):
            raise TypeError("one list of counts for each layer and a whole step")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{place} is broken ({error!r}); delete it to read the others") from error
    return {"step": step, "layers": layers, "counts": counts}


def _shape(row: dict[str, Any]) -> list[tuple[str, int]]:
    return [(layer, len(counts)) for layer, counts in zip(row["layers"], row["counts"], strict=True)]
