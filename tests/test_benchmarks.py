"""The overhead benchmark: it compares like with like, and its figures are figures."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "recipes" / "benchmarks" / "overhead.py"
TINY = [
    "--vocab-size=128",
    "--hidden-size=64",
    "--layers=2",
    "--prompt-length=4",
    "--completion-length=6",
    "--steps=2",
]


@pytest.fixture(scope="module")
def overhead() -> ModuleType:
    spec = importlib.util.spec_from_file_location("overhead", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["overhead"] = module  # where dataclasses look up the annotations
    spec.loader.exec_module(module)
    return module


def run(trainer: str, step: list[float], completions: list[str]) -> dict[str, Any]:
    parts = dict.fromkeys(("rollout", "update", "cpu", "memory"), [2.0])
    return {"trainer": trainer, "step": step, "completions": completions, **parts}


def test_ratios_are_taken_within_repetitions(overhead: ModuleType) -> None:
    """The machine is 10 times slower in the second repetition, which must not show in the ratio."""
    runs = [
        run("grpo", [1.0, 2.0, 3.0], ["a"]),
        run("critic", [3.0], ["a"]),
        run("critic", [30.0], ["a"]),
        run("grpo", [20.0], ["a"]),
    ]
    report = overhead.compare(runs)
    assert report["median"]["grpo"]["step"] == 2.5
    assert report["ratio"]["critic"]["step"] == 1.5
    assert report["ratio"]["critic"]["memory"] == 1.0


def test_different_completions_are_an_error(overhead: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="different completions"):
        overhead.compare([run("grpo", [1.0], ["a"]), run("critic", [1.0], ["b"])])


@pytest.mark.slow
def test_both_trainers_run_on_the_same_completions(tmp_path: Path) -> None:
    path = tmp_path / "overhead.json"
    command = [sys.executable, str(SCRIPT), *TINY, "--repeats=1", f"--json={path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "identical completions in all 2 runs" in done.stdout
    report = json.loads(path.read_text())
    grpo, critic = report["runs"]
    assert (grpo["trainer"], critic["trainer"]) == ("grpo", "critic")
    assert grpo["completions"] == critic["completions"]
    assert len(set(grpo["completions"])) == 3, "every step has completions of its own"
    assert critic["parameters"] > grpo["parameters"], "the heads are part of the critic's model"
    for name in ("step", "rollout", "update", "cpu"):
        assert all(len(r[name]) == 2 and min(r[name]) > 0 for r in (grpo, critic)), name
        assert report["ratio"]["critic"][name] > 0
    for r in (grpo, critic):
        assert all(abs(s - a - b) < 1e-6 for s, a, b in zip(r["step"], r["rollout"], r["update"], strict=True))
    assert 0 < report["ratio"]["critic"]["step"] < 10
