"""The `rl-plugins` command: what it says, what it takes, and a run from beginning to end."""

import dataclasses
import inspect
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import GRPOConfig
from trl.rewards import think_format_reward
from trl.scripts import grpo

import rl_plugins
from rl_plugins import cli
from rl_plugins.signals.options import DraftOptions, HeadOptions, PolicyOptions, PPOValueOptions
from rl_plugins.trl import MTPCriticConfig
from rl_plugins.trl.scripts import online
from rl_plugins.trl.scripts.parser import group_description, group_title

COMMAND = Path(sys.executable).parent / "rl-plugins"
REWARD = """
def odd_digits(completions, **kwargs):
    return [float(sum(c in "13579" for c in text)) for text in completions]
"""


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *arguments], capture_output=True, text=True, **options)


def test_help_is_there_at_once() -> None:
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run("--help")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time, which busy cores do not lengthen as they do the time on the clock.
    assert done.returncode == 0 and used.ru_utime - start.ru_utime < 0.5
    assert all(name in done.stdout for name in cli.COMMANDS)
    assert {*online.TRAINERS, "plot"} == set(cli.COMMANDS)
    loaded = "import sys, rl_plugins.cli; print({'torch', 'trl', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["grpo"], "invalid choice: 'grpo' (choose from 'mtp-critic', 'grpo-variant', 'ppo', 'plot')"),
        ([], "are required: COMMAND"),
    ],
)
def test_what_is_no_command(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("rl-plugins: error: ") and message in line


def test_the_version_is_that_of_the_package() -> None:
    assert run("--version").stdout == f"rl-plugins {rl_plugins.__version__}\n"


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["grpo"]], ids=" ".join)
def test_the_module_is_the_command(arguments: list[str]) -> None:
    module = subprocess.run([sys.executable, "-m", "rl_plugins", *arguments], capture_output=True, text=True)
    command = run(*arguments)
    assert (module.stdout, module.stderr, module.returncode) == (command.stdout, command.stderr, command.returncode)


def options(parser: Any) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


OWN = {
    "mtp-critic": {"--num_mtp_heads", "--lam_policy", "--use_critic", "--phasic_every", "--policy_loss"},
    "grpo-variant": {"--preset", "--advantage", "--policy_loss", "--dynamic_sampling", "--replay_buffer_size"},
    "ppo": {"--preset", "--value_model_path", "--value_learning_rate", "--lam_policy", "--policy_loss"},
}


@pytest.mark.parametrize("command", OWN)
def test_it_takes_all_that_trl_grpo_takes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    ours, host = options(online.make_parser(command)), options(grpo.make_parser())
    assert len(host) > 400 and host < ours
    fields = {*online.TRAINERS[command][0].__dataclass_fields__, "config", "traceback"}
    assert {option.lstrip("-").replace("-", "_").removeprefix("no_") for option in ours - host} <= fields
    assert OWN[command] <= ours - host
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: rl-plugins {command} [-h] [--config FILE] [--OPTION VALUE ...]\n")
    assert all(option in shown for option in ours)


@pytest.mark.parametrize("command", OWN)
def test_options_are_in_the_group_of_the_class_that_declares_them_ours_first(command: str) -> None:
    config = online.TRAINERS[command][0]
    groups = [group for group in online.make_parser(command)._action_groups if group._group_actions][1:]
    titles = [str(group.title) for group in groups]
    ours = [title for title in titles if title.endswith(" options")]
    assert titles[: len(ours)] == ours and titles[len(ours)] == "GRPOConfig of trl", "the hosts' come last"
    declared = {
        field.name: {group_title(base) for base in config.__mro__ if field.name in inspect.get_annotations(base)}
        for field in dataclasses.fields(config)
        if field.init
    }
    seen: dict[str, str] = {}
    for group in groups:
        for action in group._group_actions:
            seen[action.dest] = str(group.title)
    assert all(seen[name] in classes for name, classes in declared.items())
    # One place decides: an option of ours that is declared in options.py is in the group of that class.
    for kind in (HeadOptions, PolicyOptions, DraftOptions):
        assert {seen[field.name] for field in dataclasses.fields(kind)} == {group_title(kind)}
    assert seen["learning_rate"] == "GRPOConfig of trl" or seen["learning_rate"] == "TrainingArguments of transformers"
    assert seen["model_name_or_path"] == "ModelConfig of trl"


def test_titles_of_groups() -> None:
    titles = {kind: group_title(kind) for kind in (HeadOptions, PPOValueOptions, MTPCriticConfig, GRPOConfig)}
    assert [*titles.values()] == ["head options", "PPO value options", "MTP critic options", "GRPOConfig of trl"]
    assert group_description(HeadOptions) == ("Multi-token-prediction heads, and how they learn to predict tokens.")
    assert group_description(MTPCriticConfig) == "Configuration class for the MTPCriticTrainer."


def test_each_command_parses_its_own_options() -> None:
    def parsed(command: str, *given: str) -> Any:
        return online.make_parser(command).parse_args_and_config([*given, "--use_cpu", "--bf16", "False"])[0]

    assert parsed("mtp-critic", "--lam_policy", "0.9").lam_policy == 0.9
    assert parsed("grpo-variant", "--preset", "gspo").preset == "gspo"
    assert parsed("ppo", "--preset", "vpg").preset == "vpg"


def test_rewards_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert online.find_reward("think_format_reward") is think_format_reward
    overlong = online.find_reward("get_soft_overlong_punishment")
    assert overlong([[0] * 1280, [0] * 10]) == [-1.0, 0.0]
    (tmp_path / "rewards_in_cwd.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert online.find_reward("rewards_in_cwd.odd_digits")(["135", "24"]) == [3.0, 0.0]
    with pytest.raises(
        ValueError, match="unknown reward function 'odd_digits'; choose one of accuracy_reward, .*path"
    ):
        online.find_reward("odd_digits")
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        online.find_reward("nowhere.odd_digits")
    with pytest.raises(ImportError, match="has no function even_digits"):
        online.find_reward("rewards_in_cwd.even_digits")


ON_CPU = ["--use_cpu", "--bf16", "False", "--report_to", "none"]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["mtp-critic", "ppo"])
def test_arguments_reach_the_trainer(command: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []

    class Recorder:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            calls.append(("init", (args, kwargs)))
            self.accelerator = SimpleNamespace(print=print, wait_for_everyone=lambda: None)
            self.args = args[2]

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *args, **kwargs: calls.append((name, args or kwargs))

    monkeypatch.setitem(online.TRAINERS, command, (online.TRAINERS[command][0], Recorder))
    monkeypatch.chdir(workplace)
    config = {"datasets": [{"path": "data"}], "reward_model_name_or_path": "a/judge", "lam_policy": 0.5}
    Path("config.yaml").write_text(json.dumps(config))
    arguments = ["--model_name_or_path", "model", "--output_dir", "out", "--config", "config.yaml"]
    arguments += ["--model_revision", "v2", "--model_init_kwargs", '{"attn_implementation": "eager"}']
    arguments += ["--reward_funcs", "think_format_reward", "--use_peft", "--lora_r", "3", "--push_to_hub"]
    cli.main([command, *ON_CPU, *arguments, "--resume_from_checkpoint", "out/checkpoint-1"])
    (_, ((model, rewards, args), kwargs)), *rest = calls
    assert model == "model" and rewards == ["a/judge", think_format_reward] and args.lam_policy == 0.5
    assert args.model_init_kwargs["revision"] == "v2" and args.model_init_kwargs["attn_implementation"] == "eager"
    assert len(kwargs["train_dataset"]) == 32 and kwargs["eval_dataset"] is None
    assert kwargs["peft_config"].r == 3 and kwargs["quantization_config"] is None
    assert rest == [
        ("train", {"resume_from_checkpoint": "out/checkpoint-1"}),
        ("save_model", ("out",)),
        ("create_model_card", {"dataset_name": None}),
        ("push_to_hub", {"dataset_name": None}),
        ("end", {}),
    ]


@pytest.fixture
def workplace(tiny_model: Callable[..., Any], tokenizer: Any, dataset: Dataset, tmp_path: Path) -> Path:
    """A directory with a saved model, a dataset in JSON with two splits, and a reward function."""
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    dataset.select(range(32)).to_json(tmp_path / "data" / "train.jsonl")
    dataset.select(range(32, 40)).to_json(tmp_path / "data" / "test.jsonl")
    (tmp_path / "my_rewards.py").write_text(REWARD)
    return tmp_path


@pytest.mark.slow
def test_a_run_from_the_command_line(workplace: Path) -> None:
    config = {
        "model_name_or_path": "model",
        "dtype": "float32",
        "dataset_name": "data",
        "reward_funcs": ["my_rewards.odd_digits"],
        "max_completion_length": 4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "max_steps": 3,
        "num_mtp_heads": 3,
    }
    (workplace / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    arguments = ["--config", "config.yaml", "--output_dir", "out", "--max_steps", "2", "--eval_strategy", "steps"]
    arguments += ["--eval_steps", "2", "--save_steps", "1", "--head_learning_rate", "1e-2", "--logging_steps", "1"]
    environment = {**os.environ, "HF_HOME": str(workplace / "cache")}
    done = run("mtp-critic", *ON_CPU, *arguments, cwd=workplace, env=environment)
    assert done.returncode == 0, done.stderr
    assert "The policy is in out; README.md there says how to load it." in done.stdout
    assert "Warning" not in done.stderr and "\r" not in done.stdout + done.stderr and "\x1b" not in done.stdout
    out = workplace / "out"
    written = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "mtp_heads.safetensors", "mtp_heads_config.json", "checkpoint-1"} <= written
    assert "This model was trained with a critic inside the policy." in (out / "README.md").read_text()
    heads = load_file(out / "mtp_heads.safetensors")
    assert {name.split(".")[1] for name in heads} == {"0", "1", "2"}
    assert heads["heads.0.value.weight"].any()
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    state = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2  # the command line overrides the file
    assert {"rewards/odd_digits/mean", "critic/value_loss/head_3"} <= set(state["log_history"][0])
    assert any("eval_critic/value_mean" in entry for entry in state["log_history"])

    arguments += ["--max_steps", "3", "--resume_from_checkpoint", "out/checkpoint-2"]
    resumed = run("mtp-critic", *ON_CPU, *arguments, cwd=workplace, env=environment)
    assert resumed.returncode == 0, resumed.stderr
    state = json.loads((out / "checkpoint-3" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3]
