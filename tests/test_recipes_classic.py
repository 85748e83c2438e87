"""The recipe of the classic agents and their benchmark: small runs, settings on file, the sums of the table."""

import importlib.util
import inspect
import json
import re
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from rl_plugins import classic
from rl_plugins.classic import Agent, Linear, PPOAgent

FOLDER = Path(__file__).parents[1] / "recipes"
CONFIGS = sorted((FOLDER / "classic").glob("*.yaml"))
AGENTS = {"dqn", "reinforce", "qac", "a2c", "off_policy_ac", "trpo", "ppo"}


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"classic_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return load(FOLDER / "lightning_classic.py")


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load(FOLDER / "benchmarks" / "classic.py")


# The recipe


pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning")


def run(recipe: ModuleType, *options: str, command: str = "fit") -> Any:
    return recipe.main([command, f"--config={FOLDER / 'classic' / 'ppo.yaml'}", *options])


@pytest.mark.slow
def test_two_iterations_from_end_to_end(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is printed and written is what the saved agent does, measured again."""
    monkeypatch.chdir(tmp_path)
    cli = run(recipe, "--model.total_steps=512", "--model.seed=3")
    printed, complaints = capsys.readouterr()
    output = tmp_path / "outputs" / "classic" / "ppo"
    summary = json.loads((output / "summary.json").read_text())
    returns = PPOAgent.load_from_checkpoint(output / "last.ckpt").evaluate(20).returns
    assert summary.pop("seconds") > 0
    assert summary == {
        "agent": "PPOAgent",
        "environment": "CartPole-v1",
        "seed": 3,
        "env_steps": 512,
        "return_mean": returns.mean(),
        "return_std": returns.std(),
        "episodes": 20,
        "episodes_cut_off": 0,
    }
    assert f"return {returns.mean():.1f} ± {returns.std():.1f} over 20 episodes, after 512 env" in printed
    assert "2/2" in printed, "the progress bar"
    for shown in ("rollout/return_mean=", "eval/return_mean=", "time/env_steps=512"):
        assert shown in printed
    assert complaints == ""
    picture = (output / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and len(picture) > 20_000
    assert {path.name for path in output.iterdir()} == {"config.yaml", "curves.png", "last.ckpt", "summary.json"}

    rows = cli.history.rows
    assert [row["step"] for row in rows if "eval/return_mean" in row] == [256, 512]
    trained = [row for row in rows if "train/policy_loss" in row]
    assert trained[-1]["step"] == 512 and trained[-1]["rollout/return_mean"] > 9

    validated = run(recipe, f"--ckpt_path={output / 'last.ckpt'}", "--model.seed=3", command="validate")
    again = validated.trainer.callback_metrics
    assert again["eval/return_mean"].item() == rows[-1]["eval/return_mean"]


@pytest.mark.slow
def test_interrupted_training_goes_on_from_the_last_evaluation(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe, "plot_training_curves", lambda *args, **options: None)  # half of the time
    options = ["--model.total_steps=1024", "--trainer.enable_progress_bar=false", "--trainer.val_check_interval=3"]
    whole = run(recipe, *options, "--trainer.default_root_dir=whole")
    saved = PPOAgent.load_from_checkpoint("whole/last.ckpt").state_dict()
    assert all(torch.equal(saved[name], weight) for name, weight in whole.model.state_dict().items()), (
        "not the third's"
    )
    with monkeypatch.context() as patch:
        patch.setattr(PPOAgent, "loss", failing(PPOAgent.loss, after=3 * 20 + 7))  # minibatches, 20 an iteration
        with pytest.raises(RuntimeError, match="power cut"):
            run(recipe, *options, "--trainer.default_root_dir=cut")
    resumed = run(recipe, *options, "--trainer.default_root_dir=cut", "--ckpt_path=cut/last.ckpt")
    assert resumed.model.runner.steps == 1024
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name

    with pytest.raises(ValueError, match="the checkpoint is CartPole-v1, but here it is MountainCar-v0"):
        run(recipe, *options, "--model.env=MountainCar-v0", "--ckpt_path=cut/last.ckpt")


def failing(method: Any, after: int) -> Any:
    calls = iter(range(after))

    def wrapped(*args: Any) -> Any:
        if next(calls, None) is None:
            raise RuntimeError("power cut")
        return method(*args)

    return wrapped


def test_curves_are_drawn_over_environment_steps(recipe: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("rl_plugins.report.curves.save_png", lambda figure, path: drawn.append(figure))
    rows = [{"step": step, "rollout/return_mean": 1.0 * step, "train/epsilon": 0.5} for step in (10, 20)]
    recipe.plot_training_curves(rows, "any.png", panels=recipe.PANELS, xlabel="environment steps")
    assert [axes.get_title() for axes in drawn[0].axes] == ["Return in training", "Random actions"]
    assert {axes.get_xlabel() for axes in drawn[0].axes} == {"environment steps"}
    recipe.plot_training_curves(rows, "any.png", panels=recipe.PANELS)
    assert {axes.get_xlabel() for axes in drawn[1].axes} == {"optimizer step"}


@pytest.mark.slow
def test_another_agent_and_environment_without_a_file(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recipe, "plot_training_curves", lambda *args, **options: None)
    options = [
        "--model=DQNAgent",
        "--model.env=MountainCar-v0",
        "--model.total_steps=256",
        "--model.learning_starts=0",
    ]
    quiet = ["--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={tmp_path}"]
    cli = recipe.main(["fit", *options, "--model.learning_rate=1e-4", "--model.eval_episodes=1", *quiet])
    assert cli.model.updates == 128 and cli.model.settings.learning_rate == 1e-4
    assert "DQNAgent on MountainCar-v0: return -200.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model=NoAgent", "--model.env=CartPole-v1"], "NoAgent"),
        (["--model=PPOAgent", "--model.env=CartPole-v1", "--model.epsilon=1"], "epsilon"),
        (["--model=PPOAgent"], "env"),
    ],
)
def test_mistakes_are_told_before_any_work(
    recipe: ModuleType, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        recipe.main(["fit", *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("agent", ["PPOAgent", "DQNAgent"])
def test_every_setting_is_explained(recipe: ModuleType, agent: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        recipe.main(["fit", f"--model.help={agent}"])
    shown = capsys.readouterr().out.split("  --model.total_steps", 2)[-1]
    entries = re.split(r"\n  --model\.(\w+) ", shown)  # a text, then names and texts in turns
    texts = dict(zip(["total_steps", *entries[1::2]], entries[::2], strict=True))
    assert set(texts) == {field.name for field in fields(inspect.get_annotations(getattr(classic, agent))["settings"])}
    assert all(re.search("[a-z]+ [a-z]+", text.split("(type")[0]) for text in texts.values()), "words before the type"


# Settings


@pytest.mark.parametrize("agent", [name for name in classic.__all__ if name not in ("Agent", "Linear")])
def test_the_docs_name_every_setting(agent: str) -> None:
    docs = (FOLDER.parent / "docs" / "classic.md").read_text()
    (row,) = (line for line in docs.splitlines() if line.startswith(f"| `{agent}`"))
    shared = docs[docs.index("All have `total_steps`") : docs.index("Episodes that a time limit")]
    for field in fields(inspect.get_annotations(getattr(classic, agent))["settings"]):
        assert f"`{field.name}`" in row + shared, field.name


def test_every_agent_has_settings_that_name_it() -> None:
    assert {path.stem for path in CONFIGS} == AGENTS
    named = {yaml.safe_load(path.read_text())["model"]["class_path"] for path in CONFIGS}
    assert named == {name for name in classic.__all__ if name.endswith("Agent")} - {"Agent"}


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_settings_are_the_agents_own(benchmark: ModuleType, path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    assert config["trainer"] == {"default_root_dir": f"outputs/classic/{path.stem}"}
    module = benchmark.make_ours(path.stem, seed=4, steps=2000)
    assert type(module) is getattr(classic, config["model"]["class_path"])
    assert (module.env, module.seed, module.settings.total_steps) == ("CartPole-v1", 4, 2000)
    for name, value in config["model"]["init_args"].items():
        if name not in ("env", "seed", "total_steps"):
            expected = Linear(**value["init_args"]) if isinstance(value, dict) else value
            assert getattr(module.settings, name) == expected, name


def test_budgets_are_those_of_the_zoo() -> None:
    budgets = {path.stem: yaml.safe_load(path.read_text())["model"]["init_args"]["total_steps"] for path in CONFIGS}
    zoo = {"dqn": 50_000, "a2c": 500_000, "ppo": 100_000, "trpo": 100_000}
    assert budgets == zoo | dict.fromkeys(("reinforce", "qac", "off_policy_ac"), 500_000)


# The benchmark


SAME = {
    "dqn": {
        "batch_size": "batch_size",
        "gradient_steps": "gradient_steps",
        "buffer_size": "buffer_size",
        "exploration_final_eps": "epsilon_end",
    },
    "a2c": {"n_steps": "rollout_steps", "gae_lambda": "gae_lambda", "vf_coef": "value_coef"},
    "ppo": {"n_steps": "rollout_steps", "n_epochs": "epochs", "batch_size": "batch_size", "gae_lambda": "gae_lambda"},
    "trpo": {
        "n_steps": "rollout_steps",
        "target_kl": "max_kl",
        "cg_damping": "cg_damping",
        "batch_size": "batch_size",
    },
}


@pytest.mark.parametrize("agent", SAME)
def test_both_sides_have_the_same_settings(benchmark: ModuleType, agent: str) -> None:
    ours = benchmark.make_ours(agent, seed=0)
    theirs = benchmark.make_theirs(agent, ours)
    settings = ours.settings
    assert (theirs.gamma, theirs.n_envs, theirs.seed) == (settings.gamma, settings.num_envs, 0)
    for their_name, our_name in SAME[agent].items():
        assert getattr(theirs, their_name) == getattr(settings, our_name), our_name
    for remaining in (1.0, 0.25, 0.0):
        rate = settings.learning_rate(remaining) if callable(settings.learning_rate) else settings.learning_rate
        assert theirs.lr_schedule(remaining) == pytest.approx(rate)
    shapes = sorted(tuple(weight.shape) for weight in ours.parameters())
    assert sorted(tuple(weight.shape) for weight in theirs.policy.parameters()) == shapes


def pair(agent: str, seed: int, ours: tuple[float, ...], theirs: tuple[float, ...] | None) -> dict[str, Any]:
    """Seconds, CPU seconds and return of 1000 steps, on each side."""
    sides = {"ours": ours, "theirs": theirs}
    runs = {
        side: {"env_steps": 1000, "seconds": run[0], "cpu_seconds": run[1], "return": run[2], "curve": [[9, 1.0]]}
        for side, run in sides.items()
        if run is not None
    }
    return {"agent": agent, "seed": seed, "steps": 1000, **runs}


PAIRS = [
    # The machine was 10 times slower for the second pair, which must not show in the ratio.
    pair("ppo", 0, (1.0, 1.0, 500.0), (2.0, 3.0, 480.0)),
    pair("ppo", 1, (10.0, 2.0, 400.0), (20.0, 4.0, 100.0)),
    pair("ppo", 2, (1.0, 1.0, 490.0), (1.5, 2.0, 500.0)),
    pair("off_policy_ac", 0, (4.0, 4.0, 399.0), None),
]


def test_medians_are_over_seeds_and_ratios_within_pairs(benchmark: ModuleType) -> None:
    ppo, off_policy = benchmark.summarise(PAIRS)
    assert ppo["ours_returns"] == [500.0, 400.0, 490.0] and ppo["ratio"] == [2.0, 2.0, 1.5]
    assert (ppo["ours_speed"], ppo["theirs_speed"], ppo["cpu_ratio"]) == (1000.0, 500.0, [3.0, 2.0, 2.0])
    assert off_policy["theirs_speed"] is None and off_policy["ratio"] == []
    lines = benchmark.table([ppo, off_policy]).splitlines()
    assert lines[2] == (
        "| ppo | 1,000 | 475 | 490 (400 to 500), 2 of 3 | 480 (100 to 500), 2 of 3 | 500 | 1,000 | 500 "
        "| 2.00 (1.50 to 2.00) | 2.00 (2.00 to 3.00) |"
    )
    assert lines[3] == "| off_policy_ac | 1,000 | 400 | 399 (399 to 399), 0 of 1 | - | - | 250 | - | - | - |"
    assert benchmark.verdicts([ppo, off_policy]) == ["off_policy_ac: median return 399 below 400"]


def test_losses_are_reported(benchmark: ModuleType) -> None:
    slow = [pair("a2c", 0, (2.0, 1.0, 500.0), (1.0, 1.5, 500.0))]
    assert benchmark.verdicts(benchmark.summarise(slow)) == [
        "a2c: 0.50 times as fast as Stable-Baselines3 by the clock, goal 1.0"
    ]


@pytest.mark.slow
def test_speed_only_prints_a_table_and_repeats_nothing(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, plot = tmp_path / "pairs.json", tmp_path / "curves.png"
    options = ["--speed_only", "--agents", "a2c", "reinforce", "--seeds", "1", "--steps", "800"]
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["classic.py", *options, "--json", str(path), "--plot", str(plot)])
    for _ in range(2):
        benchmark.main()
    first, second = capsys.readouterr().out.split("| agent |")[1:]
    assert second.startswith(first.splitlines()[0])
    pairs = json.loads(path.read_text())["pairs"]
    assert [(each["agent"], each["seed"], each["steps"]) for each in pairs] == [("a2c", 1, 800), ("reinforce", 1, 800)]
    a2c = pairs[0]
    assert a2c["ours"]["env_steps"] == a2c["theirs"]["env_steps"] == 800 and "return" not in a2c["ours"]
    ratio = a2c["theirs"]["seconds"] / a2c["ours"]["seconds"]
    assert f"{ratio:.2f} ({ratio:.2f} to {ratio:.2f})" in second
    assert plot.read_bytes().startswith(b"\x89PNG")
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_theirs_begin_where_the_seed_is_odd(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, order in [(0, ["ours", "theirs"]), (1, ["theirs", "ours"])]:
        done = benchmark.run_pair("a2c", seed, 80, 1)
        assert [key for key in done if key in order] == order
        assert isinstance(done["theirs"]["return"], float) and done["ours"]["return"] > 5


def test_every_agent_is_one_of_ours(benchmark: ModuleType) -> None:
    assert set(benchmark.GOALS) == AGENTS and set(benchmark.THEIRS) == set(benchmark.ZOO) == set(SAME)
    assert all(isinstance(benchmark.make_ours(agent, 0, 2000), Agent) for agent in AGENTS)
