"""Advantages of GRPO variants by name: scores of a batch in, one advantage per completion or token out."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rl_plugins.functional.advantages.group import (
    batch_normalized,
    gpg_scale,
    group_centered,
    group_centered_batch_normalized,
    group_centered_batch_scaled,
    group_min_max,
    group_normalized,
    kalman,
    leave_one_out,
    length_weighted,
    max_likelihood,
    pass_at_k,
)
from rl_plugins.functional.advantages.traces import lambda_trace
from rl_plugins.functional.advantages.tracked import forget_factor, tracker_update
from rl_plugins.functional.masking import upcast
from rl_plugins.functional.returns import discounted_returns
from rl_plugins.functional.rewards import kl_shaped_rewards, terminal_rewards


def _reward(scores: Tensor, group_size: int) -> Tensor:
    return upcast(scores).nan_to_num(0.0)


def _group_centered_rescaled(scores: Tensor, group_size: int) -> Tensor:
    groups = torch.arange(len(scores), device=scores.device) // group_size
    centered = group_centered(scores, group_size)
    return centered * gpg_scale(centered, groups)


GROUP_ADVANTAGES: dict[str, Callable[..., Tensor]] = {
    "reward": _reward,
    "group_normalized": group_normalized,
    "group_centered": group_centered,
    "group_min_max": group_min_max,
    "group_centered_rescaled": _group_centered_rescaled,
    "leave_one_out": leave_one_out,
    "max_likelihood": max_likelihood,
    "length_weighted": length_weighted,
    "group_centered_batch_normalized": group_centered_batch_normalized,
    "group_centered_batch_scaled": group_centered_batch_scaled,
    "pass_at_k": pass_at_k,
    "kalman": kalman,
}
"""`(scores (N,), group_size, **options) -> (N,)`. `reward` is plain REINFORCE, without a baseline;
`group_centered_rescaled` is GPG's, which makes up for the groups that teach nothing."""

ADVANTAGES = (*GROUP_ADVANTAGES, "batch_normalized", "value_tracker", "lambda_trace")
"""Every name. Of the last three, one needs no groups, one a tracker, and one the masks of the tokens."""

GROUPLESS = ("reward", "batch_normalized", "value_tracker")
"""Advantages that need only one completion per prompt."""

_GIVEN = ("lengths", "mask", "reduce")


def advantage_options(name: str) -> list[str]:
    """Names of the options of an advantage.

    Raises:
        ValueError: If the advantage is unknown; the message lists the valid ones.
    """
    if name not in ADVANTAGES:
        raise ValueError(f"Unknown advantage {name!r}; choose one of {', '.join(ADVANTAGES)}.")
    if name == "value_tracker":
        return ["forget", *_keywords(forget_factor)]
    functions: dict[str, Callable[..., Tensor]] = {
        **GROUP_ADVANTAGES,
        "batch_normalized": batch_normalized,
        "lambda_trace": lambda_trace,
    }
    return [key for key in _keywords(functions[name]) if key not in _GIVEN]


def _keywords(function: Callable[..., Any]) -> list[str]:
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]


@torch.no_grad()
def penalised_returns(scores: Tensor, logps: Tensor, ref_logps: Tensor, mask: Tensor, *, beta: float) -> Tensor:
    """REINFORCE++: what is left at each token of the score and the KL penalties.

    `R_t = r - beta sum_{i>=t} (ln pi - ln pi_ref)(y_i|s_i)` (2501.03262).

    Args:
        scores: `r` (B,), NaN where the mask of the row is empty.
        logps: `ln pi` of the policy that sampled (B, T).
        ref_logps: Under the reference (B, T).
        mask: Real tokens of completions with a score (B, T).
        beta: Coefficient of the KL penalty.

    Returns:
        (B, T), 0 at masked positions.
    """
    rewards = terminal_rewards(scores.nan_to_num(0.0), mask)
    return discounted_returns(kl_shaped_rewards(rewards, logps, ref_logps, mask, beta=beta), mask, gamma=1.0)


def check_advantage(name: str, options: Mapping[str, Any], group_size: int) -> None:
    """Try the options of an advantage on a group of zeros.

    Raises:
        ValueError: If the advantage or an option is unknown, or the advantage does not take these values.
    """
    unknown = sorted(set(options) - set(advantage_options(name)))
    if unknown:
        raise ValueError(
            f"The advantage {name!r} has no option {', '.join(map(repr, unknown))}; it has "
            f"{', '.join(advantage_options(name)) or 'none'}."
        )
    zeros = torch.zeros(group_size)
    try:
        if name == "lambda_trace":
            lambda_trace(zeros, torch.ones(group_size, 2), **options)
        elif name == "value_tracker":
            _check_tracker(dict(options))
        else:
            group_advantages(name, zeros, group_size, torch.ones(group_size), options=options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"advantage_kwargs={dict(options)} do not suit {name!r}: {error}") from error


def _check_tracker(options: dict[str, Any]) -> None:
    if "forget" not in options:
        forget_factor(torch.zeros(1), **options)
        return
    if len(options) > 1:
        raise ValueError("a constant forget leaves nothing for the other options to do; give it alone")
    tracker_update(torch.ones(1), torch.ones(1), torch.ones(1), float(options["forget"]))


@torch.no_grad()
def group_advantages(
    name: str, scores: Tensor, group_size: int, lengths: Tensor, *, options: Mapping[str, Any]
) -> Tensor:
    """One advantage per completion of a batch.

    Args:
        name: One of `GROUP_ADVANTAGES`, or `batch_normalized`.
        scores: Of all ranks, those of a prompt side by side (N,); NaN for a completion that cannot be scored.
        group_size: Completions per prompt.
        lengths: Real tokens of each completion (N,).
        options: Keyword arguments of the function.

    Returns:
        (N,), 0 where the score is NaN.

    Raises:
        ValueError: If the name is unknown or an option is wrong.
    """
    if name == "batch_normalized":
        return batch_normalized(scores, **options)
    if name not in GROUP_ADVANTAGES:
        raise ValueError(f"Unknown group advantage {name!r}; choose one of {', '.join(GROUP_ADVANTAGES)}.")
    if name == "length_weighted":
        return length_weighted(scores, group_size, lengths, **options)
    if name == "pass_at_k":
        # Evaluation may draw fewer completions than k.
        options = {**options, "k": min(options["k"], group_size)}
    return GROUP_ADVANTAGES[name](scores, group_size, **options)
