"""Reward functions that do not do what they should, and what is said about them; the same in both hosts."""

from typing import Any

import torch

from rl_plugins.rollouts import rewards_per


def strings(completions: list[str], **kwargs: Any) -> list[str]:
    return ["good"] * len(completions)


def numbers_as_text(completions: list[str], **kwargs: Any) -> list[str]:
    return ["1"] * len(completions)


def text(completions: list[str], **kwargs: Any) -> str:
    return "1" * len(completions)


def scalar(completions: list[str], **kwargs: Any) -> float:
    return 1.0


def tensor_scalar(completions: list[str], **kwargs: Any) -> torch.Tensor:
    return torch.tensor(1.0)


def nothing(completions: list[str], **kwargs: Any) -> None:
    return None


def mapping(completions: list[str], **kwargs: Any) -> dict[int, float]:
    return dict.fromkeys(range(len(completions)), 1.0)


def pairs(completions: list[str], **kwargs: Any) -> list[list[float]]:
    return [[1.0, 2.0]] * len(completions)


def lists_and_numbers(completions: list[str], **kwargs: Any) -> list[Any]:
    return [[1.0, 2.0], 1.0]


def words(completions: list[str], **kwargs: Any) -> list[list[str]]:
    return [["good", "bad"]] * len(completions)


@rewards_per("turn")
def two_turns(completions: list[str], **kwargs: Any) -> list[list[float]]:
    return [[1.0], [1.0, 2.0]]


@rewards_per("step")
def numbers_for_steps(completions: list[str], **kwargs: Any) -> list[float]:
    return [1.0] * len(completions)


@rewards_per("span")
def outside(completions: list[str], **kwargs: Any) -> list[list[tuple[int, int, float]]]:
    return [[(0, 7, 1.0)]] * len(completions)


async def lists_later(completions: list[str], **kwargs: Any) -> list[list[float]]:
    return [[1.0, 2.0]] * len(completions)


def one(completions: list[str], **kwargs: Any) -> list[float]:
    return [1.0]


async def later(completions: list[str], **kwargs: Any) -> list[str]:
    return ["good"] * len(completions)


def unawaited(completions: list[str], **kwargs: Any) -> Any:
    return later(completions)


def reads(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(x) for x in kwargs["solution"]]


def closed(completions: list[str], answer: list[str]) -> list[float]:
    return [1.0] * len(completions)


def asks(completions: list[str], solution: list[str], **kwargs: Any) -> list[float]:
    return [1.0] * len(completions)


def by_position(prompts: list[str], completions: list[str], /, **kwargs: Any) -> list[float]:
    return [1.0] * len(completions)


async def asks_later(completions: list[str], solution: list[str], **kwargs: Any) -> list[float]:
    return [1.0] * len(completions)


RETURNS: list[tuple[Any, type[Exception], str]] = [
    (strings, TypeError, "'strings' returned 'good' \\(str\\) for completion 0 in step 1, which is not a number"),
    (numbers_as_text, TypeError, "'numbers_as_text' returned '1' \\(str\\) for completion 0"),
    (text, TypeError, "'text' returned str in step 1, not a list of one reward per completion"),
    (
        scalar,
        TypeError,
        "'scalar' returned float in step 1, not a list of one reward per completion. Return a list of 2",
    ),
    (tensor_scalar, TypeError, "'tensor_scalar' returned Tensor in step 1, not a list"),
    (nothing, TypeError, "'nothing' returned NoneType in step 1, not a list"),
    (mapping, TypeError, "'mapping' returned dict in step 1, not a list"),
    (pairs, ValueError, "'pairs' returned 2 rewards for completion 0 in step 1, which has [^2]"),
    (
        lists_and_numbers,
        TypeError,
        "'lists_and_numbers' returned 1.0 for completion 1 in step 1, but its other .* Return a list",
    ),
    (words, ValueError, "'words' returned 2 rewards for completion 0 in step 1, which has 1 tokens"),
    (
        two_turns,
        ValueError,
        "'two_turns' returned 2 rewards for completion 1 in step 1, which has 1 turns of the policy",
    ),
    (numbers_for_steps, TypeError, "'numbers_for_steps' returned 1.0 for completion 0 in step 1, but its other"),
    (outside, ValueError, "'outside' returned the span 0:7 for completion 0 in step 1, whose text has 1 characters"),
    (lists_later, ValueError, "'lists_later' returned 2 rewards for completion 0 in step 1, which has 1 tokens"),
    (one, ValueError, "'one' returned 1 rewards for 2 completions in step 1"),
    (later, TypeError, "'later' returned 'good' \\(str\\) for completion 0"),
    (unawaited, TypeError, "'unawaited' returned coroutine in step 1, not a list"),
]
"""What a function returns; the same in both hosts."""

ARGUMENTS: list[tuple[Any, type[Exception], str]] = [
    (closed, TypeError, r"'closed' does not take `prompts`, .* add `\*\*kwargs`"),
    (asks, TypeError, "'asks' asks for `solution`, which the data does not have.* answer.* add the column"),
    (by_position, TypeError, "'by_position' takes `prompts`, `completions` by position only.* Remove the \"/\""),
    (asks_later, TypeError, "'asks_later' asks for `solution`"),
    (3, TypeError, "must be callable, a reward model or its path, got 3"),
    ("./no/such/model", FileNotFoundError, "reward_funcs='./no/such/model': there is no such"),
]
"""What a function takes; the same in both hosts."""
