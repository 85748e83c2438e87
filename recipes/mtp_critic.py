"""Train a policy whose own multi-token-prediction heads are its critic.

The default builds a small Qwen3-style model with a character tokenizer, warm-starts it on a reasoning-gym task with
`MTPSFTTrainer` and improves it on the task's verifier with `MTPCriticTrainer`. It runs on a laptop's CPU in minutes:

    python recipes/mtp_critic.py --output_dir outputs/demo

Any model, from a path or the hub, skips the warm start:

    accelerate launch recipes/mtp_critic.py --model Qwen/Qwen3-0.6B --output_dir outputs/qwen3 \
        --learning_rate 1e-6 --max_completion_length 512 --deepspeed recipes/launch/ds_zero2.json

Every option of `MTPCriticConfig` (and so of TRL's `GRPOConfig`) is a command-line argument; `--config file.yaml` reads
them from a file. Writes the policy, the heads, `curves.png`, `token_values.html` and `summary.json`.
"""

import json
import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import reasoning_gym
from accelerate.state import AcceleratorState
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, set_seed
from transformers.integrations.deepspeed import set_hf_deepspeed_config
from trl import TrlParser

from rl_plugins.report import DEFAULT_PANELS, Panel, plot_training_curves, traces_from_rollout, write_token_values_html
from rl_plugins.trl import MTPCriticConfig, MTPCriticTrainer, MTPSFTConfig, MTPSFTTrainer

CHARACTERS = "0123456789+-*/=()., "
HELD_OUT_SEED = 1_000_000_000  # reasoning-gym seeds item i with seed + i, so neighbouring seeds would share items


@dataclass
class Script:
    """What to train and on what."""

    model: str | None = field(default=None, metadata={"help": "Path or hub id of a model; default: a small new one."})
    gguf_file: str | None = field(default=None, metadata={"help": "GGUF file inside --model to load weights from."})
    task: str = field(default="chain_sum", metadata={"help": "Name of a reasoning-gym task."})
    task_config: str = field(
        default='{"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 1}',
        metadata={"help": "Options of the task, as JSON."},
    )
    train_items: int = field(default=20_000, metadata={"help": "Items to train on."})
    eval_items: int = field(default=512, metadata={"help": "Held-out items, none of which is trained on."})
    warm_start_steps: int = field(default=1000, metadata={"help": "Supervised steps of the small model."})
    slips: float = field(
        default=0.1, metadata={"help": "Share of running totals that are wrong in the warm start's demonstrations."}
    )
    hidden_size: int = field(default=64, metadata={"help": "Width of the small model."})
    layers: int = field(default=2, metadata={"help": "Depth of the small model."})


@dataclass
class Config(MTPCriticConfig):
    """`MTPCriticConfig` with defaults that suit the small model."""

    output_dir: str = field(default="outputs/mtp_critic", metadata={"help": "Where to write."})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Completions per step and device."})
    per_device_eval_batch_size: int = field(default=128, metadata={"help": "Completions per step in evaluation."})
    learning_rate: float = field(default=3e-4, metadata={"help": "Learning rate of the trunk."})
    head_learning_rate: float | None = field(default=1e-3, metadata={"help": "Learning rate of the heads."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning-rate schedule."})
    max_steps: int = field(default=400, metadata={"help": "Optimizer steps of reinforcement learning."})
    max_completion_length: int = field(default=24, metadata={"help": "Longest completion, in tokens."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate."})
    eval_steps: float | None = field(default=100, metadata={"help": "Evaluate every so many steps."})
    eval_on_start: bool = field(default=True, metadata={"help": "Whether to evaluate before training."})
    save_strategy: str = field(default="no", metadata={"help": "When to save checkpoints."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Whether to recompute activations."})
    report_to: str = field(default="none", metadata={"help": "Where to log: none, tensorboard, wandb, trackio, ..."})


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
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


def demonstration(entry: dict[str, Any], slips: float) -> str:
    """The answer, after the running totals where the task is a chain of sums: "4 + 3 - 5" is worked as "7 2".

    Each total goes wrong with probability `slips`, and the next ones build on it: people's worked solutions have such
    slips, a policy that imitates them slips as often, and it is for reinforcement learning to stop that.
    """
    expression = entry["metadata"].get("expression", "")
    numbers = [int(x.replace(" ", "")) for x in re.findall(r"(?:^|[+-] )-?\d+", expression)]
    totals = [sum(numbers[: i + 1]) for i in range(1, len(numbers))]
    if not totals or str(totals[-1]) != entry["answer"]:
        return entry["answer"]
    dice, error, steps = random.Random(expression), 0, []
    for total in totals:
        if dice.random() < slips:
            error += dice.choice([-10, -2, -1, 1, 2, 10])
        steps.append(str(total + error))
    return " ".join(steps)


def build_datasets(script: Script, chat: bool, seed: int) -> tuple[Dataset, Dataset]:
    """Training and held-out items of one distribution; no held-out question is trained on."""
    options = json.loads(script.task_config)

    def rows(first: int, size: int) -> list[dict[str, Any]]:
        entries = reasoning_gym.create_dataset(script.task, seed=first, size=size, **options)
        return [as_row(entry, chat, script.slips) for entry in entries]

    held_out = {row["question"]: row for row in rows(HELD_OUT_SEED + seed, script.eval_items)}
    train = [row for row in rows(seed, script.train_items) if row["question"] not in held_out]
    if not train:
        raise ValueError("Every training question is held out: widen --task_config or lower --eval_items.")
    return Dataset.from_list(train), Dataset.from_list(list(held_out.values()))


def as_row(entry: dict[str, Any], chat: bool, slips: float) -> dict[str, Any]:
    """A row for TRL: chat models get the question as it is, the small model only the expression."""
    question = entry["question"]
    prompt: Any = question.rsplit(": ", 1)[-1].replace(" ", "")
    if chat:
        prompt = [{"role": "user", "content": f"{question}\nEnd your reply with the final answer."}]
    row = {"prompt": prompt, "question": question, "entry": json.dumps(entry)}
    return row if chat else {**row, "completion": " " + demonstration(entry, slips)}


def make_reward(script: Script) -> Any:
    """The task's own verifier, on the last number (or else the last line) of the completion."""
    verifier = reasoning_gym.create_dataset(script.task, **json.loads(script.task_config))

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


def warm_start(script: Script, args: Config, train: Dataset) -> str:
    """Train the small model on demonstrations, with its heads; returns where it was saved."""
    tokenizer = character_tokenizer()
    set_seed(args.seed)
    directory = str(Path(args.output_dir) / "warm_start")
    sft_args = MTPSFTConfig(
        output_dir=directory,
        max_steps=script.warm_start_steps,
        per_device_train_batch_size=args.per_device_train_batch_size,
        learning_rate=5e-3,
        head_learning_rate=args.head_learning_rate,
        num_mtp_heads=args.num_mtp_heads,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        logging_steps=50,
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
    trainer.train()
    trainer.save_model(directory)
    trainer.accelerator.wait_for_everyone()  # rank 0 writes, all ranks read
    if args.deepspeed is not None:
        # accelerate and transformers hold one DeepSpeed config per process: make it the main run's again.
        AcceleratorState._reset_state()
        set_hf_deepspeed_config(args.hf_deepspeed_config)
    return directory


def report(trainer: MTPCriticTrainer, script: Script, args: Config) -> dict[str, Any]:
    """Pictures and a summary of what was reached."""
    history = trainer.state.log_history
    accuracy = [row["eval_reward"] for row in history if "eval_reward" in row]
    variance = [row["eval_critic/explained_variance"] for row in history if "eval_critic/explained_variance" in row]
    summary = {
        "accuracy_before": accuracy[0],
        "accuracy_after": accuracy[-1],
        "explained_variance_before": variance[0],
        "explained_variance_after": variance[-1],
        "seed": args.seed,
        "steps": trainer.state.global_step,
    }
    output = Path(args.output_dir)
    held_out = Panel("Accuracy on held-out items", "share right", "eval_reward", floor=0.0)
    title = f"{script.task}: {script.model or 'small Qwen3'}, critic = {args.num_mtp_heads} MTP heads"
    plot_training_curves(history, output / "curves.png", title=title, panels=(held_out, *DEFAULT_PANELS))
    write_token_values_html(
        traces_from_rollout(trainer.processing_class, trainer.last_rollout, 48),
        output / "token_values.html",
        title=f"What the critic thinks of each token: {script.task}",
        subtitle=f"Held-out items after {trainer.state.global_step} steps.",
        value_range=(0.0, 1.0),
    )
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def main() -> None:
    """Parse, warm-start, train, report."""
    parser = TrlParser((Script, Config))
    script, args = parser.parse_args_and_config()
    train, held_out = build_datasets(script, chat=script.model is not None, seed=args.seed)
    model = script.model or warm_start(script, args, train)
    if script.gguf_file is not None:
        args.model_init_kwargs = {**(args.model_init_kwargs or {}), "gguf_file": script.gguf_file}
    trainer = MTPCriticTrainer(model, make_reward(script), args, train_dataset=train, eval_dataset=held_out)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    if trainer.accelerator.is_main_process:
        summary = report(trainer, script, args)
        print(
            f"\nHeld-out accuracy {summary['accuracy_before']:.1%} -> {summary['accuracy_after']:.1%}, explained "
            f"variance of the critic {summary['explained_variance_after']:.2f}.\nPolicy, heads, curves.png and "
            f"token_values.html are in {args.output_dir}."
        )


if __name__ == "__main__":
    main()
