"""Run one trainer for a few steps in a process of its own, and measure it; two benchmarks share this file.

`overhead.py` and `memory.py` call `spawn`, which runs this file as a script. The trainers of a comparison get the same
model, prompts, optimizer and random numbers, so that all of them sample exactly the same completions.
"""

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

TRAINERS = ("grpo", "critic", "sequential", "replay", "values-only", "speculative", "ppo")
MIB = 2**20


@dataclass(frozen=True)
class Settings:
    """Settings of one run; each field is a command-line option."""

    completions: int = field(default=8, metadata={"help": "completions per step"})
    generations: int = field(default=4, metadata={"help": "completions per prompt of GRPO"})
    prompt_length: int = field(default=32, metadata={"help": "tokens per prompt"})
    completion_length: int = field(default=64, metadata={"help": "tokens per completion"})
    vocab_size: int = field(default=32_768, metadata={"help": "tokens of the model"})
    hidden_size: int = field(default=384, metadata={"help": "width of the model"})
    layers: int = field(default=16, metadata={"help": "depth of the model"})
    checkpointing: int = field(default=0, metadata={"help": "1 recomputes activations, as TRL does by default"})
    steps: int = field(default=2, metadata={"help": "counted steps per run"})
    threads: int = field(default=1, metadata={"help": "CPU threads"})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda"})
    temperature: float = field(default=1.0, metadata={"help": "of sampling"})
    loss_share: float = field(default=0.25, metadata={"help": "share of the tokens in the heads' token loss"})
    loss: str = field(default="tokens", metadata={"help": "token loss of the heads: tokens or distribution"})
    model: str = field(default="", metadata={"help": "folder of a model with heads and prompts.json"})


def add_settings(parser: argparse.ArgumentParser, defaults: Settings) -> None:
    """Make every field of the settings a command-line option."""
    for option in fields(Settings):
        default = getattr(defaults, option.name)
        flag = f"--{option.name.replace('_', '-')}"
        parser.add_argument(flag, type=type(default), default=default, help=option.metadata["help"])


def read_settings(args: argparse.Namespace) -> Settings:
    """Make the settings from parsed options."""
    return Settings(**{option.name: getattr(args, option.name) for option in fields(Settings)})


# The benchmark's process


def spawn(name: str, settings: Settings) -> dict[str, Any]:
    """Run one trainer in a fresh process, and return what it measured."""
    options = [f"--{key.replace('_', '-')}={value}" for key, value in asdict(settings).items()]
    threads = str(settings.threads)
    env = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, name, *options]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


# The trainer's process. The benchmark's process does not load torch, so the imports are inside of functions.


def make_model(settings: Settings) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

    if settings.model:
        return AutoModelForCausalLM.from_pretrained(settings.model).to(settings.device)

    width = settings.hidden_size
    config = Qwen3Config(
        vocab_size=settings.vocab_size,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=settings.layers,
        num_attention_heads=max(1, width // 64),
        num_key_value_heads=max(1, width // 128),
        head_dim=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config).to(settings.device)


def make_tokenizer(settings: Settings) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if settings.model:
        return AutoTokenizer.from_pretrained(settings.model, padding_side="left")
    vocab = {"<pad>": 0, "<eos>": 1} | {f"t{i}": i for i in range(2, settings.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def make_prompts(settings: Settings, copies: int) -> list[str]:
    """Make enough prompts for all steps, each repeated `copies` times in a row."""
    distinct = (settings.steps + 1) * settings.completions // settings.generations
    if settings.model:
        known = json.loads((Path(settings.model) / "prompts.json").read_text())
        prompts = [known[i % len(known)] for i in range(distinct)]
    else:
        span = settings.vocab_size - 2
        prompts = [
            " ".join(f"t{2 + (7919 * (i * settings.prompt_length + j)) % span}" for j in range(settings.prompt_length))
            for i in range(distinct)
        ]
    return [prompt for prompt in prompts for _ in range(copies)]


def share_of_even_tokens(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Compute a reward that differs between completions and costs nearly no time."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def make_trainer(name: str, settings: Settings, model: Any, output_dir: str) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from rl_plugins.nn import load_mtp_heads
    from rl_plugins.trl import MTPCriticConfig, MTPCriticTrainer, PPOConfig, PPOTrainer

    tokenizer = make_tokenizer(settings)
    options: dict[str, Any] = dict(
        output_dir=output_dir,
        per_device_train_batch_size=settings.completions,
        max_steps=settings.steps + 1,
        max_completion_length=settings.completion_length,
        generation_kwargs={"suppress_tokens": [tokenizer.eos_token_id]},
        temperature=settings.temperature,
        learning_rate=0.0,
        gradient_checkpointing=bool(settings.checkpointing),
        bf16=settings.device == "cuda",
        use_cpu=settings.device == "cpu",
        shuffle_dataset=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        seed=0,
    )
    prompts = make_prompts(settings, copies=1 if name == "grpo" else settings.generations)
    shared: dict[str, Any] = dict(
        model=model,
        reward_funcs=share_of_even_tokens,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
    )
    if name == "grpo":
        return GRPOTrainer(args=GRPOConfig(num_generations=settings.generations, **options), **shared)
    if name == "ppo":
        # One epoch and no KL penalty, so that PPO makes as many passes over the policy as the other trainers.
        options |= {"num_iterations": 1, "beta": 0.0, "value_learning_rate": 0.0}
        return PPOTrainer(args=PPOConfig(**options), **shared)
    options |= {"mtp_loss_share": settings.loss_share, "mtp_loss_type": settings.loss}
    if name in ("sequential", "replay"):
        options |= {"mtp_head_type": "sequential", "num_mtp_heads": 1}
    if name == "replay":
        options["value_replay"] = 1
    if name == "values-only":
        options["mtp_loss_coef"] = 0.0
    if settings.model:
        options["num_mtp_heads"] = load_mtp_heads(model, settings.model).config.num_heads
    if name == "speculative":
        options["speculative"] = True
    return MTPCriticTrainer(args=MTPCriticConfig(**options), **shared)


def run_worker(name: str, settings: Settings) -> dict[str, Any]:
    """Train with one trainer, and return seconds per counted step, peak memory, and hashes of the completions."""
    import psutil
    import torch
    import transformers
    from transformers import TrainerCallback

    import rl_plugins.trl  # noqa: F401  (loaded in all runs alike, before memory is measured)

    torch.set_num_threads(settings.threads)
    transformers.logging.set_verbosity_error()
    on_gpu = settings.device == "cuda"

    def now() -> tuple[float, float]:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def held() -> int:
        return torch.cuda.memory_allocated() if on_gpu else psutil.Process().memory_info().rss

    empty = held()
    model = make_model(settings)
    with tempfile.TemporaryDirectory() as output_dir:
        loaded = held()
        trainer = make_trainer(name, settings, model, output_dir)
        ends: list[tuple[float, float]] = []
        rollouts: list[float] = []
        hashes: list[str] = []
        prepare_inputs = trainer._prepare_inputs

        def timed_prepare_inputs(batch: Any) -> Any:
            start = now()[0]
            inputs = prepare_inputs(batch)
            rollouts.append(now()[0] - start)
            # Sorted, since the trainers shuffle rows.
            rows = sorted(torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1).tolist())
            hashes.append(hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16])
            return inputs

        class Clock(TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                ends.append(now())

        trainer._prepare_inputs = timed_prepare_inputs
        trainer.add_callback(Clock())
        trainer.train()
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    steps = [after[0] - before[0] for before, after in zip(ends, ends[1:], strict=False)]
    return {
        "trainer": name,
        "step": steps,
        "cpu": [after[1] - before[1] for before, after in zip(ends, ends[1:], strict=False)],
        "rollout": rollouts[1:],
        "update": [step - rollout for step, rollout in zip(steps, rollouts[1:], strict=True)],
        "memory": [(peak - loaded) / MIB],
        "loaded": loaded / MIB,
        "total_memory": (peak - empty) / MIB,
        "parameters": sum(p.numel() for p in model.parameters()),
        "completions": hashes,
    }


def main() -> None:
    """Train with one trainer and print what was measured, as JSON."""
    from rl_plugins.process_group import end_process_group

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainer", choices=TRAINERS, help="what to train with")
    add_settings(parser, Settings())
    args = parser.parse_args()
    print(json.dumps(run_worker(args.trainer, read_settings(args))))
    end_process_group()


if __name__ == "__main__":
    main()
