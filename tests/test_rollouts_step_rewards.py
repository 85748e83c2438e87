"""Rewards of tokens, turns, steps and spans: at which token each is paid, what sums they have, and what is refused."""

import asyncio
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForTokenClassification

from rl_plugins.functional import terminal_rewards
from rl_plugins.rollouts import ProcessRewardModel, call_rewards, rewards_per, text_steps
from rl_plugins.rollouts.rewards import weighted_scores
from rl_plugins.rollouts.step_rewards import Completed, StepRewards, token_ends

NAN = math.nan
# A token may hold the end of one step and the beginning of the next, as those of byte pairs do.
PIECES = ["<pad>", "<eos>", "a", "b", " ", ".", "\n", "\n\n", ".\n", "\nb", "a\n\nb", "\n\n\n"]


@pytest.fixture(scope="module")
def pieces() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are `PIECES`."""
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(PIECES)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def ids_of(*pieces: str) -> list[int]:
    return [PIECES.index(piece) for piece in pieces]


def returning(rewards: list[Any], kind: str | None = None, **options: Any) -> Callable[..., Any]:
    def given(**_: Any) -> list[Any]:
        return rewards

    return given if kind is None else rewards_per(kind, **options)(given)


def pay(
    functions: list[Any],
    ids: list[list[int]],
    *,
    chosen: list[list[int]] | None = None,
    tokenizer: Any = None,
    weights: list[float] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards by function (B, F), and rewards and paid tokens (B, T)."""
    steps = StepRewards(Completed(ids, chosen, tokenizer))
    rewards = call_rewards(functions, ["p"] * len(ids), ["c"] * len(ids), ids, {}, " in step 3", steps=steps)
    width = max(map(len, ids))
    rows = [[1] * len(row) for row in ids] if chosen is None else chosen
    mask = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    return rewards, *steps.token_rewards(rewards, mask, None if weights is None else torch.tensor(weights))


# Where


def test_a_reward_for_every_token() -> None:
    func = returning([[1.0, 2.0, 3.0], [0.5, None]], "token")
    rewards, at, paid = pay([func], [[5, 6, 7], [8, 9]])
    assert rewards.tolist() == [[6.0], [0.5]]
    assert at.tolist() == [[1.0, 2.0, 3.0], [0.5, 0.0, 0.0]]
    assert paid.tolist() == [[True, True, True], [True, False, False]]


def test_lists_without_a_declaration_are_for_tokens() -> None:
    _, at, _ = pay([returning([[1.0, 0.0, 2.0], None])], [[5, 6, 7], [8, 9]])
    assert at.tolist() == [[1.0, 0.0, 2.0], [0.0, 0.0, 0.0]]


def test_a_column_of_numbers_is_one_number_each() -> None:
    rewards, at, _ = pay([returning([[1.0], [2.0]])], [[5, 6, 7], [8, 9]])
    assert rewards.tolist() == [[1.0], [2.0]]
    assert at.tolist() == [[0.0, 0.0, 1.0], [0.0, 2.0, 0.0]]


def test_a_reward_for_every_turn() -> None:
    # Two turns and what the environment said between them; one turn alone.
    chosen = [[1, 1, 0, 0, 1, 1], [1, 1, 1, 0, 0]]
    func = returning([[1.0, 2.0], [3.0]], "turn")
    _, at, _ = pay([func], [[2, 3, 4, 5, 6, 7], [2, 3, 4, 5, 6]], chosen=chosen)
    assert at.tolist() == [[0, 1.0, 0, 0, 0, 2.0], [0, 0, 3.0, 0, 0, 0]]


def test_a_number_for_a_conversation_is_paid_at_its_last_token_of_the_policy() -> None:
    _, at, _ = pay([returning([7.0])], [[2, 3, 4, 5]], chosen=[[1, 0, 1, 0]])
    assert at.tolist() == [[0, 0, 7.0, 0]]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["a", "\n\n", "b", "<eos>"], [0, 1, 0, 2]),  # the end-of-text token is part of the last step
        (["a", "\n\n", "b", "\n\n"], [0, 1, 0, 2]),
        (["a", "\n", "\n", "b"], [0, 0, 1, 2]),  # the separator in two tokens
        (["a", ".\n", "\nb", "b"], [0, 0, 1, 2]),  # its end in the first token of the next step
        (["a", "\n\n\n", "b"], [0, 1, 2]),  # a token that holds more than it
        (["a\n\nb", "a"], [1, 2]),  # both steps share a token
        (["\n\n", "a", "\n\n", "\n\n", "b"], [0, 0, 1, 0, 2]),  # blank pieces are no steps
    ],
)
def test_a_reward_for_every_step_of_the_text(pieces: Any, tokens: list[str], expected: list[float]) -> None:
    assert text_steps("".join(t for t in tokens if t != "<eos>")) in (
        ["a", "b"],
        ["a.", "bb"],
        ["a", "\nb"],
        ["a", "ba"],
    )
    _, at, _ = pay([returning([[1.0, 2.0]], "step")], [ids_of(*tokens)], tokenizer=pieces)
    assert at.tolist() == [expected]


def test_steps_that_share_a_token_are_both_paid_there(pieces: Any) -> None:
    _, at, paid = pay([returning([[1.0, 2.0]], "step")], [ids_of("a\n\nb")], tokenizer=pieces)
    assert at.tolist() == [[3.0]] and paid.tolist() == [[True]]


def test_another_separator(pieces: Any) -> None:
    func = returning([[1.0, 2.0, 3.0]], "step", separator=".")
    _, at, _ = pay([func], [ids_of("a", ".", "b", ".", "a", "<eos>")], tokenizer=pieces)
    assert at.tolist() == [[0, 1, 0, 2, 0, 3]]


def test_steps_of_turns_end_with_the_turn(pieces: Any) -> None:
    ids = ids_of("a", "\n\n", "b", "a", "\n\n", "a", "b")
    _, at, _ = pay([returning([[1.0, 2.0, 3.0]], "step")], [ids], chosen=[[1, 1, 1, 0, 0, 1, 1]], tokenizer=pieces)
    assert at.tolist() == [[0, 1, 2, 0, 0, 0, 3]]


def test_spans_of_characters(pieces: Any) -> None:
    # "ab a.\n": the second span ends in the middle of a token, and the last in its other half.
    spans = [(0, 2, 1.0), (2, 5, 2.0), (5, 6, 4.0)]
    _, at, _ = pay([returning([spans], "span")], [ids_of("a", "b", " ", "a", ".\n")], tokenizer=pieces)
    assert at.tolist() == [[0, 1, 0, 0, 6]]


def test_what_falls_on_an_environment_is_paid_at_the_token_before() -> None:
    _, at, _ = pay([returning([[0.0, 0.0, 5.0, 1.0]], "token")], [[2, 3, 4, 5]], chosen=[[1, 1, 0, 1]])
    assert at.tolist() == [[0, 5, 0, 1]]


def test_characters_of_several_tokens() -> None:
    """Byte-level tokens: three of the four tokens of an emoji complete no character."""
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    ids = fast("a🙂é")["input_ids"]
    assert len(ids) == 7
    assert token_ends(fast, ids) == [1, 1, 1, 1, 2, 2, 3]
    # Cut in the middle of a character, which is decoded as a mark of its own.
    text = fast.decode(ids[:3])
    assert token_ends(fast, ids[:3])[-1] == len(text)


def test_special_tokens_have_no_characters(pieces: Any) -> None:
    assert token_ends(pieces, ids_of("a", "<pad>", "\n\n", "<eos>")) == [1, 1, 3, 3]


# Sums


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_everything_at_the_last_token_is_the_number(count: int) -> None:
    torch.manual_seed(count)
    ids, columns = [[2] * n for n in (5, 1, 3, 4)], torch.randn(count, 4).tolist()
    weights = torch.rand(count).tolist()
    numbers = [returning(column) for column in columns]
    lists = [
        returning([[*[0.0] * (len(row) - 1), reward] for row, reward in zip(ids, column, strict=True)], "token")
        for column in columns
    ]
    one, at_one, _ = pay(numbers, ids, weights=weights)
    other, at_other, _ = pay(lists, ids, weights=weights)
    mask = torch.tensor([[1] * len(row) + [0] * (5 - len(row)) for row in ids])
    assert torch.equal(one, other) and torch.equal(at_one, at_other)
    assert torch.equal(at_one, terminal_rewards(weighted_scores(one, torch.tensor(weights)), mask))


def test_numbers_and_steps_mix_with_their_weights() -> None:
    functions = [returning([[1.0, 2.0], [None, 4.0]], "token"), returning([10.0, None])]
    rewards, at, paid = pay(functions, [[5, 6], [7, 8]], weights=[0.5, 2.0])
    torch.testing.assert_close(rewards, torch.tensor([[3.0, 10.0], [4.0, NAN]]), equal_nan=True)
    assert at.tolist() == [[0.5, 21.0], [0.0, 2.0]]
    assert paid.tolist() == [[True, True], [False, True]]


def test_nothing_and_nan_are_no_reward() -> None:
    func = returning([[None, NAN], None, [None, 1.0]], "token")
    rewards, at, paid = pay([func], [[5, 6], [7, 8], [9, 9]])
    torch.testing.assert_close(rewards, torch.tensor([[NAN], [NAN], [1.0]]), equal_nan=True)
    assert at.tolist() == [[0, 0], [0, 0], [0, 1]] and paid.tolist() == [[False] * 2, [False] * 2, [False, True]]


def test_an_infinite_step_makes_the_completion_unusable() -> None:
    rewards, _, _ = pay([returning([[1.0, math.inf], [1.0, 1.0]], "token")], [[5, 6], [7, 8]])
    assert weighted_scores(rewards).isnan().tolist() == [True, False]


def test_infinities_of_both_signs_are_not_no_reward() -> None:
    functions = [returning([[math.inf, -math.inf], [1.0]]), returning([1.0, 1.0])]
    rewards, _, _ = pay(functions, [[5, 6], [7]])
    assert rewards.tolist() == [[math.inf, 1.0], [1.0, 1.0]]
    assert weighted_scores(rewards).isnan().tolist() == [True, False]
    steps, mask = StepRewards(Completed([])), torch.tensor([[1, 1], [1, 0]])
    sums = steps.take_tokens(0, torch.tensor([[math.inf, -math.inf], [1.0, NAN]]), mask)
    assert sums.tolist() == [math.inf, 1.0]


def test_async_and_partial_functions() -> None:
    @rewards_per("token")
    async def later(scale: float, **_: Any) -> list[list[float]]:
        await asyncio.sleep(0)
        return [[scale, 2.0]]

    _, at, _ = pay([partial(later, scale=1.0), returning([5.0])], [[5, 6]])
    assert at.tolist() == [[1.0, 7.0]]


# Refused


@pytest.mark.parametrize(
    ("func", "message"),
    [
        (
            returning([[1.0], [1.0, 2.0, 3.0]]),
            r"'given' returned 1 rewards for completion 0 in step 3, which has 2 tok",
        ),
        (
            returning([[1.0, 2.0], [1.0]], "turn"),
            r"2 rewards for completion 0 in step 3, which has 1 turns of the pol",
        ),
        (returning([[1.0], [1.0]], "step"), r"1 rewards for completion 0 in step 3, which has 2 steps that end with"),
        (returning([[(0, 9, 1.0)], []], "span"), r"the span 0:9 for completion 0 in step 3, whose text has 4 charact"),
    ],
)
def test_lists_of_the_wrong_length(pieces: Any, func: Any, message: str) -> None:
    ids = [ids_of("a", "\n\nb"[1:]), ids_of("a", "b", "a")]
    ids[0] = ids_of("a\n\nb", "<eos>")
    with pytest.raises(ValueError, match=message):
        pay([func], ids, tokenizer=pieces)


@pytest.mark.parametrize(
    ("func", "message"),
    [
        (
            returning([[1.0, 2.0], 3.0]),
            r"'given' returned 3.0 for completion 1 in step 3, but its other rewards are",
        ),
        (returning([1.0, 2.0], "turn"), r"returned 1.0 for completion 0 in step 3"),
        (returning([[1.0, "x"], None]), r"returned 'x' for completion 0 in step 3 instead of a number"),
        (returning([[1.0, [2.0, 3.0]], None]), r"returned \[2.0, 3.0\] for completion 0"),
        (returning([[3], None], "span"), r"returned 3 for completion 0 in step 3. Return \(start, end, reward\)"),
    ],
)
def test_what_is_no_number(pieces: Any, func: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        pay([func], [[2, 3], [2, 3]], tokenizer=pieces)


def test_declarations_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="choose one of token, turn, step, span"):
        rewards_per("sentence")
    with pytest.raises(ValueError, match="separator is empty"):
        rewards_per("step", separator="")
    with pytest.raises(TypeError, match="Wrap it"):
        rewards_per("token")(len)


def test_completions_without_the_separator_are_counted(pieces: Any) -> None:
    ids = [ids_of("a", "b"), ids_of("a", "\n\n", "b"), ids_of("b")]
    steps = StepRewards(Completed(ids, None, pieces))
    func = returning([[1.0], [1.0, 1.0], [1.0]], "step")
    call_rewards([returning([0.0] * 3), func], ["p"] * 3, ["c"] * 3, ids, {}, steps=steps)
    assert steps.unseparated == {1: 2}


# Process reward models


def test_process_rewards_are_those_of_a_plain_pass(tokenizer: Any, tiny_model: Callable[..., Any]) -> None:
    config = tiny_model().config
    config.num_labels = 2
    torch.manual_seed(0)
    model = Qwen3ForTokenClassification(config).eval()
    judge = ProcessRewardModel(model, tokenizer, separator="=", step_separator=" ", batch_size=1)
    texts = ["1+2=3=4", "5"]
    rewards = judge(prompts=["7+", "8-"], completions=texts)
    assert [len(row) for row in rewards] == [3, 1]
    encode = partial(tokenizer, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        logits = model(**encode("7+1+2 3 4 ")).logits.softmax(-1)[0, :, 1]
        other = model(**encode("8-5 ")).logits.softmax(-1)[0, :, 1]
    torch.testing.assert_close(torch.tensor(rewards[0]), logits[[5, 7, 9]])
    torch.testing.assert_close(torch.tensor(rewards[1]), other[[3]])
    together = ProcessRewardModel(model, tokenizer, separator="=", step_separator=" ")
    torch.testing.assert_close(
        torch.tensor(together(prompts=["7+", "8-"], completions=texts)[1]), torch.tensor(rewards[1])
    )
    # Its rewards are paid where the steps of the completion end.
    ids = [tokenizer(text)["input_ids"] for text in texts]
    steps = StepRewards(Completed(ids, None, tokenizer))
    columns = call_rewards([judge], ["7+", "8-"], texts, ids, {}, steps=steps)
    mask = torch.tensor([[1] * 7, [1] + [0] * 6])
    at, paid = steps.token_rewards(columns, mask)
    assert paid.nonzero().tolist() == [[0, 3], [0, 5], [0, 6], [1, 0]]
    torch.testing.assert_close(at[0, [3, 5, 6]], torch.tensor(rewards[0]))


def test_a_process_reward_model_with_too_many_classes(tokenizer: Any, tiny_model: Callable[..., Any]) -> None:
    config = tiny_model().config
    config.num_labels = 3
    with pytest.raises(ValueError, match="has 3 classes"):
        ProcessRewardModel(Qwen3ForTokenClassification(config), tokenizer)
