"""Train a language model on a game of TextArena, a library of text games, with the MTP critic.

    pip install textarena                                               # then, offline, about a minute of one core:
    python recipes/textarena_game.py                                    # Guess the Number
    python recipes/textarena_game.py --game TowerOfHanoi-v0 --max_turn_length 2
    python recipes/textarena_game.py --model Qwen/Qwen3-0.6B --max_turn_length 32 --learning_rate 1e-6

`TextArenaGame` makes a [`~rl_plugins.rollouts.TextEnvironment`] of any game with one player. If the game measures its
progress, the reward of a turn is the progress that the turn adds. The rewards of a whole game then add up to the
reward that TextArena gives for it.

Without `--model` a small Qwen3 with random weights plays. It has a token for each word of the game, and does not know
English. It learns which words are moves, and which moves do well on average. In Guess the Number the outcome is the
closeness of the last guess: a guess in the middle is worth .74 without a look at the hints. The run shows that all
parts work together, and not how well a language model can play. It writes `outcomes.json` and `token_values.html`.

Some games need downloads (word lists of nltk) or a judge behind an API: Hangman, Wordle, Twenty Questions and others.
These play offline: GuessTheNumber, Mastermind, TowerOfHanoi, FrozenLake, LightsOut, Minesweeper, Sudoku, 2048, Bandit.
"""

import argparse
import json
import random
import re
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
    set_seed,
)

from rl_plugins.extras import require
from rl_plugins.known_warnings import ignore_known_warnings
from rl_plugins.process_group import end_process_group
from rl_plugins.report import traces_from_rollout, write_token_values_html
from rl_plugins.trl import EpisodeRollouts, MTPCriticConfig, MTPCriticTrainer
from rl_plugins.usage import OneLineErrors, one_line_errors

PLAYER = 0


def make_textarena(name: str) -> Any:
    """Make a game of TextArena by its name, such as `GuessTheNumber-v0`."""
    require("textarena", "textarena")
    import textarena

    return textarena.make(name)


class TextArenaGame:
    """A game of TextArena for one player, as a [`~rl_plugins.rollouts.TextEnvironment`].

    Args:
        name: Name of the game.
        seed: Seed of the game's random numbers. TextArena uses Python's global generator. Every game here has a state
            of that generator for itself, so that the games of a run do not depend on each other or on other code.
        max_turns: Turns after which an unfinished game is cut (truncated); by default only the game's own limit ends
            it.
        make: Makes the game from its name.

    Attributes:
        outcome: Outcome of the last game: TextArena's reward, or the progress so far.
        moves: Number of turns of that game.
    """

    def __init__(
        self, name: str, seed: int, max_turns: int | None = None, make: Callable[[str], Any] = make_textarena
    ) -> None:
        self.name, self.max_turns = name, max_turns
        self.dice = random.Random(seed).getstate()
        with self._own_dice():
            self.game = make(name)
        # TextArena's wrappers repeat all messages; the game inside them returns only the new ones.
        self.inside = self.game
        while "env" in vars(self.inside):
            self.inside = self.inside.env
        self.progress: Callable[[], float] = getattr(self.inside, "_get_percentage_completion", lambda: 0.0)
        self.outcome, self.moves = 0.0, 0

    @contextmanager
    def _own_dice(self) -> Iterator[None]:
        """Use the game's random state inside the block, and restore that of all other code afterwards."""
        others = random.getstate()
        random.setstate(self.dice)
        try:
            yield
        finally:
            self.dice = random.getstate()
            random.setstate(others)

    def _news(self) -> str:
        """Return the messages of the game since the last call, without those of the player."""
        _, messages = self.inside.get_observation()
        said = [str(text) for speaker, text, *_ in messages if speaker != PLAYER]
        return "\n" + "\n".join(said) + "\n"

    def reset(self, **row: Any) -> str:
        """Begin a game."""
        with self._own_dice():
            self.game.reset(num_players=1)
            self.moves, self.outcome = 0, self.progress()
            return self._news()

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Make a move. The game's own turn limit is a rule that ends the game; `max_turns` cuts the game."""
        with self._own_dice():
            over, _ = self.game.step(action)
            self.moves += 1
            before, info = self.outcome, {}
            if over:
                rewards, infos = self.game.close()
                self.outcome, info = float(rewards[PLAYER]), infos[PLAYER]
            else:
                self.outcome = self.progress()
            cut = not over and self.moves == self.max_turns
            return "" if over else self._news(), self.outcome - before, bool(over), cut, info


def word_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token for each word, and for each group of punctuation marks, in some texts."""
    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text)})
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


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
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


def overheard(game: TextArenaGame, games: int = 20) -> list[str]:
    """Play games with random words, mostly from their own messages, and return the texts of the games."""
    chance, texts = random.Random(0), [str(number) for number in range(21)]
    for _ in range(games):
        texts.append(game.reset())
        over = False
        while not over and game.moves < 20:
            words = re.findall(r"\w+", texts[-1])
            answer, _, over, _, _ = game.step(chance.choice([*words, str(chance.randint(0, 20)), "A C"]))
            texts.append(answer)
    return texts


class Outcomes(TrainerCallback):
    """Callback that records the mean outcome of the games of each rollout."""

    def __init__(self, games: list[TextArenaGame]) -> None:
        self.games = games
        self.points: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the mean outcome of the games just played."""
        self.points.append(statistics.fmean(game.outcome for game in self.games))


def main() -> None:
    """Train, and report the outcomes of the games at the beginning and at the end."""
    parser = OneLineErrors(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--game", default="GuessTheNumber-v0")
    parser.add_argument("--model", help="path or hub id; a small new model by default")
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--episodes", type=int, default=32, help="games per update")
    parser.add_argument("--max_turns", type=int, default=8, help="turns after which a game is cut")
    parser.add_argument("--max_turn_length", type=int, default=1, help="tokens per turn")
    parser.add_argument("--max_completion_length", type=int, default=256, help="tokens per game after its prompt")
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU")
    parser.add_argument("--report_to", default="none")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/textarena_game"))
    options = parser.parse_args()
    ignore_known_warnings()
    with one_line_errors(parser.prog):
        set_seed(options.seed)
        games: list[TextArenaGame] = []

        def new_game() -> TextArenaGame:
            number = PartialState().process_index * options.episodes + len(games)
            games.append(TextArenaGame(options.game, 1_000_003 * options.seed + number, options.max_turns))
            return games[-1]

        if options.model is None:
            tokenizer: Any = word_tokenizer(overheard(TextArenaGame(options.game, options.seed)))
            model: Any = small_model(tokenizer)
        else:
            model, tokenizer = options.model, AutoTokenizer.from_pretrained(options.model, padding_side="left")
        asks = "Answer each message of the game with your move only.\n"
        prompt: Any = [{"role": "user", "content": asks}] if tokenizer.chat_template else asks
        episodes = EpisodeRollouts(new_game, max_turn_length=options.max_turn_length)
        trainer = MTPCriticTrainer(
            model,
            episodes.earned,
            MTPCriticConfig(
                output_dir=str(options.output_dir / "trainer"),
                per_device_train_batch_size=options.episodes,
                max_completion_length=options.max_completion_length,
                learning_rate=options.learning_rate,
                head_learning_rate=3e-3,
                num_mtp_heads=1,
                lr_scheduler_type="constant",
                max_steps=options.updates,
                logging_steps=20,
                save_strategy="no",
                gradient_checkpointing=options.model is not None,
                bf16=False if options.model is None else None,
                use_cpu=options.cpu,
                report_to=options.report_to,
                seed=options.seed,
            ),
            train_dataset=Dataset.from_dict({"prompt": [prompt] * max(256, options.episodes)}),
            processing_class=tokenizer,
            rollout_func=episodes,
        )
    outcomes = Outcomes(games)
    trainer.add_callback(outcomes)
    trainer.train()
    if trainer.is_world_process_zero():
        report(trainer, tokenizer, outcomes.points, options)
    end_process_group()


def report(trainer: MTPCriticTrainer, tokenizer: Any, outcomes: list[float], options: argparse.Namespace) -> None:
    """Write outcomes and token values, and print this process's mean outcomes at the beginning and at the end."""
    options.output_dir.mkdir(parents=True, exist_ok=True)
    (options.output_dir / "outcomes.json").write_text(json.dumps(outcomes))
    write_token_values_html(
        traces_from_rollout(tokenizer, trainer.last_rollout, 16),
        options.output_dir / "token_values.html",
        title=f"What the critic thinks of each token: {options.game}",
        subtitle=f"Games after {trainer.state.global_step} updates.",
    )
    tenth = max(1, len(outcomes) // 10)
    first, last = statistics.fmean(outcomes[:tenth]), statistics.fmean(outcomes[-tenth:])
    print(f"\n{options.game}: mean outcome {first:.3f} in the first tenth of the updates, {last:.3f} in the last.")
    print(f"Outcomes and token values are in {options.output_dir}.")


if __name__ == "__main__":
    main()
