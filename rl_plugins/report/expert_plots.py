"""Pictures of how evenly experts are used: a map of every expert's load, and the violation of several runs.

Legend: `S` logged steps, `L` layers, `E` experts of a layer, `C` columns of a picture.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from rl_plugins.functional import max_violation
from rl_plugins.report.colors import DIVERGING_LIGHT
from rl_plugins.report.curves import (
    COLORS,
    DPI,
    INK,
    LINE_STYLES,
    TITLE_INCHES,
    default_window,
    new_figure,
    save_png,
    smooth,
    style_axes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

    from rl_plugins.moe.load_log import ExpertLoadHistory

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

MAX_COLUMNS = 100
# Loads below a quarter of the mean and above four times the mean have the colours of the ends. An expert without any
# token has a colour of its own.
LOG2_LIMIT = 2.0
NO_TOKENS = "#000000"
MISSING = "#dddddd"
LOAD_TICKS = {-2: "≤ 1/4", -1: "1/2", 0: "1", 1: "2", 2: "≥ 4"}
PANEL_WIDTH = 2.8
MIN_WIDTH = 4.6
# An expert has at least two pixels: with fewer, some rows are not drawn at all.
MIN_PANEL_HEIGHT = 1.8
PIXELS_PER_EXPERT = 2
BAR_HEIGHT, BAR_WIDTH, BAR_NO_TOKENS = 4.0, 0.16, 0.3
GREY = "#666666"


def plot_expert_load(
    history: ExpertLoadHistory, path: str | Path, *, title: str | None = None, max_layers: int = 12
) -> Path:
    """Write a map of every expert's load over the run, one panel per layer, as a PNG and return its path.

    The colour is `log2(load)`, cut off at a quarter and at four times the mean. An expert without any token is black.
    The text above a panel is the layer's MaxVio ([`~rl_plugins.functional.max_violation`]) in the first and in the
    last column.

    Args:
        history: From `read_expert_load`.
        path: File to write; missing folders are made.
        title: Heading above all panels.
        max_layers: Largest number of panels. Of more layers, evenly spaced ones are shown, and the heading says so.

    Raises:
        ValueError: `max_layers` is below 1.
    """
    return save_png(expert_load_figure(history, title, max_layers), path)


def expert_load_figure(history: ExpertLoadHistory, title: str | None, max_layers: int) -> Figure:
    """Draw the picture of `plot_expert_load` without writing a file."""
    shown = spaced(len(history.layers), max_layers)
    tokens = [history.tokens(history.layers[index]) for index in shown]
    labels = layer_labels(history.layers)
    edges, groups = step_columns(history.steps)
    rows, columns = _grid(len(shown))
    height = max(MIN_PANEL_HEIGHT, 0.6 + PIXELS_PER_EXPERT * max(counts.shape[1] for counts in tokens) / DPI)
    figure = new_figure(max(columns * PANEL_WIDTH, MIN_WIDTH) + 0.9, rows * height + 1.5 * TITLE_INCHES)
    for place, (index, counts) in enumerate(zip(shown, tokens, strict=True)):
        axes = figure.add_subplot(rows, columns, place + 1)
        _draw_load(axes, edges, column_sums(counts, groups))
        axes.set_title(labels[index], fontsize=9, color=INK, loc="left")
        axes.set_ylabel("expert" if place % columns == 0 else "", fontsize=9, color=INK)
        axes.set_xlabel("optimizer step" if place + columns >= len(shown) else "", fontsize=9, color=INK)
    _add_colorbar(figure, min(rows * height - 0.4, BAR_HEIGHT) / (rows * height))
    _add_heading(figure, title, len(shown), len(history.layers))
    return figure


def spaced(n_items: int, limit: int) -> list[int]:
    """Return at most `limit` evenly spaced indices, from the first to the last: `spaced(5, 3) = [0, 2, 4]`.

    Raises:
        ValueError: `limit` is below 1.
    """
    if limit < 1:
        raise ValueError(f"max_layers={limit}: show at least 1")
    if n_items <= limit:
        return list(range(n_items))
    return [round(float(x)) for x in np.linspace(0, n_items - 1, limit)]


def layer_labels(layers: Sequence[str]) -> list[str]:
    """Return "layer 3" for `model.layers.3.mlp.gate` if the numbers tell all layers apart, else the whole names."""
    numbers = [re.search(r"\.(\d+)(\.|$)", layer) for layer in layers]
    short = [f"layer {match[1]}" for match in numbers if match]
    return short if len(set(short)) == len(layers) else list(layers)


def step_columns(steps: Sequence[int], max_columns: int = MAX_COLUMNS) -> tuple[FloatArray, list[IntArray]]:
    """Group consecutive logged steps into at most `max_columns` columns; return edges (C + 1,) and lines of each.

    A line of the log has the counts since the line before it. So the column of lines `a..b` reaches from the step of
    the line before `a` to the step of `b`. The log does not say where the counts of the first line begin: the distance
    between the first two lines is used.
    """
    groups = np.array_split(np.arange(len(steps)), min(len(steps), max_columns))
    gap = steps[1] - steps[0] if len(steps) > 1 else 1
    edges = [max(steps[0] - gap, 0), *(steps[group[-1]] for group in groups)]
    return np.array(edges, dtype=np.float64), groups


def column_sums(counts: IntArray, groups: Sequence[IntArray]) -> IntArray:
    """Add up the tokens of each column: (S, E) -> (C, E)."""
    return np.stack([counts[group].sum(axis=0) for group in groups])


def relative_load(counts: IntArray) -> FloatArray:
    """Divide counts by their mean, `E n_e / sum(n)`, (..., E) -> (..., E); NaN where nothing was counted."""
    mean = counts.mean(axis=-1, keepdims=True)
    return np.divide(counts, mean, out=np.full(counts.shape, np.nan), where=mean > 0)


def color_positions(counts: IntArray) -> FloatArray:
    """Compute `log2(load)` (C, E), cut off at -2 and 2.

    It is -3, below the scale, for an expert without tokens, and NaN in a column without any token.
    """
    load = relative_load(counts)
    # Without the lower limit it would be -inf, which matplotlib draws as missing.
    position = np.log2(load.clip(min=2.0**-LOG2_LIMIT)).clip(max=LOG2_LIMIT)
    return np.where(load == 0, -LOG2_LIMIT - 1, position)


def load_colors() -> Colormap:
    """Make the colour map: blue, white, red below, at and above the mean; black below the scale, grey for NaN."""
    from matplotlib.colors import LinearSegmentedColormap

    stops = [tuple(channel / 255 for channel in color) for color in reversed(DIVERGING_LIGHT)]
    return LinearSegmentedColormap.from_list("load", stops, under=NO_TOKENS, bad=MISSING)


def _grid(n_panels: int) -> tuple[int, int]:
    columns = n_panels if n_panels <= 3 else min(math.ceil(math.sqrt(n_panels)), 6)
    return math.ceil(n_panels / columns), columns


def _draw_load(axes: Axes, edges: FloatArray, counts: IntArray) -> None:
    """Draw (C, E) counts; experts are numbered from 0 at the top."""
    from matplotlib.ticker import MaxNLocator, MultipleLocator

    experts = np.arange(counts.shape[1] + 1) - 0.5
    colors: dict[str, Any] = {"cmap": load_colors(), "vmin": -LOG2_LIMIT, "vmax": LOG2_LIMIT}
    axes.pcolormesh(edges, experts, color_positions(counts).T, **colors)
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MultipleLocator(max(2 ** round(math.log2(counts.shape[1] / 4)), 1)))
    axes.tick_params(labelsize=8, colors=INK)
    first, last = max_violation(torch.from_numpy(counts[[0, -1]])).tolist()
    axes.set_title(f"MaxVio {_short(first)} → {_short(last)}", fontsize=7.5, color=GREY, loc="right")


def _short(number: float) -> str:
    return f"{number:.{2 if number < 1 else 1 if number < 10 else 0}f}"


def _add_colorbar(figure: Figure, share: float) -> None:
    """Add a colour bar as high as this share of the panels, with a lower end for experts without tokens."""
    height = share * (figure.get_figheight() - 1.5 * TITLE_INCHES)
    size: dict[str, Any] = {
        "shrink": share,
        "aspect": height / BAR_WIDTH,
        "extendfrac": BAR_NO_TOKENS / (height - BAR_NO_TOKENS),
    }
    bar = figure.colorbar(figure.axes[0].collections[0], ax=figure.axes, extend="min", extendrect=True, **size)
    bar.set_ticks(list(LOAD_TICKS), labels=list(LOAD_TICKS.values()))
    bar.set_label("load / mean", fontsize=9, color=INK)
    bar.ax.tick_params(labelsize=8, colors=INK)
    # The text is as far from the bar as the numbers of the ticks, and low enough not to touch the lowest number.
    place: dict[str, Any] = {"xy": (1, -size["extendfrac"]), "xycoords": "axes fraction", "xytext": (7, -2)}
    bar.ax.annotate("0 tokens", **place, textcoords="offset points", fontsize=8, color=INK, va="bottom")


def _add_heading(figure: Figure, title: str | None, n_shown: int, n_layers: int) -> None:
    choice = f"{n_shown} of {n_layers} layers, evenly spaced" if n_shown < n_layers else ""
    heading = f"{title} ({choice})" if title and choice else title or choice
    if heading:
        figure.suptitle(textwrap.fill(heading, int(10 * figure.get_figwidth())), fontsize=12, color=INK)
    figure.supxlabel("MaxVio = busiest expert / mean − 1, first → last column", fontsize=7.5, color=GREY)


# The picture of the violation


def plot_max_violation(
    histories: Mapping[str, ExpertLoadHistory],
    path: str | Path,
    *,
    title: str | None = None,
    goal: float | None = None,
) -> Path:
    """Write how unbalanced the experts of several runs are over time, as a PNG, and return its path.

    Every run has one line: MaxVio ([`~rl_plugins.functional.max_violation`]), averaged over layers. In long runs it is
    also averaged over neighbouring steps, and a thin line shows it without this average. The band reaches from the
    best layer to the worst. The legend lists the runs by their last values, the largest first.

    Args:
        histories: Name of the run -> result of `read_expert_load` for it.
        path: File to write; missing folders are made.
        title: Heading.
        goal: Height of a thin dashed line, such as the MaxVio below which no expert is a bottleneck.

    Raises:
        ValueError: There are no runs.
    """
    return save_png(max_violation_figure(histories, title, goal), path)


def max_violation_figure(histories: Mapping[str, ExpertLoadHistory], title: str | None, goal: float | None) -> Figure:
    """Draw the picture of `plot_max_violation` without writing a file."""
    if not histories:
        raise ValueError("histories is empty: there is nothing to show")
    figure = new_figure(7.5, 3.8)
    axes = figure.add_subplot()
    values = {name: history.max_violation() for name, history in histories.items()}  # (S, L)
    for index, (name, history) in enumerate(histories.items()):
        style = {"color": COLORS[index % len(COLORS)], "linestyle": LINE_STYLES[index % len(LINE_STYLES)]}
        _draw_violation(axes, name, history.steps, values[name], style)
    if goal is not None:
        axes.axhline(goal, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), label=f"goal {goal:g}")
    _scale_violation(axes, [*(run.mean(axis=1) for run in values.values()), np.array([goal or np.nan])])
    style_axes(axes)
    axes.set_xlabel("optimizer step", fontsize=9, color=INK)
    axes.set_title(title or "", fontsize=12, color=INK)
    _add_legend(figure, axes, has_bands=any(run.shape[1] > 1 for run in values.values()))
    return figure


def _draw_violation(axes: Axes, name: str, steps: list[int], values: FloatArray, style: dict[str, Any]) -> None:
    window = default_window(len(steps))
    mean, low, high = values.mean(axis=1), values.min(axis=1), values.max(axis=1)
    if values.shape[1] > 1:
        band = smooth(low.tolist(), window), smooth(high.tolist(), window)
        axes.fill_between(steps, *band, color=style["color"], alpha=0.13, linewidth=0)
    if window > 1:
        axes.plot(steps, mean, color=style["color"], alpha=0.3, linewidth=0.7)
    marker = "o" if len(steps) == 1 else None  # a single point makes no line
    axes.plot(steps, smooth(mean.tolist(), window), **style, linewidth=1.7, label=name, marker=marker)


def _scale_violation(axes: Axes, means: Sequence[FloatArray]) -> None:
    everything = np.concatenate(means)
    low, high = np.nanmin(everything), np.nanmax(everything)
    label = "MaxVio = busiest expert / mean − 1"
    if low > 0 and high / low > 50:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        label += ", log"
    else:
        axes.set_ylim(bottom=0)
    axes.set_ylabel(label, fontsize=9, color=INK)


def _add_legend(figure: Figure, axes: Axes, has_bands: bool) -> None:
    """Add a legend beside the lines, in the order of their last values."""
    named: list[Any] = [line for line in axes.lines if not str(line.get_label()).startswith("_")]
    named.sort(key=lambda line: -line.get_ydata()[-1])
    place: dict[str, Any] = {"loc": "outside right center", "fontsize": 8.5, "frameon": False, "alignment": "left"}
    title = "mean of layers\n(band: best to worst)" if has_bands else None
    figure.legend(handles=named, title=title, title_fontsize=8.5, handlelength=2.6, **place)
