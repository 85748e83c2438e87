"""What the critic costs: `MTPCriticTrainer` beside stock `GRPOTrainer` on the same completions.

    python recipes/benchmarks/overhead.py --json outputs/overhead.json

Both trainers get the same randomly initialised Qwen3 (41M parameters, 32k vocabulary, tied embeddings), the same
reward function and the same optimizer. A step of GRPO samples `--generations` completions for each of its prompts,
`--completions` in all; the critic's dataset names every prompt that often instead, one completion each. End-of-text is
suppressed, so every completion has `--completion-length` tokens, and the policy's learning rate is 0, which costs
an optimizer as much as any other: with equal seeds both trainers sample the very same tokens in every step. The
hashes of all prompts and completions are compared, and a difference is an error.

Every run is a fresh process, the trainers take turns (A B B A ...), and the first step of each run is not counted.
Reported are medians over all counted steps, and as ratio the median over repetitions of the ratio within one: runs
next to each other share what else the machine is doing.

    step      from the end of one optimizer step to the end of the next: everything
    rollout   generation, rewards, and for the critic its values, targets and advantages
    update    the rest: forward, backward, optimizer, target heads
    memory    peak above what the process held once the model was loaded: resident memory, or CUDA's allocations
    cpu       processor time of the same steps, which depends less on what else the machine runs

Goals: a step at most 1.15 times GRPO's, and memory at most 1.05 times.

What it costs is the heads' token loss: each head multiplies its features with the LM head once forward and once
backward, so the overhead grows with the embedding's share of the parameters (0.31 here, 0.26 in Qwen3-0.6B, less in
larger models) and shrinks with the share of generation. `--trainers grpo critic values-only` adds a critic with
`mtp_loss_coef=0`, which has no such loss.

The critic whose heads also draft the completions needs heads that know the task: those of `speculative.py`.

    python recipes/benchmarks/overhead.py --model outputs/benchmarks/speculative/small --temperature 1e-5 \
        --completion-length 128 --trainers grpo critic speculative

So close to temperature 0 all trainers get the same completions, and the hashes are compared as above. At
`--temperature 1` drafting draws other random numbers, and its completions are as many and as long, but others.
"""

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

TRAINERS = ("grpo", "critic", "values-only", "speculative", "ppo")
GOALS = {"step": 1.15, "memory": 1.05}
MIB = 2**20


@dataclass(frozen=True)
class Settings:
    """What one run trains; each field is a command-line option."""

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
    model: str = field(default="", metadata={"help": "folder of a model with heads and prompts.json"})


# The worker: one trainer in one process. The parent stays free of torch, so the imports are inside.


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
    """Enough prompts for all steps, each repeated `copies` times in a row."""
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
    """A reward that differs between completions and costs nothing."""
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
        # One epoch and no KL penalty, so that all three do the same to the policy.
        options |= {"num_iterations": 1, "beta": 0.0, "value_learning_rate": 0.0}
        return PPOTrainer(args=PPOConfig(**options), **shared)
    if name == "values-only":
        options["mtp_loss_coef"] = 0.0
    if settings.model:
        options["num_mtp_heads"] = load_mtp_heads(model, settings.model).config.num_heads
    if name == "speculative":
        options["speculative"] = True
    return MTPCriticTrainer(args=MTPCriticConfig(**options), **shared)


def run_worker(name: str, settings: Settings) -> dict[str, Any]:
    """Train with one trainer; seconds per counted step, peak memory, and a hash of every step's completions."""
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


# The parent: runs workers in turns and compares them.


def spawn(name: str, settings: Settings) -> dict[str, Any]:
    """Run one worker in a fresh process."""
    options = [f"--{key.replace('_', '-')}={value}" for key, value in asdict(settings).items()]
    threads = str(settings.threads)
    env = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, "--worker", name, *options]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(runs: list[dict[str, Any]], exempt: Collection[str] = ()) -> dict[str, Any]:
    """Medians per trainer over all steps, and the median over repetitions of their ratios to GRPO's.

    Args:
        runs: What the workers returned.
        exempt: Trainers whose completions may be others.

    Raises:
        RuntimeError: If two runs trained on different completions.
    """
    if len({tuple(run["completions"]) for run in runs if run["trainer"] not in exempt}) != 1:
        raise RuntimeError("The trainers sampled different completions, so their times cannot be compared.")
    quantities = ("step", "rollout", "update", "cpu", "memory")
    by_trainer: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        by_trainer.setdefault(run["trainer"], []).append(run)
    median = {
        name: {q: statistics.median(x for run in mine for x in run[q]) for q in quantities}
        for name, mine in by_trainer.items()
    }
    ratio = {
        name: {
            q: statistics.median(
                statistics.median(run[q]) / statistics.median(stock[q])
                for run, stock in zip(mine, by_trainer["grpo"], strict=True)
            )
            for q in quantities
        }
        for name, mine in by_trainer.items()
    }
    return {"median": median, "ratio": ratio}


def print_table(report: dict[str, Any], settings: Settings) -> None:
    print(f"{'':20}{'step s':>9}{'rollout s':>11}{'update s':>10}{'cpu s':>8}{'memory MiB':>12}")
    for name, m in report["median"].items():
        print(f"{name:20}{m['step']:9.3f}{m['rollout']:11.3f}{m['update']:10.3f}{m['cpu']:8.3f}{m['memory']:12.0f}")
    for name, r in report["ratio"].items():
        if name != "grpo":
            label = f"{name} / grpo"
            print(
                f"{label:20}{r['step']:9.3f}{r['rollout']:11.3f}{r['update']:10.3f}{r['cpu']:8.3f}{r['memory']:12.3f}"
            )
    goals = {}
    if "critic" in report["ratio"] and not settings.model:  # the goals are for the model of the default
        goals |= {("critic", quantity): goal for quantity, goal in GOALS.items()}
    if "speculative" in report["ratio"]:
        goals["speculative", "step"] = 1.0
    for (name, quantity), goal in goals.items():
        ratio = report["ratio"][name][quantity]
        print(f"{name}, {quantity} {ratio:.3f}, goal {goal:.2f}: {'met' if ratio <= goal else 'missed'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in fields(Settings):
        flag = f"--{option.name.replace('_', '-')}"
        parser.add_argument(flag, type=type(option.default), default=option.default, help=option.metadata["help"])
    parser.add_argument("--repeats", type=int, default=3, help="runs per trainer")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=TRAINERS[:2], help="what to compare")
    parser.add_argument("--worker", choices=TRAINERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    settings = Settings(**{option.name: getattr(args, option.name) for option in fields(Settings)})
    if settings.completions % settings.generations:
        parser.error("--completions must be a multiple of --generations")
    if "grpo" not in args.trainers:
        parser.error("--trainers must include grpo, which the others are compared with")
    if args.worker:
        from rl_plugins.process_group import end_process_group

        print(json.dumps(run_worker(args.worker, settings)))
        end_process_group()
        return
    runs = []
    for repeat in range(args.repeats):
        for name in args.trainers if repeat % 2 == 0 else args.trainers[::-1]:
            runs.append(spawn(name, settings))
            print(f"{name}: {statistics.median(runs[-1]['step']):.2f} s per step", file=sys.stderr)
    drawn_otherwise = ("speculative",) if settings.temperature > 0.01 else ()
    report = compare(runs, drawn_otherwise)
    identical = sum(run["trainer"] not in drawn_otherwise for run in runs)
    share = f"all {len(runs)}" if identical == len(runs) else f"{identical} of {len(runs)}"
    print(
        f"{runs[0]['parameters'] / 1e6:.1f}M parameters, {settings.completions} completions of "
        f"{'' if settings.model else f'{settings.prompt_length} + '}{settings.completion_length} tokens, "
        f"{settings.device}, {settings.threads} threads; identical completions in {share} runs"
    )
    print_table(report, settings)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"settings": asdict(settings), **report, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
