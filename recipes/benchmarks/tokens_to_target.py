"""Count the tokens that methods generate until they are as good as stock GRPO at its end (with `symbols.py`).

    OMP_NUM_THREADS=1 python recipes/benchmarks/tokens_to_target.py --output_dir outputs/tokens_to_target --jobs 2
    OMP_NUM_THREADS=1 python recipes/benchmarks/tokens_to_target.py --tasks delay_16 --methods critic grpo spo

    sums         sums and differences of two to four numbers of one or two digits, of which no method learns all
    words        words spelled backward, three to nine letters
    delay_16     the first of 16 tokens decides, and the reward comes after the last; `delay_64`, `delay_256`
    cipher       the game of `recipes/multi_turn.py`: eight turns, most of what they earn is luck, paid after each turn
    cipher_end   the game again, paid as one sum at the end
    random       a coin decides the reward of `delay_16`, the control: no method can learn anything

All methods generate 64 completions for an update, with one policy, one schedule and no KL term. What is theirs is the
number of completions per prompt, the advantage and the loss, as papers or package have them by default. The critic has
a sequential head and a replay of its values. GRPO, DAPO and
RLOO compare eight completions of a prompt; `reward_to_go` is REINFORCE++ on the rewards that follow each token. Every
method has a learning rate of its own for every task, the best of three by the mean score over the run, on a seed that
is not reported. DAPO goes without its penalty on length, since lengths are given or short. Tokens that are drawn and
dropped count, for they are generated.

A score is the task's own, of the completions of one update, before the policy learns from them. The target is where
stock GRPO ends, the mean over the seeds and over the last tenth of the run. A run has reached it when the mean of ten
updates has. A run that never does counts with its whole budget; the table says how many did. Intervals are bootstrap
intervals of the mean over the seeds, 95 %.

Everything that is done is in `runs/`, one file for a run, and is not done again: stop and go on at any time.
Writes `tokens_to_target.json`, `tokens_to_target.md` and `tokens_to_target.png`.
"""

import argparse
import json
import multiprocessing
import random
import resource
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback, set_seed

from rl_plugins.report.curves import COLORS, LINE_STYLES, new_figure, save_png, style_axes
from rl_plugins.trl import (
    EpisodeRollouts,
    GRPOVariantConfig,
    GRPOVariantTrainer,
    MTPCriticConfig,
    MTPCriticTrainer,
    PPOConfig,
    PPOTrainer,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
import multi_turn
import sums
from symbols import CRITIC, small_policy, symbol_tokenizer

BATCH = 64
TUNING_SEED = 100
"""Seed on which learning rates are chosen, and no other."""

GROUPS = {"num_generations": 8}
SINGLE = {"num_generations": 1}
METHODS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "critic": (MTPCriticTrainer, MTPCriticConfig, CRITIC),
    "grpo": (GRPOVariantTrainer, GRPOVariantConfig, GROUPS),
    "dapo": (GRPOVariantTrainer, GRPOVariantConfig, {**GROUPS, "preset": "dapo", "overlong_shaping": False}),
    "reinforce++": (
        GRPOVariantTrainer,
        GRPOVariantConfig,
        {**SINGLE, "preset": "reinforce++", "beta": 0.0, "kl_in_reward": False},
    ),
    "rloo": (GRPOVariantTrainer, GRPOVariantConfig, {**GROUPS, "preset": "rloo", "beta": 0.0}),
    "spo": (GRPOVariantTrainer, GRPOVariantConfig, {**SINGLE, "preset": "spo"}),
    "ppo": (PPOTrainer, PPOConfig, {"beta": 0.0}),
    "reward_to_go": (GRPOVariantTrainer, GRPOVariantConfig, {**SINGLE, "advantage": "reward_to_go"}),
}
LEARNING_RATES = (3e-4, 1e-3, 3e-3)


# Tasks


class Meter:
    """Counts generated tokens and notes scores, update by update."""

    def __init__(self) -> None:
        self.tokens, self.curve = 0, []
        self._scores: list[float] = []

    def note(self, tokens: int, scores: list[float]) -> None:
        """Take in the completions of one call of the reward function; dynamic sampling calls several times."""
        self.tokens += tokens
        self._scores += scores

    def end_update(self) -> None:
        """Add a point to the curve."""
        if self._scores:
            self.curve.append((self.tokens, statistics.fmean(self._scores)))
            self._scores = []


class EndsUpdate(TrainerCallback):
    """Tells the meter that an update is over."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add a point."""
        self.meter.end_update()


@dataclass
class Setting:
    """A task, ready for one run.

    Attributes:
        model: The policy.
        tokenizer: Its tokenizer.
        prompts: Rows of the data.
        reward: Reward function, which also tells the meter.
        updates: Of the policy.
        max_completion_length: In tokens.
        options: Further options of the configs.
        given: Further arguments of the trainers.
        of_critics: Options of methods that have values.
        of_methods: Options of a method.
    """

    model: Any
    tokenizer: Any
    prompts: list[dict[str, Any]]
    reward: Any
    updates: int
    max_completion_length: int
    options: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    of_critics: dict[str, Any] = field(default_factory=dict)
    of_methods: dict[str, dict[str, Any]] = field(default_factory=dict)


def delay(length: int, updates: int, *, by_chance: bool = False) -> Callable[[Meter, int, Path], Setting]:
    """The first token decides: each of 32 prompts asks for one of four, and `length - 1` free tokens follow."""

    def make(meter: Meter, seed: int, output: Path) -> Setting:
        spelled = [f"{a}{b}{c}" for a in range(4) for b in range(4) for c in range(2)]
        dice = random.Random(0)
        wanted = {text: dice.randrange(4) for text in spelled}
        coin = random.Random(seed)

        def reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
            right = [float(ids[0] == wanted[text]) for text, ids in zip(prompts, completion_ids, strict=True)]
            meter.note(sum(map(len, completion_ids)), right)
            return [float(coin.random() < 0.5) for _ in right] if by_chance else right

        rows = [{"prompt": text} for text in spelled] * 8
        return Setting(small_policy(512), symbol_tokenizer(), rows, reward, updates, length)

    return make


def cipher(*, at_the_end: bool) -> Callable[[Meter, int, Path], Setting]:
    """Eight turns of a game in which luck decides how much a right answer is worth."""

    def make(meter: Meter, seed: int, output: Path) -> Setting:
        games: list[multi_turn.Cipher] = []

        def new_game() -> multi_turn.Cipher:
            games.append(multi_turn.Cipher(1_000_003 * seed + len(games)))
            return games[-1]

        turns, turn_length = multi_turn.TURNS, 2
        episodes = EpisodeRollouts(new_game, max_turns=turns, max_turn_length=turn_length)

        def earned(**inputs: Any) -> list[Any]:
            paid = episodes.earned(**inputs)
            meter.note(len(paid) * turns * turn_length, [game.right / turns for game in episodes.environments])
            return [sum(x for x in turn if x is not None) for turn in paid] if at_the_end else paid

        tokenizer = multi_turn.character_tokenizer()
        return Setting(
            multi_turn.small_model(tokenizer),
            tokenizer,
            [{"prompt": "a"}] * 1024,
            earned,
            updates=300,
            max_completion_length=turns * (turn_length + 3),
            given={"rollout_func": episodes},
            # Returns are up to 48, where a verifier says 0 or 1, and a squared error grows with the square.
            of_critics={"value_loss_coef": 0.005, "time_unit": "turn"},
            of_methods={"spo": {"reward_weights": [1 / 48]}},  # which tracks rewards between 0 and 1
            options={"entropy_coef": 0.01},
        )

    return make


def reasoning(
    task: str, config: dict[str, Any], updates: int, length: int, warm_start_steps: int
) -> Callable[[Meter, int, Path], Setting]:
    """A task of reasoning-gym for the small model of `recipes/sums.py`, after a warm start that all runs share."""

    def make(meter: Meter, seed: int, output: Path) -> Setting:
        script = sums.Script(task=task, task_config=json.dumps(config), warm_start_steps=warm_start_steps)
        train, _ = sums.build_datasets(script, False, 0)
        folder = warm_start(task, script, train, output)
        verify = sums.make_reward(script)

        def reward(completions: list[str], entry: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
            right = verify(completions, entry)
            meter.note(sum(map(len, completion_ids)), right)
            return right

        return Setting(
            AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
            sums.character_tokenizer(),
            train.select_columns(["prompt", "entry"]).to_list(),
            reward,
            updates,
            length,
        )

    return make


def warm_start(task: str, script: sums.Script, train: Dataset, output: Path) -> str:
    """Folder of the policy that all runs of a task start from, which is trained the first time."""
    folder = output / "warm_start" / task
    if not (folder / "warm_start" / "config.json").is_file():
        args = sums_config(folder)
        sums.warm_start(script, args, train)
        for heads in (folder / "warm_start").glob("mtp_heads*"):
            heads.unlink()  # the critic's are new ones, as those of its rivals are none
    return str(folder / "warm_start")


def sums_config(folder: Path) -> MTPCriticConfig:
    """Config that `sums.warm_start` reads its options from."""
    return MTPCriticConfig(
        output_dir=str(folder), bf16=False, use_cpu=True, report_to="none", disable_tqdm=True, seed=0
    )


TASKS: dict[str, Callable[[Meter, int, Path], Setting]] = {
    "sums": reasoning(
        "chain_sum", {"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 2}, 400, 24, warm_start_steps=2000
    ),
    "words": reasoning("spell_backward", {"min_word_len": 3, "max_word_len": 9}, 400, 12, warm_start_steps=1500),
    "delay_16": delay(16, 150),
    "delay_64": delay(64, 150),
    "delay_256": delay(256, 100),
    "cipher": cipher(at_the_end=False),
    "cipher_end": cipher(at_the_end=True),
    "random": delay(16, 150, by_chance=True),
}


# One run


def train(
    task: str, method: str, learning_rate: float, seed: int, output: Path, changes: dict[str, Any]
) -> dict[str, Any]:
    """Train with one method and give its curve, time and peak memory."""
    set_seed(seed)
    meter = Meter()
    setting = TASKS[task](meter, seed, output)
    set_seed(seed)
    trainer_class, config_class, own = METHODS[method]
    if method in ("critic", "ppo"):
        own = {**setting.of_critics, **own}
    if method == "critic":
        own = {**own, **changes}
    own = {**own, **setting.of_methods.get(method, {})}
    passes = own.get("num_iterations", config_class.num_iterations if method == "ppo" else 1)
    args = config_class(
        output_dir=str(output / "scratch" / f"{task}_{method}_{learning_rate}_{seed}"),
        per_device_train_batch_size=BATCH,
        max_completion_length=setting.max_completion_length,
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        max_steps=setting.updates * passes,
        logging_steps=20,
        save_strategy="no",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        seed=seed,
        **{"steps_per_generation": 1, **setting.options, **own},
    )
    trainer = trainer_class(
        setting.model,
        setting.reward,
        args,
        train_dataset=Dataset.from_list(setting.prompts),
        processing_class=setting.tokenizer,
        callbacks=[EndsUpdate(meter)],
        **setting.given,
    )
    trainer.remove_callback(PrinterCallback)
    before, began = held_memory(), time.time()
    trainer.train()
    logged = [row for row in trainer.state.log_history if "critic/explained_variance" in row]
    return {
        "task": task,
        "method": method,
        "learning_rate": learning_rate,
        "seed": seed,
        "curve": meter.curve,
        "seconds": time.time() - began,
        "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before,
        "explained_variance": [row["critic/explained_variance"] for row in logged],
    }


def held_memory() -> float:
    """Resident memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def run_file(output: Path, task: str, method: str, learning_rate: float, seed: int) -> Path:
    """Where a run is kept."""
    return output / "runs" / task / f"{method}_{learning_rate:g}_{seed}.json"


def work(job: tuple[str, str, float, int], output: Path, changes: dict[str, Any]) -> None:
    """Do a run and keep it; runs in a process of its own, whose memory is the run's."""
    torch.set_num_threads(1)
    try:
        result = train(*job, output, changes)
    except Exception:
        traceback.print_exc()
        raise
    path = run_file(output, *job)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".new").write_text(json.dumps(result))
    path.with_suffix(".new").rename(path)


def run_all(jobs: list[tuple[str, str, float, int]], output: Path, processes: int, changes: dict[str, Any]) -> None:
    """Do the runs that are not done, several at a time.

    Raises:
        RuntimeError: If one fails; those that are done stay.
    """
    context, running = multiprocessing.get_context("fork"), {}
    waiting = [job for job in jobs if not run_file(output, *job).is_file()]
    failed: list[Any] = []
    while waiting or running:
        while waiting and len(running) < processes and not failed:
            job = waiting.pop(0)
            running[job] = context.Process(target=work, args=(job, output, changes))
            running[job].start()
        for job in [job for job, process in running.items() if not process.is_alive()]:
            process = running.pop(job)
            process.join()
            if process.exitcode:
                failed.append(job)
            else:
                result = json.loads(run_file(output, *job).read_text())
                print(
                    f"{' '.join(map(str, job))}: end {ending(result['curve']):.3f}, {result['seconds']:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
        if failed and not running:
            raise RuntimeError(f"Failed: {failed}. Runs that are done stay in {output / 'runs'}.")
        time.sleep(0.2)


# Choosing learning rates, and the table


def smoothed(curve: list[tuple[int, float]], width: int = 10) -> list[float]:
    """Means of the last `width` scores."""
    heights = [height for _, height in curve]
    return [statistics.fmean(heights[max(0, i + 1 - width) : i + 1]) for i in range(len(heights))]


def ending(curve: list[tuple[int, float]]) -> float:
    """Mean score of the last tenth of a run."""
    return statistics.fmean(height for _, height in curve[-max(1, len(curve) // 10) :])


def area(curve: list[tuple[int, float]]) -> float:
    """Mean score over the run."""
    return statistics.fmean(height for _, height in curve)


def tokens_until(curve: list[tuple[int, float]], target: float) -> float | None:
    """Tokens after which the smoothed curve first reaches a target."""
    heights = smoothed(curve)
    return next((tokens for (tokens, _), h in zip(curve, heights, strict=True) if h >= target), None)


def interval(values: list[float], draws: int = 10_000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    dice = random.Random(0)
    means = sorted(statistics.fmean(dice.choices(values, k=len(values))) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws)]


def load(output: Path, task: str, method: str, learning_rate: float, seeds: list[int]) -> list[dict[str, Any]]:
    """Runs of the seeds that are there."""
    paths = [run_file(output, task, method, learning_rate, seed) for seed in seeds]
    return [json.loads(path.read_text()) for path in paths if path.is_file()]


def best_rate(output: Path, task: str, method: str, rates: list[float]) -> float | None:
    """Learning rate with the highest mean score on the tuning seed; `None` while some are missing."""
    found = {rate: load(output, task, method, rate, [TUNING_SEED]) for rate in rates}
    if not all(found.values()):
        return None
    return max(rates, key=lambda rate: area(found[rate][0]["curve"]))


def summarise(output: Path, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Rows of the table by task: of every method whose runs are there."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for task in options.tasks:
        runs = {}
        for method in options.methods:
            rate = best_rate(output, task, method, options.learning_rates)
            found = [] if rate is None else load(output, task, method, rate, options.seeds)
            if found:
                runs[method] = found
        if "grpo" not in runs:
            continue
        target = statistics.fmean(ending(run["curve"]) for run in runs["grpo"])
        unit = statistics.fmean(used(run, target)[0] for run in runs["grpo"])
        memory = statistics.fmean(run["mib"] for run in runs["grpo"])
        clock = statistics.fmean(run["seconds"] / run["curve"][-1][0] for run in runs["grpo"])
        tables[task] = []
        for method, found in runs.items():
            tokens = [used(run, target) for run in found]
            shares = [count / unit for count, _ in tokens]
            ends = [ending(run["curve"]) for run in found]
            tables[task].append(
                {
                    "method": method,
                    "learning_rate": found[0]["learning_rate"],
                    "seeds": len(found),
                    "target": target,
                    "tokens": statistics.fmean(count for count, _ in tokens),
                    "share": statistics.fmean(shares),
                    "share_interval": interval(shares),
                    "reached": sum(reached for _, reached in tokens),
                    "end": statistics.fmean(ends),
                    "end_interval": interval(ends),
                    "area": statistics.fmean(area(run["curve"]) for run in found),
                    "seconds_per_token": statistics.fmean(r["seconds"] / r["curve"][-1][0] for r in found) / clock,
                    "memory": statistics.fmean(run["mib"] for run in found) / memory,
                    "explained_variance": [run["explained_variance"][-1:] for run in found],
                }
            )
    return tables


def used(run: dict[str, Any], target: float) -> tuple[float, bool]:
    """Tokens until the target, or all of the budget, and whether it was reached."""
    tokens = tokens_until(run["curve"], target)
    return (run["curve"][-1][0], False) if tokens is None else (tokens, True)


def markdown(tables: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The tables."""
    lines = []
    for task, rows in tables.items():
        lines += [
            f"**{task}**, target {rows[0]['target']:.3f}",
            "",
            "| method | learning rate | tokens to the target beside GRPO | reached | score at the end | time a token "
            "| memory |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in sorted(rows, key=lambda row: row["share"]):
            low, high = row["share_interval"]
            first, last = row["end_interval"]
            lines.append(
                f"| {row['method']} | {row['learning_rate']:g} | {row['share']:.2f} ({low:.2f} to {high:.2f}) | "
                f"{row['reached']} of {row['seeds']} | {row['end']:.3f} ({first:.3f} to {last:.3f}) | "
                f"{row['seconds_per_token']:.2f} | {row['memory']:.2f} |"
            )
        lines.append("")
    return lines


def draw(output: Path, options: argparse.Namespace, tables: dict[str, list[dict[str, Any]]]) -> None:
    """Score over generated tokens, a panel for each task, means over the seeds."""
    columns = min(4, len(tables))
    lines = -(-len(tables) // columns)
    figure = new_figure(4 * columns + 2, 3.2 * lines)
    axes = None
    for number, (task, rows) in enumerate(tables.items()):
        axes = figure.add_subplot(lines, columns, number + 1)
        for row in rows:
            runs = load(output, task, row["method"], row["learning_rate"], options.seeds)
            length = min(len(run["curve"]) for run in runs)
            heights = [smoothed(run["curve"])[:length] for run in runs]
            tokens = [statistics.fmean(run["curve"][i][0] for run in runs) / 1000 for i in range(length)]
            index = list(METHODS).index(row["method"])
            axes.plot(
                tokens,
                [statistics.fmean(column) for column in zip(*heights, strict=True)],
                LINE_STYLES[index % len(LINE_STYLES)],
                color=COLORS[index % len(COLORS)],
                label=row["method"],
                linewidth=2.4 if row["method"] == "critic" else 1.4,
            )
        axes.axhline(rows[0]["target"], color="0.6", linewidth=0.8)
        axes.set_title(task, fontsize=11)
        axes.set(xlabel="generated tokens, thousands", ylabel="score")
        axes.set_xlim(left=0)
        style_axes(axes)
    if axes is not None:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        save_png(figure, output / "tokens_to_target.png")


def main() -> None:
    """Tune, run, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/tokens_to_target"), help="where to write")
    parser.add_argument("--tasks", nargs="+", default=[*TASKS], choices=TASKS, help="which tasks")
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=METHODS, help="which methods")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5], help="seeds that are reported")
    parser.add_argument("--learning_rates", nargs="+", type=float, default=[*LEARNING_RATES], help="to choose from")
    parser.add_argument("--critic", type=json.loads, default={}, help="options of the critic, as JSON")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--table", action="store_true", help="run nothing; table and picture of what is there")
    options = parser.parse_args()
    output = options.output_dir
    (output / "runs").mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", "'pin_memory' argument is set as true", UserWarning)
    warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
    for task in [] if options.table else options.tasks:
        TASKS[task](Meter(), 0, output)  # makes the warm start, before runs share it
        rates = options.learning_rates
        tuning = [(task, method, rate, TUNING_SEED) for method in options.methods for rate in rates]
        run_all(tuning, output, options.jobs, options.critic)
        chosen = {method: best_rate(output, task, method, rates) for method in options.methods}
        jobs = [(task, method, chosen[method], seed) for seed in options.seeds for method in options.methods]
        run_all(jobs, output, options.jobs, options.critic)
    tables = summarise(output, options)
    (output / "tokens_to_target.json").write_text(json.dumps(tables, indent=1))
    text = "\n".join(markdown(tables))
    (output / "tokens_to_target.md").write_text(text + "\n")
    print(text)
    draw(output, options, tables)


if __name__ == "__main__":
    main()
