"""Every launch config trains on two ranks, and the launch scripts call what exists."""

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from .helpers.processes import free_port, run_script

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "recipes" / "launch"
CONFIGS = sorted(path.stem for path in LAUNCH.glob("*.json"))
ACCELERATE = "fsdp2"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))


def called_with(script: Path, folder: Path, *arguments: str, **variables: str) -> list[str]:
    """What `script` passes to torchrun, and in which directory (last)."""
    fake = folder / "torchrun"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@" "$PWD"\n')
    fake.chmod(0o755)
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "NODES": "2", "HEAD_NODE": "node0", "GPUS": "2"}
    env |= variables
    done = subprocess.run([script, *arguments], env=env, capture_output=True, text=True, check=True, cwd=folder)
    return done.stdout.splitlines()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_gives_torchrun_what_it_accepts(script: Path, tmp_path: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    *arguments, directory = called_with(script, tmp_path, "--output_dir", "a folder")
    parsed = get_args_parser().parse_args(arguments)
    assert Path(directory) == ROOT
    assert (ROOT / parsed.training_script).is_file()
    assert parsed.nproc_per_node == "2"
    assert parsed.training_script_args[-2:] == ["--output_dir", "a folder"]
    option, config = parsed.training_script_args[:2]
    assert option == "--deepspeed" and (ROOT / config).is_file()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_another_recipe(script: Path, tmp_path: Path) -> None:
    *arguments, _ = called_with(script, tmp_path, RECIPE="grpo_variants")
    assert get_args_parser().parse_args(arguments).training_script == "recipes/grpo_variants.py"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["mtp_critic", "grpo_variants", "ppo"])
def test_recipe_has_the_options_that_are_named(recipe: str) -> None:
    done = run_script(f"recipes/{recipe}.py", "--help", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for option in ("--deepspeed", "--model", "--output_dir", "--resume_from_checkpoint"):
        assert f"{option} " in done.stdout


@pytest.mark.parametrize("name", CONFIGS)
def test_config_leaves_the_optimizer_to_the_trainer(name: str) -> None:
    config = json.loads((LAUNCH / f"{name}.json").read_text())
    assert "optimizer" not in config and "scheduler" not in config
    assert config["gradient_clipping"] == "auto"  # DeepSpeed's default became 1.0
    zero = config["zero_optimization"]
    assert zero["stage"] < 3 or zero["stage3_gather_16bit_weights_on_model_save"] is True


def test_accelerate_knows_every_option_of_its_config() -> None:
    config = load_config_from_file(str(LAUNCH / f"{ACCELERATE}.yaml"))
    args = launch_command_parser().parse_args([f"--config_file={LAUNCH / ACCELERATE}.yaml", "recipes/ppo.py"])
    assert config.distributed_type == "FSDP" and config.fsdp_config["fsdp_version"] == 2
    assert all(hasattr(args, option) for option in config.fsdp_config)
    named = re.findall(r"--(\w+)", (LAUNCH / f"{ACCELERATE}.yaml").read_text())
    assert {"config_file", "num_machines"} < set(named)
    assert all(hasattr(args, option) for option in named if option not in ("model", "output_dir"))


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """Two steps in bfloat16, the trainer's default, on two ranks with each config."""
    folder = tmp_path_factory.mktemp("launch")
    tiny_model().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    runs = []
    for name in CONFIGS:
        config = json.loads((LAUNCH / f"{name}.json").read_text())
        # Right for users, but it compiles DeepSpeed's CPU Adam for minutes.
        config["zero_force_ds_cpu_optimizer"] = False
        (folder / f"{name}.json").write_text(json.dumps(config))
        args = {
            "deepspeed": str(folder / f"{name}.json"),
            "bf16": True,
            "per_device_train_batch_size": 4,
            "max_steps": 2,
            "gradient_accumulation_steps": 2,
        }
        runs.append({"out": str(folder / name), "model": str(folder / "model"), "port": free_port(), "args": args})
    args = {key: value for key, value in runs[-1]["args"].items() if key != "deepspeed"}
    runs.append({**runs[-1], "out": str(folder / ACCELERATE), "args": args})
    runs[-1]["accelerate"] = str(LAUNCH / f"{ACCELERATE}.yaml")
    (folder / "runs.json").write_text(json.dumps(runs))
    worker = Path(__file__).parent / "workers" / "critic_worker.py"
    done = run_script(worker, str(folder / "runs.json"), ranks=2, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CONFIGS, ACCELERATE])
def test_config_trains_on_two_ranks(trained: Path, name: str) -> None:
    errors = [path.read_text() for path in (trained / name).glob("error_*.txt")]
    assert not errors, "\n".join(errors)
    log = json.loads((trained / name / "log.json").read_text())
    losses = [entry["loss"] for entry in log["history"] if "loss" in entry]
    assert len(losses) == 2 and all(abs(loss) < 100 for loss in losses)
    assert log["captured"] == ([False, True] if name == ACCELERATE else [True]) * 2  # under FSDP2 a pass fills in
    assert log["sharded"] == ("zero3" in name or name == ACCELERATE)
