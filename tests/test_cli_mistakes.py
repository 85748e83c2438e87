"""Whatever a user gives wrongly to a command is one line on stderr and exit status 2, and a bug is a traceback."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from rl_plugins import cli
from rl_plugins.trl.scripts import online
from rl_plugins.usage import is_mistake, one_line_errors

from .helpers.tiny import make_dataset, make_tiny_model, make_tokenizer

REWARDS = """
import json

def odd_digits(completions, **kwargs):
    return [float(sum(c in "13579" for c in text)) for text in completions]

def buggy(completions, **kwargs):
    return [json.loads("no JSON") for text in completions]

not_callable = 3
"""
BASE = {
    "model_name_or_path": "model",
    "dataset_name": "data",
    "reward_funcs": "my_rewards.odd_digits",
    "output_dir": "out",
    "use_cpu": "True",
    "bf16": "False",
    "report_to": "none",
    "per_device_train_batch_size": "8",
    "max_completion_length": "4",
    "max_steps": "1",
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what a run needs, and with many things that are broken."""
    place = tmp_path_factory.mktemp("workplace")
    for name in ("model", "broken_config", "broken_weights"):
        make_tiny_model().save_pretrained(place / name)
        make_tokenizer().save_pretrained(place / name)
    (place / "broken_config" / "config.json").write_text("{")
    (place / "broken_weights" / "model.safetensors").write_bytes(b"no weights")
    (place / "no_model").mkdir()
    for name in ("data", "no_prompt", "broken_data", "empty_data"):
        (place / name).mkdir()
    make_dataset(32).to_json(place / "data" / "train.jsonl")
    make_dataset(32).rename_column("prompt", "question").to_json(place / "no_prompt" / "train.jsonl")
    (place / "broken_data" / "train.jsonl").write_text('{"prompt": "1+1="}\n{"prompt": \n')
    Dataset.from_dict({"prompt": []}).to_csv(place / "empty_data" / "train.csv")
    (place / "my_rewards.py").write_text(REWARDS)
    (place / "my_broken_rewards.py").write_text("raise ValueError('a bug of the user')\n")
    (place / "a_file").write_text("")
    configs = {
        "no_yaml": "learning_rate: [1",
        "a_list": "- learning_rate",
        "unknown": "learning_rte: 0.1",
        "text": "learning_rate: fast",
        "a_number_as_name": "3: 4",
        "both": json.dumps({"datasets": [{"path": "data"}]}),
        "env": "env: 3",
        "a_choice": "policy_loss: nosuch",
    }
    for name, text in configs.items():
        (place / f"{name}.yaml").write_text(text)
    (place / "latin.yaml").write_bytes("output_dir: \xe9".encode("latin-1"))
    return place


COMMON: dict[str, tuple[list[str], str]] = {
    "an unknown option": (["--learning_rte", "1"], "unknown option --learning_rte; did you mean --learning_rate?"),
    "a stray value": (["stray"], "unexpected value 'stray'"),
    "an option without its value": (["--learning_rate"], "argument --learning_rate"),
    "no number": (["--learning_rate", "fast"], "invalid float value: 'fast'"),
    "a fraction": (["--max_steps", "1.5"], "invalid int value: '1.5'"),
    "no truth value": (["--gradient_checkpointing", "perhaps"], "perhaps"),
    "a negative learning rate": (["--learning_rate", "-1"], "learning_rate"),
    "an empty batch": (["--per_device_train_batch_size", "0"], "per_device_train_batch_size"),
    "temperature 0": (["--temperature", "0"], "temperature"),
    "an empty completion": (["--max_completion_length", "0"], "max_completion_length"),
    "no step": (["--max_steps", "0"], "max_steps=0 does not mean an end at once"),
    "an unknown schedule": (["--lr_scheduler_type", "zigzag"], "invalid choice: 'zigzag'"),
    "an unknown loss": (["--policy_loss", "nosuch"], "invalid choice: 'nosuch'"),
    "options that are no JSON": (
        ["--policy_loss", "dapo", "--policy_loss_kwargs", "{ratio: 1}"],
        "policy_loss_kwargs",
    ),
    "options that are a list": (["--policy_loss", "dapo", "--policy_loss_kwargs", "[1]"], "policy_loss_kwargs"),
    "an option that a loss has not": (["--policy_loss", "dapo", "--policy_loss_kwargs", '{"zeta": 1}'], "zeta"),
    "model options that are no JSON": (["--model_init_kwargs", '{"dtype'], "model_init_kwargs"),
    "no config file": (["--config", "nowhere.yaml"], "argument --config: nowhere.yaml: No such file or directory"),
    "a folder for a config file": (["--config", "data"], "argument --config: data: Is a directory"),
    "a forgotten config file": (["--config"], "argument --config: expected one file"),
    "a config file that is no YAML": (["--config=no_yaml.yaml"], "no_yaml.yaml is no YAML"),
    "a config file in another encoding": (["--config", "latin.yaml"], "latin.yaml is no YAML"),
    "a list in the config file": (["--config", "a_list.yaml"], "must hold lines such as `max_steps: 100`"),
    "an unknown option in the file": (
        ["--config", "unknown.yaml"],
        "in the --config file: unknown option --learning_rte",
    ),
    "no number in the file": (["--config", "text.yaml"], "invalid float value: 'fast'"),
    "a number for a name in the file": (["--config", "a_number_as_name.yaml"], "3 is not the name of an option"),
    "an environment that is a number": (["--config", "env.yaml"], "`env` field should be a dict"),
    "an unknown choice in the file": (["--config", "a_choice.yaml"], "nosuch"),
    "no model": (["--model_name_or_path", "nowhere/model"], "nowhere/model"),
    "a folder without a model": (["--model_name_or_path", "no_model"], "no_model"),
    "a broken config of a model": (["--model_name_or_path", "broken_config"], "broken_config"),
    "broken weights": (["--model_name_or_path", "broken_weights"], "--model_name_or_path broken_weights"),
    "an unknown dtype": (["--dtype", "float7"], "float7"),
    "no dataset": (["--dataset_name", "nowhere/data"], "nowhere/data"),
    "two datasets": (["--config", "both.yaml"], "Give either --dataset_name, or `datasets`"),
    "a dataset that is no JSON": (["--dataset_name", "broken_data"], "--dataset_name broken_data: "),
    "an empty dataset": (["--dataset_name", "empty_data"], "--dataset_name empty_data: "),
    "a dataset without prompts": (["--dataset_name", "no_prompt"], "has no column `prompt`, only question, answer"),
    "a split that is not there": (["--dataset_train_split", "nosuch"], "has no split 'nosuch', only train"),
    "no test split": (["--eval_strategy", "steps", "--eval_steps", "1"], "has no split 'test', only train"),
    "an unknown reward": (["--reward_funcs", "odd_digits"], "unknown reward function 'odd_digits'; choose one of"),
    "a reward of no module": (
        ["--reward_funcs", "nowhere.odd"],
        "there is no module nowhere in the working directory",
    ),
    "a reward that is not there": (["--reward_funcs", "my_rewards.even"], "my_rewards has no function even"),
    "a reward that is a number": (["--reward_funcs", "my_rewards.not_callable"], "has no function not_callable"),
    "no checkpoint": (["--resume_from_checkpoint", "out/checkpoint-7"], "out/checkpoint-7"),
    "no DeepSpeed config": (["--deepspeed", "nowhere.json"], "nowhere.json"),
    "an unknown tracker": (["--report_to", "nosuch"], "nosuch"),
    "an output folder that is a file": (["--output_dir", "a_file"], "a_file"),
    "a missing engine": (["--use_vllm"], "vllm"),
    "drafts in an engine": (["--speculative", "--use_vllm"], "speculative=True drafts"),
    "an unknown adapter": (["--use_peft", "--lora_target_modules", "nosuch"], "nosuch"),
}
OWN: dict[str, dict[str, tuple[list[str], str]]] = {
    "mtp-critic": {
        "no head": (["--num_mtp_heads", "0"], "num_mtp_heads"),
        "an unknown head": (["--mtp_head_type", "twisted"], "invalid choice: 'twisted'"),
        "a step beyond 1": (["--target_tau", "2"], "target_tau"),
        "a discount beyond 1": (["--gamma", "2"], "gamma"),
        "one head ahead": (["--bootstrap_lookahead"], "bootstrap_lookahead averages the forecasts of several heads"),
        "heads beyond the completion": (["--num_mtp_heads", "9"], "num_mtp_heads"),
        "no heads in a folder": (["--mtp_heads_path", "data"], "data"),
        "a moving reference": (["--sync_ref_model", "--beta", "0.1"], "sync_ref_model=True cannot work with a critic"),
        "half a range": (["--reward_range", "1"], "reward_range must be [smallest, largest]"),
    },
    "grpo-variant": {
        "an unknown preset": (["--preset", "dapoo"], "invalid choice: 'dapoo'"),
        "a preset of PPO": (["--preset", "vpg"], "invalid choice: 'vpg'"),
        "an unknown advantage": (["--advantage", "nosuch"], "invalid choice: 'nosuch'"),
        "options of no advantage": (["--advantage_kwargs", '{"k": 4}'], "advantage is None"),
        "no draw": (["--preset", "dapo", "--max_draws", "0"], "max_draws"),
        "a group that does not fit": (["--num_generations", "3"], "num_generations"),
        "a group of one": (["--preset", "grpo", "--num_generations", "1"], "at least 2 generations"),
    },
    "ppo": {
        "a preset of GRPO": (["--preset", "dapo"], "invalid choice: 'dapo'"),
        "no value model": (["--value_model_path", "nowhere/model"], "nowhere/model"),
        "a lambda below 0": (["--lam_policy", "-0.1"], "lam_policy"),
        "an unknown value loss": (["--value_loss_type", "cubed"], "invalid choice: 'cubed'"),
        "a moving reference": (["--sync_ref_model"], "sync_ref_model=True cannot work with a critic"),
    },
}
CASES = [
    pytest.param(command, *case, id=f"{command}: {name}")
    for command in online.TRAINERS
    for name, case in {**COMMON, **OWN[command]}.items()
]


def arguments(*given: str) -> list[str]:
    """Those of a run that works, but for those that are given."""
    names = {word.split("=")[0].lstrip("-") for word in given if word.startswith("--")}
    base = {f"--{name}": value for name, value in BASE.items() if name not in names}
    return [*(word for pair in base.items() for word in pair), *given]


@pytest.fixture
def in_workplace(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(sys, "path", [str(workplace), *sys.path])
    yield workplace
    unset_hf_deepspeed_config()  # which transformers keeps in the process


@pytest.mark.slow
@pytest.mark.parametrize(("command", "given", "message"), CASES)
def test_a_mistake_is_one_line(
    command: str, given: list[str], message: str, in_workplace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, *arguments(*given)])
    written = capfd.readouterr().err
    assert stopped.value.code == 2
    (line,) = written.splitlines()
    assert line.startswith(f"rl-plugins {command}: error: ") and message in line


def test_there_are_many_kinds_of_mistakes() -> None:
    assert all(len({**COMMON, **OWN[command]}) >= 50 for command in online.TRAINERS)


@pytest.mark.slow
def test_a_forgotten_model_dataset_or_reward_is_named(in_workplace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    needed = {"model_name_or_path": "Give --model_name_or_path", "dataset_name": "Give either --dataset_name"}
    for name, message in needed.items():
        given = arguments()
        place = given.index(f"--{name}")
        with pytest.raises(SystemExit, match="2"):
            cli.main(["ppo", *given[:place], *given[place + 2 :]])
        assert message in capfd.readouterr().err


@pytest.mark.slow
def test_a_bug_of_the_user_is_a_traceback(in_workplace: Path) -> None:
    """The errors come out of their file, which a traceback names."""
    with pytest.raises(json.JSONDecodeError):
        cli.main(["ppo", *arguments("--reward_funcs", "my_rewards.buggy")])
    with pytest.raises(ValueError, match="a bug of the user"):
        cli.main(["ppo", *arguments("--reward_funcs", "my_broken_rewards.odd_digits")])


@pytest.mark.slow
def test_a_bug_of_ours_is_a_traceback(in_workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        return 1 + kwargs["train_dataset"]

    config = online.TRAINERS["ppo"][0]
    monkeypatch.setitem(online.TRAINERS, "ppo", (config, broken))
    with pytest.raises(TypeError, match="unsupported operand"):
        cli.main(["ppo", *arguments()])


@pytest.mark.slow
def test_the_traceback_can_be_asked_for(in_workplace: Path) -> None:
    with pytest.raises(ValueError, match="learning_rate must be at least 0"):
        cli.main(["ppo", *arguments("--learning_rate", "-1", "--traceback")])


@pytest.mark.slow
@pytest.mark.parametrize("start", [["-m", "rl_plugins"], ["-m", "rl_plugins.cli"]], ids=" ".join)
def test_a_process_of_its_own_writes_nothing_else(start: list[str], workplace: Path) -> None:
    """Neither warnings of libraries nor progress bars stand beside the line."""
    environment = {**os.environ, "HF_HOME": str(workplace / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    given = ["ppo", *arguments("--resume_from_checkpoint", "out/checkpoint-7")]
    done = subprocess.run(
        [sys.executable, *start, *given], capture_output=True, text=True, cwd=workplace, env=environment
    )
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line == (
        "rl-plugins ppo: error: resume_from_checkpoint='out/checkpoint-7': there is no such folder. Check the path."
    )


# ---------------------------------------------------------------------------------------------- rl_plugins.usage


def raised_by(action: Callable[[], Any]) -> Exception:
    try:
        action()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def raise_value_error() -> None:
    raise ValueError("three is too many")


def test_errors_that_were_raised_on_purpose_are_mistakes() -> None:
    assert is_mistake(raised_by(raise_value_error))
    assert is_mistake(raised_by(lambda: Path("/nowhere").read_text()))
    assert not is_mistake(raised_by(lambda: int("three"))), "an operation failed"
    assert not is_mistake(raised_by(lambda: 1 + "2")), "an operation failed"  # type: ignore[operator]
    assert not is_mistake(raised_by(lambda: [][0])) and not is_mistake(raised_by(lambda: {}["key"]))
    assert not is_mistake(raised_by(raise_value_error), users_code=[__name__]), "it came out of the user's code"
    assert is_mistake(raised_by(raise_value_error), users_code=[f"{__name__}.inner", __name__[:-1]])


def test_work_that_has_begun_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="three"), one_line_errors("command", begun=lambda: True):
        raise_value_error()
    with pytest.raises(SystemExit, match="2"), one_line_errors("command", begun=lambda: False):
        raise ValueError("three is\n  too many")
    assert capsys.readouterr().err == "command: error: three is too many\n"
