"""Train on a game of several turns with a reward after every turn, with the MTP critic and GRPO, and compare curves.

The game is a cipher. In each of eight turns it shows a stake and two letters, such as "gdk", and the policy answers
with the two letters that stand for them in a secret alphabet. It earns the stake times the share of right letters.
The game draws letters and stakes at random, so most of an episode's reward is luck, which no policy can change. A
critic with a reward after every turn can tell right answers from luck. One reward per episode mixes both.

    python recipes/multi_turn.py                                       # two methods, some minutes on a laptop's CPU
    python recipes/multi_turn.py --methods critic grpo process reward_to_go discounted --seeds 0 1 2 3 4

All methods play equally many episodes, so they generate equally many tokens. The small model starts from random
weights; `--model` starts from any other, which then needs `--max_turn_length 8` or more and a smaller learning rate.
The recipe writes `curves.png`, `curves.json`, and for the critic `token_values.html`.
"""

import argparse
import json
import random
import statistics
from dataclasses import fields
from pathlib import Path
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    ProgressCallback,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
    set_seed,
)

from rl_plugins.extras import require
from rl_plugins.known_warnings import ignore_known_warnings
from rl_plugins.process_group import end_process_group
from rl_plugins.report import traces_from_rollout, write_token_values_html
from rl_plugins.report.curves import COLORS, LINE_STYLES, new_figure, save_png, style_axes
from rl_plugins.trl import (
    EpisodeRollouts,
    GRPOVariantConfig,
    GRPOVariantTrainer,
    MTPCriticConfig,
    MTPCriticTrainer,
)
from rl_plugins.usage import OneLineErrors, one_line_errors

LETTERS = "abcdefghijkl"
STAKES = "abbcg"  # worth 0, 1, 1, 2 and 6
TURNS = 8


class Cipher:
    """The game, a [`~rl_plugins.rollouts.TextEnvironment`]. All instances have the same alphabet, but other dice.

    Args:
        seed: Seed of the dice.
    """

    def __init__(self, seed: int) -> None:
        secret = random.Random("the secret alphabet").sample(LETTERS, len(LETTERS))
        self.secret = dict(zip(LETTERS, secret, strict=True))
        self.dice = random.Random(seed)

    def reset(self, **row: Any) -> str:
        """Begin a game."""
        self.turn, self.right = 0, 0.0
        return self._show()

    def _show(self) -> str:
        stake, self.word = self.dice.choice(STAKES), self.dice.choice(LETTERS) + self.dice.choice(LETTERS)
        self.stake = LETTERS.index(stake)
        return stake + self.word

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Reward an answer, and show the next word."""
        wanted = "".join(self.secret[letter] for letter in self.word)
        right = sum(given == letter for given, letter in zip(action[:2], wanted, strict=False)) / 2
        earned = self.stake * right  # before the next stake is shown
        self.turn, self.right = self.turn + 1, self.right + right
        return self._show(), earned, self.turn == TURNS, False, {"right": right}


class Curve(TrainerCallback):
    """Callback that records the share of right letters of each rollout, whatever the stakes, by generated tokens."""

    def __init__(self, episodes: EpisodeRollouts, tokens_per_rollout: int) -> None:
        self.episodes, self.tokens = episodes, tokens_per_rollout
        self.points: list[tuple[int, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the share of letters that were right in the games just played."""
        games = self.episodes.environments
        right = statistics.fmean(game.right / TURNS for game in games)  # type: ignore[attr-defined]
        self.points.append((state.global_step * self.tokens, right))


class Brief(ProgressCallback):
    """Progress bar of transformers that prints three metrics only."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Print one short line."""
        shown = {key: logs[key] for key in ("reward", "entropy", "critic/explained_variance") if logs and key in logs}
        if shown:
            super().on_log(args, state, control, logs={"step": state.global_step, **shown}, **kwargs)


def small_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Make a Qwen3 with random weights."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=16,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


def character_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per character."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


# method: trainer, config, and the options that define the method
METHODS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "critic": (
        MTPCriticTrainer,
        MTPCriticConfig,
        # Returns are up to 48, while those of a verifier are 0 or 1, and the value loss grows with their square. With
        # the usual weight the value loss would dominate the trunk and the clipped gradient.
        {
            "num_mtp_heads": 1,
            "head_learning_rate": 3e-3,
            "value_loss_coef": 0.005,
            "lam_policy": 0.5,
            "time_unit": "turn",
        },
    ),
    "grpo": (GRPOVariantTrainer, GRPOVariantConfig, {"advantage": "group_normalized", "num_generations": 8}),
    "process": (GRPOVariantTrainer, GRPOVariantConfig, {"advantage": "process_normalized", "num_generations": 8}),
    "turns": (GRPOVariantTrainer, GRPOVariantConfig, {"advantage": "turn_normalized", "num_generations": 8}),
    "reward_to_go": (GRPOVariantTrainer, GRPOVariantConfig, {"advantage": "reward_to_go", "num_generations": 1}),
    "discounted": (
        GRPOVariantTrainer,
        GRPOVariantConfig,
        # The critic's lambda as a discount, without values: a comparison shows how much the values help.
        {
            "advantage": "reward_to_go",
            "advantage_kwargs": {"gamma": 0.5, "time_unit": "turn"},
            "num_generations": 1,
        },
    ),
    "batch": (GRPOVariantTrainer, GRPOVariantConfig, {"advantage": "batch_normalized", "num_generations": 1}),
}


def run(method: str, seed: int, options: argparse.Namespace, output: Path) -> list[tuple[int, float]]:
    """Train with one method, and return its curve."""
    trainer_class, config_class, own = METHODS[method]
    own = {**own, **(options.critic if method == "critic" else {})}
    set_seed(seed)
    if options.model is None:
        tokenizer: Any = character_tokenizer()
        model: Any = small_model(tokenizer)
    else:
        model, tokenizer = options.model, AutoTokenizer.from_pretrained(options.model, padding_side="left")
    made: list[Cipher] = []

    def new_game() -> Cipher:
        made.append(Cipher(1_000_003 * seed + len(made)))
        return made[-1]

    episodes = EpisodeRollouts(new_game, max_turns=TURNS, max_turn_length=options.max_turn_length)
    args = config_class(
        output_dir=str(output / f"{method}_{seed}"),
        per_device_train_batch_size=options.episodes,
        max_completion_length=TURNS * (options.max_turn_length + 3),
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        max_steps=options.updates,
        steps_per_generation=2,
        entropy_coef=options.entropy_coef,
        logging_steps=20,
        save_strategy="no",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=options.cpu,
        report_to=options.report_to,
        seed=seed,
        **own,
    )
    trainer = trainer_class(
        model,
        episodes.earned,
        args,
        train_dataset=Dataset.from_dict({"prompt": ["a" if options.model is None else options.prompt] * 1024}),
        processing_class=tokenizer,
        rollout_func=episodes,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Brief)
    curve = Curve(episodes, options.episodes * TURNS * options.max_turn_length)
    trainer.add_callback(curve)
    trainer.train()
    if trainer.critic is not None:
        write_token_values_html(
            traces_from_rollout(tokenizer, trainer.last_rollout, 24),
            output / "token_values.html",
            title="What the critic thinks of each token: cipher",
            subtitle=f"Episodes after {trainer.state.global_step} updates.",
        )
    return curve.points


def run_lightning(method: str, seed: int, options: argparse.Namespace, output: Path) -> list[tuple[int, float]]:
    """Train with one method in Lightning, and return its curve."""
    require("lightning", "lightning.pytorch")
    from lightning.pytorch import Callback, Trainer, seed_everything

    from rl_plugins.lightning import GRPOModule, MTPCriticModule, PromptDataModule

    own = {**METHODS[method][2], **(options.critic if method == "critic" else {})}
    seed_everything(seed, verbose=False)
    tokenizer = character_tokenizer() if options.model is None else None  # else the model's own
    games: list[Cipher] = []

    def new_game() -> Cipher:
        games.append(Cipher(1_000_003 * seed + len(games)))
        return games[-1]

    points: list[tuple[int, float]] = []
    tokens = options.episodes * TURNS * options.max_turn_length

    class Noted(Callback):
        def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
            points.append(((len(points) + 1) * tokens, statistics.fmean(game.right / TURNS for game in games)))

    made = {"num_generations": 1, **own}
    module = (MTPCriticModule if method == "critic" else GRPOModule)(
        options.model or small_model(tokenizer),
        tokenizer,
        environment=new_game,
        max_turns=TURNS,
        max_turn_length=options.max_turn_length,
        max_completion_length=TURNS * (options.max_turn_length + 3),
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        steps_per_generation=2,
        entropy_coef=options.entropy_coef,
        **made,
    )
    prompts = 2 * options.episodes // made["num_generations"]
    rows = [{"prompt": "a" if options.model is None else options.prompt}] * (prompts * options.updates)
    trainer = Trainer(
        max_steps=options.updates,
        accelerator="cpu" if options.cpu else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        default_root_dir=output,
        callbacks=[Noted()],
    )
    trainer.fit(module, PromptDataModule(rows, batch_size=prompts))
    return points


# The comparison

NAMES = {
    "critic": "critic, paid per turn",
    "grpo": "GRPO, groups of 8",
    "process": "GRPO, process supervision",
    "turns": "GRPO, turn levels",
    "reward_to_go": "REINFORCE++, reward-to-go",
    "discounted": "REINFORCE++, discounted",
    "batch": "REINFORCE++, sums",
}


def smoothed(values: list[float], width: int = 10) -> list[float]:
    """Average the last `width` points at each point."""
    return [statistics.fmean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))]


def interval(values: list[float]) -> str:
    """Format the mean and, for several seeds, half the width of its 95 % interval (Student's t)."""
    mean, seeds = statistics.fmean(values), len(values)
    if seeds < 2:
        return f"{mean:.3f}"
    quantiles = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
    return f"{mean:.3f} ± {quantiles.get(seeds, 1.96) * statistics.stdev(values) / seeds**0.5:.3f}"


def first_at(curve: list[tuple[int, float]], level: float) -> float:
    """Return the tokens after which a smoothed curve first reaches a level; infinity if it does not."""
    heights = smoothed([height for _, height in curve])
    return next((tokens for (tokens, _), height in zip(curve, heights, strict=True) if height >= level), float("inf"))


def compare(curves: dict[str, list[list[tuple[int, float]]]]) -> list[str]:
    """Write a table: end and mean of each method's curve, and when the curve reaches the end of GRPO's."""
    lines = [f"{'method':28} {'end':>15} {'area':>15} {'share of tokens to the end of GRPO':>36}"]
    goals = [smoothed([h for _, h in curve], 20)[-1] for curve in curves.get("grpo", [])]
    for method, runs in curves.items():
        ends = interval([smoothed([h for _, h in curve], 20)[-1] for curve in runs])
        areas = interval([statistics.fmean(h for _, h in curve) for curve in runs])
        reached = [first_at(curve, goal) / curve[-1][0] for curve, goal in zip(runs, goals, strict=False)]
        share = ", ".join("never" if x == float("inf") else f"{x:.2f}" for x in reached) or "-"
        lines.append(f"{NAMES[method]:28} {ends:>15} {areas:>15} {share:>36}")
    return lines


def draw(curves: dict[str, list[list[tuple[int, float]]]], path: Path) -> None:
    """Draw the mean curves over the seeds, with a thin line for each seed."""
    figure = new_figure(9, 4.5)
    axes = figure.add_subplot()
    ends: dict[Any, float] = {}
    for number, (method, runs) in enumerate(curves.items()):
        color, style = COLORS[number % len(COLORS)], LINE_STYLES[number % len(LINE_STYLES)]
        tokens = [t / 1000 for t, _ in runs[0]]
        heights = [smoothed([h for _, h in curve]) for curve in runs]
        mean = [statistics.fmean(column) for column in zip(*heights, strict=True)]
        (line,) = axes.plot(tokens, mean, style, label=NAMES[method], color=color, linewidth=2)
        ends[line] = mean[-1]
        for curve in heights if len(heights) > 1 else []:
            axes.plot(tokens, curve, color=color, linewidth=0.6, alpha=0.4)
    axes.set(xlabel="generated tokens, thousands", ylabel="share of letters that are right")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    thin = "; thin: each seed" if any(len(runs) > 1 for runs in curves.values()) else ""
    axes.set_title(
        f"Cipher: eight turns, a reward after each, most of it luck\n(means of 10 updates{thin})", fontsize=11
    )
    style_axes(axes)
    # The names are in the order in which the curves end, so that each name is beside its curve.
    lines = sorted(ends, key=lambda line: -ends[line])
    axes.legend(handles=lines, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, handlelength=2.6)
    save_png(figure, path)


def main() -> None:
    """Train with each method and seed, and draw the curves."""
    parser = OneLineErrors(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["critic", "grpo"], choices=METHODS, help="what to compare")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="a run of each method for each")
    parser.add_argument("--updates", type=int, default=250, help="optimizer steps")
    parser.add_argument("--episodes", type=int, default=64, help="games per update; a rollout plays those of two")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="of the policy, constant")
    parser.add_argument("--entropy_coef", type=float, default=0.02, help="weight of the entropy bonus")
    parser.add_argument("--critic", type=json.loads, default={}, help="options of the critic, as JSON")
    parser.add_argument("--max_turn_length", type=int, default=2, help="tokens per turn")
    parser.add_argument("--model", help="path or hub id; a small new model by default")
    parser.add_argument("--prompt", default="Answer two letters with those that stand for them.\n", help="for --model")
    parser.add_argument("--host", default="trl", choices=["trl", "lightning"], help="which library trains")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU")
    parser.add_argument("--report_to", default="none", help="where to log: none, tensorboard, wandb, ...")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/multi_turn"), help="where to write")
    options = parser.parse_args()
    unknown = set(options.critic) - {field.name for field in fields(MTPCriticConfig)}
    if unknown:
        parser.error(f"argument --critic: MTPCriticConfig has no option {', '.join(sorted(unknown))}")
    ignore_known_warnings()
    with one_line_errors(parser.prog):
        options.output_dir.mkdir(parents=True, exist_ok=True)
    train = run if options.host == "trl" else run_lightning
    curves: dict[str, list[list[tuple[int, float]]]] = {}
    with one_line_errors(parser.prog, begun=lambda: bool(curves)):
        for method in options.methods:
            for seed in options.seeds:
                curve = train(method, seed, options, options.output_dir)
                curves.setdefault(method, []).append(curve)
                (options.output_dir / "curves.json").write_text(json.dumps(curves))
    draw(curves, options.output_dir / "curves.png")
    print("\n" + "\n".join(compare(curves)))
    print(f"\nThe curves are in {options.output_dir}.")
    end_process_group()


if __name__ == "__main__":
    main()
