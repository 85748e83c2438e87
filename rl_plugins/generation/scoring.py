"""Reward functions with TRL's signature, called on text or conversations."""

import asyncio
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

RewardFunc = Callable[..., Any]
"""`(prompts, completions, completion_ids, **columns) -> one number or None per completion`, sync or async."""


def is_conversational(prompt: Any) -> bool:
    """Whether a prompt is a list of messages instead of text."""
    return isinstance(prompt, list) and all(isinstance(message, Mapping) and "role" in message for message in prompt)


def prompt_tokens(tokenizer: Any, prompts: Sequence[Any]) -> list[list[int]]:
    """Token ids of prompts: text as it is, conversations through the chat template."""
    if is_conversational(prompts[0]):
        kwargs = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        return tokenizer.apply_chat_template(conversation=list(prompts), **kwargs)["input_ids"]
    return tokenizer(text=list(prompts))["input_ids"]


def as_completions(tokenizer: Any, prompts: Sequence[Any], completion_ids: Sequence[Sequence[int]]) -> list[Any]:
    """What reward functions see of completions: text, or one assistant message where prompts are conversations."""
    texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    if is_conversational(prompts[0]):
        return [[{"role": "assistant", "content": text}] for text in texts]
    return texts


def reward_name(func: Any) -> str:
    """Name of a reward function in metrics: its own, or its class's."""
    inner = getattr(func, "func", func)  # of a functools.partial
    return getattr(inner, "__name__", type(inner).__name__)


def as_reward_funcs(reward_funcs: Any) -> list[RewardFunc]:
    """The reward functions of a run as a list; reward models and their paths are made into functions.

    Raises:
        TypeError: If one is neither callable nor a path.
        ValueError: If there is none.
    """
    listed = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    if not listed or listed == [None]:
        raise ValueError(
            "There are no reward functions. Give reward_funcs a function "
            "`(prompts, completions, **columns) -> list[float]`, a reward model, or a list of them."
        )
    functions = [RewardModel(func) if isinstance(func, str | nn.Module) else func for func in listed]
    for func in functions:
        if not callable(func):
            raise TypeError(f"A reward function must be callable, a reward model or its path, got {func!r}.")
    return functions


class RewardModel:
    """A sequence classifier as a reward function: its only score of prompt and completion.

    Args:
        model: The classifier, or where to load it from.
        tokenizer: Its tokenizer; by default that of the same path.
    """

    def __init__(self, model: str | nn.Module, tokenizer: Any = None) -> None:
        path = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", None)
        classifier: Any = model
        if isinstance(model, str):
            classifier = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(path)
        self.model, self.tokenizer = classifier.eval(), tokenizer
        self.__name__ = str(path or type(model).__name__).rstrip("/").split("/")[-1]

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        """Scores of the pairs."""
        if is_conversational(prompts[0]):
            chats = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
            texts = self.tokenizer.apply_chat_template(chats, tokenize=False)
        else:
            texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        device = next(self.model.parameters()).device
        inputs = self.tokenizer(text=texts, return_tensors="pt", padding=True, add_special_tokens=False).to(device)
        return self.model(**inputs).logits[:, 0].float().tolist()


def call_rewards(
    functions: Sequence[RewardFunc],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
) -> Tensor:
    """Call reward functions as TRL does.

    Args:
        functions: F functions; async ones run side by side.
        prompts: B prompts.
        completions: B completions, as text or messages.
        completion_ids: Their tokens.
        columns: Further keyword arguments: the other columns of the data, repeated like the prompts.

    Returns:
        Rewards (B, F), float32; NaN where a function returned None.

    Raises:
        ValueError: If a function returns another number of rewards than there are completions.
        Exception: Whatever a function raises, with a note that names it.
    """
    # A column of the data may have the name of one of these.
    arguments = {**columns, "prompts": prompts, "completions": completions, "completion_ids": completion_ids}
    results: dict[int, Any] = {}
    waiting = {}
    for i, func in enumerate(functions):
        if inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(type(func).__call__):
            waiting[i] = func
        else:
            with raised_by(reward_name(func)):
                results[i] = func(**arguments)
    results |= asyncio.run(_gather(waiting, arguments)) if waiting else {}
    return torch.stack([_as_tensor(functions[i], results[i], len(prompts)) for i in range(len(functions))], dim=1)


@contextmanager
def raised_by(name: str) -> Iterator[None]:
    """Note the name of a reward function on whatever it raises, which keeps its type and traceback (PEP 678)."""
    try:
        yield
    except Exception as error:
        error.add_note(f"Raised by the reward function '{name}'.")
        raise


async def _gather(functions: Mapping[int, RewardFunc], arguments: dict[str, Any]) -> dict[int, Any]:
    async def call(func: RewardFunc) -> Any:
        with raised_by(reward_name(func)):
            return await func(**arguments)

    outputs = await asyncio.gather(*(call(func) for func in functions.values()))
    return dict(zip(functions, outputs, strict=True))


def _as_tensor(func: RewardFunc, rewards: Any, expected: int) -> Tensor:
    try:
        count = len(rewards)
    except TypeError:
        raise TypeError(
            f"The reward function '{reward_name(func)}' returned {type(rewards).__name__}, not a list of one reward "
            "per completion."
        ) from None
    if count != expected:
        raise ValueError(
            f"The reward function '{reward_name(func)}' returned {count} rewards for {expected} completions. Return "
            "exactly one per completion, None where it does not apply."
        )
    return torch.tensor([math.nan if r is None else float(r) for r in rewards], dtype=torch.float32)


def check_weights(weights: list[float] | None, num_functions: int) -> Tensor | None:
    """Weights of the reward functions (F,).

    Raises:
        ValueError: If there are not as many as functions.
    """
    if weights is None:
        return None
    if len(weights) != num_functions:
        raise ValueError(f"reward_weights has {len(weights)} numbers for {num_functions} reward functions.")
    return torch.tensor(weights, dtype=torch.float32)


def weighted_scores(rewards: Tensor, weights: Tensor | None = None) -> Tensor:
    """`sum_f w_f r_f` over the functions that gave a reward.

    Args:
        rewards: (B, F), NaN for none.
        weights: (F,); ones by default.

    Returns:
        (B,), NaN where no function gave one, or one gave something infinite.
    """
    weighted = rewards if weights is None else rewards * weights.to(rewards)
    unusable = rewards.isnan().all(1) | rewards.isinf().any(1)
    return weighted.nansum(1).masked_fill(unusable, torch.nan)
