"""Learning curves from a `transformers.Trainer`'s `state.log_history`, as one PNG.

Legend: `N` logged points of one metric.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl_plugins.extras import require

# matplotlib comes with an extra that training does not need, and the trainers write files that this layer reads:
# functions that draw import it themselves.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
PANEL_INCHES = (3.6, 2.8)
TITLE_INCHES = 0.4
MARKS_INCHES = 0.3

# Okabe & Ito's palette: its members stay distinct under the common colour-vision deficiencies. Line styles
# change as well, so that a grey print-out still tells the heads apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINE_STYLES = ("-", "--", "-.", ":")
INK = "#333333"
MARK_STYLE: dict[str, Any] = {"color": "#555555", "linewidth": 1.0, "linestyle": (0, (2, 2))}


@dataclass(frozen=True)
class Panel:
    """The content of one panel.

    Args:
        title: Heading of the panel.
        ylabel: The quantity with its unit.
        key: Metric name in the log; `*` stands for a head number, and each number becomes one line.
        band: Metric drawn as a band of plus and minus this much around `key`.
        floor: Points below it are cut off, and counted in a note. (Explained variance starts at minus
            hundreds, which would flatten everything that matters.)
        reference: Height of a thin horizontal line, such as 0 = "no better than the mean".
        log_scale: Use a logarithmic axis where the positive data span more than a factor of 50.
    """

    title: str
    ylabel: str
    key: str
    band: str | None = None
    floor: float | None = None
    reference: float | None = None
    log_scale: bool = False


@dataclass(frozen=True)
class Line:
    """One metric over time: `steps` (N,), `values` (N,), and `band` (N,) where the panel has one."""

    label: str
    steps: list[int]
    values: list[float]
    band: list[float] | None = None


@dataclass(frozen=True)
class PanelData:
    """A panel together with the lines that the log holds for it."""

    panel: Panel
    lines: list[Line]


DEFAULT_PANELS: tuple[Panel, ...] = (
    Panel("Reward", "mean reward", "reward", band="reward_std"),
    Panel(
        "Explained variance of the critic",
        "1 − Var[error] / Var[return]",
        "critic/explained_variance/head_*",
        floor=-1.0,
        reference=0.0,
    ),
    Panel("Value loss", "squared error (reward²)", "critic/value_loss/head_*", log_scale=True),
    Panel("|TD error|", "mean |δ| (reward)", "critic/td_error_abs"),
    Panel("Value gradient norm", "L2 norm", "critic/grad_norm", log_scale=True),
    Panel("Policy entropy", "nats per token", "entropy"),
    Panel("KL to the reference policy", "nats per token", "kl"),
    Panel("Completion length", "tokens, mean", "completions/mean_length"),
    # Where steps are paid, a policy can also earn more by taking more of them.
    Panel("Steps that are paid", "per completion, mean", "step_rewards/per_completion"),
    Panel("Expert load, mean of layers", "MaxVio = max / mean − 1", "moe/max_violation", log_scale=True),
    Panel("Expert load, worst layer", "MaxVio = max / mean − 1", "moe/max_violation_worst", log_scale=True),
    Panel("Entropy of the expert load", "entropy / ln E", "moe/load_entropy"),
    Panel("MoE auxiliary loss", "loss", "moe/aux_loss"),
)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred moving average, shortened at both ends; missing (NaN) points are left out of the mean.

    `out_i = mean(values[j] for |i - j| <= window // 2)`

    Args:
        values: (N,).
        window: Odd number of points.

    Returns:
        (N,); NaN only where a whole window is missing.

    Raises:
        ValueError: `window` is even or below 1.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window must be a positive odd number, not {window}")
    half = window // 2
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [_finite_mean(part) for part in windows]


def _finite_mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def default_window(n_points: int) -> int:
    """About a twentieth of the run, odd: `N = 200 -> 11`; up to 39 points are averaged over 3 at most."""
    return 2 * (n_points // 40) + (3 if 10 <= n_points < 40 else 1)


def select_panels(log_history: Sequence[dict[str, Any]], panels: Sequence[Panel] = DEFAULT_PANELS) -> list[PanelData]:
    """The panels for which the log holds at least one value, each with its lines.

    Args:
        log_history: Dicts with `step` and metric names, as in `trainer.state.log_history`.
        panels: Panels to look for, in the order of drawing.

    Raises:
        ValueError: The log holds none of the metrics.
    """
    found = [PanelData(panel, lines) for panel in panels if (lines := _panel_lines(log_history, panel))]
    if not found:
        raise ValueError(
            f"log_history ({len(log_history)} entries) has none of the expected keys: "
            + ", ".join(panel.key for panel in panels)
            + ". Pass trainer.state.log_history after training, with logging_steps short enough to log."
        )
    return found


def _panel_lines(log_history: Sequence[dict[str, Any]], panel: Panel) -> list[Line]:
    pattern = re.compile(re.escape(panel.key).replace(r"\*", r"(\d+)"))
    heads = {key: match for row in log_history for key in row if (match := pattern.fullmatch(key))}
    # By number, so that head 10 comes after head 2.
    keys = sorted(heads, key=lambda key: [int(group) for group in heads[key].groups()])
    return [_read_line(log_history, key, heads[key].groups(), panel.band) for key in keys]


def _read_line(log_history: Sequence[dict[str, Any]], key: str, head: tuple[str, ...], band: str | None) -> Line:
    rows = [row for row in log_history if key in row]
    deviations = [float(row.get(band, math.nan)) for row in rows] if band else []
    return Line(
        label=f"head {head[0]}" if head else key,
        steps=[int(row["step"]) for row in rows],
        values=[float(row[key]) for row in rows],
        band=deviations if any(map(math.isfinite, deviations)) else None,
    )


def grid_shape(n_panels: int) -> tuple[int, int]:
    """(rows, columns): three columns at most, since a page shows no more at a readable size."""
    columns = 2 if n_panels == 4 else min(n_panels, 3)
    return math.ceil(n_panels / columns), columns


def plot_training_curves(
    log_history: list[dict[str, Any]],
    path: str | Path,
    *,
    title: str | None = None,
    panels: Sequence[Panel] | None = None,
    marks: dict[int, str] | None = None,
    window: int | None = None,
    xlabel: str = "optimizer step",
) -> Path:
    """Write the learning curves of one run as a PNG and return its path.

    Every panel shows the logged values thin and light, and their moving average on top. Metrics that the
    run did not log have no panel.

    Args:
        log_history: Dicts with `step` and metric names, as in `trainer.state.log_history`.
        path: File to write; missing folders are made.
        title: Heading above all panels.
        panels: Panels to draw instead of `DEFAULT_PANELS`.
        marks: Optimizer step -> text; vertical lines such as the end of the value warm-up.
        window: Odd number of points of the moving average; by default about a twentieth of the run.
        xlabel: What `step` counts.

    Raises:
        ValueError: The log holds none of the panels' metrics.
    """
    data = select_panels(log_history, DEFAULT_PANELS if panels is None else panels)
    rows, columns = grid_shape(len(data))
    figure = _new_figure(rows, columns, bool(title), bool(marks))
    for index, item in enumerate(data):
        axes = figure.add_subplot(rows, columns, index + 1)
        _draw_panel(axes, item, window)
        _draw_mark_lines(axes, marks or {})
        _style(axes, item, xlabel if index + columns >= len(data) else None)
    if title:
        figure.suptitle(title, fontsize=13, color=INK)
    if marks:
        _name_marks(figure, marks)
    return save_png(figure, path)


def save_png(figure: Figure, path: str | Path) -> Path:
    """Draw the figure into a file and return its path; missing folders are made."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)
    return path


def _new_figure(rows: int, columns: int, has_title: bool, has_marks: bool) -> Figure:
    height = rows * PANEL_INCHES[1] + has_title * TITLE_INCHES + has_marks * MARKS_INCHES
    return new_figure(columns * PANEL_INCHES[0], height)


def new_figure(width: float, height: float) -> Figure:
    """A white figure of so many inches whose layout makes room for what is drawn."""
    require("report", "matplotlib.figure")
    from matplotlib.figure import Figure

    # Not pyplot: nothing global (backend, list of open figures) changes in the caller's process.
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.06)
    return figure


def _draw_panel(axes: Axes, data: PanelData, window: int | None) -> None:
    if data.panel.reference is not None:
        axes.axhline(data.panel.reference, color="#888888", linewidth=0.8)
    for index, line in enumerate(data.lines):
        points = default_window(len(line.steps)) if window is None else window
        _draw_line(axes, line, COLORS[index % len(COLORS)], LINE_STYLES[index % len(LINE_STYLES)], points)
    if data.panel.log_scale and _spans_decades(data.lines):
        axes.set_yscale("log")
    if data.panel.floor is not None:
        _cut_at(axes, data.lines, data.panel.floor)


def _draw_line(axes: Axes, line: Line, color: str, style: str, window: int) -> None:
    mean = smooth(line.values, window)
    if line.band is not None:
        width = smooth(line.band, window)
        low = [m - w for m, w in zip(mean, width, strict=True)]
        high = [m + w for m, w in zip(mean, width, strict=True)]
        axes.fill_between(line.steps, low, high, color=color, alpha=0.13, linewidth=0)
    # A lone point makes no line; the marker keeps a one-step run visible.
    marker = "o" if len(line.steps) == 1 else None
    axes.plot(line.steps, line.values, color=color, alpha=0.3, linewidth=0.7)
    axes.plot(line.steps, mean, style, color=color, linewidth=1.7, label=line.label, marker=marker)


def _spans_decades(lines: Sequence[Line]) -> bool:
    finite = [value for line in lines for value in line.values if math.isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) / min(finite) > 50


def _cut_at(axes: Axes, lines: Sequence[Line], floor: float) -> None:
    n_below = sum(value < floor for line in lines for value in line.values)
    if n_below == 0:
        return
    # Autoscaling has seen the points that are cut off, and leaves too much room above the others.
    kept = [value for line in lines for value in line.values if value >= floor]
    axes.set_ylim(floor, max([*kept, floor + 1.0]) + 0.08)
    note = f"{n_below} point{'s' if n_below > 1 else ''} below {floor:g}".replace("-", "−")
    axes.text(0.98, 0.03, note, transform=axes.transAxes, ha="right", fontsize=7.5, color="#666666")


def _draw_mark_lines(axes: Axes, marks: dict[int, str]) -> None:
    for step in marks:
        axes.axvline(step, **MARK_STYLE)


def _name_marks(figure: Figure, marks: dict[int, str]) -> None:
    from matplotlib.lines import Line2D

    # Once under the panels: a label inside each panel hides the curves.
    lines = [Line2D([], [], label=f"step {step}: {text}", **MARK_STYLE) for step, text in marks.items()]
    figure.legend(handles=lines, loc="outside lower center", ncols=2, fontsize=9, frameon=False)


def _style(axes: Axes, data: PanelData, xlabel: str | None) -> None:
    has_band = any(line.band is not None for line in data.lines)
    axes.set_title(data.panel.title + (" (band: ± std)" if has_band else ""), fontsize=10, color=INK)
    axes.set_ylabel(data.panel.ylabel + (", log" if axes.get_yscale() == "log" else ""), fontsize=9, color=INK)
    if xlabel is not None:
        axes.set_xlabel(xlabel, fontsize=9, color=INK)
    if len(data.lines) > 1:
        # Above the note on cut-off points, where there may be one.
        place: dict[str, Any] = (
            {} if data.panel.floor is None else {"loc": "lower right", "bbox_to_anchor": (1.0, 0.08)}
        )
        axes.legend(fontsize=8, framealpha=0.8, edgecolor="none", handlelength=2.4, **place)
    style_axes(axes)


def style_axes(axes: Axes) -> None:
    """Whole steps on the x axis, a faint grid, and no frame above and to the right."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
    axes.tick_params(labelsize=8, colors=INK)
    axes.grid(color="#dddddd", linewidth=0.5)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
