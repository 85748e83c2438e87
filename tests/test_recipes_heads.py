"""The benchmark of heads: what it averages, and that its oracle is exact."""

import json
import math
import re
import sys
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from .helpers.processes import run_script

SCRIPT = Path(__file__).parents[1] / "recipes" / "benchmarks" / "heads.py"


@pytest.fixture(scope="module")
def heads() -> ModuleType:
    spec = util.spec_from_file_location("heads", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])  # in which the script puts the folder of the recipes
        spec.loader.exec_module(module)
    return module


def recipe_run(head_type: str, k: int, seed: int, cpu: float, end: float) -> dict[str, Any]:
    explained = {"quarter": end / 2, "end": end, "training": end / 4}
    run = {"part": "recipe", "heads": head_type, "K": k, "seed": seed, "cpu": cpu, "accuracy": 0.5}
    return {**run, "explained_variance": explained, "acceptance": [0.5 + 0.1 * seed] * k}


def test_costs_are_ratios_within_a_seed(heads: ModuleType) -> None:
    """The machine is 10 times slower for seed 2, which must not show in the ratio."""
    runs = [
        recipe_run("parallel", 1, 1, 2.0, 0.4),
        recipe_run("sequential", 2, 1, 3.0, 0.6),
        recipe_run("parallel", 1, 2, 20.0, 0.2),
        recipe_run("sequential", 2, 2, 30.0, 0.8),
        recipe_run("sequential", 2, 3, 99.0, 0.7),  # a seed without the unit
        {"part": "exact", "reward": "hard", "heads": "sequential", "K": 2, "seed": 1, "scores": [0.9, 0.1]},
    ]
    one, two = heads.summarise(runs)
    assert (one["heads"], one["K"], one["cost"], one["hard"]) == ("parallel", 1, [1.0, 1.0], [])
    assert (two["cost"], two["end"], two["quarter"]) == ([1.5, 1.5], [0.6, 0.8, 0.7], [0.3, 0.4, 0.35])
    assert two["hard"] == [0.9], "the first head is the critic"
    assert two["acceptance"] == [[0.6, 0.7, 0.8]] * 2
    assert heads.mean_and_range(two["end"]) == "0.70 (0.60 to 0.80)"
    assert heads.mean_and_range([0.5]) == "0.50" and heads.mean_and_range([]) == ""


def test_undefined_figures_leave_the_others(heads: ModuleType) -> None:
    assert heads.mean_and_range([0.5, math.nan, 0.7]) == "0.60 (0.50 to 0.70)"
    assert heads.mean_and_range([math.nan]) == ""


def test_figures_of_the_log(heads: ModuleType) -> None:
    key = "critic/explained_variance"
    history = [
        {"step": 0, f"eval_{key}": 0.0},
        {"step": 2, key: 0.1},
        {"step": 2, f"eval_{key}": 0.2},
        {"step": 4, key: 0.3},
        {"step": 8, f"eval_{key}": 0.6},
    ]
    assert heads.explained(history, 8) == {"quarter": 0.2, "end": 0.6, "training": 0.2}
    undefined = heads.explained(history[:1], 8)  # all were right, or all wrong
    assert [math.isnan(undefined[name]) for name in ("quarter", "end", "training")] == [True] * 3


def test_names_of_heads(heads: ModuleType) -> None:
    assert heads.read_cells(["parallel2", "sequential11"]) == [("parallel", 2), ("sequential", 11)]
    for name in ("parallel", "3", "serial2", "parallel0", "parallel2x"):
        with pytest.raises(ValueError, match=f"'{name}' are no heads"):
            heads.read_cells([name])


def test_rewards_and_accuracy_by_hand(heads: ModuleType) -> None:
    strings = torch.tensor([[1, 2, 0, 1, 2, 1], [2, 1, 3, 2, 2, 0], [0, 1, 2, 0, 3, 3]])
    assert heads.REWARDS["easy"](strings).tolist() == [1.0, -1.0, 0.0]
    assert heads.REWARDS["hard"](strings).tolist() == [1.0, 0.0, 0.5]
    exact = torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert heads.accuracy_of(exact, exact) == 1.0
    assert heads.accuracy_of(torch.full((4,), 1.5), exact) == 0.0
    assert heads.accuracy_of(exact + 0.5, exact) == pytest.approx(0.8), "a bias counts"


@pytest.mark.parametrize(("head_type", "number"), [("parallel", 2), ("sequential", 3)])
def test_the_error_of_heads_that_have_learnt_nothing(heads: ModuleType, head_type: str, number: int) -> None:
    """They say 0, which is no better than the mean."""
    scores = heads.exact_scores(head_type, number, "hard", 2, 0)
    assert len(scores) == number and max(scores) <= 0.0


@pytest.mark.slow
def test_a_run_in_small(tmp_path: Path) -> None:
    """Every cell starts from one policy, and what is done is not repeated."""
    tiny = "--warm-start-steps=2 --head-steps=2 --max-steps=8 --exact-steps=2 --train-items=1200 --eval-items=8"
    options = f"{tiny} --hidden-size=32 --layers=1 --seeds 1 --heads parallel1 sequential2".split()
    path = tmp_path / "heads.json"
    for _ in range(2):
        done = run_script(str(SCRIPT), *options, f"--folder={tmp_path}", f"--json={path}")
        assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    assert [(run["part"], run["heads"], run["K"]) for run in report["runs"]] == [
        (part, *cell) for cell in (("parallel", 1), ("sequential", 2)) for part in ("recipe", "exact", "exact")
    ]
    recipe = [run for run in report["runs"] if run["part"] == "recipe"]
    assert len({run["accuracy_before"] for run in recipe}) == 1 and min(run["cpu"] for run in recipe) > 0
    assert [len(run["acceptance"]) for run in recipe] == [1, 2]
    assert report["rows"][0]["cost"] == [1.0]
    assert re.search(r"^\| sequential \| 2 \| -?[\d.]+ \|", done.stdout, re.M)
