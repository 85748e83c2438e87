"""Train online from the command line; takes the arguments of `trl grpo` and those of our trainers.

    rl-plugins mtp-critic --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/DeepMath-103K \
        --reward_funcs accuracy_reward --output_dir qwen3-critic

`rl-plugins grpo-variant --preset dapo ...` and `rl-plugins ppo ...` work in the same way. Give a reward function by
TRL's name or by a dotted path (`my_rewards.brevity`, looked up in the working directory first). `--config file.yaml`
reads arguments from a file.
"""

import inspect
import os
import sys
from importlib import import_module
from typing import Any

import datasets
import transformers
from datasets import load_dataset
from datasets.exceptions import DatasetsError
from packaging.version import Version
from safetensors import SafetensorError

from rl_plugins.hooks import require_hooks

require_hooks("rl_plugins.trl.scripts")

from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    get_dataset,
    get_peft_config,
    get_quantization_config,
    rewards,
)
from trl.scripts.grpo import GRPOScriptArguments

from rl_plugins.extras import require
from rl_plugins.process_group import end_process_group
from rl_plugins.trl import (
    GRPOVariantConfig,
    GRPOVariantTrainer,
    MTPCriticConfig,
    MTPCriticTrainer,
    PPOConfig,
    PPOTrainer,
)
from rl_plugins.trl.scripts.parser import OptionParser

TRAINERS: dict[str, tuple[type, type]] = {
    "mtp-critic": (MTPCriticConfig, MTPCriticTrainer),
    "grpo-variant": (GRPOVariantConfig, GRPOVariantTrainer),
    "ppo": (PPOConfig, PPOTrainer),
}
REWARDS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward", "get_soft_overlong_punishment")


def make_parser(command: str, prog: str | None = None) -> OptionParser:
    """Make the parser of all arguments of a command.

    Args:
        command: One of `TRAINERS`.
        prog: Name in the usage line.
    """
    config, trainer = TRAINERS[command]
    summary = inspect.cleandoc(trainer.__doc__ or "").split("\n\n")[0]
    arguments = (config, GRPOScriptArguments, ModelConfig, DatasetMixtureConfig)
    return OptionParser(arguments, prog=prog, description=" ".join(summary.split()))


def find_reward(name: str) -> Any:
    """Find a reward function by TRL's name or by dotted path.

    Raises:
        ValueError: If `name` is neither.
        ModuleNotFoundError: If there is no module of the path.
        ImportError: If it has no such function.
    """
    if name == "get_soft_overlong_punishment":  # TRL makes this one by a call; `trl grpo` has the same numbers
        return rewards.get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256)
    if name in REWARDS:
        return getattr(rewards, name)
    module, _, function = name.rpartition(".")
    if not module:
        raise ValueError(
            f"--reward_funcs: unknown reward function {name!r}; choose one of {', '.join(REWARDS)}, or give a dotted "
            "path such as my_rewards.brevity."
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, but imports another one that is not
        raise ModuleNotFoundError(
            f"--reward_funcs {name}: there is no module {error.name} in the working directory {os.getcwd()} or among "
            "the installed packages.",
            name=error.name,
        ) from error
    if not callable(getattr(found, function, None)):
        raise ImportError(f"--reward_funcs {name}: {module} has no function {function}.", name=module)
    return getattr(found, function)


def load_data(script_args: ScriptArguments, mixture: DatasetMixtureConfig, *needed: str) -> Any:
    """Load the splits of the mixture or of the named dataset.

    Args:
        script_args: Has the name of the dataset.
        mixture: Has several datasets, which only a `--config` file can give.
        needed: Splits that have to be there.

    Raises:
        ValueError: Unless exactly one of the two is given, or if a split is missing.
    """
    if bool(mixture.datasets) == bool(script_args.dataset_name):
        found = "Both are" if mixture.datasets else "None is"
        raise ValueError(f"Give either --dataset_name, or `datasets` in the --config file. {found} given.")
    if mixture.datasets:
        splits = get_dataset(mixture)
    else:
        splits = _load_named(script_args)
    for split in needed:
        if split not in splits:
            raise ValueError(
                f"The dataset has no split {split!r}, only {', '.join(splits)}. Name one of these with "
                "--dataset_train_split or --dataset_test_split; --eval_strategy no needs no test split."
            )
    return splits


def _load_named(script_args: ScriptArguments) -> Any:
    """Load the dataset of `--dataset_name`, with errors that name it."""
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the error has the same text as the log
    try:
        return load_dataset(
            script_args.dataset_name, name=script_args.dataset_config, streaming=script_args.dataset_streaming
        )
    except (OSError, ValueError, DatasetsError) as error:
        reason = "" if error.__cause__ is None else f": {error.__cause__}"
        raise ValueError(f"--dataset_name {script_args.dataset_name}: {error}{reason}") from error
    finally:
        datasets.logging.set_verbosity(verbosity)


def make_trainer(
    command: str,
    script_args: GRPOScriptArguments,
    args: Any,
    model_args: ModelConfig,
    mixture: DatasetMixtureConfig,
) -> Any:
    """Make the trainer of a command from its arguments.

    Raises:
        ValueError: If there is no model or dataset, or a reward function is unknown.
        ImportError: If a package is missing that an option needs.
    """
    if model_args.model_name_or_path is None:
        raise ValueError("Give --model_name_or_path, a directory or the hub id of a model.")
    if model_args.use_peft:
        require("trl", "peft")
    reward_funcs = [find_reward(name) for name in script_args.reward_funcs or []]
    if script_args.reward_model_name_or_path:
        reward_funcs.insert(0, script_args.reward_model_name_or_path)
    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(args.model_init_kwargs or {}),
    }
    needed = [script_args.dataset_train_split]
    if args.eval_strategy != "no":
        needed.append(script_args.dataset_test_split)
    splits = load_data(script_args, mixture, *needed)
    try:
        return TRAINERS[command][1](
            model_args.model_name_or_path,
            reward_funcs,
            args,
            train_dataset=splits[script_args.dataset_train_split],
            eval_dataset=None if args.eval_strategy == "no" else splits[script_args.dataset_test_split],
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
        )
    except SafetensorError as error:
        named = model_args.model_name_or_path
        raise ValueError(f"The weights of --model_name_or_path {named} cannot be read: {error}") from error


def save(trainer: Any, dataset_name: str | None) -> None:
    """Save a trained policy with its model card, and push it to the hub if asked to."""
    args = trainer.args
    trainer.save_model(args.output_dir)
    trainer.create_model_card(dataset_name=dataset_name)
    trainer.accelerator.print(f"The policy is in {args.output_dir}; README.md there says how to load it.")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
    trainer.accelerator.wait_for_everyone()
    if Version(transformers.__version__) >= Version("5.18"):
        trainer.end()
    end_process_group()


def write_plain_logs() -> None:
    """Turn off progress bars if stderr is a file, where they would be lines of carriage returns."""
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()


def main(command: str, argv: list[str] | None = None, prog: str | None = None) -> None:
    """Parse, train and save.

    Args:
        command: One of `TRAINERS`.
        argv: Arguments; those of the process by default.
        prog: Name in the usage line and in errors.

    Raises:
        SystemExit: With status 2 and one line on stderr, if an argument is wrong.
    """
    write_plain_logs()
    parser = make_parser(command, prog=prog)
    if not sys.stderr.isatty():
        parser.set_defaults(disable_tqdm=True)
    args, script_args, model_args, mixture = parser.parse_args_and_config(argv)
    users_code = [name.rpartition(".")[0] for name in script_args.reward_funcs or [] if "." in name]
    with parser.catching(users_code=users_code):
        trainer = make_trainer(command, script_args, args, model_args, mixture)
    with parser.catching(users_code=users_code, begun=lambda: trainer.state.global_step > 0):
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    save(trainer, script_args.dataset_name)
