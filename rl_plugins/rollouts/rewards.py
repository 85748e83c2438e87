"""Reward functions with TRL's signature, called on text or conversations."""

import asyncio
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rl_plugins.nn.sources import check_source
from rl_plugins.rollouts.reward_models import RewardModel, is_conversational
from rl_plugins.rollouts.step_rewards import Completed, StepRewards, as_float

RewardFunc = Callable[..., Any]
"""`(prompts, completions, completion_ids, **columns) -> one entry per completion`, sync or async. An entry is a
number, `None`, or a list with a reward for each token, turn or step; see [`~rl_plugins.rollouts.rewards_per`]."""

REWARD_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra")
"""Keyword arguments that every reward function is given, beside the columns of the data."""

NOT_COLUMNS = ("prompt", "completion", "completion_ids")
"""Columns of the data that reward functions do not get, as in TRL: a demonstration is not for them."""


def prompt_tokens(tokenizer: Any, prompts: Sequence[Any]) -> list[list[int]]:
    """Turn prompts into token ids: text as it is, conversations through the chat template."""
    if is_conversational(prompts[0]):
        kwargs = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        return tokenizer.apply_chat_template(conversation=list(prompts), **kwargs)["input_ids"]
    return tokenizer(text=list(prompts))["input_ids"]


def as_completions(tokenizer: Any, prompts: Sequence[Any], completion_ids: Sequence[Sequence[int]]) -> list[Any]:
    """Present completions as reward functions expect them: text, or an assistant message where prompts are chats."""
    texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    if is_conversational(prompts[0]):
        return [[{"role": "assistant", "content": text}] for text in texts]
    return texts


def reward_name(func: Any) -> str:
    """Return the name of a reward function in metrics: its own, or that of its class."""
    while isinstance(func, functools.partial):
        func = func.func
    return getattr(func, "__name__", type(func).__name__)


def is_async(func: Any) -> bool:
    """Tell whether calling a reward function returns a coroutine."""
    while isinstance(func, functools.partial):
        func = func.func
    return inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(type(func).__call__)


def list_reward_funcs(reward_funcs: Any) -> list[Any]:
    """List the reward functions of a run, reward models and their paths among them; empty where there are none.

    Raises:
        TypeError: If one is neither callable nor a path.
        FileNotFoundError: If one is the path of a folder that does not exist.
    """
    listed = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    listed = [func for func in listed if func is not None]
    for func in listed:
        if isinstance(func, str):
            check_source("reward_funcs", func)
        elif not callable(func):
            raise TypeError(f"A reward function must be callable, a reward model or its path, got {func!r}.")
    return listed


def as_reward_funcs(reward_funcs: Any) -> list[RewardFunc]:
    """List the reward functions of a run, and make functions of reward models and their paths.

    Raises:
        TypeError: If one is neither callable nor a path.
        ValueError: If there is none.
    """
    listed = list_reward_funcs(reward_funcs)
    if not listed:
        raise ValueError(
            "There are no reward functions. Give reward_funcs a function "
            "`(prompts, completions, **columns) -> list[float]`, a reward model, or a list of them."
        )
    return [RewardModel(func) if isinstance(func, str | nn.Module) else func for func in listed]


def check_reward_arguments(functions: Sequence[Any], given: Iterable[str], *, complete: bool = True) -> None:
    """Refuse a reward function that cannot be called with the arguments that it will be given.

    Args:
        functions: Reward functions; reward models and their paths pass.
        given: Names of the keyword arguments, columns of the data among them.
        complete: Whether `given` is complete.

    Raises:
        TypeError: If there is one; the message names it, and the arguments or columns in question.
    """
    names = list(dict.fromkeys(given))
    for func in functions:
        # A function written in C may take more than its signature says, if it has one.
        if isinstance(func, str | nn.Module | RewardModel) or inspect.isbuiltin(func):
            continue
        parameters = inspect.signature(func).parameters.values()
        keywords = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        missing = [name for name, p in keywords.items() if p.default is p.empty and name not in names]
        nameless = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
        if nameless:
            raise TypeError(
                f"The reward function '{reward_name(func)}' takes {_quoted(nameless)} by position only. Reward "
                'functions are called with keyword arguments. Remove the "/" from the parameters.'
            )
        if missing and complete:
            raise TypeError(
                f"The reward function '{reward_name(func)}' asks for {_quoted(missing)}, which the data does not "
                f"have. Reward functions are called with keyword arguments, here {', '.join(names)}: rename the "
                "parameter, or add the column to the dataset."
            )
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        refused = [name for name in names if name not in keywords]
        if refused and not takes_all:
            raise TypeError(
                f"The reward function '{reward_name(func)}' does not take {_quoted(refused)}. Reward functions are "
                f"given every column and more, here {', '.join(names)}: add `**kwargs` to its parameters."
            )


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def as_rewards(
    name: str,
    rewards: Any,
    expected: int,
    moment: str = "",
    *,
    func: Any = None,
    number: int = 0,
    steps: StepRewards | None = None,
) -> list[float]:
    """Read the result of a reward function as one number for each completion, NaN for None.

    Args:
        name: Name of the function.
        rewards: A list, tensor, array or other iterable of numbers and None, or of lists of these for the steps.
        expected: Number of completions.
        moment: When it was called, such as `" in step 3"`.
        func: The function, which may declare a unit of its rewards.
        number: Number of the function among the reward functions.
        steps: Takes in the rewards of steps, whose sums are returned.

    Raises:
        TypeError: If it is no iterable of numbers.
        ValueError: If there are more or fewer rewards than completions.
    """
    given, returned = rewards, f"The reward function '{name}' returned"
    if inspect.iscoroutine(rewards):
        rewards.close()
    if isinstance(rewards, Tensor):
        rewards = rewards.detach().cpu().tolist()
    try:
        if isinstance(rewards, str | bytes | Mapping | Set):
            raise TypeError
        listed = list(rewards)
    except TypeError:  # also of what cannot be iterated
        raise TypeError(
            f"{returned} {type(given).__name__}{moment}, not a list of one reward per completion. Return a list of "
            f"{expected} numbers, with None for a completion without a reward."
        ) from None
    if len(listed) != expected:
        raise ValueError(
            f"{returned} {len(listed)} rewards for {expected} completions{moment}. Return exactly one per completion, "
            "and None for a completion without a reward."
        )
    if steps is not None and steps.are_steps(func, listed):
        return steps.take(number, func, returned, moment, listed)
    numbers = []
    for row, reward in enumerate(listed):
        try:
            numbers.append(as_float(reward))
        except (TypeError, ValueError, RuntimeError):  # the last is torch's, for a tensor of several numbers
            raise TypeError(
                f"{returned} {reward!r:.80} ({type(reward).__name__}) for completion {row}{moment}, which is not a "
                "number. Return a number for each completion, or None for a completion without a reward."
            ) from None
    return numbers


def checked(func: RewardFunc, name: str, number: int, steps: StepRewards, moment: str = "") -> RewardFunc:
    """Wrap a reward function such that arguments and result are checked, and every error names the function.

    Args:
        func: The function, sync or async.
        name: Its name in errors.
        number: Number of the function among the reward functions.
        steps: Takes in the rewards of steps.
        moment: When it is called, such as `" in step 3"`.

    Returns:
        A function of the same kind, which returns floats, NaN for None; sums where there are rewards of steps.
    """
    expected = len(steps.completed.ids)

    async def call_async(**arguments: Any) -> list[float]:
        check_reward_arguments([func], arguments)
        with raised_by(name, moment, arguments):
            rewards = await func(**arguments)
        return as_rewards(name, rewards, expected, moment, func=func, number=number, steps=steps)

    def call(**arguments: Any) -> list[float]:
        check_reward_arguments([func], arguments)
        with raised_by(name, moment, arguments):
            rewards = func(**arguments)
        return as_rewards(name, rewards, expected, moment, func=func, number=number, steps=steps)

    return call_async if is_async(func) else call


def call_rewards(
    functions: Sequence[RewardFunc],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Any],
    moment: str = "",
    *,
    steps: StepRewards | None = None,
) -> Tensor:
    """Call reward functions as TRL does.

    Args:
        functions: F functions; async ones run side by side.
        prompts: B prompts.
        completions: B completions, as text or messages.
        completion_ids: Their tokens.
        columns: Further keyword arguments: the other columns of the data, repeated like the prompts.
        moment: When they are called, for errors, such as `" in step 3"`.
        steps: Takes in the rewards of steps.

    Returns:
        Rewards (B, F), float32; NaN where a function returned None, sums where it returned rewards of steps.

    Raises:
        TypeError: If a function does not take these arguments, or does not return a list of numbers.
        ValueError: If a function returns another number of rewards than there are completions.
        Exception: Whatever a function raises, with a note that names it.
    """
    # A column of the data may have the name of one of these arguments, which then hide the column.
    arguments = {**columns, "prompts": prompts, "completions": completions, "completion_ids": completion_ids}
    steps = StepRewards(Completed(completion_ids)) if steps is None else steps
    calls = [checked(func, reward_name(func), number, steps, moment) for number, func in enumerate(functions)]
    rewards: list[Any] = [None if is_async(call) else call(**arguments) for call in calls]
    waiting = [i for i, call in enumerate(calls) if is_async(call)]
    if waiting:
        outputs = asyncio.run(_gather([calls[i] for i in waiting], arguments))
        for i, output in zip(waiting, outputs, strict=True):
            rewards[i] = output
    return torch.tensor(rewards, dtype=torch.float32).T


async def _gather(calls: Sequence[RewardFunc], arguments: dict[str, Any]) -> list[list[float]]:
    return await asyncio.gather(*(call(**arguments) for call in calls))


@contextmanager
def raised_by(name: str, moment: str = "", arguments: Iterable[str] = ()) -> Iterator[None]:
    """Add a note to an exception of a reward function, with its name, the moment of the call and the arguments. Its
    type and traceback stay (PEP 678)."""
    try:
        yield
    except Exception as error:
        error.add_note(f"Raised by the reward function '{name}'.")
        if moment:
            error.add_note(f"It was called{moment} with {', '.join(arguments)}.")
        raise


def check_weights(weights: list[float] | None, num_functions: int) -> Tensor | None:
    """Return the weights of the reward functions (F,); `None` for none.

    Raises:
        ValueError: If there are not as many as functions.
    """
    if weights is None:
        return None
    if len(weights) != num_functions:
        raise ValueError(
            f"reward_weights has {len(weights)} numbers for {num_functions} reward functions. Give one for each."
        )
    return torch.tensor(weights, dtype=torch.float32)


def weighted_scores(rewards: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum the weighted rewards, `sum_f w_f r_f`, over the functions that gave one.

    Args:
        rewards: (B, F), NaN for none.
        weights: (F,); ones by default.

    Returns:
        (B,), NaN where no function gave one, or one gave something infinite.
    """
    weighted = rewards if weights is None else rewards * weights.to(rewards)
    unusable = rewards.isnan().all(1) | rewards.isinf().any(1)
    return weighted.nansum(1).masked_fill(unusable, torch.nan)
