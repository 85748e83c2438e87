"""Reward functions that say who they are when they fail."""

import functools
from typing import Any

import torch
from trl.trainer.utils import get_callable_name, is_async_callable

from rl_plugins.generation.scoring import raised_by


def naming(func: Any) -> Any:
    """Wrap a reward function so that whatever it raises names it; reward models and their ids pass through.

    The exception keeps its type and traceback and gets a note (PEP 678).
    """
    if isinstance(func, str | torch.nn.Module) or not callable(func):
        return func
    name = get_callable_name(func)

    async def call_async(*args: Any, **kwargs: Any) -> Any:
        with raised_by(name):
            return await func(*args, **kwargs)

    def call(*args: Any, **kwargs: Any) -> Any:
        with raised_by(name):
            return func(*args, **kwargs)

    wrapper = call_async if is_async_callable(func) else call
    wrapped = functools.wraps(func, updated=())(wrapper)
    wrapped.__name__ = name
    return wrapped
