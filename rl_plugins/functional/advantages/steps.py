"""Advantages from rewards for the steps of completions.

Arguments that functions here share, and do not list again:
    rewards: `r (B, T)`, at the tokens after which they are paid; where groups are compared, the completions of a
        prompt are adjacent.
    mask: the policy's tokens `(B, T)`; a row without any of them counts as unscorable and enters no statistic.
    group_size: completions per prompt.
    eps: a small positive number, added to a standard deviation or a variance.

Results are `(B, T)`, 0 where the mask is 0. All functions raise `ValueError` where shapes do not fit or a number is
out of range.
"""

import torch
from torch import Tensor

from rl_plugins.functional.advantages.group import batch_normalized, group_normalized
from rl_plugins.functional.checks import check_shape
from rl_plugins.functional.masking import Reduce, zero_masked
from rl_plugins.functional.returns import discounted_returns
from rl_plugins.functional.turns import at_turn_ends, in_time_unit, turn_ends, turn_numbers, turn_sums


def reward_to_go(
    rewards: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    time_unit: str = "token",
    eps: float = 1e-8,
    reduce: Reduce | None = None,
) -> Tensor:
    """Credit each token with the rewards that follow it, compared with the whole batch.

    `R_t = sum_i gamma^i r_{t+i}`, then `batch_normalized` over all tokens: REINFORCE++ (arXiv 2501.03262), which has
    `gamma = 1`. With `gamma` below 1 a token gets less credit for rewards long after it. This helps where later
    rewards are luck or depend on later tokens, and harms where they depend on this token.

    Args:
        gamma: discount, in `[0, 1]`.
        time_unit: `token`, or `turn`: the discount acts once at the end of each turn.
    """
    check_shape("rewards", rewards, mask.shape, "give one per token")
    discount = in_time_unit(gamma, mask, time_unit=time_unit, dtype=rewards.dtype)
    return batch_normalized(discounted_returns(rewards, mask, gamma=discount), mask=mask, eps=eps, reduce=reduce)


def process_normalized(rewards: Tensor, paid: Tensor, mask: Tensor, group_size: int, *, eps: float = 1e-4) -> Tensor:
    """Credit each token with the step that it is part of and with those that follow, in units of the group's spread.

    `A_i[t] = sum over steps j of completion i that end at t or later of (r_ij - mean) / (std + eps)`, with mean and
    deviation (Bessel's correction) over all steps of the group's completions: GRPO's process supervision
    (DeepSeekMath, arXiv 2402.03300, section 4.1.3). Where each completion is paid once, at its end, this is
    `group_normalized`.

    Advantages grow with the number of steps that are left: a token before ten good steps has ten times the advantage
    of a token before the last step.

    Args:
        paid: tokens at which a step ends and gets its reward, which may be 0, `(B, T)`.
    """
    check_shape("rewards", rewards, mask.shape, "give one per token")
    check_shape("paid", paid, mask.shape, "give one per token")
    steps = zero_masked(rewards, mask).masked_fill(~(paid.bool() & mask.bool()), torch.nan)
    # Tokens at which no step ends are treated as unscorable completions: in no statistic, and 0 in the result.
    normalized = group_normalized(steps.flatten(), group_size * max(mask.shape[1], 1), eps=eps).view(mask.shape)
    return discounted_returns(normalized, mask)


def turn_normalized(
    rewards: Tensor, mask: Tensor, group_size: int, *, gamma: float = 1.0, eps: float = 1e-4
) -> Tensor:
    """Compare each turn with the turns of the same number in the group, and credit it with the turns that follow.

    `A_i[t] = sum over turns l >= k of gamma^(l - k) A_i(l)` for a token of turn `k`. `A_i(l)` is `group_normalized` of
    the rewards that the turns with number `l` earned. The last turn earns the outcome, so it is compared with the last
    turns of the others, whatever their numbers. This is MT-GRPO (arXiv 2505.11821), whose alpha is `gamma`. In the
    paper all completions of a prompt have equally many turns.

    Args:
        gamma: weight of the next turn's advantage in that of a turn, in `[0, 1]`.
    """
    check_shape("rewards", rewards, mask.shape, "give one per token")
    numbers, sums = turn_numbers(mask), turn_sums(rewards, mask)
    turns = torch.arange(sums.shape[1], device=sums.device)
    last = (turn_ends(mask).sum(1) - 1).unsqueeze(1)  # -1 where there is no turn
    outcomes = sums.gather(1, last.clamp(min=0)).masked_fill(last < 0, torch.nan)
    # One column for each turn before the last, and one for the last.
    earned = torch.cat([sums.masked_fill(turns >= last, torch.nan), outcomes], dim=1)
    compared = torch.stack([group_normalized(column, group_size, eps=eps) for column in earned.unbind(1)], dim=1)
    by_turn = torch.where(turns < last, compared[:, :-1], compared[:, -1:])
    at_ends = by_turn.gather(1, numbers.clamp(min=0)).masked_fill(~turn_ends(mask), 0.0)
    return discounted_returns(at_ends, mask, gamma=at_turn_ends(gamma, mask, dtype=at_ends.dtype))
