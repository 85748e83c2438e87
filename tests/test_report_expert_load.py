"""The log of expert loads and its pictures: the numbers that are read, summed and drawn."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from rl_plugins.moe import ExpertLoadHistory, append_expert_load, read_expert_load
from rl_plugins.report import plot_expert_load, plot_max_violation, select_panels
from rl_plugins.report.expert_plots import (
    color_positions,
    column_sums,
    expert_load_figure,
    layer_labels,
    load_colors,
    max_violation_figure,
    relative_load,
    spaced,
    step_columns,
)

# Two layers of four and two experts, at steps 5 and 10.
LAYERS = ["model.layers.1.mlp.gate", "model.layers.3.mlp.gate"]
FIRST, SECOND = [[1, 2, 3, 2], [6, 2]], [[8, 0, 0, 0], [5, 5]]
HISTORY = ExpertLoadHistory([5, 10], LAYERS, [FIRST, SECOND])


def random_history(n_steps: int, n_layers: int = 2, n_experts: int = 8) -> ExpertLoadHistory:
    counts = np.random.default_rng(0).integers(0, 50, (n_steps, n_layers, n_experts)).tolist()
    return ExpertLoadHistory(
        [2 * (i + 1) for i in range(n_steps)], [f"layers.{i}.gate" for i in range(n_layers)], counts
    )


# ------------------------------------------------------------------------------------------- history


def test_load_by_hand() -> None:
    assert relative_load(HISTORY.tokens(LAYERS[0])).tolist() == [[0.5, 1.0, 1.5, 1.0], [4.0, 0.0, 0.0, 0.0]]
    assert relative_load(HISTORY.tokens(LAYERS[1])).tolist() == [[1.5, 0.5], [1.0, 1.0]]


def test_max_violation_by_hand() -> None:
    assert HISTORY.max_violation().tolist() == [[0.5, 0.5], [3.0, 0.0]]


def test_a_step_without_tokens_has_no_load() -> None:
    assert np.isnan(relative_load(ExpertLoadHistory([1], ["a"], [[[0, 0]]]).tokens("a"))).all()


def test_an_unknown_layer_is_named() -> None:
    with pytest.raises(ValueError, match=r"no layer 'x'; there are model\.layers\.1"):
        HISTORY.tokens("x")


# ---------------------------------------------------------------------------------------------- file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "moe_load.jsonl"


def write(path: Path, *steps: int) -> None:
    for step in steps:
        append_expert_load(path, step, LAYERS, [[step, 0, 0, 0], [1, 1]])


def test_what_is_appended_is_read_back(path: Path) -> None:
    append_expert_load(path, 5, LAYERS, FIRST)
    append_expert_load(path, 10, LAYERS, SECOND)
    assert json.loads(path.read_text().splitlines()[0]) == {"step": 5, "layers": LAYERS, "counts": FIRST}
    assert read_expert_load(path) == HISTORY


@pytest.mark.parametrize(
    ("resumed_at", "steps"), [(15, [5, 10, 15]), (10, [5, 10]), (8, [5, 8]), (3, [3]), (20, [5, 10, 15, 20])]
)
def test_a_resumed_run_replaces_what_it_repeats(path: Path, resumed_at: int, steps: list[int]) -> None:
    write(path, 5, 10, 15)
    append_expert_load(path, resumed_at, LAYERS, [[0, 0, 0, 99], [1, 1]])
    history = read_expert_load(path)
    assert history.steps == steps
    assert history.tokens(LAYERS[0])[:, 0].tolist() == [*steps[:-1], 0]  # the last is the new one
    assert history.tokens(LAYERS[0])[-1, 3] == 99


def test_a_cut_line_is_ignored_and_then_replaced(path: Path) -> None:
    write(path, 5, 10)
    path.write_bytes(path.read_bytes()[:-7])
    assert read_expert_load(path).steps == [5]
    write(path, 15, 20)
    assert read_expert_load(path).steps == [5, 15, 20]
    assert len(path.read_text().splitlines()) == 3


def test_a_file_of_nothing_but_a_cut_line(path: Path) -> None:
    write(path, 5)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="no complete line"):
        read_expert_load(path)
    write(path, 5)
    assert read_expert_load(path).steps == [5]


@pytest.mark.parametrize(
    "line",
    ['{"step": 7, "lay', "", "[]", "3", '{"step": 7}', '{"step": 7, "layers": ["a"], "counts": []}']
    + ['{"step": "7", "layers": ["a"], "counts": [[1]]}', '{"step": 7, "layers": ["a"], "counts": [3]}'],
)
def test_a_broken_line_is_named(path: Path, line: str) -> None:
    write(path, 5)
    with path.open("a") as file:
        file.write(line + "\n")
    write(path, 10)
    with pytest.raises(ValueError, match=r"moe_load\.jsonl, line 2 is broken"):
        read_expert_load(path)


@pytest.mark.parametrize(
    ("layers", "counts"),
    [(["a", "b"], [[1, 1, 1, 1], [1, 1]]), (LAYERS[:1], [[1, 1, 1, 1]]), (LAYERS, [[1, 1, 1], [1, 1]])],
)
def test_layers_that_change_are_refused(path: Path, layers: list[str], counts: list[list[int]]) -> None:
    write(path, 5)
    append_expert_load(path, 10, layers, counts)
    with pytest.raises(ValueError, match="line 2: other layers or numbers of experts than at step 5"):
        read_expert_load(path)


def test_a_new_run_from_the_start_may_have_other_layers(path: Path) -> None:
    write(path, 5, 10)
    append_expert_load(path, 5, ["a"], [[1, 2]])
    assert read_expert_load(path) == ExpertLoadHistory([5], ["a"], [[[1, 2]]])


def test_a_missing_file_says_who_writes_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="balanced training writes it"):
        read_expert_load(tmp_path / "no.jsonl")


def test_append_wants_counts_of_each_layer(path: Path) -> None:
    with pytest.raises(ValueError, match="2 layers but 1 lists"):
        append_expert_load(path, 5, LAYERS, FIRST[:1])
    assert not path.exists()


# ------------------------------------------------------------------------------------ numbers of the map


@pytest.mark.parametrize("n_steps", [1, 7, 100, 101, 250, 500])
def test_columns_keep_every_token(n_steps: int) -> None:
    history = random_history(n_steps)
    edges, groups = step_columns(history.steps)
    tokens = history.tokens("layers.0.gate")
    sums = column_sums(tokens, groups)
    assert sums.shape == (min(n_steps, 100), 8)
    assert (sums.sum(axis=0) == tokens.sum(axis=0)).all()
    assert len(edges) == len(sums) + 1
    assert (np.diff(edges) > 0).all()
    assert edges[-1] == history.steps[-1]


def test_columns_by_hand() -> None:
    edges, groups = step_columns([10, 20, 30, 45, 50], max_columns=2)
    assert edges.tolist() == [0, 30, 50]
    assert [group.tolist() for group in groups] == [[0, 1, 2], [3, 4]]
    assert column_sums(np.array([[1, 0], [2, 0], [4, 0], [8, 1], [16, 1]]), groups).tolist() == [[7, 0], [24, 2]]


def test_the_first_column_reaches_back_as_far_as_the_second() -> None:
    assert step_columns([100, 105])[0].tolist() == [95, 100, 105]
    assert step_columns([1, 11])[0].tolist() == [0, 1, 11]
    assert step_columns([7])[0].tolist() == [6, 7]


def test_color_positions_by_hand() -> None:
    counts = np.array([[8, 4, 4, 2, 32, 0, 7, 7], [0, 0, 0, 0, 0, 0, 0, 0]])  # mean 8
    positions = color_positions(counts)
    assert positions[0, :6].tolist() == [0.0, -1.0, -1.0, -2.0, 2.0, -3.0]
    assert np.isnan(positions[1]).all()
    extreme = color_positions(np.array([[1, 0, 0, 0, 0, 0, 0, 99]]))  # 0.08 and 7.92 times the mean
    assert extreme[0, [0, 7]].tolist() == [-2.0, 2.0]


def test_spaced_layers() -> None:
    assert spaced(3, 12) == [0, 1, 2]
    assert spaced(5, 3) == [0, 2, 4]
    assert spaced(9, 1) == [0]
    chosen = spaced(60, 12)
    assert (len(set(chosen)), chosen[0], chosen[-1]) == (12, 0, 59)
    assert set(np.diff(chosen)) <= {5, 6}
    with pytest.raises(ValueError, match="max_layers=0"):
        spaced(3, 0)


def test_layer_labels() -> None:
    assert layer_labels(LAYERS) == ["layer 1", "layer 3"]
    assert layer_labels(["blocks.2", "blocks.10"]) == ["layer 2", "layer 10"]
    assert layer_labels(["enc.1.gate", "dec.1.gate"]) == ["enc.1.gate", "dec.1.gate"]
    assert layer_labels(["gate", "layers.1.gate"]) == ["gate", "layers.1.gate"]


# --------------------------------------------------------------------------------------- what is drawn


def test_map_draws_positions_of_every_layer() -> None:
    figure = expert_load_figure(HISTORY, "Title", 12)
    *panels, bar = figure.axes
    for panel, layer in zip(panels, LAYERS, strict=True):
        (image,) = panel.collections
        assert image.get_array().reshape(-1, 2).T.tolist() == color_positions(HISTORY.tokens(layer)).tolist()
        assert image.get_clim() == (-2.0, 2.0)
        assert panel.get_xlim() == (0.0, 10.0)
    assert panels[0].get_ylim() == (3.5, -0.5)  # expert 0 on top
    assert [panel.get_title("left") for panel in panels] == ["layer 1", "layer 3"]
    assert [panel.get_title("right") for panel in panels] == ["MaxVio 0.50 → 3.0", "MaxVio 0.50 → 0.00"]
    assert bar.get_ylabel() == "load / mean"
    assert [label.get_text() for label in bar.get_yticklabels()] == ["≤ 1/4", "1/2", "1", "2", "≥ 4"]
    assert figure.get_suptitle() == "Title"


def drawn_color(history: ExpertLoadHistory, step: float, expert: int) -> list[int]:
    """RGB in the middle of a cell of the only panel, from the finished picture."""
    figure = expert_load_figure(history, None, 12)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())
    x, y = figure.axes[0].transData.transform((step, expert))
    return pixels[len(pixels) - 1 - round(y), round(x), :3].tolist()


@pytest.mark.slow
def test_pixels_have_the_colors_of_the_scale() -> None:
    history = ExpertLoadHistory([2, 4], ["a"], [[[16, 0, 0, 0]], [[4, 4, 4, 4]]])
    red, blue, white, black = [178, 24, 43], [33, 102, 172], [246, 246, 246], [0, 0, 0]
    assert drawn_color(history, 1, 0) == red
    assert drawn_color(history, 1, 2) == black
    assert max(abs(a - b) for a, b in zip(drawn_color(history, 3, 2), white, strict=True)) <= 2
    assert drawn_color(ExpertLoadHistory([2], ["a"], [[[1, 99, 99, 99]]]), 1.5, 0) == blue
    assert drawn_color(ExpertLoadHistory([2], ["a"], [[[0, 0, 0, 0]]]), 1.5, 0) == [221, 221, 221]


def test_scale_is_centred_and_tells_starved_from_rare() -> None:
    colors = load_colors()
    low, middle, high, starved = (np.array(colors(x)[:3]) for x in (0.0, 0.5, 1.0, -0.01))
    assert middle.min() > 0.95
    assert low[2] > low[0] and high[0] > high[2]
    assert starved.max() == 0.0
    luminance = [np.dot(colors(x)[:3], [0.2126, 0.7152, 0.0722]) for x in np.linspace(0, 1, 9)]
    assert (np.diff(luminance[:5]) > 0).all() and (np.diff(luminance[4:]) < 0).all()


@pytest.mark.slow
def test_the_heading_says_which_layers_are_left_out() -> None:
    history = random_history(3, n_layers=24)
    figure = expert_load_figure(history, None, 12)
    assert figure.get_suptitle() == "12 of 24 layers, evenly spaced"
    assert len(figure.axes) == 13  # and the colour bar
    assert [a.get_title("left") for a in figure.axes[:2]] == ["layer 0", "layer 2"]
    heading = expert_load_figure(history, "Run", 12).get_suptitle()
    assert heading == "Run (12 of 24 layers, evenly spaced)"
    assert expert_load_figure(history, None, 24).get_suptitle() == ""


@pytest.mark.slow
@pytest.mark.parametrize("n_experts", [4, 64, 256])
def test_every_expert_has_two_pixels(n_experts: int) -> None:
    figure = expert_load_figure(random_history(5, 6, n_experts), "Run", 12)
    FigureCanvasAgg(figure).draw()  # the layout is made here
    assert min(axes.get_window_extent().height for axes in figure.axes[:-1]) >= 2 * n_experts


def test_violation_lines_by_hand() -> None:
    figure = max_violation_figure({"a": HISTORY, "b": random_history(3)}, "Title", 0.1)
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["a"].get_xdata().tolist() == [5, 10]
    assert list(lines["a"].get_ydata()) == [0.5, 1.5]
    band = axes.collections[0].get_paths()[0].vertices
    assert {tuple(point) for point in band} >= {(5.0, 0.5), (10.0, 0.0), (10.0, 3.0)}
    assert set(lines["goal 0.1"].get_ydata()) == {0.1}
    assert axes.get_yscale() == "linear" and axes.get_ylim()[0] == 0
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    ends = [lines[name].get_ydata()[-1] for name in names]
    assert ends == sorted(ends, reverse=True) and set(names) == {"a", "b", "goal 0.1"}


def test_legend_is_beside_the_lines() -> None:
    figure = max_violation_figure({"a run with quite a long name": HISTORY, "b": HISTORY}, None, 0.1)
    FigureCanvasAgg(figure).draw()
    assert figure.legends[0].get_window_extent().x0 > figure.axes[0].get_window_extent().x1


@pytest.mark.parametrize(("goal", "scale"), [(None, "linear"), (0.1, "linear"), (0.01, "log")])
def test_decades_get_a_log_axis(goal: float | None, scale: str) -> None:
    (axes,) = max_violation_figure({"a": HISTORY}, None, goal).axes
    assert axes.get_yscale() == scale
    assert axes.get_ylabel().endswith(", log") == (scale == "log")


def test_long_runs_are_smoothed_over_the_raw_line() -> None:
    history = random_history(200)
    thin, thick = max_violation_figure({"a": history}, None, None).axes[0].lines
    raw = history.max_violation().mean(axis=1)
    assert thin.get_ydata().tolist() == raw.tolist()
    assert thick.get_ydata()[100] == pytest.approx(raw[95:106].mean())


def test_no_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="histories is empty"):
        plot_max_violation({}, tmp_path / "a.png")


@pytest.mark.slow
def test_pictures_are_written(tmp_path: Path) -> None:
    single = ExpertLoadHistory([5], ["gate"], [[[3, 0]]])
    for index, history in enumerate((HISTORY, single)):
        paths = [
            plot_expert_load(history, tmp_path / "new" / f"load{index}.png", title="T"),
            plot_max_violation({"a": history}, tmp_path / "new" / f"vio{index}.png"),
        ]
        assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in paths)


# ------------------------------------------------------------------------------------------ neighbours


def test_training_curves_show_what_the_callback_logs() -> None:
    names = ["max_violation", "max_violation_worst", "load_entropy", "aux_loss"]
    data = select_panels([{"step": 1, **{f"moe/{name}": 0.5 for name in names}}])
    assert [item.panel.key for item in data] == [f"moe/{name}" for name in names]
    assert all(math.isclose(item.lines[0].values[0], 0.5) for item in data)


@pytest.mark.slow
def test_the_pictures_are_imported_without_matplotlib_and_training_imports_no_pictures() -> None:
    package = Path(__file__).parents[1] / "rl_plugins"
    training = [
        *(package / "moe").glob("*.py"),
        package / "trl" / "balancing.py",
        package / "lightning" / "balancing.py",
    ]
    pictures = re.compile(r"^\s*(from|import) (matplotlib|rl_plugins\.report)", re.MULTILINE)
    assert len(training) > 10 and not [path.name for path in training if pictures.search(path.read_text())]
    code = "import sys; sys.modules['matplotlib'] = None\nfrom rl_plugins.report import plot_expert_load"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=package.parent)
