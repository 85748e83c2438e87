"""Logs of runs as files, and `rl-plugins plot`."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from rl_plugins import cli
from rl_plugins.run_logs import find_log, group_runs, label_runs, read_run


def trl_run(folder: Path, *rewards: float, name: str = "trainer_state.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"step": 10 * i, "epoch": 0.1, "reward": reward} for i, reward in enumerate(rewards, 1)]
    (folder / name).write_text(json.dumps({"global_step": 10, "log_history": rows}))
    return folder


# Reading


def test_a_folder_of_trl(tmp_path: Path) -> None:
    rows = [{"step": 10, "epoch": 0.1, "reward": 0.5}]
    run = trl_run(tmp_path / "run", 0.5)
    assert read_run(run) == read_run(str(run)) == read_run(run / "trainer_state.json") == rows


def test_the_last_checkpoint_counts_by_its_number(tmp_path: Path) -> None:
    for step in (900, 1000):
        trl_run(tmp_path / f"checkpoint-{step}", step)
    assert find_log(tmp_path) == tmp_path / "checkpoint-1000" / "trainer_state.json"
    assert find_log(tmp_path / "checkpoint-900").parent.name == "checkpoint-900"
    assert find_log(trl_run(tmp_path, 1.0)) == tmp_path / "trainer_state.json"  # written at the end


def test_a_table_of_lightning(tmp_path: Path) -> None:
    for version in (2, 10):
        folder = tmp_path / "lightning_logs" / f"version_{version}"
        folder.mkdir(parents=True)
        text = f"epoch,reward,kl,step\n0,0.5,,{version}\n0,,nan,7\n"
        (folder / "metrics.csv").write_text(text)
    assert find_log(tmp_path).parent.name == find_log(tmp_path / "lightning_logs").parent.name == "version_10"
    first, second = read_run(tmp_path)
    assert first == {"epoch": 0.0, "reward": 0.5, "step": 10}
    assert second["step"] == 7 and second["kl"] != second["kl"] and "reward" not in second


def test_what_is_no_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none does not exist\. Give the output_dir of a run"):
        read_run(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"has no trainer_state\.json, which TRL writes .* no metrics\.csv"):
        read_run(tmp_path)
    for name, text in (("a.json", "[1]"), ("b.json", "{}"), ("c.json", "no json"), ("d.csv", "step,kl\nx,1\n")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=rf"{name} is neither a trainer_state\.json of TRL nor a metrics\.csv"):
            read_run(tmp_path / name)
    with pytest.raises(ValueError, match=r"trainer_state\.json has no logged metrics yet\. Lower logging_steps"):
        read_run(trl_run(tmp_path / "early"))


# Grouping


@pytest.mark.parametrize(
    ("runs", "labels"),
    [
        (["out/demo"], ["demo"]),
        (["out/critic/seed1", "out/critic/seed2", "out/grpo/seed1"], ["critic", "critic", "grpo"]),
        (["out/critic_seed-1", "out/critic_seed-2"], ["critic", "critic"]),
        (["out/critic-seed=1-long", "out/grpo-seed=1-long"], ["critic-long", "grpo-long"]),
        (["out/seed_1/a", "out/seed_2/a", "out/seed_1/b"], ["a", "a", "b"]),
        (["out/a/1", "out/a/2/trainer_state.json", "out/b/1/checkpoint-50"], ["a", "a", "b"]),
        (["out/heads_1", "out/heads_2", "out/seedless"], ["heads_1", "heads_2", "seedless"]),
        (["logs/a/version_0", "logs/a/version_1/metrics.csv"], ["version_0", "version_1"]),
        (["out/lr/x", "out/lr/x/y"], ["x", "y"]),
    ],
)
def test_settings_are_paths_without_seeds(runs: list[str], labels: list[str]) -> None:
    assert label_runs(runs) == labels


def test_runs_of_equal_labels_are_together(tmp_path: Path) -> None:
    runs = [trl_run(tmp_path / name, reward) for name, reward in (("a", 1.0), ("b", 2.0), ("c", 3.0))]
    settings = group_runs(runs, ["x", "y", "x"])
    assert {name: [log[0]["reward"] for log in logs] for name, logs in settings.items()} == {
        "x": [1.0, 3.0],
        "y": [2.0],
    }
    assert list(group_runs(runs)) == ["a", "b", "c"]
    with pytest.raises(ValueError, match="2 labels for 3 runs"):
        group_runs(runs, ["x", "y"])


# The command


def test_plot_draws_and_says_what_it_drew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        str(trl_run(tmp_path / name, *[0.5] * length)) for name, length in (("a/seed1", 3), ("a/seed2", 2), ("b", 3))
    ]
    picture = tmp_path / "new" / "curves.png"
    cli.main(["plot", *runs, "--output", str(picture), "--metrics", "reward", "--smooth", "1", "--spread", "stderr"])
    width, height = struct.unpack(">II", picture.read_bytes()[16:24])
    assert (width, height) == (540, 510)  # one panel, a row of names, and the line about bands
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [
        f"a: mean of {runs[0]}, {runs[1]}",
        f"b: {runs[2]}",
        f"The curves are in {picture}.",
    ]
    assert shown.err == f"note: {runs[1]} ends at step 20, others of its setting at 30; their mean ends there.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "none does not exist"),
        (["a", "a/trainer_state.json"], "name each run once"),
        (["a", "--labels", "x", "y"], "2 labels for 1 runs"),
        (["a", "--metrics", "rewrad"], "no run has the metric 'rewrad'. a/trainer_state.json has: reward"),
        (["a", "--smooth", "4"], "must be an odd number such as 1 or 11, not '4'"),
        ([], "the following arguments are required: RUN"),
    ],
)
def test_mistakes_are_told(
    tmp_path: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trl_run(tmp_path / "a", 0.5)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["plot", *arguments])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "curves.png").exists()


def test_help_and_mistakes_do_not_wait_for_torch() -> None:
    code = (
        "import sys\nfrom rl_plugins import cli\nsys.argv = ['rl-plugins', 'plot', *sys.argv[1:]]\n"
        "try: cli.main()\nexcept SystemExit: print({'torch', 'numpy', 'matplotlib'} & set(sys.modules))"
    )
    for argument in ("--help", "/no/such/run"):
        done = subprocess.run([sys.executable, "-c", code, argument], capture_output=True, text=True)
        assert done.stdout.endswith("set()\n"), done.stderr
