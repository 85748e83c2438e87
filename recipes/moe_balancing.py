"""Compare three ways of balancing the experts of a mixture-of-experts language model.

The recipe trains a small model in DeepSeek-V3's style (sigmoid router, shared expert) from scratch on Python's own
standard library: without balancing, with Switch's auxiliary loss, and loss-free (arXiv:2408.15664). It prints the
validation loss and the balance beside those of the paper. It takes four minutes on one core:

    python recipes/moe_balancing.py --output_dir outputs/moe_balancing

The runs differ only in the settings of `MoEBalancingCallback` on a stock `Trainer`: initial weights, batches and their
order are the same. Every option of `TrainingArguments` is a command-line argument. The recipe writes `results.json`,
`max_violation.png`, and for each run `moe_load.jsonl` and `expert_load.png`.
"""

import json
import math
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Dots1Config, Dots1ForCausalLM, ProgressCallback, Trainer, TrainingArguments, set_seed

from rl_plugins.functional import expert_counts, max_violation
from rl_plugins.known_warnings import ignore_known_warnings
from rl_plugins.moe import LOAD_FILE_NAME, read_expert_load
from rl_plugins.process_group import end_process_group
from rl_plugins.report import plot_expert_load, plot_max_violation
from rl_plugins.trl import MoEBalancingCallback
from rl_plugins.trl.scripts.parser import OptionParser

HELD_OUT = 4  # every fourth document: with fewer, their subjects would decide which experts are busy
SHOWN = ("loss", "moe/max_violation")
PAPER = {"aux": (9.56, 0.72), "loss_free": (9.50, 0.04)}  # perplexity and global MaxVio of its model of 1B parameters


@dataclass
class Script:
    """Options of the settings to compare, and of the model."""

    balancing: list[str] = field(
        default_factory=lambda: list(BALANCINGS), metadata={"help": "What to compare: none, aux, loss_free."}
    )
    rate: float = field(default=0.01, metadata={"help": "Step of the selection bias (loss_free)."})
    rule: str = field(
        default="proportional", metadata={"help": "How the bias moves: sign, proportional or quantile (loss_free)."}
    )
    stop: float = field(default=1.0, metadata={"help": "Share of training after which the bias rests (loss_free)."})
    aux_loss_coef: float = field(default=0.01, metadata={"help": "Coefficient of the auxiliary loss (aux)."})
    hidden_size: int = field(default=128, metadata={"help": "Width of the model."})
    layers: int = field(default=2, metadata={"help": "Depth of the model."})
    experts: int = field(default=16, metadata={"help": "Routed experts per layer."})
    experts_per_token: int = field(default=4, metadata={"help": "Routed experts that a token goes to."})
    expert_size: int = field(default=32, metadata={"help": "Hidden units of an expert."})
    vocabulary: int = field(default=1024, metadata={"help": "Tokens of the byte-pair encoding."})
    sequence_length: int = field(default=128, metadata={"help": "Tokens of a sequence."})
    eval_items: int = field(default=1000, metadata={"help": "Held-out sequences, evenly spaced."})


@dataclass
class Config(TrainingArguments):
    """`TrainingArguments` with defaults that suit the small model."""

    output_dir: str = field(default="outputs/moe_balancing", metadata={"help": "Where to write."})
    max_steps: int = field(default=600, metadata={"help": "Optimizer steps of each run."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Sequences per step and device."})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Sequences per step in evaluation."})
    learning_rate: float = field(default=6e-3, metadata={"help": "Peak of the learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    warmup_steps: float = field(default=20, metadata={"help": "Steps of linear warm-up."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Decay of AdamW's second moment."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    save_strategy: str = field(default="no", metadata={"help": "When to save checkpoints."})
    report_to: str = field(default="none", metadata={"help": "Where to log: none, tensorboard, wandb, trackio, ..."})


BALANCINGS: dict[str, Callable[[Script], dict[str, Any]]] = {
    "none": lambda script: {"rate": 0.0, "count_only": True},
    "aux": lambda script: {"rate": 0.0, "aux_loss_coef": script.aux_loss_coef},
    "loss_free": lambda script: {"rate": script.rate, "rule": script.rule, "stop": script.stop},
}
"""Settings of `MoEBalancingCallback`, the only difference between the runs. With `none` it only counts the load."""


class BriefProgress(ProgressCallback):
    """Progress bar of transformers that prints two metrics at every tenth log entry; loggers still get all metrics."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Print one short line."""
        shown = {key: logs[key] for key in SHOWN if logs and key in logs}
        if shown and state.global_step % (10 * state.logging_steps) == 0:
            super().on_log(args, state, control, logs={"step": state.global_step, **shown}, **kwargs)


def documents() -> dict[str, str]:
    """Read the standard library's modules and the topics of `help()`, by name."""
    modules = Path(sysconfig.get_path("stdlib")).glob("*.py")
    return {**{file.name: file.read_text(encoding="utf-8") for file in modules}, **topics}


def build_blocks(script: Script) -> tuple[torch.Tensor, torch.Tensor]:
    """Make tokens for training and for validation, each (N, T), from different documents."""
    texts = [text for _, text in sorted(documents().items())]
    train = [text for i, text in enumerate(texts) if i % HELD_OUT]
    held_out = texts[::HELD_OUT]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=script.vocabulary,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(train, trainer)

    def blocks(texts: list[str]) -> torch.Tensor:
        ids = [i for encoding in tokenizer.encode_batch(texts) for i in [*encoding.ids, 0]]  # 0 is <eos>
        whole = len(ids) // script.sequence_length * script.sequence_length
        return torch.tensor(ids[:whole]).view(-1, script.sequence_length)

    validation = blocks(held_out)
    return blocks(train), validation[torch.linspace(0, len(validation) - 1, script.eval_items).long().unique()]


def small_model(script: Script) -> Dots1ForCausalLM:
    """Make a mixture of experts with random weights: dots1 is DeepSeek-V3 with plain attention."""
    config = Dots1Config(
        vocab_size=script.vocabulary,
        hidden_size=script.hidden_size,
        num_hidden_layers=script.layers,
        first_k_dense_replace=0,
        n_routed_experts=script.experts,
        num_experts_per_tok=script.experts_per_token,
        moe_intermediate_size=script.expert_size,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=script.hidden_size // 4,
        max_position_embeddings=script.sequence_length,
        max_window_layers=script.layers,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        # The usual 0.02 suits wide models: with it, the loss of this one was about 0.4 nats higher after 400 steps.
        initializer_range=0.05,
        use_cache=False,
    )
    return Dots1ForCausalLM(config)


@contextmanager
def counted_tokens(model: Dots1ForCausalLM) -> Iterator[torch.Tensor]:
    """Count the tokens that each expert receives inside the block (L, E); the callback counts only in training."""
    gates = [layer.mlp.gate for layer in model.model.layers]
    counts = torch.zeros(len(gates), model.config.n_routed_experts, dtype=torch.long, device=model.device)

    def count(layer: int, gate: torch.nn.Module, args: Any, output: tuple[torch.Tensor, ...]) -> None:
        counts[layer] += expert_counts(output[2], counts.shape[1])

    hooks = [gate.register_forward_hook(partial(count, layer)) for layer, gate in enumerate(gates)]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def train(script: Script, args: Config, balancing: str, blocks: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
    """Make one run, and return the validation loss and the balance over all validation tokens."""
    args = replace(args, output_dir=str(Path(args.output_dir) / balancing))
    Path(args.output_dir, LOAD_FILE_NAME).unlink(missing_ok=True)  # of an earlier run
    set_seed(args.seed)
    train_set, held_out = ([{"input_ids": row, "labels": row} for row in part] for part in blocks)
    trainer = Trainer(small_model(script), args, train_dataset=train_set, eval_dataset=held_out)
    MoEBalancingCallback(**BALANCINGS[balancing](script)).add_to(trainer)
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(BriefProgress)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    with counted_tokens(trainer.model) as counts:
        loss = trainer.evaluate()["eval_loss"]
    violation = max_violation(trainer.accelerator.reduce(counts))  # (L,)
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "max_violation": violation.mean().item(),
        "max_violation_of_worst_layer": violation.max().item(),
        "seconds": seconds,
    }


def table(results: dict[str, dict[str, float]]) -> str:
    """Format our results beside those of the paper."""
    lines = [
        f"{'':<10}{'ours':^56}{'2408.15664, 1B':^20}",
        f"{'balancing':<10}{'loss':>8}{'perplexity':>12}{'MaxVio':>9}{'worst layer':>13}{'seconds':>9}     "
        f"{'perplexity':>12}{'MaxVio':>8}",
    ]
    for name, row in results.items():
        ours = (
            f"{name:<10}{row['loss']:>8.3f}{row['perplexity']:>12.2f}{row['max_violation']:>9.3f}"
            f"{row['max_violation_of_worst_layer']:>13.3f}{row['seconds']:>9.0f}     "
        )
        perplexity, violation = (format(number, ".2f") for number in PAPER[name]) if name in PAPER else ("-", "-")
        lines.append(f"{ours}{perplexity:>12}{violation:>8}")
    return "\n".join(lines)


def main() -> None:
    """Parse, train with each setting, report."""
    ignore_known_warnings()
    parser = OptionParser((Script, Config), description=(__doc__ or "").splitlines()[0])
    script, args = parser.parse_args_and_config()
    unknown = set(script.balancing) - set(BALANCINGS)
    if unknown:
        parser.error(f"--balancing {' '.join(sorted(unknown))}: choose from {', '.join(BALANCINGS)}")
    results = {}
    with parser.catching(begun=lambda: bool(results)):
        blocks = build_blocks(script)
        print(f"{blocks[0].numel():,} tokens to train on, {blocks[1].numel():,} held out")
        for balancing in script.balancing:
            print(f"\n{balancing}")
            results[balancing] = train(script, args, balancing, blocks)
    if args.process_index == 0:
        report(results, args)
    end_process_group()


def report(results: dict[str, dict[str, float]], args: Config) -> None:
    """Draw pictures, and write and print the results."""
    output = Path(args.output_dir)
    loads = {name: read_expert_load(output / name / LOAD_FILE_NAME) for name in results}
    for name, load in loads.items():
        plot_expert_load(load, output / name / "expert_load.png", title=name)
    plot_max_violation(loads, output / "max_violation.png", title="Balance during training")
    (output / "results.json").write_text(json.dumps({"seed": args.seed, "runs": results}, indent=2) + "\n")
    print(f"\nMaxVio is over all held-out tokens, the mean of all layers.\n{table(results)}")
    print(f"\nThe pictures are in {args.output_dir}.")


if __name__ == "__main__":
    main()
