"""State values of a grid world as a map with the policy's arrows, as one PNG.

Legend: `S` states, numbered along the rows of the grid; `A` actions.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from rl_plugins.report.colors import SEQUENTIAL_LIGHT, sequential_color, text_color
from rl_plugins.report.curves import INK, TITLE_INCHES, new_figure, save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

FROZEN_LAKE_ARROWS = "←↓→↑"
CLIFF_WALKING_ARROWS = "↑→↓←"
CELL_INCHES = 0.52
BAR_INCHES = 1.0
HOLE = "#3b4252"


def plot_grid_values(
    values: Tensor,
    policy: Tensor,
    path: str | Path,
    *,
    shape: tuple[int, int],
    title: str | None = None,
    arrows: Sequence[str] = FROZEN_LAKE_ARROWS,
    labels: Mapping[int, str] | None = None,
    holes: Collection[int] = (),
) -> Path:
    """Write the values of a grid's states, and the most probable actions, as a PNG and return its path.

    A cell shows an arrow for its most probable action, several if they tie, and the value.

    Args:
        values: `v(s) (S,)`.
        policy: `pi(a|s) (S, A)`.
        path: file to write; missing folders are made.
        shape: rows and columns of the grid, with `S` cells in all.
        title: heading.
        arrows: symbol of each action; by default those of FrozenLake. `CLIFF_WALKING_ARROWS` is for CliffWalking.
        labels: state -> text that replaces its arrow, such as the goal.
        holes: states that are drawn dark and empty, such as holes and cliffs.

    Raises:
        ValueError: the shapes do not fit, or a value is not finite.
    """
    return save_png(grid_values_figure(values, policy, shape, title, arrows, labels or {}, holes), path)


def grid_values_figure(
    values: Tensor,
    policy: Tensor,
    shape: tuple[int, int],
    title: str | None,
    arrows: Sequence[str],
    labels: Mapping[int, str],
    holes: Collection[int],
) -> Figure:
    """Draw the picture of `plot_grid_values` without writing a file."""
    _check(values, policy, shape, arrows)
    rows, columns = shape
    figure = new_figure(columns * CELL_INCHES + BAR_INCHES, rows * CELL_INCHES + bool(title) * TITLE_INCHES + 0.1)
    axes = figure.add_subplot()
    shown = [value for state, value in enumerate(values.tolist()) if state not in holes]
    low, high = min(shown), max(shown)
    image = axes.imshow(values.view(shape).tolist(), cmap=_colormap(), vmin=low, vmax=high)
    digits = decimals(shown)
    for state, value in enumerate(values.tolist()):
        row, column = divmod(state, columns)
        if state in holes:
            axes.add_patch(_dark_cell(row, column))
            continue
        sign = labels.get(state, greedy_signs(policy[state].tolist(), arrows))
        background = sequential_color((value - low) / (high - low) if high > low else 0.0)
        _write(axes, row, column, sign, f"{value:.{digits}f}".replace("-", "−"), text_color(background))
    _draw_lines(axes, rows, columns)
    bar = figure.colorbar(image, ax=axes, shrink=0.9, aspect=25)
    bar.set_label("value of the state", fontsize=9, color=INK)
    bar.ax.tick_params(labelsize=8, colors=INK)
    axes.set_title(title or "", fontsize=11, color=INK)
    return figure


def _check(values: Tensor, policy: Tensor, shape: tuple[int, int], arrows: Sequence[str]) -> None:
    n_states = math.prod(shape)
    if values.shape != (n_states,) or policy.shape != (n_states, len(arrows)):
        raise ValueError(
            f"values {tuple(values.shape)} and policy {tuple(policy.shape)}: a grid of {shape[0]} x {shape[1]} and "
            f"{len(arrows)} arrows need {(n_states,)} and {(n_states, len(arrows))}."
        )
    if not bool(values.isfinite().all()):
        raise ValueError("values has entries that are not finite: set those of unreachable states to 0.")


def _colormap() -> Colormap:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("values", [tuple(c / 255 for c in stop) for stop in SEQUENTIAL_LIGHT])


def greedy_signs(probabilities: Sequence[float], arrows: Sequence[str]) -> str:
    """Return the arrows of the most probable actions; none if all actions are equally probable."""
    best = [a for a, p in zip(arrows, probabilities, strict=True) if p >= max(probabilities) - 1e-9]
    return "" if len(best) == len(arrows) else "".join(best)


def decimals(values: Sequence[float]) -> int:
    """Count the decimals that show three figures of the largest value (0.415, -1.53); 0 if all are whole numbers."""
    if all(abs(value - round(value)) < 1e-6 for value in values):
        return 0
    return min(max(2 - math.floor(math.log10(max(map(abs, values)))), 0), 3)


def _write(axes: Axes, row: int, column: int, sign: str, value: str, color: str) -> None:
    """Write the symbol of a cell, and the value below it."""
    axes.text(column, row - 0.12, sign, ha="center", va="center", fontsize=12 if len(sign) == 1 else 8, color=color)
    axes.text(column, row + 0.3, value, ha="center", va="center", fontsize=6.5, color=color)


def _dark_cell(row: int, column: int) -> Patch:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=HOLE, edgecolor="none")


def _draw_lines(axes: Axes, rows: int, columns: int) -> None:
    """Draw white lines between the cells; remove the frame, and the numbers of rows and columns."""
    axes.set_xticks([x + 0.5 for x in range(columns - 1)])
    axes.set_yticks([y + 0.5 for y in range(rows - 1)])
    axes.grid(color="white", linewidth=1.2)
    axes.tick_params(length=0, labelbottom=False, labelleft=False)
    for side in axes.spines.values():
        side.set_visible(False)
