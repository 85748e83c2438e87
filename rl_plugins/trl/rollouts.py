"""Rollout functions whose empty completions do not stop the run."""

from collections.abc import Callable
from typing import Any

RolloutFunc = Callable[..., dict[str, Any]]


def fill_empty(rollout_func: RolloutFunc, eos_token_id: int) -> RolloutFunc:
    """Give every empty completion of a rollout function one masked end-of-text token.

    TRL reads the last token of every completion and fails on one that has none. Masked, the token teaches nothing, and
    the completion is counted in `critic/skipped_completions`.

    Args:
        rollout_func: As TRL takes it; returns `prompt_ids`, `completion_ids`, `logprobs` and maybe `env_mask`.
        eos_token_id: The token to fill in.
    """

    def rollout(*args: Any, **kwargs: Any) -> dict[str, Any]:
        output = rollout_func(*args, **kwargs)
        completions = output["completion_ids"]
        if all(len(ids) > 0 for ids in completions):
            return output
        env_mask = output.get("env_mask") or [[1] * len(ids) for ids in completions]
        logprobs = output.get("logprobs")
        return {
            **output,
            "completion_ids": [list(ids) or [eos_token_id] for ids in completions],
            "env_mask": [list(mask) or [0] for mask in env_mask],
            "logprobs": logprobs and [list(row) or [0.0] for row in logprobs],
        }

    return rollout
