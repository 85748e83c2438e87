"""Train online from the command line; takes the arguments of `trl grpo` and those of our trainers.

    rl-plugins mtp-critic --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/DeepMath-103K \
        --reward_funcs accuracy_reward --output_dir qwen3-critic

`rl-plugins grpo-variant --preset dapo ...` and `rl-plugins ppo ...` take the same. Reward functions go by TRL's names
or by dotted path (`my_rewards.brevity`, looked up in the working directory first). `--config file.yaml` reads
arguments from a file.
"""

import os
import sys
from importlib import import_module
from typing import Any

import transformers
from datasets import load_dataset
from packaging.version import Version

from rl_plugins.hooks import require_hooks

require_hooks("rl_plugins.trl.scripts")

from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
    rewards,
)
from trl.scripts.grpo import GRPOScriptArguments

from rl_plugins.process_group import end_process_group
from rl_plugins.trl import (
    GRPOVariantConfig,
    GRPOVariantTrainer,
    MTPCriticConfig,
    MTPCriticTrainer,
    PPOConfig,
    PPOTrainer,
)

TRAINERS: dict[str, tuple[type, type]] = {
    "mtp-critic": (MTPCriticConfig, MTPCriticTrainer),
    "grpo-variant": (GRPOVariantConfig, GRPOVariantTrainer),
    "ppo": (PPOConfig, PPOTrainer),
}
REWARDS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward", "get_soft_overlong_punishment")


def make_parser(command: str, prog: str | None = None) -> TrlParser:
    """Make the parser of all arguments of a command.

    Args:
        command: One of `TRAINERS`.
        prog: Name in the usage line.
    """
    arguments = (GRPOScriptArguments, TRAINERS[command][0], ModelConfig, DatasetMixtureConfig)
    return TrlParser(arguments, prog=prog)


def find_reward(name: str) -> Any:
    """Find a reward function by TRL's name or by dotted path.

    Raises:
        ValueError: If `name` is neither.
        ImportError: If the module of the path cannot be imported.
        AttributeError: If it has no such function.
    """
    if name == "get_soft_overlong_punishment":  # the one that TRL makes; `trl grpo` has the same numbers
        return rewards.get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256)
    if name in REWARDS:
        return getattr(rewards, name)
    module, _, function = name.rpartition(".")
    if not module:
        raise ValueError(
            f"Unknown reward function {name!r}; choose one of {', '.join(REWARDS)}, or give a dotted path such as "
            "my_rewards.brevity."
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return getattr(import_module(module), function)


def load_data(script_args: ScriptArguments, mixture: DatasetMixtureConfig) -> Any:
    """Load the splits of the mixture or of the named dataset.

    Raises:
        ValueError: Unless exactly one of them is given.
    """
    if bool(mixture.datasets) == bool(script_args.dataset_name):
        raise ValueError("Give either --dataset_name, or `datasets` in the --config file.")
    if mixture.datasets:
        return get_dataset(mixture)
    return load_dataset(
        script_args.dataset_name, name=script_args.dataset_config, streaming=script_args.dataset_streaming
    )


def train(
    command: str,
    script_args: GRPOScriptArguments,
    args: Any,
    model_args: ModelConfig,
    mixture: DatasetMixtureConfig,
) -> None:
    """Train, save, and push to the hub if asked to.

    Raises:
        ValueError: If there is no model or dataset, or a reward function is unknown.
    """
    if model_args.model_name_or_path is None:
        raise ValueError("Give --model_name_or_path, a directory or the hub id of a model.")
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
    splits = load_data(script_args, mixture)
    trainer: Any = TRAINERS[command][1](
        model_args.model_name_or_path,
        reward_funcs,
        args,
        train_dataset=splits[script_args.dataset_train_split],
        eval_dataset=None if args.eval_strategy == "no" else splits[script_args.dataset_test_split],
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    trainer.accelerator.print(f"The policy is in {args.output_dir}.")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.accelerator.wait_for_everyone()
    if Version(transformers.__version__) >= Version("5.18"):
        trainer.end()
    end_process_group()


def main(command: str, argv: list[str] | None = None, prog: str | None = None) -> None:
    """Parse and train.

    Args:
        command: One of `TRAINERS`.
        argv: Arguments; those of the process by default.
        prog: Name in the usage line.
    """
    train(command, *make_parser(command, prog=prog).parse_args_and_config(argv))
