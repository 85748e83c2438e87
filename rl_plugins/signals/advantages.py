"""Advantages of GRPO variants by name, in one table whose entries say what they need.

A new advantage is a function in `functional/advantages/` and one line of `ADVANTAGES`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

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
from rl_plugins.functional.advantages.steps import process_normalized, reward_to_go, turn_normalized
from rl_plugins.functional.advantages.traces import lambda_trace
from rl_plugins.functional.advantages.tracked import forget_factor, tracker_update
from rl_plugins.functional.masking import Reduce, upcast
from rl_plugins.settings import keyword_names

GIVEN = ("mask", "reduce")
"""Keyword arguments that come with a batch instead of from the settings."""


@dataclass(frozen=True)
class Advantage:
    """An advantage, with the facts that the rest of the package needs.

    One of `of_scores`, `of_lengths`, `of_advantages`, `of_steps` and `tracks_prompts` says how it is computed, or
    `of_rewards` alone.

    Attributes:
        of_scores: `(scores (N,), group_size, **options) -> (N,)`, of all ranks, the completions of a prompt side by
            side, NaN for one that cannot be scored.
        of_lengths: Like `of_scores`, with the real tokens of each completion (N,) as third argument.
        of_advantages: `(advantages (B,), mask (B, T), **options) -> (B, T)`: spreads the advantage `source` over the
            tokens of this rank's completions.
        source: Name of the advantage that `of_advantages` spreads.
        of_steps: `(rewards (N, T), paid (N, T), mask (N, T), group_size, **options) -> (N, T)`, of all ranks: from the
            rewards of steps, at the tokens after which they are paid.
        of_rewards: `(rewards (B, T), mask (B, T), reduce=, **options) -> (B, T)`: from the rewards of tokens. If there
            is another function as well, this one is used when the KL is subtracted from each token's reward.
        tracks_prompts: Whether the success of every prompt is tracked from batch to batch, as the baseline of its next
            completion ([`~rl_plugins.signals.value_tracker.TrackedAdvantages`]).
        compares_groups: Whether it needs several completions of a prompt.
        nonnegative: Whether it needs rewards of at least 0.
        rescales: Whether it scales the other groups up to make up for groups of equal rewards, whose advantages are 0.
        check: `(options, group_size)`: refuses options that are wrong.
        shrink: `(options, group_size) -> options`: adapts them to a group that may be smaller than in training.
        scale_rewards: Value of TRL's `scale_rewards` that means the same advantage, if there is one.
    """

    of_scores: Callable[..., Tensor] | None = None
    of_lengths: Callable[..., Tensor] | None = None
    of_advantages: Callable[..., Tensor] | None = None
    source: str = "group_normalized"
    of_steps: Callable[..., Tensor] | None = None
    of_rewards: Callable[..., Tensor] | None = None
    tracks_prompts: bool = False
    compares_groups: bool = True
    nonnegative: bool = False
    rescales: bool = False
    check: Callable[[Mapping[str, Any], int], None] | None = None
    shrink: Callable[[Mapping[str, Any], int], Mapping[str, Any]] | None = None
    scale_rewards: str | None = None

    @property
    def per_token(self) -> bool:
        """Whether there is one advantage for each token."""
        return self.of_advantages is not None or self.of_steps is not None or self.only_of_rewards

    @property
    def only_of_rewards(self) -> bool:
        """Whether it is computed from the rewards of tokens, and from nothing else."""
        others = (self.of_scores, self.of_lengths, self.of_advantages, self.of_steps)
        return self.of_rewards is not None and not any(others)

    @property
    def options(self) -> list[str]:
        """Names of its options."""
        if self.tracks_prompts:
            return ["forget", *keyword_names(forget_factor)]
        function = self.of_scores or self.of_lengths or self.of_advantages or self.of_steps or self.of_rewards
        assert function is not None
        return [name for name in keyword_names(function) if name not in GIVEN]


def _reward(scores: Tensor, group_size: int) -> Tensor:
    return upcast(scores).nan_to_num(0.0)


def _batch_normalized(scores: Tensor, group_size: int, *, eps: float = 1e-8) -> Tensor:
    return batch_normalized(scores, eps=eps)


def _turn_normalized(
    rewards: Tensor, paid: Tensor, mask: Tensor, group_size: int, *, gamma: float = 1.0, eps: float = 1e-4
) -> Tensor:
    return turn_normalized(rewards, mask, group_size, gamma=gamma, eps=eps)


def _group_centered_rescaled(scores: Tensor, group_size: int) -> Tensor:
    groups = torch.arange(len(scores), device=scores.device) // group_size
    centered = group_centered(scores, group_size)
    return centered * gpg_scale(centered, groups)


def _check_k(options: Mapping[str, Any], group_size: int) -> None:
    if not 1 <= int(options.get("k", 0)) < group_size:
        raise ValueError(
            f"pass_at_k draws k of the num_generations={group_size} completions of a prompt, but k is "
            f"{options.get('k')}. Set advantage_kwargs={{'k': ...}} to at least 1 and less than num_generations: "
            "with all of them drawn every advantage is 0."
        )


def _shrink_k(options: Mapping[str, Any], group_size: int) -> Mapping[str, Any]:
    return {**options, "k": min(options["k"], group_size)}


def _check_tracker(options: Mapping[str, Any], group_size: int) -> None:
    if "forget" not in options:
        forget_factor(torch.zeros(1), **options)
        return
    if len(options) > 1:
        raise ValueError("forget replaces half_life, low and high. Give forget alone, or leave it out.")
    tracker_update(torch.ones(1), torch.ones(1), torch.ones(1), float(options["forget"]))


ADVANTAGES: dict[str, Advantage] = {
    "reward": Advantage(_reward, compares_groups=False),  # plain REINFORCE, without a baseline
    "group_normalized": Advantage(group_normalized),
    "group_centered": Advantage(group_centered, scale_rewards="none"),
    "group_min_max": Advantage(group_min_max),
    "group_centered_rescaled": Advantage(_group_centered_rescaled, rescales=True),  # GPG's
    "leave_one_out": Advantage(leave_one_out),
    "max_likelihood": Advantage(max_likelihood, nonnegative=True),
    "length_weighted": Advantage(of_lengths=length_weighted),
    "group_centered_batch_normalized": Advantage(group_centered_batch_normalized),
    "group_centered_batch_scaled": Advantage(group_centered_batch_scaled, scale_rewards="batch"),
    # Evaluation may draw fewer completions than k.
    "pass_at_k": Advantage(pass_at_k, check=_check_k, shrink=_shrink_k),
    "kalman": Advantage(kalman),
    "batch_normalized": Advantage(_batch_normalized, of_rewards=reward_to_go, compares_groups=False),
    "reward_to_go": Advantage(of_rewards=reward_to_go, compares_groups=False),
    "process_normalized": Advantage(of_steps=process_normalized),
    "turn_normalized": Advantage(of_steps=_turn_normalized),
    "value_tracker": Advantage(tracks_prompts=True, compares_groups=False, nonnegative=True, check=_check_tracker),
    "lambda_trace": Advantage(of_advantages=lambda_trace),
}
"""Every advantage by name."""


def advantage_options(name: str) -> list[str]:
    """List the options of an advantage.

    Raises:
        ValueError: If the advantage is unknown; the message lists the valid ones.
    """
    if name not in ADVANTAGES:
        raise ValueError(f"Unknown advantage {name!r}; choose one of {', '.join(ADVANTAGES)}.")
    return ADVANTAGES[name].options


def check_advantage(name: str, options: Mapping[str, Any], group_size: int) -> None:
    """Refuse an advantage that cannot be computed, by trying it on a group of zeros.

    Raises:
        ValueError: If the advantage or an option is unknown, the advantage does not take these values, or it compares
            completions of a prompt and there is only one.
    """
    unknown = sorted(set(options) - set(advantage_options(name)))
    if unknown:
        raise ValueError(
            f"The advantage {name!r} has no option {', '.join(map(repr, unknown))}; it has "
            f"{', '.join(advantage_options(name)) or 'none'}."
        )
    entry = ADVANTAGES[name]
    if entry.compares_groups and group_size < 2:
        raise ValueError(
            f"advantage={name!r} compares the completions of a prompt, but num_generations is {group_size}. Set it to "
            f"at least 2, or choose one of {', '.join(n for n, a in ADVANTAGES.items() if not a.compares_groups)}."
        )
    try:
        if entry.check is not None:
            entry.check(options, group_size)
        if not entry.tracks_prompts:
            zeros, mask = torch.zeros(group_size, 2), torch.ones(group_size, 2)
            if entry.only_of_rewards:
                advantages_of_rewards(name, zeros, mask, options=options)
            else:
                advantages_of(name, zeros[:, 0], group_size, mask, rewards=zeros, paid=mask, options=options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"advantage_kwargs={dict(options)} do not suit {name!r}: {error}") from error


@torch.no_grad()
def advantages_of(
    name: str,
    scores: Tensor,
    group_size: int,
    mask: Tensor,
    *,
    rewards: Tensor | None = None,
    paid: Tensor | None = None,
    options: Mapping[str, Any],
    gather: Callable[[Tensor], Tensor] = lambda x: x,
    own: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """Compute the advantages of this rank's completions.

    Args:
        name: One of `ADVANTAGES` that neither tracks prompts nor is computed from rewards alone.
        scores: Scores of this rank's completions (B,), those of a prompt side by side; NaN for one without a score.
        group_size: Completions per prompt.
        mask: Real tokens (B, T).
        rewards: Rewards at the tokens after which they are paid (B, T), for advantages of steps.
        paid: Where a reward is paid (B, T), for advantages of steps.
        options: Keyword arguments of the advantage.
        gather: Joins the rows of all ranks.
        own: Picks this rank's rows from those of all ranks.

    Returns:
        (B,), 0 where the score is NaN; (B, T) for an advantage per token.

    Raises:
        ValueError: If an option is wrong.
    """
    entry = ADVANTAGES[name]
    if entry.of_advantages is not None:
        whole = advantages_of(
            entry.source, scores, group_size, mask, rewards=rewards, paid=paid, options={}, gather=gather, own=own
        )
        return entry.of_advantages(whole, mask, **options)
    if entry.of_steps is not None:
        assert rewards is not None and paid is not None
        # Ranks may have padded their completions to different lengths.
        length = mask.shape[1]
        width = int(gather(torch.tensor([length], device=mask.device)).max())
        real = mask.bool() & scores.isfinite().unsqueeze(1)
        steps = [gather(F.pad(x, (0, width - length))) for x in (upcast(rewards), paid.int(), real.int())]
        return own(entry.of_steps(*steps, group_size, **options))[:, :length]
    if entry.shrink is not None:
        options = entry.shrink(options, group_size)
    if entry.of_lengths is not None:
        return own(entry.of_lengths(gather(scores), group_size, gather(mask.sum(dim=1)), **options))
    assert entry.of_scores is not None
    return own(entry.of_scores(gather(scores), group_size, **options))


def advantages_of_rewards(
    name: str, rewards: Tensor, mask: Tensor, *, options: Mapping[str, Any], reduce: Reduce | None = None
) -> Tensor:
    """Compute the advantages of this rank's completions from the rewards of its tokens.

    Args:
        name: One of `ADVANTAGES` that has `of_rewards`.
        rewards: (B, T).
        mask: Real tokens of completions with a score (B, T).
        options: Keyword arguments of the advantage.
        reduce: Sums statistics over ranks.

    Returns:
        (B, T), 0 at masked positions.
    """
    function = ADVANTAGES[name].of_rewards
    assert function is not None
    return function(rewards, mask, reduce=reduce, **options)
