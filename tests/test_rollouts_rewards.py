"""Reward functions with TRL's signature: what they are given, what they may return, and what goes wrong."""

import asyncio
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3ForSequenceClassification

from rl_plugins.rollouts.rewards import (
    RewardModel,
    as_completions,
    as_reward_funcs,
    call_rewards,
    is_conversational,
    prompt_tokens,
    reward_name,
    weighted_scores,
)

PROMPTS, TEXTS, IDS = ["1+1=", "2+2="], ["2", "45"], [[4], [6, 7]]
CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"


def length(completions: list[Any], **kwargs: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def call(*functions: Any, **columns: Any) -> torch.Tensor:
    return call_rewards(functions, PROMPTS, TEXTS, IDS, columns)


def test_functions_are_given_everything() -> None:
    seen: dict[str, Any] = {}

    def spy(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float | None]:
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        return [None, 3]

    rewards = call(spy, length, answer=["2", "4"], level=[1, 2])
    assert seen == {
        "prompts": PROMPTS, "completions": TEXTS, "completion_ids": IDS, "answer": ["2", "4"], "level": [1, 2]
    }  # fmt: skip
    assert rewards.dtype == torch.float32
    torch.testing.assert_close(rewards, torch.tensor([[math.nan, 1.0], [3.0, 2.0]]), equal_nan=True)


def test_columns_of_the_data_do_not_replace_the_completions() -> None:
    def spy(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
        assert (prompts, completions, completion_ids) == (PROMPTS, TEXTS, IDS)
        return [1.0, 1.0]

    assert call(spy, prompts=["a", "b"], completions=["x", "y"], completion_ids=[[0], [0]]).tolist() == [[1.0], [1.0]]


def test_async_functions_run_side_by_side_and_keep_their_column() -> None:
    order: list[str] = []
    event = asyncio.Event()

    async def waits(completions: list[str], **kwargs: Any) -> list[float]:
        await event.wait()
        order.append("waits")
        return [1.0, 2.0]

    class Opens:
        async def __call__(self, completions: list[str], **kwargs: Any) -> list[float]:
            order.append("opens")
            event.set()
            return [3.0, 4.0]

    rewards = call(waits, length, Opens())
    assert order == ["opens", "waits"]
    assert rewards.tolist() == [[1.0, 1.0, 3.0], [2.0, 2.0, 4.0]]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_rewards(count: int) -> None:
    def careless(**kwargs: Any) -> list[float]:
        return [0.0] * count

    with pytest.raises(ValueError, match=f"reward function 'careless' returned {count} rewards for 2 completions"):
        call(length, careless)


def test_no_list_of_rewards() -> None:
    def single(**kwargs: Any) -> float:
        return 1.0

    with pytest.raises(TypeError, match="'single' returned float, not a list of one reward per completion"):
        call(single)


@pytest.mark.parametrize("is_async", [False, True])
def test_errors_say_which_function_raised(is_async: bool) -> None:
    def broken(**kwargs: Any) -> list[float]:
        raise ZeroDivisionError("oh")

    async def broken_later(**kwargs: Any) -> list[float]:
        raise ZeroDivisionError("oh")

    with pytest.raises(ZeroDivisionError, match="oh") as caught:
        call(length, broken_later if is_async else broken)
    name = "broken_later" if is_async else "broken"
    assert caught.value.__notes__ == [f"Raised by the reward function '{name}'."]


def test_names() -> None:
    class Judge:
        def __call__(self, **kwargs: Any) -> list[float]:
            return []

    assert [reward_name(f) for f in (length, Judge(), functools.partial(length, x=1))] == ["length", "Judge", "length"]


def test_lists_of_functions() -> None:
    assert as_reward_funcs(length) == [length] == as_reward_funcs([length]) == as_reward_funcs((length,))
    for nothing in (None, []):
        with pytest.raises(ValueError, match="There are no reward functions"):
            as_reward_funcs(nothing)
    with pytest.raises(TypeError, match="must be callable, a reward model or its path, got 3"):
        as_reward_funcs([length, 3])


def test_weights_and_what_cannot_be_scored() -> None:
    nan, inf = math.nan, math.inf
    rewards = torch.tensor([[1.0, 2.0], [nan, 2.0], [nan, nan], [inf, 1.0], [1.0, -inf]])
    expected = torch.tensor([3.0, 2.0, nan, nan, nan])
    torch.testing.assert_close(weighted_scores(rewards), expected, equal_nan=True)
    weighted = weighted_scores(rewards, torch.tensor([2.0, -0.5]))
    torch.testing.assert_close(weighted, torch.tensor([1.0, -1.0, nan, nan, nan]), equal_nan=True)


# Conversations


def test_conversations(tokenizer: Any) -> None:
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = CHAT
    chats = [[{"role": "user", "content": "1+1"}], [{"role": "user", "content": "2"}]]
    assert is_conversational(chats[0]) and not is_conversational("1+1") and not is_conversational(["1"])
    assert prompt_tokens(tokenizer, chats) == [tokenizer("1+1=")["input_ids"], tokenizer("2=")["input_ids"]]
    assert prompt_tokens(tokenizer, PROMPTS) == [tokenizer(p)["input_ids"] for p in PROMPTS]
    # Ends are cut off from what reward functions see.
    ids = [tokenizer("45")["input_ids"] + [1], tokenizer("7")["input_ids"]]
    assert as_completions(tokenizer, PROMPTS, ids) == ["45", "7"]
    messages = as_completions(tokenizer, chats, ids)
    assert messages == [[{"role": "assistant", "content": "45"}], [{"role": "assistant", "content": "7"}]]


# Reward models


@pytest.fixture
def classifier(tiny_model: Callable[..., Any]) -> Any:
    config = tiny_model(initializer_range=0.3).config
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Qwen3ForSequenceClassification(config)


def test_a_reward_model_scores_prompt_and_completion(classifier: Any, tokenizer: Any, tmp_path: Path) -> None:
    classifier.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    (judge,) = as_reward_funcs(str(tmp_path / "judge"))
    assert isinstance(judge, RewardModel) and reward_name(judge) == "judge" and not judge.model.training
    expected = []
    for prompt, text in zip(PROMPTS, TEXTS, strict=True):  # alone, so that nothing is padded
        with torch.no_grad():
            expected.append(classifier.eval()(**tokenizer(prompt + text, return_tensors="pt")).logits.item())
    assert expected[0] != pytest.approx(expected[1], abs=1e-3)
    torch.testing.assert_close(call(judge), torch.tensor(expected).unsqueeze(1), rtol=1e-5, atol=1e-6)
    # The model itself, with the tokenizer of its path.
    loaded = Qwen3ForSequenceClassification.from_pretrained(tmp_path / "judge").train()
    (own,) = as_reward_funcs([loaded])
    torch.testing.assert_close(call(own), call(judge))
    assert not loaded.training


def test_a_reward_model_reads_conversations(classifier: Any, tokenizer: Any) -> None:
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = CHAT
    judge = RewardModel(classifier, tokenizer)
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    answers = [[{"role": "assistant", "content": text}] for text in TEXTS]
    assert judge(chats, answers) == pytest.approx(judge(PROMPTS, TEXTS), abs=1e-6)
