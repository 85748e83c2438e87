"""Advantages from rewards for the steps of completions, compared within the completions of a prompt.

Arguments that functions here share, and do not list again:
    rewards: `r (B, T)`, at the tokens after which they are paid; the completions of a prompt stand together.
    mask: the policy's tokens `(B, T)`; a row without any could not be scored and enters no statistic.
    group_size: completions per prompt.
    eps: a small positive number, added to a deviation.

Results are `(B, T)`, 0 where the mask is 0. All raise `ValueError` where shapes do not fit or a number is out of
range.
"""

import torch
from torch import Tensor

from rl_plugins.functional.advantages.group import group_normalized
from rl_plugins.functional.checks import check_shape
from rl_plugins.functional.masking import zero_masked
from rl_plugins.functional.turns import turn_numbers, turn_sums


def process_normalized(rewards: Tensor, paid: Tensor, mask: Tensor, group_size: int, *, eps: float = 1e-4) -> Tensor:
    """Credit each token with the steps that it is part of or that follow, in units of the group's spread.

    `A_i[t] = sum over steps j of completion i that end at t or later of (r_ij - mean) / (std + eps)`, with mean and
    deviation (Bessel's correction) over all steps of the group's completions: GRPO's process supervision
    (DeepSeekMath, arXiv 2402.03300, section 4.1.3). Where each completion is paid once, at its end, this is
    `group_normalized`.

    A sum over steps is the larger the more steps are left, so long completions have large advantages.

    Args:
        paid: tokens at which a step is rewarded, be it with 0, `(B, T)`.
    """
    check_shape("rewards", rewards, mask.shape, "give one per token")
    check_shape("paid", paid, mask.shape, "give one per token")
    steps = zero_masked(rewards, mask).masked_fill(~(paid.bool() & mask.bool()), torch.nan)
    # Tokens without a step are like completions that could not be scored: in no statistic, and 0 in the result.
    normalized = group_normalized(steps.flatten(), group_size * mask.shape[1], eps=eps).view(mask.shape)
    return zero_masked(normalized.flip(1).cumsum(1).flip(1), mask)


def turn_normalized(
    rewards: Tensor, mask: Tensor, group_size: int, *, outcome_coef: float = 1.0, eps: float = 1e-4
) -> Tensor:
    """Compare each turn with the turns of its number in the group, and credit it with the outcome besides.

    `A_i[t] = A_turn(i, k) + outcome_coef A_outcome(i)` for a token of turn `k`, and `A_outcome(i)` for the last turn,
    where `A_turn` is `group_normalized` of the rewards that turns number `k` earned, and `A_outcome` of those that
    last turns earned: MT-GRPO (arXiv 2505.11821), which has two turns. Unlike process supervision, it does not credit
    a turn with the turns between it and the last.

    Args:
        outcome_coef: weight of the outcome in the advantage of turns before the last.
    """
    check_shape("rewards", rewards, mask.shape, "give one per token")
    numbers, sums = turn_numbers(mask), turn_sums(rewards, mask)
    last = numbers.amax(1)  # -1 where there is no turn
    outcomes = sums.gather(1, last.clamp(min=0)[:, None]).squeeze(1).masked_fill(last < 0, torch.nan)
    outcome = group_normalized(outcomes, group_size, eps=eps)
    columns = []
    for k, column in enumerate(sums.unbind(1)):
        of_turn = group_normalized(column.masked_fill(k >= last, torch.nan), group_size, eps=eps)
        columns.append(torch.where(k < last, of_turn + outcome_coef * outcome, outcome))
    return zero_masked(torch.stack(columns, dim=1).gather(1, numbers.clamp(min=0)), mask)
