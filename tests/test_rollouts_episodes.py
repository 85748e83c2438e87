"""Episodes with a text environment, with a policy that is told what to say."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from rl_plugins.rollouts import Completions, TextEnvironment, Turns, play_episodes
from rl_plugins.rollouts.completions import pad_left, until_eos
from rl_plugins.rollouts.step_rewards import Completed
from rl_plugins.trl import EpisodeRollouts, GRPOVariantTrainer, MTPCriticTrainer

from .helpers.tiny import EOS, PAD, make_critic_args, make_dataset, make_tiny_model, make_tokenizer
from .helpers.tool_calls import chat_tokenizer

TOKENIZER = make_tokenizer()
Step = tuple[str, float | None, bool, bool]


class Scripted:
    """Answers step after step what it was given: observation, reward, terminated, truncated."""

    def __init__(self, *steps: Step, first: Any = "") -> None:
        self.steps, self.first = steps, first
        self.rows: list[dict[str, Any]] = []
        self.actions: list[str] = []

    def reset(self, **row: Any) -> Any:
        self.rows.append(row)
        self.turn = 0
        return self.first

    def step(self, action: str) -> Any:
        self.actions.append(action)
        self.turn += 1
        return (*self.steps[self.turn - 1], {})


class Speaker:
    """A `generate` that says for each row one text after the other, cut at the longest length.

    Attributes:
        calls: Prompts and lengths of each call.
    """

    def __init__(self, rows: Sequence[Sequence[str]], tokenizer: Any = TOKENIZER) -> None:
        self.rows, self.tokenizer = [list(row) for row in rows], tokenizer
        self.calls: list[tuple[list[list[int]], int]] = []
        self.eos = tokenizer.eos_token_id

    def __call__(self, prompts: Sequence[Sequence[int]], max_length: int) -> Completions:
        self.calls.append(([list(prompt) for prompt in prompts], max_length))
        first = self.calls[0][0]
        made = []
        for prompt in prompts:
            row = next(i for i, begun in enumerate(first) if list(prompt[: len(begun)]) == begun and self.rows[i])
            made.append(self._ids(self.rows[row].pop(0))[:max_length])
        width = max(map(len, made))
        ids = torch.tensor([row + [self.eos] * (width - len(row)) for row in made])
        mask, ended = until_eos(ids, [self.eos])
        return Completions(*pad_left(prompts, PAD, "cpu"), ids, mask, ended)

    def _ids(self, text: str) -> list[int]:
        ids = self.tokenizer(text=text, add_special_tokens=False)["input_ids"]
        return ids[:-1] if text.endswith("~") else [*ids, self.eos]


def play(
    speaker: Speaker, prompts: Sequence[Any], environments: Sequence[TextEnvironment], length: int = 20, **options: Any
) -> Completions:
    limits = {name: options.pop(name) for name in ("max_turns", "max_turn_length") if name in options}
    turns = Turns(speaker.tokenizer, [speaker.eos], length, **limits)
    return play_episodes(speaker, prompts, environments, turns, pad_token_id=PAD, **options)


def words(row: Tensor, mask: Tensor) -> str:
    """Real tokens as text, `.` for the end-of-text token."""
    return TOKENIZER.decode(row[mask.bool()]).replace("<eos>", ".")


def said(played: Completions) -> list[str]:
    return [words(*row) for row in zip(played.completion_ids, played.completion_mask, strict=True)]


def paid(played: Completions) -> list[dict[int, float]]:
    assert played.rewards is not None
    return [{t: r for t, r in enumerate(row) if not math.isnan(r)} for row in played.rewards.tolist()]


def test_an_episode_as_tokens() -> None:
    game = Scripted(("+3=", 1.0, False, False), ("+4=", None, False, False), ("bye", 2.5, True, False), first="1=")
    speaker = Speaker([["12", "3", "45"]])
    played = play(speaker, ["0+"], [game])
    assert words(played.prompt_ids[0], played.prompt_mask[0]) == "0+1="
    # The last observation is left out: nobody acts on it.
    assert said(played) == ["12.+3=3.+4=45."]
    assert played.policy_lists() == [[1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1]]
    assert paid(played) == [{2: 1.0, 13: 2.5}]
    assert played.truncated is not None and played.truncated.tolist() == [False] and played.ended.tolist() == [True]
    assert game.actions == ["12", "3", "45"] and game.rows == [{"prompt": "0+"}]
    assert Completed(played.token_lists(), played.policy_lists()).turns(0) == [(0, 2), (6, 7), (11, 13)]
    # Each turn is generated after all that was said before, and may take what is left.
    assert [words(torch.tensor(ids[0]), torch.ones(len(ids[0]))) for ids, _ in speaker.calls] == [
        "0+1=",
        "0+1=12.+3=",
        "0+1=12.+3=3.+4=",
    ]
    assert [length for _, length in speaker.calls] == [20, 14, 9]


def test_rows_end_on_their_own_and_are_padded() -> None:
    games = [
        Scripted(("+", 1.0, True, False)),
        Scripted(("-", None, False, False), ("-", 2.0, False, True)),
        Scripted(("=", 0.0, False, False), ("=", 3.0, False, False), ("=", 4.0, True, False)),
    ]
    speaker = Speaker([["1"], ["2", "3"], ["4", "5", "6"]])
    rows = [{"prompt": p, "level": i} for i, p in enumerate(["0", "10", "200"])]
    played = play(speaker, ["0", "10", "200"], games, rows=rows)
    assert said(played) == ["1.", "2.-3.-", "4.=5.=6."]
    assert [len(prompts) for prompts, _ in speaker.calls] == [3, 2, 1]
    assert paid(played) == [{1: 1.0}, {4: 2.0}, {1: 0.0, 4: 3.0, 7: 4.0}]
    assert played.truncated is not None and played.tool_mask is not None and played.rewards is not None
    assert played.truncated.tolist() == [False, True, False] and played.ended.tolist() == [True, False, True]
    assert games[2].rows == [{"prompt": "200", "level": 2}]
    # Padding: pad tokens, nobody's reward, and not an environment's token.
    assert played.completion_ids[0].tolist() == [*TOKENIZER("1")["input_ids"], EOS, *[PAD] * 6]
    assert played.completion_mask.sum(1).tolist() == [2, 6, 8]
    assert played.tool_mask[0].tolist() == [1] * 8 and played.tool_mask[1].tolist() == [1, 1, 0, 1, 1, 0, 1, 1]
    assert played.rewards[0, 2:].isnan().all() and played.rewards.dtype == torch.float32
    assert played.prompt_mask.tolist() == [[0, 0, 1], [0, 1, 1], [1, 1, 1]]
    assert played.prompt_ids[0, :2].tolist() == [PAD, PAD]


def test_a_turn_cut_by_its_own_length_is_an_action() -> None:
    game = Scripted(("+", 1.0, False, False), ("+", 2.0, True, False))
    played = play(Speaker([["12345", "678"]]), ["0"], [game], max_turn_length=2)
    assert game.actions == ["12", "67"]
    assert said(played) == ["12+67"] and paid(played) == [{1: 1.0, 4: 2.0}]


def test_an_action_cut_by_the_length_of_the_episode_is_none() -> None:
    game = Scripted(("+", 1.0, False, False), ("+", 2.0, True, False))
    played = play(Speaker([["12", "34567"]]), ["0"], [game], length=6)
    assert game.actions == ["12"]
    assert said(played) == ["12.+34"] and paid(played) == [{2: 1.0, 5: 0.0}]  # and earns nothing
    assert not played.ended.any() and played.truncated is not None and not played.truncated.any()


@pytest.mark.parametrize(("length", "actions"), [(6, ["12", "3"]), (5, ["12"])])
def test_an_action_that_ends_at_the_last_token_counts(length: int, actions: list[str]) -> None:
    game = Scripted(("+", 1.0, False, False), ("+", 2.0, True, False))
    played = play(Speaker([["12", "3"]]), ["0"], [game], length=length)
    cut = {} if len(actions) == 2 else {4: 0.0}
    assert game.actions == actions and {t: r for t, r in paid(played)[0].items() if r == 0.0} == cut


def test_an_episode_cut_in_its_first_action_is_worth_nothing_and_counts() -> None:
    played = play(Speaker([["123456"]]), ["0"], [Scripted(("+", 1.0, True, False))], length=4)
    assert said(played) == ["1234"] and paid(played) == [{3: 0.0}]


def test_both_lengths_cut_at_once() -> None:
    """The longest turn is an action also where nothing is left after it."""
    game = Scripted(("+", 1.0, False, False), ("+", 2.0, False, False))
    played = play(Speaker([["123", "456"]]), ["0"], [game], length=5, max_turn_length=2)
    assert game.actions == ["12", "45"] and said(played) == ["12+45"] and paid(played) == [{1: 1.0, 4: 2.0}]


def test_rows_with_less_room_than_others_are_cut_alone() -> None:
    games = [Scripted(("+" * 4, None, False, False), ("", 1.0, True, False)) for _ in range(2)]
    games[1].steps = (("+", None, False, False), ("", 1.0, True, False))
    speaker = Speaker([["1", "234"], ["5", "678"]])
    played = play(speaker, ["0", "10"], games, length=8)
    assert speaker.calls[1][1] == 5  # the most that any row has left
    assert said(played) == ["1.++++23", "5.+678."]
    assert [game.actions for game in games] == [["1"], ["5", "678"]]


@pytest.mark.parametrize(("size", "kept"), [(3, "12.+++4."), (4, "12."), (9, "12.")])
def test_an_observation_that_does_not_fit_is_left_out(size: int, kept: str) -> None:
    """With 7 tokens, an action of 3 leaves room for 3 and one more; one more is not enough for a whole turn."""
    game = Scripted(("+" * size, 1.0, False, False), ("-", 2.0, True, False))
    played = play(Speaker([["12", "4"]]), ["0"], [game], length=8 if size == 3 else 7)
    assert said(played) == [kept]
    assert paid(played)[0][2] == 1.0
    assert played.ended.tolist() == [size == 3]


def test_a_truncated_episode_keeps_what_was_observed_last() -> None:
    games = [Scripted(("+5", 1.0, False, True)), Scripted(("+" * 30, 1.0, False, True))]
    played = play(Speaker([["1"], ["2"]]), ["0", "10"], games)
    assert said(played) == ["1.+5", "2."]
    assert played.truncated is not None and played.truncated.tolist() == [True, True]


def test_ended_and_truncated_is_both() -> None:
    played = play(Speaker([["1"]]), ["0"], [Scripted(("+", 1.0, True, True))])
    assert said(played) == ["1."] and played.ended.tolist() == [True]


def test_max_turns() -> None:
    game = Scripted(*[("+", 1.0, False, False)] * 5)
    played = play(Speaker([["1", "2", "3"]]), ["0"], [game], max_turns=2)
    assert game.actions == ["1", "2"] and said(played) == ["1.+2.+"]
    assert played.truncated is not None and not played.truncated.any() and not played.ended.any()


@pytest.mark.parametrize("first", ["5=", ("5=", {"level": 3})])
def test_reset_may_return_a_pair(first: Any) -> None:
    played = play(Speaker([["1"]]), ["0"], [Scripted(("", None, True, False), first=first)])
    assert words(played.prompt_ids[0], played.prompt_mask[0]) == "05="


@pytest.mark.parametrize("first", [None, "", (None, {})])
def test_reset_may_return_nothing(first: Any) -> None:
    played = play(Speaker([["1"]]), ["0"], [Scripted(("", None, True, False), first=first)])
    assert words(played.prompt_ids[0], played.prompt_mask[0]) == "0"
    assert played.rewards is not None and played.rewards.isnan().all()


def test_one_environment_for_each_prompt() -> None:
    with pytest.raises(ValueError, match="There are 1 environments for 2 prompts. Give one for each."):
        play(Speaker([["1"]]), ["0", "1"], [Scripted()])


@pytest.mark.parametrize(
    "answer", [None, ("+", 1.0, True, False), ("+", 1.0, True, False, {}, 0), ("+", "much", True, False, {})]
)
def test_a_step_that_returns_no_five_tuple(answer: Any) -> None:
    class Odd(Scripted):
        def step(self, action: str) -> Any:
            return answer

    with pytest.raises((TypeError, ValueError)) as raised:
        play(Speaker([["1"]]), ["0"], [Odd()])
    (note,) = raised.value.__notes__
    assert note == (
        "In turn 1 of an episode with Odd. Its step(text) has to return (observation, reward, terminated, truncated, "
        "info), as in Gymnasium."
    )


def test_a_rank_that_has_none_left_goes_along() -> None:
    """Where all ranks have to generate equally often, the others' rounds are played with a row that is thrown away."""
    game, rounds = Scripted(("+", 1.0, True, False)), iter([True, True, True, False])
    speaker = Speaker([["1", "8", "9"]])
    played = play(speaker, ["0"], [game], any_rank=lambda holds: next(rounds))
    assert said(played) == ["1."] and game.actions == ["1"]
    assert [length for _, length in speaker.calls] == [20, 1, 1]


# Conversations


def test_observations_are_messages_in_a_conversation() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    game = Scripted(("warmer", 0.5, False, False), ("yes", 1.0, True, False), first=" It is 1 to 9.")
    prompt = [{"role": "system", "content": "Play."}, {"role": "user", "content": "Guess."}]
    played = play(Speaker([["4", "5"]], tokenizer), [prompt], [game], length=200)
    assert tokenizer.decode(played.prompt_ids[0]) == (
        "<|im_start|>system\nPlay.<|im_end|>\n<|im_start|>user\nGuess. It is 1 to 9.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    text = tokenizer.decode(played.completion_ids[0])
    assert text == "4<|im_end|>\n<|im_start|>user\nwarmer<|im_end|>\n<|im_start|>assistant\n5<|im_end|>"
    # The same tokens as those of the whole conversation.
    whole = [
        *[prompt[0], {"role": "user", "content": "Guess. It is 1 to 9."}, {"role": "assistant", "content": "4"}],
        *[{"role": "user", "content": "warmer"}, {"role": "assistant", "content": "5"}],
    ]
    ids = tokenizer.apply_chat_template(whole, tokenize=True, return_dict=False)
    assert [*played.prompt_ids[0].tolist(), *played.completion_ids[0].tolist()] == ids[:-1]  # but for a line break
    assert game.actions == ["4", "5"] and list(paid(played)[0].values()) == [0.5, 1.0]
    assert prompt[1]["content"] == "Guess."  # left as it was
    (row,) = played.policy_lists() or []
    assert sum(row) == 4 and row[:2] == [1, 1] and row[-2:] == [1, 1]


def test_a_template_that_writes_earlier_turns_differently_is_refused() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    )
    game = Scripted(("warmer", 0.5, False, False))
    with pytest.raises(ValueError, match="writes earlier turns differently.*only ever appends"):
        play(Speaker([["4"]], tokenizer), [[{"role": "user", "content": "Guess."}]], [game], length=100)


# As a rollout function of TRL


class Sum:
    """Shows a digit in each of three turns; pays the policy's odd digits."""

    def __init__(self) -> None:
        self.played = 0

    def reset(self, prompt: str, **row: Any) -> str:
        self.turn, self.prompt = 0, prompt
        self.played += 1
        return "3="

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.turn += 1
        return "+1=", float(sum(c in "13579" for c in action)), self.turn == 3, False, {}


Run = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Any) -> Run:
    """Factory: a trainer that plays `Sum`, and its rollouts."""

    def make(trainer_class: Any, environment: Any = Sum, turns: int = 3, **options: Any) -> Any:
        episodes = EpisodeRollouts(environment, max_turns=turns, max_turn_length=2)
        values = {"max_completion_length": 20, "num_generations": 2, **options}
        if trainer_class is MTPCriticTrainer:
            args = make_critic_args(tmp_path, **values)
        else:
            from .helpers.tiny import ON_CPU

            defaults = {"per_device_train_batch_size": 8, "max_steps": 1, "logging_steps": 1}
            args = trainer_class.config_class(output_dir=str(tmp_path), **{**ON_CPU, **defaults, **values})
        trainer = trainer_class(
            make_tiny_model(),
            episodes.earned,
            args,
            train_dataset=make_dataset(8),
            processing_class=make_tokenizer(),
            rollout_func=episodes,
        )
        return trainer, episodes

    return make


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
@pytest.mark.parametrize("trainer_class", [MTPCriticTrainer, GRPOVariantTrainer])
def test_episodes_in_a_trainer(run: Run, trainer_class: Any) -> None:
    trainer, episodes = run(trainer_class, max_steps=1)
    trainer.train()
    batch, tokenizer = trainer.last_rollout, make_tokenizer()
    assert len(episodes.environments) == 8 and all(game.played == 1 for game in episodes.environments)
    for row, game in enumerate(episodes.environments):
        ids = batch["completion_ids"][row][batch["completion_mask"][row].bool()].tolist()
        own = batch["tool_mask"][row][batch["completion_mask"][row].bool()].tolist()
        turns = Completed([ids], [own]).turns(0)
        assert len(turns) == 3
        rewards = {
            last: float(sum(c in "13579" for c in tokenizer.decode(ids[first : last + 1]))) for first, last in turns
        }
        assert {t: float(batch["rewards"][row, t]) for t in rewards} == rewards
        assert batch["rewards"][row].sum() == sum(rewards.values()) == batch["scores"][row]
        prompt = tokenizer.decode(batch["prompt_ids"][row][batch["prompt_mask"][row].bool()])
        assert prompt == game.prompt + "3="
    assert "rewards/earned/mean" in trainer.state.log_history[0]


class Cut(Sum):
    """Every other instance is cut instead of ended."""

    made = 0

    def __init__(self) -> None:
        super().__init__()
        self.cut, Cut.made = Cut.made % 2 == 0, Cut.made + 1

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        observation, reward, over, _, info = super().step(action)
        return observation, reward, over and not self.cut, over and self.cut, info


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
@pytest.mark.parametrize(
    ("bootstrap", "turns", "expected"),
    [(None, 3, [True, False]), (True, 3, [True, False]), (False, 3, None), (None, 2, None), (True, 2, [True, True])],
)
def test_cut_episodes_in_a_trainer(run: Run, bootstrap: bool | None, turns: int, expected: list[bool] | None) -> None:
    """An episode that ended is never bootstrapped, though its last turn has no end-of-text token; one that is short of
    an end is where everything that was cut is."""
    Cut.made = 0
    options = {"bootstrap_truncated": bootstrap, "generation_kwargs": {"suppress_tokens": [EOS, PAD]}}
    trainer, _ = run(MTPCriticTrainer, Cut, turns, per_device_train_batch_size=2, **options)
    trainer.model.train()
    trainer._generate_and_score_completions([dict(trainer.train_dataset[i]) for i in range(2)])
    found = trainer.last_rollout.get("truncated")
    assert (None if found is None else found.tolist()) == expected
