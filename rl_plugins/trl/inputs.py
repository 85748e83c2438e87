"""Checks of the trainers' options, data, reward functions and callbacks, before the host prepares anything."""

from collections.abc import Mapping
from typing import Any

import trl
from datasets import Dataset, IterableDataset
from transformers import TrainerCallback
from trl.data_utils import get_dataset_column_names
from trl.trainer.utils import get_config_model_id

from rl_plugins.nn.sources import check_language_model
from rl_plugins.rollouts.rewards import (
    NOT_COLUMNS,
    REWARD_ARGUMENTS,
    check_reward_arguments,
    list_reward_funcs,
)
from rl_plugins.settings import settle_numbers
from rl_plugins.signals.checks import check_above, check_at_least

# Columns that are left with remove_unused_columns=True.
USED_COLUMNS = ("prompt", "image", "images")
# The host's SFT needs one of these columns.
TEXT_COLUMNS = ("messages", "prompt", "completion", "input_ids", "conversations")


def settle_options(config: Any) -> None:
    """Turn options that arrive as text into numbers, and refuse values with which no training is possible.

    Raises:
        TypeError: If an option should be a number and is not.
        ValueError: If an option is out of range.
    """
    settle_numbers(config)
    check_at_least(0, learning_rate=config.learning_rate, weight_decay=config.weight_decay)
    check_at_least(
        1,
        per_device_train_batch_size=config.per_device_train_batch_size,
        per_device_eval_batch_size=config.per_device_eval_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
    )
    # Only configs of online training have these.
    check_at_least(1, max_completion_length=getattr(config, "max_completion_length", None))
    check_above(0, temperature=getattr(config, "temperature", None))
    if config.max_steps == 0:
        raise ValueError(
            "max_steps=0 does not mean an end at once: transformers would train for num_train_epochs. Set "
            "max_steps=-1 to train for num_train_epochs, or a positive number of steps."
        )
    if config.max_steps < 0:
        check_above(0, num_train_epochs=config.num_train_epochs)


def complete_args(args: Any, config_class: type, model: Any) -> Any:
    """Return the trainer's `args`; by default a config whose output folder is named after the model, as in TRL.

    Raises:
        TypeError: If `args` is not a `config_class`, or `model` is not a model.
        FileNotFoundError: If there is no model of that name.
        ValueError: If the model cannot be trained as a causal language model.
    """
    init_kwargs = getattr(args, "model_init_kwargs", None)
    check_language_model(model, init_kwargs if isinstance(init_kwargs, dict) else None)
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        return config_class(f"{name.split('/')[-1]}-{config_class.__name__.removesuffix('Config')}")
    if not isinstance(args, config_class):
        raise TypeError(
            f"args must be of type {config_class.__name__}, got {type(args).__name__}. Give the options to "
            f"{config_class.__name__}(...), which takes those of its host, too."
        )
    return args


def check_inputs(given: Mapping[str, Any], args: Any) -> None:
    """Check the arguments of a trainer before the host uses them.

    Args:
        given: Arguments of the host's `__init__` by name.
        args: The trainer's config.

    Raises:
        TypeError: If a callback is of another host, or a reward function cannot be called with the data's columns.
        ValueError: If a dataset is empty or lacks the columns that are needed.
    """
    for callback in given.get("callbacks") or []:
        check_callback(callback)
    online = isinstance(args, trl.GRPOConfig)
    columns = {name: _columns(name, dataset) for name, dataset in _datasets(given).items()}
    for name, found in columns.items():
        if not online:
            _check_text(name, found, args, given)
        elif given.get("environment_factory") is None:  # an environment may give the prompts
            _check_prompt(name, found)
    if online:
        functions = list_reward_funcs(given.get("reward_funcs"))
        own = [*REWARD_ARGUMENTS, *(["environments"] if given.get("environment_factory") is not None else [])]
        for found in columns.values():
            kept = [c for c in found if c in USED_COLUMNS] if args.remove_unused_columns else found
            names = [c for c in kept if c not in NOT_COLUMNS]
            # A rollout function may return further columns.
            check_reward_arguments(functions, [*own, *names], complete=given.get("rollout_func") is None)


def check_callback(callback: Any) -> None:
    """Refuse a callback of another host.

    Raises:
        TypeError: If transformers' `Trainer` cannot call it.
    """
    kind = callback if isinstance(callback, type) else type(callback)
    if not issubclass(kind, TrainerCallback):
        advice = " Import it from rl_plugins.trl, if it is there." if "rl_plugins" in kind.__module__ else ""
        raise TypeError(
            f"{kind.__name__} of {kind.__module__} is no callback of transformers' Trainer, which TRL builds on."
            f"{advice}"
        )


def _datasets(given: Mapping[str, Any]) -> dict[str, Any]:
    """Collect the datasets among the arguments, by their names in errors; the host refuses anything else."""
    evals = given.get("eval_dataset")
    named = {f"eval_dataset[{key!r}]": value for key, value in evals.items()} if isinstance(evals, Mapping) else {}
    named = {"train_dataset": given.get("train_dataset"), "eval_dataset": evals, **named}
    return {name: value for name, value in named.items() if isinstance(value, Dataset | IterableDataset)}


def _columns(name: str, dataset: Any) -> list[str]:
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"{name} is empty. Give it at least one row.")
    try:
        return get_dataset_column_names(dataset)
    except StopIteration:
        raise ValueError(f"{name} is empty. Give it at least one row.") from None


def _check_prompt(name: str, columns: list[str]) -> None:
    if "prompt" not in columns:
        raise ValueError(
            f"{name} has no column `prompt`, only {', '.join(columns) or 'none'}. Rename the column that holds the "
            "prompts: dataset.rename_column(..., 'prompt')."
        )


def _check_text(name: str, columns: list[str], args: Any, given: Mapping[str, Any]) -> None:
    if given.get("formatting_func") is not None or (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
        return
    if {args.dataset_text_field, *TEXT_COLUMNS}.isdisjoint(columns):
        raise ValueError(
            f"{name} has none of the columns that supervised fine-tuning reads: `{args.dataset_text_field}`, "
            f"`messages`, or `prompt` and `completion`. It has {', '.join(columns) or 'none'}."
        )
