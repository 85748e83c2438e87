"""Measure which MTP heads to choose: parallel or sequential ones, and how many.

    OMP_NUM_THREADS=1 python recipes/benchmarks/heads.py --json outputs/heads.json

    exact   Random languages of short strings (`rl_plugins.tabular.TokenMDP`) with a frozen policy, a random Qwen3. The
            values are exact, and so is the error of heads that learn them by temporal differences:
            `1 - MSE / Var` over the policy's states. Two rewards: whether 1s or 2s are in the majority (easy: one
            hidden state of the trunk tells most of it), and the number of 2s right after a 1 (hard: it does not).
    recipe  The task of `recipes/mtp_critic.py`. For every seed the trunk gets one warm start, from which all heads
            begin: first they learn to draft on the same demonstrations with the trunk frozen, then policy and critic
            learn together. All runs have the same number of completions per step, and start from the same policy.
            Explained variance is measured on held-out items, at a quarter of the run and at the end. It is also
            measured on each training batch before learning from it, and averaged over the whole run, which is less
            noisy.

After a run the heads draft the completions of held-out prompts at the temperature of the run. The table has the share
of drafts that were accepted at each place, among those whose earlier drafts were all accepted. The cost is the
processor time of a training step, rollout included, in units of that of one parallel head with the same seed. The
trunk has only two layers here, so that one more decoder layer costs a lot: `overhead.py` measures the cost in a deeper
model.

Results are written to the file after every run, and another call with the same file does not repeat these runs.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
    set_seed,
)

from rl_plugins.functional.alignment import completion_states, head_targets
from rl_plugins.nn import MTPHeads, PolyakTarget, attach_mtp_heads
from rl_plugins.nn.mtp_heads import HEAD_TYPES
from rl_plugins.process_group import end_process_group
from rl_plugins.rollouts import SpeculativeDecoder
from rl_plugins.signals import critic_targets, value_loss, value_losses
from rl_plugins.tabular import TokenMDP
from rl_plugins.trl import MTPCriticTrainer, MTPSFTConfig, MTPSFTTrainer

sys.path.insert(0, str(Path(__file__).parents[1]))
import mtp_critic
import sums

VALUE = "critic/explained_variance"
FIRST = ("parallel", 1)
"""Heads whose cost is the unit of all costs."""
PROMPT_LENGTH = 4  # so that three heads in a row have read three tokens before the first state
VOCAB_SIZE, MAX_LENGTH = 4, 6


# Exact values


def majority(strings: Tensor) -> Tensor:
    """Return 1 if 1s are in the majority, -1 if 2s are, else 0."""
    return torch.sign((strings == 1).sum(1) - (strings == 2).sum(1)).double()


def pairs(strings: Tensor) -> Tensor:
    """Return a half for every 2 right after a 1."""
    return ((strings[:, :-1] == 1) & (strings[:, 1:] == 2)).sum(1).double() / 2


REWARDS: dict[str, Callable[[Tensor], Tensor]] = {"easy": majority, "hard": pairs}


def with_prompt(tokens: Tensor) -> Tensor:
    """Put a prompt of 0s in front of strings."""
    return torch.cat([tokens.new_zeros(len(tokens), PROMPT_LENGTH), tokens], dim=1)


def random_policy(seed: int) -> Qwen3ForCausalLM:
    """Make a random Qwen3 whose states and probabilities depend visibly on the whole prefix."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=32,
        initializer_range=64**-0.5,  # the usual 0.02 makes attention uniform and every policy the same
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Qwen3ForCausalLM(config).eval().requires_grad_(False)


def language(model: Qwen3ForCausalLM, reward: Callable[[Tensor], Tensor]) -> TokenMDP:
    """Make the decision process of all strings of the policy, with their exact values."""

    def policy(prefixes: Tensor) -> Tensor:
        logits = model(input_ids=with_prompt(prefixes), use_cache=False).logits[:, -1]
        return logits.double().softmax(-1)

    return TokenMDP(policy, reward, vocab_size=VOCAB_SIZE, max_length=MAX_LENGTH)


def run_heads(model: Qwen3ForCausalLM, heads: MTPHeads, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values (B, T, K) of the states of strings, and the hidden states from which heads compute them."""
    states: list[Tensor] = []

    def select(hidden: Tensor) -> Tensor:
        states.append(completion_states(hidden, tokens.shape[1]))
        return states[0]

    with heads.running(select, value_grad_scale=0.0) as run:
        model.model(input_ids=with_prompt(tokens), use_cache=False)
    assert run.values is not None
    return run.values, states[0].detach()


def exact_scores(head_type: str, num_heads: int, reward: str, seed: int, steps: int) -> list[float]:
    """Compute `1 - MSE / Var` of each head after `steps` of temporal differences: parallel head k against the best
    forecast of `V(s_{t+k-1})` from `s_t`, sequential heads all against `V(s_t)`."""
    model = random_policy(seed)
    mdp = language(model, REWARDS[reward])
    heads = attach_mtp_heads(model, num_heads, head_type=head_type)
    target = PolyakTarget(heads, tau=0.1)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=5e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=steps)
    generator = torch.Generator().manual_seed(1)
    for step in range(1, steps + 1):
        tokens, mask, _ = mdp.sample(96, generator)
        values, states = run_heads(model, heads, tokens)
        old = values.detach()
        rewards = mdp.token_rewards(tokens).float()
        goals = critic_targets(rewards, old, target(states), mask, estimator="td").returns
        squared = value_losses()["squared"]
        options: dict[str, Any] = {"num_items": mask.sum(), "old_values": old, "ahead": heads.ahead}
        loss, _, _ = value_loss(values, goals, mask, loss=squared, **options)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        target.update(heads.value_path.parameters(), step=step)
    with torch.no_grad():
        tokens, mask, _ = mdp.sample(4000, torch.Generator().manual_seed(2))
        values = run_heads(model, heads, tokens)[0]
    _, exists = head_targets(torch.zeros(mask.shape), mask, num_heads, ahead=heads.ahead)
    scores = []
    for k in range(num_heads):
        exact = mdp.forecast(tokens, 1 + k * heads.ahead)[exists[..., k]]
        scores.append(accuracy_of(values[..., k][exists[..., k]].double(), exact))
    return scores


def accuracy_of(values: Tensor, exact: Tensor) -> float:
    """Compute `1 - MSE / Var`: explained variance, which a bias lowers, too."""
    return float(1 - (values - exact).square().mean() / exact.var(correction=0))


# The recipe


class Clock(TrainerCallback):
    """Callback that records the processor time of every training step, with its rollout and without evaluation."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._start = time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        self.seconds.append(time.process_time() - self._start)


def make_config(output_dir: Path, seed: int, args: argparse.Namespace, **options: Any) -> mtp_critic.Config:
    """Make the recipe's config."""
    return mtp_critic.Config(
        output_dir=str(output_dir),
        seed=seed,
        max_steps=args.max_steps,
        eval_steps=args.max_steps // 4,
        logging_steps=args.max_steps // 4,
        learning_rate=args.learning_rate,
        value_grad_scale=args.value_grad_scale,
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        **options,
    )


def warm_heads(head_type: str, num_heads: int, start: str, output: Path, train: Any, args: argparse.Namespace) -> str:
    """Train heads to draft demonstrations, on the frozen trunk, and return the folder where both are saved."""
    config = MTPSFTConfig(
        output_dir=str(output),
        max_steps=args.head_steps,
        per_device_train_batch_size=64,
        freeze_trunk=True,
        head_learning_rate=4e-3,
        mtp_head_type=head_type,
        num_mtp_heads=num_heads,
        lr_scheduler_type="cosine",
        warmup_steps=min(20, args.head_steps // 10),
        logging_steps=max(1, args.head_steps),
        save_strategy="no",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    rows, tokenizer = train.select_columns(["prompt", "completion"]), AutoTokenizer.from_pretrained(start)
    model = AutoModelForCausalLM.from_pretrained(start)  # without the heads of its warm start
    trainer = MTPSFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model(str(output))
    return str(output)


def explained(history: list[dict[str, Any]], steps: int) -> dict[str, float]:
    """Read explained variances from the trainer's log: of held-out items at a quarter and at the end, and of training
    batches over the whole run."""
    held_out = {row["step"]: row[f"eval_{VALUE}"] for row in history if f"eval_{VALUE}" in row}
    training = [row[VALUE] for row in history if VALUE in row]
    return {
        "quarter": held_out.get(steps // 4, float("nan")),  # undefined where all completions are right, or wrong
        "end": held_out.get(steps, float("nan")),
        "training": statistics.mean(training) if training else float("nan"),
    }


@torch.no_grad()
def draft(model: Any, tokenizer: Any, prompts: list[str], config: mtp_critic.Config) -> dict[str, Any]:
    """Measure the acceptance of drafts, with as many drafts in every step as there are heads."""
    batch = tokenizer(text=prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    decoder = SpeculativeDecoder(draft_cost=0.0)
    torch.manual_seed(0)
    model.eval().generate(
        input_ids=batch["input_ids"].to(model.device),
        attention_mask=batch["attention_mask"].to(model.device),
        max_new_tokens=config.max_completion_length,
        do_sample=True,
        temperature=config.temperature,
        top_k=0,
        custom_generate=decoder,
    )
    assert decoder.last is not None and decoder.last.statistics is not None
    return {
        "acceptance": decoder.last.statistics.acceptance,
        "tokens_per_step": decoder.last.statistics.tokens_per_step,
    }


def run_recipe(head_type: str, num_heads: int, seed: int, root: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Train policy and critic with these heads, from the warm start of the seed."""
    script = sums.Script(
        warm_start_steps=args.warm_start_steps,
        train_items=args.train_items,
        eval_items=args.eval_items,
        hidden_size=args.hidden_size,
        layers=args.layers,
    )
    train, held_out = sums.build_datasets(script, False, seed)
    start = root / f"start_{seed}" / "warm_start"
    if not (start / "config.json").is_file():
        sums.warm_start(script, make_config(start.parent, seed, args, num_mtp_heads=1), train)
    output = root / f"{head_type}_{num_heads}_{seed}"
    policy = warm_heads(head_type, num_heads, str(start), output / "heads", train, args)
    config = make_config(output, seed, args, mtp_head_type=head_type, num_mtp_heads=num_heads)
    set_seed(seed)
    trainer = MTPCriticTrainer(policy, sums.make_reward(script), config, train_dataset=train, eval_dataset=held_out)
    trainer.remove_callback(PrinterCallback)
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    history = trainer.state.log_history
    accuracy = [row[sums.ACCURACY] for row in history if sums.ACCURACY in row]
    counted = clock.seconds[config.steps_per_generation :]  # the first rollout warms up
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    return {
        "accuracy_before": accuracy[0],
        "accuracy": accuracy[-1],
        "explained_variance": explained(history, args.max_steps),
        "cpu": statistics.mean(counted),
        "steps": args.max_steps,
        **draft(model, trainer.processing_class, list(held_out["prompt"]), config),
    }


# The table


def mean_and_range(xs: list[float]) -> str:
    """Format mean and range of the figures that are defined, for the table."""
    xs = [x for x in xs if not math.isnan(x)]
    if not xs:
        return ""
    text = f"{statistics.mean(xs):.2f}"
    return text if len(xs) == 1 else f"{text} ({min(xs):.2f} to {max(xs):.2f})"


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Make one row per type and number of heads, every figure as a list over seeds; costs are ratios within a seed.

    Args:
        runs: Runs with `part`, `heads`, `K`, `seed` and their figures.
    """
    unit = {run["seed"]: run["cpu"] for run in runs if run["part"] == "recipe" and (run["heads"], run["K"]) == FIRST}
    rows = []
    for head_type, num_heads in sorted({(run["heads"], run["K"]) for run in runs}):
        mine = [run for run in runs if (run["heads"], run["K"]) == (head_type, num_heads)]
        recipe = [run for run in mine if run["part"] == "recipe"]
        row: dict[str, Any] = {"heads": head_type, "K": num_heads}
        for reward in REWARDS:
            row[reward] = [run["scores"][0] for run in mine if run["part"] == "exact" and run["reward"] == reward]
        for name in ("quarter", "end", "training"):
            row[name] = [run["explained_variance"][name] for run in recipe]
        row["accuracy"] = [run["accuracy"] for run in recipe]
        row["acceptance"] = [list(places) for places in zip(*(run["acceptance"] for run in recipe), strict=True)]
        row["cost"] = [run["cpu"] / unit[run["seed"]] for run in recipe if run["seed"] in unit]
        rows.append(row)
    return rows


COLUMNS = ("easy", "hard", "quarter", "end", "training", "accuracy", "cost")


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the rows as Markdown: mean and range over seeds."""
    print(f"| heads | K | {' | '.join(COLUMNS)} | accepted by place |\n|{'---|' * (len(COLUMNS) + 3)}")
    for row in rows:
        figures = " | ".join(mean_and_range(row[name]) for name in COLUMNS)
        accepted = " ".join(f"{statistics.mean(place):.2f}" for place in row["acceptance"])
        print(f"| {row['heads']} | {row['K']} | {figures} | {accepted} |")


def read_cells(names: list[str]) -> list[tuple[str, int]]:
    """Read types and numbers of heads from names: `parallel2` means two parallel heads.

    Raises:
        ValueError: If a name is not of this form.
    """
    cells = []
    for name in names:
        head_type = name.rstrip("0123456789")
        number = name.removeprefix(head_type)
        if head_type not in HEAD_TYPES or not number or int(number) < 1:
            raise ValueError(f"{name!r} are no heads; write {' or '.join(HEAD_TYPES)} and their number: parallel2.")
        cells.append((head_type, int(number)))
    return cells


def main() -> None:
    """Measure all cases that are not measured yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [f"{head_type}{k}" for k in (1, 2, 3) for head_type in HEAD_TYPES]
    parser.add_argument("--parts", nargs="+", choices=("exact", "recipe"), default=["exact", "recipe"])
    parser.add_argument("--heads", nargs="+", default=every, help="what to compare, such as sequential1 parallel2")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 1, 2], help="of policies, warm starts and runs")
    parser.add_argument("--exact-steps", type=int, default=300, help="steps on each language")
    parser.add_argument("--warm-start-steps", type=int, default=4000, help="supervised steps of the trunk")
    parser.add_argument("--head-steps", type=int, default=400, help="supervised steps of the heads")
    parser.add_argument("--max-steps", type=int, default=1200, help="steps of reinforcement learning")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="of the trunk; 0 compares on one policy")
    parser.add_argument("--value-grad-scale", type=float, default=1.0, help="of the value gradient into the trunk")
    parser.add_argument("--train-items", type=int, default=20_000, help="items to train on")
    parser.add_argument("--eval-items", type=int, default=512, help="held-out items")
    parser.add_argument("--hidden-size", type=int, default=64, help="width of the recipe's model")
    parser.add_argument("--layers", type=int, default=2, help="depth of the recipe's model")
    parser.add_argument("--folder", type=Path, default=Path("outputs/heads"), help="where the runs write")
    parser.add_argument("--json", type=Path, default=Path("outputs/heads.json"), help="write all figures to this file")
    args = parser.parse_args()
    try:
        cells = read_cells(args.heads)
    except ValueError as error:
        parser.error(str(error))
    if args.max_steps % 4 or args.max_steps < 8:
        parser.error("--max-steps must be a multiple of 4, so that there is a quarter, and at least two rollouts, 8")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    sums.ignore_known_warnings()
    chosen = ("parts", "heads", "seeds", "folder", "json")
    settings = {name: value for name, value in vars(args).items() if name not in chosen}
    runs: list[dict[str, Any]] = []
    if args.json.is_file():
        report = json.loads(args.json.read_text())
        runs = report["runs"]
        if report["settings"] != settings:
            parser.error(f"{args.json} holds figures of other settings: {report['settings']}")
    args.json.parent.mkdir(parents=True, exist_ok=True)

    def measure(key: dict[str, Any], call: Callable[[], dict[str, Any]]) -> None:
        if any(key.items() <= run.items() for run in runs):
            return
        start = time.perf_counter()
        runs.append({**key, **call(), "minutes": (time.perf_counter() - start) / 60})
        print(json.dumps(runs[-1]), file=sys.stderr)
        report = {"settings": settings, "rows": summarise(runs), "runs": runs}
        args.json.write_text(json.dumps(report, indent=1))

    for seed, (head_type, k) in itertools.product(args.seeds, cells):
        key = {"heads": head_type, "K": k, "seed": seed}
        if "recipe" in args.parts:
            measure({"part": "recipe", **key}, partial(run_recipe, head_type, k, seed, args.folder, args))
        for reward in REWARDS if "exact" in args.parts else ():
            call = partial(exact_scores, head_type, k, reward, seed, args.exact_steps)
            measure({"part": "exact", "reward": reward, **key}, lambda call=call: {"scores": call()})
    print_table(summarise(runs))
    end_process_group()


if __name__ == "__main__":
    main()
