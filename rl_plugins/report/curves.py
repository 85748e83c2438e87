"""Learning curves from a `transformers.Trainer`'s `state.log_history`, of one run or of several, as one PNG.

Legend: `N` logged points of one metric.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl_plugins.extras import require

# matplotlib comes with an extra that training does not need, but training may import this file. So the functions that
# draw import matplotlib themselves.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
PANEL_INCHES = (3.6, 2.8)
TITLE_INCHES = 0.4
LEGEND_INCHES = 0.3
LEGEND_COLUMNS = 2

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
        key: Metric name in the log; `*` stands for a head number or a name, and each becomes one line.
        band: Metric whose value is the half width of a band around `key`, such as a standard deviation.
        floor: Lower end of the axis. Points below are cut off, and a note counts them. (Explained variance may start
            at minus several hundred, and the rest of its curve would look flat.)
        reference: Height of a thin horizontal line, such as 0 = "no better than the mean".
        log_scale: Use a logarithmic axis if all data are positive and span more than a factor of 50.
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
    """One metric over time.

    Args:
        label: Head or name that `*` stands for in the metric's name.
        steps: (N,) optimizer steps.
        values: (N,) of one run, or the means of several.
        band: (N,) deviation to both sides, where the panel has one and there is one run.
        spread: Lower and upper edge, (N,) each, of several runs.
        setting: Number of the setting that the runs share.
    """

    label: str
    steps: list[int]
    values: list[float]
    band: list[float] | None = None
    spread: tuple[list[float], list[float]] | None = None
    setting: int = 0


@dataclass(frozen=True)
class PanelData:
    """A panel together with the lines that the log holds for it."""

    panel: Panel
    lines: list[Line]


DEFAULT_PANELS: tuple[Panel, ...] = (
    Panel("Reward", "mean reward", "reward", band="reward_std"),
    Panel(
        "Explained variance of the critic's values",
        "1 − Var[error] / Var[return]",
        "critic/explained_variance/head_*",
        floor=-1.0,
        reference=0.0,
    ),
    Panel("Error of the critic's values", "mean squared error (reward²)", "critic/value_loss/head_*", log_scale=True),
    Panel("Size of the TD error", "mean |δ| (reward)", "critic/td_error_abs"),
    Panel("Gradient of the critic's loss", "L2 norm", "critic/grad_norm", log_scale=True),
    Panel("Entropy of the policy", "nats per token", "entropy"),
    Panel("KL to the reference policy", "nats per token", "kl"),
    Panel("Length of completions", "tokens, mean", "completions/mean_length"),
    # Where steps are paid, a policy can also earn more by taking more of them.
    Panel("Steps that are paid", "per completion, mean", "step_rewards/per_completion"),
    Panel("Expert load, mean of layers", "MaxVio = max / mean − 1", "moe/max_violation", log_scale=True),
    Panel("Expert load, worst layer", "MaxVio = max / mean − 1", "moe/max_violation_worst", log_scale=True),
    Panel("Entropy of the expert load", "entropy / ln E", "moe/load_entropy"),
    Panel("Auxiliary loss of the experts", "loss", "moe/aux_loss"),
)
EVALUATION_PANELS: tuple[Panel, ...] = (
    Panel("Reward on held-out data", "mean reward", "eval_reward", band="eval_reward_std"),
    Panel(
        "Explained variance on held-out data",
        "1 − Var[error] / Var[return]",
        "eval_critic/explained_variance",
        floor=-1.0,
        reference=0.0,
    ),
)
OTHER_PANELS: tuple[Panel, ...] = (
    Panel("Loss", "loss", "loss"),
    Panel("Gradient of the whole loss", "L2 norm", "grad_norm", log_scale=True),
    Panel("Learning rate", "learning rate", "learning_rate"),
    Panel("Tokens so far", "tokens", "num_tokens"),
    Panel("Time of a step", "seconds", "step_time"),
    Panel("Completions cut at the limit", "share", "completions/clipped_ratio"),
    Panel("Groups with equal rewards", "share", "frac_reward_zero_std"),
    Panel("Token loss of the heads", "nats per token", "mtp/token_loss"),
    Panel("Mean of a reward", "mean reward", "rewards/*/mean"),
    Panel("Mean of a reward on held-out data", "mean reward", "eval_rewards/*/mean"),
)
"""Panels that are drawn only on demand."""
SPREADS = {
    "range": "bands: from the smallest to the largest run",
    "stderr": "bands: standard error of the mean, to both sides",
}
"""Kinds of bands around the mean of several runs, and the words for them below the panels."""


def panel_of(key: str) -> Panel:
    """Return the panel of a metric, with a title in words.

    Args:
        key: Metric name as in the log, or a pattern with `*`.

    Returns:
        One of our panels if it shows this metric, else one whose title is made of the name's words.
    """
    for panel in (*EVALUATION_PANELS, *DEFAULT_PANELS, *OTHER_PANELS):
        name = key_pattern(panel.key).fullmatch(key)
        if name is not None:
            what = [_line_name(name.groups())] if "*" not in key and name.groups() else []
            return replace(panel, key=key, title=": ".join([panel.title, *what]))
    words = re.sub("[/_]+", " ", key.removeprefix("eval_")).strip()
    held_out = " on held-out data" if key.startswith("eval_") else ""
    return Panel(words[:1].upper() + words[1:] + held_out, "", key)


def key_pattern(key: str) -> re.Pattern[str]:
    """Return a pattern that matches the names of metrics for which a panel's `key` stands."""
    return re.compile(re.escape(key).replace(r"\*", "([^/]+)"))


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Compute the centred moving average, with a shorter window at both ends; missing (NaN) points are left out.

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
    """Choose an odd window of about a twentieth of the run: `N = 200 -> 11`; at most 3 for fewer than 40 points."""
    return 2 * (n_points // 40) + (3 if 10 <= n_points < 40 else 1)


def select_panels(log_history: Sequence[dict[str, Any]], panels: Sequence[Panel] = DEFAULT_PANELS) -> list[PanelData]:
    """Return the panels for which the log holds at least one value, each with its lines.

    Args:
        log_history: Dicts with `step` and metric names, as in `trainer.state.log_history`.
        panels: Panels to look for, in the order of drawing.

    Raises:
        ValueError: The log holds none of the metrics.
    """
    found = [PanelData(panel, lines) for panel in panels if (lines := _panel_lines(log_history, panel))]
    if not found:
        raise ValueError(
            f"The log ({len(log_history)} entries) has none of these metrics: "
            + ", ".join(panel.key for panel in panels)
            + ". Name metrics that it has, or train with smaller logging_steps."
        )
    return found


def _panel_lines(log_history: Sequence[dict[str, Any]], panel: Panel) -> list[Line]:
    pattern = key_pattern(panel.key)
    names = {key: match.groups() for row in log_history for key in row if (match := pattern.fullmatch(key))}
    keys = sorted(names, key=lambda key: [_rank(name) for name in names[key]])
    return [_read_line(log_history, key, _line_name(names[key]) or key, panel.band) for key in keys]


def _rank(name: str) -> tuple[float, str]:
    """Return a sort key: numbers by size, so that head 10 comes after head 2, then names in alphabetical order."""
    return (int(name), "") if name.isdigit() else (math.inf, name)


def _line_name(names: tuple[str, ...]) -> str:
    """Return words for the parts that `*` stands for: the name of a reward, or the number of a head."""
    return ", ".join(f"head {name}" if name.isdigit() else name for name in names)


def _read_line(log_history: Sequence[dict[str, Any]], key: str, label: str, band: str | None) -> Line:
    rows = [row for row in log_history if key in row]
    deviations = [float(row.get(band, math.nan)) for row in rows] if band else []
    return Line(
        label=label,
        steps=[int(row["step"]) for row in rows],
        values=[float(row[key]) for row in rows],
        band=deviations if any(map(math.isfinite, deviations)) else None,
    )


def merge_panels(
    settings: Mapping[str, Sequence[Sequence[dict[str, Any]]]],
    panels: Sequence[Panel] = DEFAULT_PANELS,
    *,
    window: int | None = None,
    spread: str = "range",
) -> list[PanelData]:
    """Return the panels for which any run has data; runs of one setting become their mean and a band.

    The mean is over the smoothed curves, on the steps that all runs of the setting have reached. A run is interpolated
    linearly between its points.

    Args:
        settings: Label of a setting -> logs of its runs, which differ in their seeds.
        panels: Panels to look for, in the order of drawing.
        window: Odd number of points of the moving average; by default about a twentieth of the run.
        spread: `range` or `stderr`, which the bands show.

    Raises:
        ValueError: Unknown `spread`, no setting, a setting without runs, or none of the metrics.
    """
    if spread not in SPREADS:
        raise ValueError(f"spread must be one of {', '.join(SPREADS)}, not {spread!r}")
    if not settings or not all(settings.values()):
        raise ValueError("every setting needs the log of at least one run")
    found = []
    for panel in panels:
        lines = []
        for number, logs in enumerate(settings.values()):
            of_runs: dict[str, list[Line]] = {}
            for log in logs:
                for line in _panel_lines(log, panel):
                    of_runs.setdefault(line.label, []).append(line)
            merged = [replace(_merge(runs, window, spread), setting=number) for runs in of_runs.values()]
            # With several settings, the bands of deviations within a batch would hide each other.
            lines += merged if len(settings) == 1 else [replace(line, band=None) for line in merged]
        if lines:
            found.append(PanelData(panel, lines))
    return found or select_panels([row for logs in settings.values() for log in logs for row in log], panels)


def _merge(runs: Sequence[Line], window: int | None, spread: str) -> Line:
    import numpy

    if len(runs) == 1:
        return runs[0]
    curves = []
    for run in runs:
        means = smooth(run.values, default_window(len(run.steps)) if window is None else window)
        # A resumed run logs some steps twice: the later entry counts.
        points = {step: mean for step, mean in zip(run.steps, means, strict=True) if math.isfinite(mean)}
        if points:
            curves.append(dict(sorted(points.items())))
    start, end = (max(min(curve) for curve in curves), min(max(curve) for curve in curves)) if curves else (0, -1)
    steps = sorted({step for curve in curves for step in curve if start <= step <= end})
    values = numpy.array([numpy.interp(steps, list(curve), list(curve.values())) for curve in curves])
    if not steps:
        return Line(runs[0].label, [], [])
    mean, low, high = values.mean(0), values.min(0), values.max(0)
    if spread == "stderr" and len(curves) > 1:
        error = values.std(0, ddof=1) / math.sqrt(len(curves))
        low, high = mean - error, mean + error
    return Line(runs[0].label, steps, mean.tolist(), spread=(low.tolist(), high.tolist()))


def grid_rows(n_panels: int) -> list[int]:
    """Return the number of panels of every row, so that no cell stays empty.

    A row has at most three panels, since a page shows no more at a readable size.
    """
    rows = math.ceil(n_panels / (2 if n_panels == 4 else 3))
    fewest, more = divmod(n_panels, rows)
    return [fewest + (row < more) for row in range(rows)]


def plot_training_curves(
    log_history: Sequence[dict[str, Any]] | Mapping[str, Sequence[Sequence[dict[str, Any]]]],
    path: str | Path,
    *,
    title: str | None = None,
    panels: Sequence[Panel] | None = None,
    marks: dict[int, str] | None = None,
    window: int | None = None,
    xlabel: str = "optimizer step",
    spread: str = "range",
) -> Path:
    """Write the learning curves of one run, or of several, as a PNG and return its path.

    With one run, every panel shows the logged values thin and light, and their moving average on top. Several runs of
    one setting become the mean of their moving averages, with a band, and every setting has its colour. Metrics that
    no run logged have no panel.

    Args:
        log_history: Dicts with `step` and metric names, as in `trainer.state.log_history`. For several runs, a
            mapping: label of a setting -> such lists, one for each seed (`group_runs` reads them from files).
        path: File to write; missing folders are made.
        title: Heading above all panels.
        panels: Panels to draw instead of `DEFAULT_PANELS`.
        marks: Optimizer step -> text of a vertical line there, such as the end of the value warm-up.
        window: Odd number of points of the moving average; by default about a twentieth of the run.
        xlabel: Label of the x axis: the unit that `step` counts.
        spread: Bands around the mean of several runs: `range`, from the smallest to the largest, or `stderr`, the
            standard error of the mean. The picture says which.

    Raises:
        ValueError: The logs hold none of the panels' metrics, or `spread` is unknown.
    """
    require("report", "matplotlib.figure")
    settings = log_history if isinstance(log_history, Mapping) else {"": [log_history]}
    panels = DEFAULT_PANELS if panels is None else panels
    data = merge_panels(settings, panels, window=window, spread=spread)
    legend = _legend_entries(settings, marks or {})
    note = f"lines: means over runs; {SPREADS[spread]}" if any(len(logs) > 1 for logs in settings.values()) else None
    rows = grid_rows(len(data))
    height = len(rows) * PANEL_INCHES[1] + bool(title) * TITLE_INCHES
    height += LEGEND_INCHES * (math.ceil(len(legend) / LEGEND_COLUMNS) + bool(note))
    figure = new_figure(rows[0] * PANEL_INCHES[0], height)
    # Rows of two and rows of three panels are equally wide.
    units = math.lcm(*rows)
    grid = figure.add_gridspec(len(rows), units)
    cells = [(row, k * units // size, (k + 1) * units // size) for row, size in enumerate(rows) for k in range(size)]
    for item, (row, start, stop) in zip(data, cells, strict=True):
        axes = figure.add_subplot(grid[row, start:stop])
        _draw_panel(axes, item, window, len(settings))
        _draw_mark_lines(axes, marks or {})
        _style(axes, item, xlabel if row == len(rows) - 1 else None, len(settings))
    if title:
        figure.suptitle(title, fontsize=13, color=INK)
    if legend or note:
        place: dict[str, Any] = {"loc": "outside lower center", "ncols": LEGEND_COLUMNS, "fontsize": 9}
        figure.legend(handles=legend, title=note, title_fontsize=9, frameon=False, **place)
    return save_png(figure, path)


def _legend_entries(settings: Mapping[str, Sequence[Any]], marks: dict[int, str]) -> list[Any]:
    """Make the legend below all panels: colours of settings, and marks. Inside a panel it would hide curves."""
    from matplotlib.lines import Line2D

    entries = []
    for number, (label, logs) in enumerate(settings.items()):
        if label and (len(settings) > 1 or len(logs) > 1):
            runs = f" ({len(logs)} runs)" if len(logs) > 1 else ""
            style: dict[str, Any] = {"color": COLORS[number % len(COLORS)], "linewidth": 1.7}
            style["linestyle"] = LINE_STYLES[number // len(COLORS) % len(LINE_STYLES)]
            entries.append(Line2D([], [], label=label + runs, **style))
    return entries + [Line2D([], [], label=f"step {step}: {text}", **MARK_STYLE) for step, text in marks.items()]


def save_png(figure: Figure, path: str | Path) -> Path:
    """Draw the figure into a file and return its path; missing folders are made."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)
    return path


def new_figure(width: float, height: float) -> Figure:
    """Make a white figure of this size in inches, whose layout makes room for titles and labels."""
    require("report", "matplotlib.figure")
    from matplotlib.figure import Figure

    # Not pyplot: nothing global (backend, list of open figures) changes in the caller's process.
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.06)
    return figure


def _draw_panel(axes: Axes, data: PanelData, window: int | None, n_settings: int) -> None:
    if data.panel.reference is not None:
        axes.axhline(data.panel.reference, color="#888888", linewidth=0.8)
    for index, line in enumerate(data.lines):
        points = default_window(len(line.steps)) if window is None else window
        _draw_line(axes, line, *_look(data, index, n_settings), points)
    if data.panel.log_scale and _spans_decades(data.lines):
        axes.set_yscale("log")
    if data.panel.floor is not None:
        _cut_at(axes, data.lines, data.panel.floor)


def _look(data: PanelData, index: int, n_settings: int) -> tuple[str, str]:
    """Return colour and line style of a line: the colour tells settings apart, or heads if there is one setting."""
    if n_settings == 1:
        return COLORS[index % len(COLORS)], LINE_STYLES[index % len(LINE_STYLES)]
    line = data.lines[index]
    style = _line_names(data).index(line.label) + line.setting // len(COLORS)
    return COLORS[line.setting % len(COLORS)], LINE_STYLES[style % len(LINE_STYLES)]


def _line_names(data: PanelData) -> list[str]:
    return list(dict.fromkeys(line.label for line in data.lines))


def _draw_line(axes: Axes, line: Line, color: str, style: str, window: int) -> None:
    # The mean of several runs is smooth already.
    mean = smooth(line.values, window) if line.spread is None else line.values
    edges = line.spread
    if line.band is not None:
        width = smooth(line.band, window)
        edges = ([m - w for m, w in zip(mean, width, strict=True)], [m + w for m, w in zip(mean, width, strict=True)])
    if edges is not None:
        axes.fill_between(line.steps, *edges, color=color, alpha=0.13 if line.spread is None else 0.2, linewidth=0)
    # A single point makes no line; the marker keeps a run of one step visible.
    marker = "o" if len(line.steps) == 1 else None
    if line.spread is None:
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


def _style(axes: Axes, data: PanelData, xlabel: str | None, n_settings: int) -> None:
    has_band = any(line.band is not None for line in data.lines)
    axes.set_title(data.panel.title + (" (band: ± standard deviation)" if has_band else ""), fontsize=10, color=INK)
    axes.set_ylabel(data.panel.ylabel + (", log" if axes.get_yscale() == "log" else ""), fontsize=9, color=INK)
    if xlabel is not None:
        axes.set_xlabel(xlabel, fontsize=9, color=INK)
    names = _line_names(data)
    if len(names) > 1:
        # Above the note on cut-off points, where there may be one.
        place: dict[str, Any] = (
            {} if data.panel.floor is None else {"loc": "lower right", "bbox_to_anchor": (1.0, 0.08)}
        )
        place["handles"] = _head_entries(axes, names, n_settings)
        axes.legend(fontsize=8, framealpha=0.8, edgecolor="none", handlelength=2.4, **place)
    style_axes(axes)


def _head_entries(axes: Axes, names: Sequence[str], n_settings: int) -> list[Any]:
    """Make one entry for each head; where colours stand for settings, it shows the line style only."""
    if n_settings == 1:
        return list(axes.get_legend_handles_labels()[0])
    from matplotlib.lines import Line2D

    styles: list[Any] = [LINE_STYLES[index % len(LINE_STYLES)] for index in range(len(names))]
    return [Line2D([], [], color=INK, linestyle=style, label=name) for name, style in zip(names, styles, strict=True)]


def style_axes(axes: Axes) -> None:
    """Give axes whole steps on the x axis, a faint grid, and no frame above and to the right."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
    axes.tick_params(labelsize=8, colors=INK)
    axes.grid(color="#dddddd", linewidth=0.5)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
