"""Sums and a small model that learns them: the task, its verifier, the model, its warm start and the report.

`mtp_critic.py`, `ppo.py`, `grpo_variants.py` and `lightning_mtp_critic.py` share this file, which runs nothing itself.

The task is one of reasoning-gym's, by default sums such as "4+38-15=", and its own verifier gives the reward. The
small model is a Qwen3 with random weights and a character tokenizer. The warm start shows it worked solutions and
guesses, so that reinforcement learning has something to choose from. Any other model (`--model`) skips the warm start.
"""

import json
import random
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import reasoning_gym
from accelerate.state import AcceleratorState
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedTokenizerFast,
    ProgressCallback,
    Qwen3Config,
    Qwen3ForCausalLM,
    set_seed,
)
from transformers.integrations.deepspeed import set_hf_deepspeed_config
from transformers.utils import is_torch_bf16_gpu_available
from trl import TrlParser

from rl_plugins.report import DEFAULT_PANELS, Panel, plot_training_curves, traces_from_rollout, write_token_values_html
from rl_plugins.trl import MTPSFTConfig, MTPSFTTrainer

CHARACTERS = "0123456789+-*/=()., ~abcdefghijklmnopqrstuvwxyz"
HELD_OUT_SEED = 1_000_000_000  # reasoning-gym seeds item i with seed + i, so neighbouring seeds would share items


@dataclass
class Script:
    """Options of the model and the task."""

    model: str | None = field(default=None, metadata={"help": "Path or hub id of a model; default: a small new one."})
    gguf_file: str | None = field(default=None, metadata={"help": "GGUF file inside --model to load weights from."})
    task: str = field(default="chain_sum", metadata={"help": "Name of a reasoning-gym task."})
    task_config: str = field(
        default='{"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 2}',
        metadata={"help": "Options of the task, as JSON."},
    )
    train_items: int = field(default=20_000, metadata={"help": "Items to train on."})
    eval_items: int = field(default=512, metadata={"help": "Held-out items, none of which is trained on."})
    warm_start_steps: int = field(default=4000, metadata={"help": "Supervised steps of the small model."})
    guesses: float = field(
        default=0.6, metadata={"help": "Share of the warm start's demonstrations that guess instead of working."}
    )
    hidden_size: int = field(default=64, metadata={"help": "Width of the small model."})
    layers: int = field(default=2, metadata={"help": "Depth of the small model."})


@dataclass
class Defaults:
    """Defaults of online training that suit the small model, for the configs of the TRL recipes."""

    per_device_train_batch_size: int = field(default=128, metadata={"help": "Completions per step and device."})
    per_device_eval_batch_size: int = field(default=128, metadata={"help": "Completions per step in evaluation."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Learning rate of the trunk."})
    lr_scheduler_type: str = field(default="linear", metadata={"help": "Learning-rate schedule."})
    max_steps: int = field(default=1200, metadata={"help": "Optimizer steps of reinforcement learning."})
    steps_per_generation: int | None = field(default=4, metadata={"help": "Optimizer steps per generated batch."})
    temperature: float = field(default=0.7, metadata={"help": "Sampling temperature."})
    max_completion_length: int = field(default=24, metadata={"help": "Longest completion, in tokens."})
    logging_steps: float = field(default=50, metadata={"help": "Log every so many steps."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate."})
    eval_steps: float | None = field(default=200, metadata={"help": "Evaluate every so many steps."})
    eval_on_start: bool = field(default=True, metadata={"help": "Whether to evaluate before training."})
    save_strategy: str = field(default="no", metadata={"help": "When to save checkpoints."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Whether to recompute activations."})
    # TRL's default is bf16 everywhere, which is an error where no GPU has it.
    bf16: bool | None = field(default=is_torch_bf16_gpu_available(), metadata={"help": "Whether to compute in bf16."})
    report_to: str = field(default="none", metadata={"help": "Where to log: none, tensorboard, wandb, trackio, ..."})


# The task and its verifier


def demonstration(entry: dict[str, Any], guesses: float) -> str:
    """A completion for the warm start: a worked solution, or with probability `guesses` a guess, marked by "~".

    "4 + 3 - 5" is worked as its running totals, "7 2" (only the answer where the task is no chain of sums), and
    guessed as, say, "~4". A policy that imitates both guesses too often, and it is for reinforcement learning to find
    out that working pays.
    """
    dice = random.Random(entry["question"])
    if dice.random() < guesses and re.fullmatch(r"-?\d+", entry["answer"]):
        return f"~{int(entry['answer']) + dice.choice([-10, -3, -2, -1, 0, 1, 2, 3, 10])}"
    expression = entry["metadata"].get("expression", "")
    numbers = [int(x.replace(" ", "")) for x in re.findall(r"(?:^|[+-] )-?\d+", expression)]
    totals = [sum(numbers[: i + 1]) for i in range(1, len(numbers))]
    worked = totals and str(totals[-1]) == entry["answer"]
    return " ".join(map(str, totals)) if worked else entry["answer"]


def task_items(script: Script, **seed_and_size: int) -> Any:
    """Items of the task.

    Raises:
        ValueError: If there is no such task, or it does not have these options.
    """
    try:
        return reasoning_gym.create_dataset(script.task, **json.loads(script.task_config), **seed_and_size)
    except (ValueError, TypeError, AssertionError) as error:  # no such name, no JSON or no such option, out of range
        raise ValueError(f"--task {script.task} --task_config '{script.task_config}': {error}") from error


def build_datasets(script: Script, chat: bool, seed: int) -> tuple[Dataset, Dataset]:
    """Training and held-out items of one distribution; no held-out question is trained on.

    Raises:
        ValueError: If no question is left to train on, or the task is refused.
    """

    def rows(first: int, size: int) -> list[dict[str, Any]]:
        return [as_row(entry, chat, script.guesses) for entry in task_items(script, seed=first, size=size)]

    held_out = {row["question"]: row for row in rows(HELD_OUT_SEED + seed, script.eval_items)}
    train = [row for row in rows(seed, script.train_items) if row["question"] not in held_out]
    if not train:
        raise ValueError("every training question is held out: widen --task_config or lower --eval_items")
    return Dataset.from_list(train), Dataset.from_list(list(held_out.values()))


def as_row(entry: dict[str, Any], chat: bool, guesses: float) -> dict[str, Any]:
    """A row for TRL: chat models get the question as it is, the small model only the expression."""
    question = entry["question"]
    prompt: Any = question.rsplit(": ", 1)[-1].replace(" ", "")
    if chat:
        prompt = [{"role": "user", "content": f"{question}\nEnd your reply with the final answer."}]
    row = {"prompt": prompt, "question": question, "answer": entry["answer"], "entry": json.dumps(entry)}
    return row if chat else {**row, "completion": " " + demonstration(entry, guesses)}


def make_reward(script: Script) -> Any:
    """The task's own verifier, on the last number (or else the last line) of the completion."""
    verifier = task_items(script)

    def accuracy(completions: list[Any], entry: list[str], **_: Any) -> list[float]:
        return [
            float(verifier.score_answer(final_answer(completion), json.loads(item)) >= 1.0)
            for completion, item in zip(completions, entry, strict=True)
        ]

    return accuracy


def final_answer(completion: Any) -> str:
    """The last number of a completion, else its last line."""
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    numbers = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
    return numbers[-1] if numbers else text.strip().rsplit("\n", 1)[-1]


# The small model and its warm start


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per character."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def small_model(script: Script, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A Qwen3 with random weights."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=script.hidden_size,
        intermediate_size=3 * script.hidden_size,
        num_hidden_layers=script.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=script.hidden_size // 4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def warm_start(script: Script, args: Any, train: Dataset) -> str:
    """Train the small model on demonstrations, with its heads; returns where it was saved."""
    directory = str(Path(args.output_dir) / "warm_start")
    if args.resume_from_checkpoint and Path(directory, "config.json").is_file():
        return directory  # done before; the checkpoint has newer weights anyway
    tokenizer = character_tokenizer()
    set_seed(args.seed)
    sft_args = MTPSFTConfig(
        output_dir=directory,
        max_steps=script.warm_start_steps,
        per_device_train_batch_size=64,
        learning_rate=4e-3,
        head_learning_rate=getattr(args, "head_learning_rate", 1e-3),  # recipes without heads start alike
        num_mtp_heads=getattr(args, "num_mtp_heads", 1),
        mtp_head_type=getattr(args, "mtp_head_type", "parallel"),
        lr_scheduler_type="cosine",
        warmup_steps=20,
        logging_steps=500,
        save_strategy="no",
        gradient_checkpointing=False,
        bf16=args.bf16,
        use_cpu=args.use_cpu,
        report_to=args.report_to,
        deepspeed=args.deepspeed,
        disable_tqdm=args.disable_tqdm,
        seed=args.seed,
    )
    trainer = MTPSFTTrainer(
        small_model(script, tokenizer),
        sft_args,
        train_dataset=train.select_columns(["prompt", "completion"]),
        processing_class=tokenizer,
    )
    show_briefly(trainer)
    trainer.train()
    trainer.save_model(directory)
    trainer.accelerator.wait_for_everyone()  # rank 0 writes, all ranks read
    if args.deepspeed is not None:
        # accelerate and transformers hold one DeepSpeed config per process: make it the main run's again.
        AcceleratorState._reset_state()
        set_hf_deepspeed_config(args.hf_deepspeed_config)
    return directory


# Before training: options, items, the policy


def ignore_known_warnings() -> None:
    """Hide two warnings that no user of a recipe can do anything about."""
    # transformers renamed gradient_checkpointing to activation_checkpointing; TRL still uses the old name.
    warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
    warnings.filterwarnings(
        "ignore", "'pin_memory' argument is set as true but no accelerator", UserWarning
    )  # a CPU run


def load_task(parser: TrlParser, script: Script, seed: int) -> tuple[Any, Dataset, Dataset]:
    """Tokenizer of `--model`, training items and held-out items; a mistake in the options ends the program here.

    There is no tokenizer without `--model`: the trainer loads the one that the warm start saves.
    """
    if script.gguf_file is not None and script.model is None:
        parser.error("--gguf_file needs --model, the folder that the file is in")
    tokenizer = None
    if script.model is not None:
        tokenizer = AutoTokenizer.from_pretrained(script.model, gguf_file=script.gguf_file, padding_side="left")
    chat = tokenizer is not None and tokenizer.chat_template is not None
    try:
        return tokenizer, *build_datasets(script, chat, seed)
    except ValueError as error:
        parser.error(str(error))


def load_policy(script: Script, args: Any, train: Dataset) -> Any:
    """The policy to improve: a model or its folder, either that of `--model` or the small one after its warm start."""
    if script.model is None:
        return warm_start(script, args, train)
    if script.gguf_file is None:
        return script.model
    # The weights are unpacked, since quantized ones cannot be trained.
    unpacked = GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        script.model, gguf_file=script.gguf_file, quantization_config=unpacked, dtype="float32"
    )


# Progress and report


ACCURACY = "eval_rewards/accuracy/mean"  # the task's own score, without what a variant adds to the reward
SHOWN = (
    "loss",
    "mean_token_accuracy",
    "mtp/token_loss",
    "reward",
    "entropy",
    "critic/value_loss",
    "critic/explained_variance",
    "sampling/draws",
    ACCURACY,
    "eval_critic/explained_variance",
)


class BriefProgress(ProgressCallback):
    """The host's progress bars with the metrics that matter here; loggers (`--report_to`) still get all fifty."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Print one short line."""
        shown = {key: logs[key] for key in SHOWN if logs and logs.get(key) is not None}
        if shown:
            super().on_log(args, state, control, logs={"step": state.global_step, **shown}, **kwargs)


def show_briefly(trainer: Any) -> None:
    """Short progress lines where there are progress bars."""
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(BriefProgress)


def report(trainer: Any, script: Script, args: Any) -> dict[str, Any]:
    """Pictures and a summary of what was reached."""
    history = trainer.state.log_history
    accuracy = [row[ACCURACY] for row in history if ACCURACY in row]
    # Undefined, and left out of the log, where all completions are right or all are wrong.
    variance = [row.get("eval_critic/explained_variance") for row in history if ACCURACY in row]
    summary = {
        "accuracy_before": accuracy[0],
        "accuracy_after": accuracy[-1],
        "explained_variance_before": variance[0],
        "explained_variance_after": variance[-1],
        "seed": args.seed,
        "steps": trainer.state.global_step,
    }
    output = Path(args.output_dir)
    held_out = Panel("Accuracy on held-out items", "share right", ACCURACY, floor=0.0)
    name = Path(script.gguf_file or script.model or "small Qwen3").name
    title = f"{script.task}: {name}, {type(trainer).__name__}"
    if getattr(args, "preset", None):
        title += f" ({args.preset})"
    plot_training_curves(history, output / "curves.png", title=title, panels=(held_out, *DEFAULT_PANELS))
    if trainer.critic is not None:
        write_token_values_html(
            traces_from_rollout(trainer.processing_class, trainer.last_rollout, 48, dataset=trainer.eval_dataset),
            output / "token_values.html",
            title=f"What the critic thinks of each token: {script.task}",
            subtitle=f"Held-out items after {trainer.state.global_step} steps.",
            value_range=(0.0, 1.0),
        )
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def finish(trainer: Any, script: Script, args: Any) -> None:
    """Evaluate the trained policy where that is not done yet, save the log, and report on rank 0."""
    evaluated = [row["step"] for row in trainer.state.log_history if ACCURACY in row]
    rollout_is_missing = trainer.critic is not None and not trainer.last_rollout  # where a finished run is resumed
    if evaluated[-1:] != [trainer.state.global_step] or rollout_is_missing:
        trainer.evaluate()  # the report is on the last rollout, which shall be of the trained policy on held-out items
    trainer.save_state()
    if not trainer.accelerator.is_main_process:
        return
    summary = report(trainer, script, args)
    before, after = summary["accuracy_before"], summary["accuracy_after"]
    print(f"\nAccuracy on {len(trainer.eval_dataset)} held-out items: {before:.1%} -> {after:.1%}.")
    if trainer.critic is not None:
        variance = summary["explained_variance_after"]
        print(f"Explained variance of the critic: {'undefined' if variance is None else format(variance, '.2f')}.")
    print(f"The policy and all pictures are in {args.output_dir}.")
