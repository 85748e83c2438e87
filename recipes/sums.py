"""Sums and a small model that learns them: the task, its verifier, the model, its warm start and the report.

`mtp_critic.py`, `ppo.py`, `grpo_variants.py` and `lightning_mtp_critic.py` share this file, which is not a script.

The task is one of reasoning-gym's, by default sums such as "4+38-15=", and its own verifier gives the reward. The
small model is a Qwen3 with random weights and a character tokenizer. The warm start shows it worked solutions and
guesses, so that reinforcement learning can choose between them. Any other model (`--model`) skips the warm start.
"""

import inspect
import json
import random
import re
import sys
import textwrap
import time
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import transformers
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedTokenizerFast,
    PrinterCallback,
    ProgressCallback,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
    set_seed,
)
from transformers.integrations.deepspeed import set_hf_deepspeed_config
from transformers.utils import is_torch_bf16_gpu_available

from rl_plugins.extras import require
from rl_plugins.known_warnings import ignore_known_warnings
from rl_plugins.process_group import end_process_group
from rl_plugins.report import DEFAULT_PANELS, Panel, plot_training_curves, traces_from_rollout, write_token_values_html
from rl_plugins.trl import MTPSFTConfig, MTPSFTTrainer
from rl_plugins.trl.scripts.parser import OptionParser

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
    system_prompt: str | None = field(
        default=None, metadata={"help": "System message to a chat model; default: that of its own template."}
    )
    question_format: str = field(
        default="{question}\nEnd your reply with the final answer.",
        metadata={
            "help": "Message to a chat model. {question} is the item's question, {expression} what follows its last "
            "colon, such as '4 + 38 ='."
        },
    )
    lora_rank: int = field(
        default=0, metadata={"help": "Rank of LoRA adapters that learn in place of the model's weights; 0: none."}
    )
    train_items: int = field(default=20_000, metadata={"help": "Items to train on."})
    eval_items: int = field(default=512, metadata={"help": "Held-out items, none of which is trained on."})
    warm_start_steps: int = field(default=4000, metadata={"help": "Supervised steps of the small model."})
    guesses: float = field(
        default=0.6, metadata={"help": "Share of the warm start's demonstrations that guess instead of working."}
    )
    hidden_size: int = field(default=64, metadata={"help": "Width of the small model."})
    layers: int = field(default=2, metadata={"help": "Depth of the small model."})
    open: bool = field(default=False, metadata={"help": "Open the page of results in the browser at the end."})


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
    """Write a completion for the warm start: a worked solution, or with probability `guesses` a guess, marked by "~".

    For "4 + 3 - 5" the worked solution has the running totals, "7 2", and a guess is, for example, "~4". If the task
    is not a chain of sums, the worked solution is the answer alone. A policy that imitates both guesses too often.
    Reinforcement learning has to find out that worked solutions get more reward.
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
    """Make items of the task.

    Raises:
        ValueError: If there is no such task, or it does not have these options.
    """
    require("recipes", "reasoning_gym")
    import reasoning_gym

    try:
        return reasoning_gym.create_dataset(script.task, **json.loads(script.task_config), **seed_and_size)
    except (ValueError, TypeError, AssertionError) as error:  # no such name, no JSON or no such option, out of range
        raise ValueError(f"--task {script.task} --task_config '{script.task_config}': {error}") from error


def build_datasets(script: Script, chat: bool, seed: int) -> tuple[Dataset, Dataset]:
    """Make training and held-out items of one distribution; no held-out question is trained on.

    The small model gets no items with characters that its tokenizer lacks, such as capital letters.

    Raises:
        ValueError: If no question is left to train on or to hold out, or the task is refused.
    """

    def rows(first: int, size: int) -> list[dict[str, Any]]:
        made = [as_row(entry, chat, script) for entry in task_items(script, seed=first, size=size)]
        if chat or script.model is not None:
            return made
        return [row for row in made if set(row["prompt"] + row["answer"]) <= set(CHARACTERS)]

    held_out = {row["question"]: row for row in rows(HELD_OUT_SEED + seed, script.eval_items)}
    train = [row for row in rows(seed, script.train_items) if row["question"] not in held_out]
    if not held_out:
        raise ValueError(
            "no held-out question is left: all have characters that the small model lacks. Raise --eval_items, or "
            "choose a --model"
        )
    if not train:
        raise ValueError(
            "no training question is left: all are held out, or have characters that the small model lacks. Widen "
            "--task_config, lower --eval_items, or choose a --model"
        )
    return Dataset.from_list(train), Dataset.from_list(list(held_out.values()))


def as_row(entry: dict[str, Any], chat: bool, script: Script) -> dict[str, Any]:
    """Make a row for TRL: chat models get a message, the small model only the expression."""
    question = entry["question"]
    expression = question.rsplit(": ", 1)[-1]
    row = {"prompt": expression.replace(" ", ""), "question": question, "answer": entry["answer"]}
    row["entry"] = json.dumps(entry)
    if not chat:
        return {**row, "completion": " " + demonstration(entry, script.guesses)}
    try:
        asked = script.question_format.format(question=question, expression=expression)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"--question_format {script.question_format!r}: it may hold {{question}} and {{expression}}, and no other "
            "braces"
        ) from error
    system = [] if script.system_prompt is None else [{"role": "system", "content": script.system_prompt}]
    return {**row, "prompt": [*system, {"role": "user", "content": asked}]}


def make_reward(script: Script) -> Any:
    """Make a reward function: the task's own verifier, on the last number (or else the last line) of a completion."""
    verifier = task_items(script)

    def accuracy(completions: list[Any], entry: list[str], **_: Any) -> list[float]:
        return [
            float(verifier.score_answer(final_answer(completion), json.loads(item)) >= 1.0)
            for completion, item in zip(completions, entry, strict=True)
        ]

    return accuracy


def final_answer(completion: Any) -> str:
    """Return the last number of a completion, or else its last line."""
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    numbers = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
    return numbers[-1] if numbers else text.strip().rsplit("\n", 1)[-1]


# The small model and its warm start


def character_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per character."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def small_model(script: Script, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Make a Qwen3 with random weights."""
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
    """Train the small model on demonstrations, with its heads, and return the folder where it is saved."""
    directory = str(Path(args.output_dir) / "warm_start")
    if args.resume_from_checkpoint and Path(directory, "config.json").is_file():
        return directory  # it was done before; the checkpoint has newer weights anyway
    tokenizer = character_tokenizer()
    set_seed(args.seed)
    sft_args = MTPSFTConfig(
        output_dir=directory,
        max_steps=script.warm_start_steps,
        per_device_train_batch_size=64,
        learning_rate=4e-3,
        head_learning_rate=getattr(args, "head_learning_rate", 1e-3),  # recipes without heads have the same warm start
        num_mtp_heads=getattr(args, "num_mtp_heads", 1),
        mtp_head_type=getattr(args, "mtp_head_type", "parallel"),
        lr_scheduler_type="cosine",
        warmup_steps=20,
        logging_steps=max(1, script.warm_start_steps // 8),
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
    show_progress(trainer, WARM_START_COLUMNS)
    trainer.train()
    trainer.save_model(directory)
    trainer.accelerator.wait_for_everyone()  # rank 0 writes, all ranks read
    if args.deepspeed is not None:
        # accelerate and transformers hold one DeepSpeed config per process: make it the main run's again.
        AcceleratorState._reset_state()
        set_hf_deepspeed_config(args.hf_deepspeed_config)
    return directory


# Before training: options, items, the policy


def read_options(config: type, description: str | None) -> tuple[OptionParser, Script, Any]:
    """Parse the command line of a recipe, and turn off progress bars and warnings that do not help the user.

    Args:
        config: Dataclass of the trainer's options.
        description: Docstring of the recipe, whose first sentence `--help` shows.

    Returns:
        The parser, the options of the recipe, and those of the trainer.
    """
    ignore_known_warnings()
    # One table for each phase says more than the bars of tokenizing, loading and saving.
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    parser = OptionParser((Script, config), description=inspect.cleandoc(description or "").split("\n\n")[0])
    return parser, *parser.parse_args_and_config()


def load_task(script: Script, seed: int) -> tuple[Any, Dataset, Dataset]:
    """Load the tokenizer of `--model`, and make training items and held-out items.

    There is no tokenizer without `--model`: the trainer loads the one that the warm start saves.

    Raises:
        ValueError: If options do not go together, or the task is refused.
        OSError: If there is no such model.
    """
    if script.gguf_file is not None:
        if script.model is None:
            raise ValueError("--gguf_file needs --model, the folder that the file is in")
        require("recipes", "gguf")
    tokenizer = None
    if script.model is not None:
        tokenizer = AutoTokenizer.from_pretrained(script.model, gguf_file=script.gguf_file, padding_side="left")
    chat = tokenizer is not None and tokenizer.chat_template is not None
    return tokenizer, *build_datasets(script, chat, seed)


def load_policy(script: Script, args: Any, train: Dataset) -> Any:
    """Return the policy to improve, a model or a folder: that of `--model`, or the small one after its warm start."""
    if script.model is None:
        announce(
            args,
            f"Phase 1 of 2, warm start: a small new model learns from {script.warm_start_steps} batches of "
            f"demonstrations, {script.guesses:.0%} of which guess the answer instead of working it out. The last "
            "column estimates the minutes that are left.",
        )
        return warm_start(script, args, train)
    if script.gguf_file is None:
        return script.model
    # The weights are unpacked, since quantized ones cannot be trained.
    unpacked = GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        script.model, gguf_file=script.gguf_file, quantization_config=unpacked, dtype="float32"
    )


def lora(script: Script) -> LoraConfig | None:
    """Configure LoRA adapters at all linear layers of the policy, if `--lora_rank` asks for them."""
    rank = script.lora_rank
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear") if rank else None


# Progress and report

ACCURACY = "eval_rewards/accuracy/mean"  # the task's own score, without terms that a variant adds
VARIANCE = "eval_critic/explained_variance"


def announce(args: Any, text: str) -> None:
    """Print what happens next, in lines that fit a terminal; only the first process prints."""
    if args.process_index == 0:
        print(f"\n{textwrap.fill(text, 100)}\n", flush=True)


class Column(NamedTuple):
    """A column of the table of progress.

    Args:
        title: Heading of the column.
        metric: Name in the trainer's log.
        form: Format of its numbers.
    """

    title: str
    metric: str
    form: str


WARM_START_COLUMNS = (
    Column("loss", "loss", ".3f"),
    Column("right tokens", "mean_token_accuracy", ".1%"),
    Column("loss of heads", "mtp/token_loss", ".3f"),
)
COLUMNS = (
    Column("reward", "reward", ".3f"),
    Column("entropy", "entropy", ".3f"),
)
SAMPLING_COLUMNS = (Column("draws", "sampling/draws", ".1f"),)
CRITIC_COLUMNS = (Column("value loss", "critic/value_loss", ".4f"),)
HELD_OUT_COLUMNS = (Column("right (held out)", ACCURACY, ".1%"),)
HELD_OUT_CRITIC_COLUMNS = (Column("explained variance (held out)", VARIANCE, ".2f"),)


class TableProgress(TrainerCallback):
    """Callback that prints a table of the main metrics, with a progress bar below it if stderr is a terminal.

    Loggers (`--report_to`) still get all fifty metrics. Lines that go into a file have no control characters.

    Args:
        columns: Columns of the table, after the step.
    """

    def __init__(self, columns: Sequence[Column]) -> None:
        self.columns = columns
        self.bar: Any = None
        self.waiting: dict[str, Any] = {}
        self.started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the head of the table."""
        if not state.is_world_process_zero:
            return
        self.started, self.first_step = time.perf_counter(), state.global_step
        if sys.stderr.isatty() and not args.disable_tqdm:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, leave=False, dynamic_ncols=True)
        titles = [column.title for column in self.columns]
        self.write(f"{'step':>{len(str(state.max_steps))}} of {state.max_steps}", *titles, "min:s", "left")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the line of an earlier step, since no evaluation will add to it any more."""
        self.flush(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Keep the metrics of the table until the step is over."""
        found = {column.metric: logs[column.metric] for column in self.columns if logs and column.metric in logs}
        if found and state.is_world_process_zero:
            self.waiting |= found

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the last line."""
        self.flush(state)
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        self.columns = ()  # evaluations that follow are part of the report

    def flush(self, state: Any) -> None:
        """Write the line that is waiting, if there is one."""
        if not self.waiting:
            return
        found, self.waiting = self.waiting, {}
        cells = [format(found[c.metric], c.form) if c.metric in found else "" for c in self.columns]
        passed, done = time.perf_counter() - self.started, state.global_step - self.first_step
        left = clock(passed / done * (state.max_steps - state.global_step)) if done else ""
        number = f"{state.global_step:>{len(str(state.max_steps))}}"
        self.write(f"{number:<{len(number) + len(f' of {state.max_steps}')}}", *cells, clock(passed), left)

    def write(self, step: str, *cells: str) -> None:
        """Write a line of the table."""
        widths = [max(len(column.title), 7) for column in self.columns]
        line = "  ".join([step, *(f"{cell:>{width}}" for cell, width in zip(cells, [*widths, 5, 5], strict=True))])
        if self.bar is None:
            print(line.rstrip(), flush=True)
        else:
            self.bar.write(line.rstrip())


def clock(seconds: float) -> str:
    """Format minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def show_progress(trainer: Any, columns: Sequence[Column]) -> None:
    """Make a trainer print a table instead of its bars and its fifty metrics."""
    for shown in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(shown)
    trainer.add_callback(TableProgress(columns))


def improve(trainer: Any, parser: OptionParser, script: Script, args: Any) -> None:
    """Train the policy, save it, and report: all steps after a recipe has made its trainer."""
    with parser.catching(begun=lambda: trainer.state.global_step > 0):
        train(trainer, script, args)
    trainer.save_model(args.output_dir)  # a stock model and its tokenizer, with heads or a value model beside them
    finish(trainer, script, args)
    end_process_group()


def train(trainer: Any, script: Script, args: Any) -> None:
    """Print what reinforcement learning will do, and run it."""
    critic, draws = trainer.critic is not None, getattr(args, "dynamic_sampling", False)
    phase = "Phase 2 of 2, reinforcement" if script.model is None else "Reinforcement"
    judged = "the critic's values say which tokens raised the chance" if critic else "answers to a prompt are compared"
    announce(
        args,
        f"{phase} learning with {type(trainer).__name__}: the model answers {script.task} items, a verifier says "
        f"whether each answer is right, and {judged}. {len(trainer.eval_dataset)} held-out items measure it every "
        f"{args.eval_steps:g} steps.",
    )
    columns = [*COLUMNS, *(SAMPLING_COLUMNS if draws else ()), *(CRITIC_COLUMNS if critic else ())]
    show_progress(trainer, [*columns, *HELD_OUT_COLUMNS, *(HELD_OUT_CRITIC_COLUMNS if critic else ())])
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)


def report(trainer: Any, script: Script, args: Any) -> dict[str, Any]:
    """Write pictures and a summary of the results, and return the summary."""
    history = trainer.state.log_history
    accuracy = [row[ACCURACY] for row in history if ACCURACY in row]
    # Undefined, and left out of the log, where all completions are right or all are wrong.
    variance = [row.get(VARIANCE) for row in history if ACCURACY in row]
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
    """Evaluate the trained policy if that is not done yet, save the log, and report on rank 0."""
    evaluated = [row["step"] for row in trainer.state.log_history if ACCURACY in row]
    rollout_is_missing = trainer.critic is not None and not trainer.last_rollout  # if a finished run is resumed
    if evaluated[-1:] != [trainer.state.global_step] or rollout_is_missing:
        trainer.evaluate()  # the report shows the last rollout: it must be of the trained policy, on held-out items
    trainer.save_state()
    trainer.create_model_card()
    if not trainer.accelerator.is_main_process:
        return
    summary = report(trainer, script, args)
    print("\n" + closing_words(summary, len(trainer.eval_dataset), Path(args.output_dir), trainer.critic is not None))
    page = Path(args.output_dir) / ("token_values.html" if trainer.critic is not None else "curves.png")
    if script.open and not webbrowser.open(page.resolve().as_uri()):
        print(f"\nThere is no browser here. Open {page} in one.")


def closing_words(summary: dict[str, Any], held_out: int, output: Path, has_critic: bool) -> str:
    """Write what was measured, which files to open, and what to look for in them.

    Args:
        summary: The summary that [`report`] returns.
        held_out: Number of held-out items.
        output: Folder of the run.
        has_critic: Whether there are values to look at.
    """

    def row(name: str, key: str, form: str) -> str:
        shown = [summary[f"{key}_{when}"] for when in ("before", "after")]
        return f"  {name:<32}" + "".join(f"{'undefined' if x is None else format(x, form):>12}" for x in shown)

    lines = [f"Measured on {held_out} held-out items:", "", f"  {'':<32}{'before':>12}{'after':>12}"]
    lines.append(row("right answers", "accuracy", ".1%"))
    if has_critic:
        lines.append(row("explained variance of the critic", "explained_variance", ".2f"))
        lines += [
            "",
            "  Explained variance: 1 if the critic knew every outcome beforehand, 0 if it knew the mean alone.",
        ]
    lines += ["", "Open these files:", ""]
    if has_critic:
        lines += [
            f"  {output / 'token_values.html'}",
            "    Completions whose tokens are colored by the critic's value: its estimate that the answer is right.",
            "    Look for the token at which the color changes: there the critic sees that a step was right or wrong.",
        ]
    lines += [
        f"  {output / 'curves.png'}",
        "    Learning curves. Look for the accuracy on held-out items: it should rise, and then level off.",
        f"  {output / 'README.md'}",
        "    The model card, with the lines of Python that load what was trained.",
    ]
    return "\n".join(lines)
