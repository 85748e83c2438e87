"""The map of a grid world: what each cell says, in which colours, and where."""

import math
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from rl_plugins.report import CLIFF_WALKING_ARROWS, FROZEN_LAKE_ARROWS, plot_grid_values
from rl_plugins.report.colors import contrast, sequential_color
from rl_plugins.report.grid_values import HOLE, decimals, greedy_signs, grid_values_figure
from rl_plugins.tabular import MDP, value_iteration

VALUES = torch.tensor([0.5, 0.0, 0.25, 1.0, -0.125, 0.75])
POLICY = torch.tensor(
    [
        [1.0, 0.0, 0.0, 0.0],
        [0.0, 0.5, 0.5, 0.0],
        [0.25, 0.25, 0.25, 0.25],
        [0.0, 0.0, 0.0, 1.0],
        [0.1, 0.2, 0.6, 0.1],
        [0.0, 1.0, 0.0, 0.0],
    ]
)


def cells(figure) -> dict[tuple[int, int], list[str]]:  # type: ignore[no-untyped-def]
    """(row, column) -> the sign and the value."""
    found: dict[tuple[int, int], list[str]] = {}
    for text in figure.axes[0].texts:
        column, row = text.get_position()
        found.setdefault((round(row), round(column)), []).append(text.get_text())
    return found


def test_every_cell_says_its_action_and_value() -> None:
    figure = grid_values_figure(VALUES, POLICY, (2, 3), "a title", FROZEN_LAKE_ARROWS, {3: "goal"}, [4])
    assert cells(figure) == {
        (0, 0): ["←", "0.50"],
        (0, 1): ["↓→", "0.00"],
        (0, 2): ["", "0.25"],
        (1, 0): ["goal", "1.00"],
        (1, 2): ["↓", "0.75"],
    }
    axes = figure.axes[0]
    assert axes.get_title() == "a title"
    image = axes.images[0]
    assert (image.norm.vmin, image.norm.vmax) == (0.0, 1.0)  # without the hole
    assert image.get_array().tolist() == VALUES.view(2, 3).tolist()
    (hole,) = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert hole.get_xy() == (0.5, 0.5) and to_hex(hole.get_facecolor()) == HOLE
    negative = grid_values_figure(VALUES, POLICY, (2, 3), None, FROZEN_LAKE_ARROWS, {}, ())
    assert cells(negative)[1, 1] == ["→", "−0.12"]


@pytest.mark.slow
def test_text_can_be_read_on_its_colour() -> None:
    figure = grid_values_figure(VALUES, POLICY, (2, 3), None, FROZEN_LAKE_ARROWS, {}, [4])
    image = figure.axes[0].images[0]
    for text in figure.axes[0].texts:
        column, row = (round(x) for x in text.get_position())
        background = to_hex(image.cmap(image.norm(float(VALUES[3 * row + column]))))
        assert contrast(to_hex(text.get_color()), background) > 4.4
    assert to_hex(image.cmap(1.0)) == sequential_color(1.0) and to_hex(image.cmap(0.0)) == sequential_color(0.0)


def test_arrows_point_where_gymnasium_goes() -> None:
    """In CliffWalking the best way is along the cliff; on a dry lake every arrow leads to a neighbour worth more."""
    steps = {"←": (0, -1), "↓": (1, 0), "→": (0, 1), "↑": (-1, 0)}
    for name, options, arrows, shape in (
        ("CliffWalking-v1", {}, CLIFF_WALKING_ARROWS, (4, 12)),
        ("FrozenLake-v1", {"is_slippery": False}, FROZEN_LAKE_ARROWS, (4, 4)),
    ):
        mdp = MDP.from_gymnasium(gym.make(name, **options), 0.9)
        plan = value_iteration(mdp)
        figure = grid_values_figure(plan.values, plan.policy, shape, None, arrows, {}, ())
        worth = plan.values.view(shape).clone()
        worth[-1, -1] = 9.0  # the goal
        checked = 0
        for (row, column), (sign, _) in cells(figure).items():
            if not mdp.terminal[row * shape[1] + column] and worth[row, column] != 0:
                down, right = steps[sign]
                assert worth[row + down, column + right] > worth[row, column]
                checked += 1
        assert checked >= 11


def test_signs_and_decimals() -> None:
    assert greedy_signs([0.2, 0.4, 0.4 - 1e-12, 0.0], "abcd") == "bc"
    assert greedy_signs([0.25] * 4, "abcd") == ""
    assert [decimals(x) for x in ([0.4146], [1.534, 0.2], [-12.94], [117.3], [-13.0, 2.0], [0.0], [0.00012])] == [
        3,
        2,
        1,
        0,
        0,
        0,
        3,
    ]


def test_the_file(tmp_path: Path) -> None:
    path = plot_grid_values(VALUES, POLICY, tmp_path / "new" / "grid.png", shape=(3, 2), title="values")
    assert path == tmp_path / "new" / "grid.png"
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    same = plot_grid_values(torch.ones(6), POLICY, tmp_path / "same.png", shape=(2, 3))  # no range of values
    assert same.stat().st_size > 3000


def test_errors(tmp_path: Path) -> None:
    path = tmp_path / "grid.png"
    with pytest.raises(ValueError, match="2 x 2"):
        plot_grid_values(VALUES, POLICY, path, shape=(2, 2))
    with pytest.raises(ValueError, match="2 arrows"):
        plot_grid_values(VALUES, POLICY, path, shape=(2, 3), arrows="←→")
    with pytest.raises(ValueError, match="not finite"):
        plot_grid_values(VALUES * math.nan, POLICY, path, shape=(2, 3))
    assert not path.exists()
