"""Targets for action values, which differ in how they read the next state, and the one update towards them.

The functions take `N` transitions `(s, a, r, s')`, where `N` stands for any number of leading dimensions, and `A`
actions.

Arguments that functions here share, and do not list again:
    rewards: `r (N,)`.
    next_q: `q(s', .) (N, A)`.
    terminated: whether the episode ended in `s'`, bool `(N,)`. There is no next state then: the target is the reward
        alone, and whatever `next_q` holds there (NaN, inf) reaches neither a result nor a gradient. A time limit is no
        termination: leave it false, and give the values of the state that was cut off.
    gamma: discount in `[0, 1]`.

Targets are `(N,)`, float32 or wider. All functions raise `ValueError` where shapes do not fit or a number is out of
range. Nothing is detached here: pass `next_q` from a target network, or under stop-gradient. Equation numbers without
a paper are those of Sutton and Barto 2018.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rl_plugins.functional.checks import check_shape
from rl_plugins.functional.masking import upcast
from rl_plugins.functional.returns import check_discount


def expected_sarsa_targets(
    rewards: Tensor, next_q: Tensor, next_policy: Tensor, terminated: Tensor, *, gamma: float
) -> Tensor:
    """Evaluate a policy by the mean over its next actions, without the noise of one draw.

    `Y = r + gamma sum_a pi(a|s') q(s', a)` (eq. 6.9). Actions of probability 0 do not count, whatever their value
    (-inf for an action that is not allowed).

    Args:
        next_policy: `pi(.|s') (N, A)`.
    """
    _check(rewards, next_q, terminated, gamma)
    check_shape("next_policy", next_policy, next_q.shape, "give the shape of next_q")
    # Entries are replaced before they are multiplied: 0 * NaN is NaN, in the value and in the gradient.
    counts = ~terminated.bool().unsqueeze(-1) & (next_policy != 0)
    policy, values = upcast(next_policy), upcast(next_q)
    expected = (torch.where(counts, policy, 0.0) * torch.where(counts, values, 0.0)).sum(-1)
    return upcast(rewards) + gamma * expected


def sarsa_targets(
    rewards: Tensor, next_q: Tensor, next_actions: Tensor, terminated: Tensor, *, gamma: float
) -> Tensor:
    """Evaluate a policy by the next action that it took: `Y = r + gamma q(s', a')` (eq. 6.7).

    This is expected Sarsa with all probability on that action.

    Args:
        next_actions: `a' (N,)`, long, in `0 .. A - 1`; ignored where `terminated`.
    """
    _check(rewards, next_q, terminated, gamma)
    check_shape("next_actions", next_actions, rewards.shape, "give the shape of rewards")
    actions = torch.where(terminated.bool(), 0, next_actions)
    if bool(((actions < 0) | (actions >= next_q.shape[-1])).any()):
        raise ValueError(f"next_actions must lie in 0 .. {next_q.shape[-1] - 1}, the columns of next_q.")
    return expected_sarsa_targets(rewards, next_q, F.one_hot(actions, next_q.shape[-1]), terminated, gamma=gamma)


def double_q_targets(
    rewards: Tensor, next_q_online: Tensor, next_q_target: Tensor, terminated: Tensor, *, gamma: float
) -> Tensor:
    """Let one table choose and another evaluate, against overestimation: `Y = r + gamma q'(s', argmax_a q(s', a))`.

    Double Q-learning (van Hasselt et al., arXiv 1509.06461, eq. 4) reduces the upward bias of the maximum over noisy
    values. It is Sarsa with a next action that is greedy in `q` and has its value from `q'`.

    Args:
        next_q_online: `q(s', .) (N, A)`, which chooses the action.
        next_q_target: `q'(s', .) (N, A)`, which has the action's value.
    """
    _check(rewards, next_q_online, terminated, gamma)
    check_shape("next_q_target", next_q_target, next_q_online.shape, "give the shape of next_q_online")
    return sarsa_targets(rewards, next_q_target, next_q_online.argmax(-1), terminated, gamma=gamma)


def q_learning_targets(rewards: Tensor, next_q: Tensor, terminated: Tensor, *, gamma: float) -> Tensor:
    """Evaluate the best policy, whichever policy acts: `Y = r + gamma max_a q(s', a)` (eq. 6.8).

    This is expected Sarsa of the greedy policy: one table both chooses and evaluates.
    """
    return double_q_targets(rewards, next_q, next_q, terminated, gamma=gamma)


def stochastic_update(q: Tensor, targets: Tensor, alpha: float | Tensor) -> Tensor:
    """Move estimates a step towards their targets: `q <- q - alpha (q - Y)` (Robbins and Monro 1951).

    All methods from Monte Carlo to Q-learning use this update; they differ in the target. With `alpha = 1` the result
    is the target itself, to the last bit.

    Args:
        q: estimates of any shape; not written to.
        targets: `Y`, the shape of `q`.
        alpha: step size in `[0, 1]`, a float, 0-d, or one for each estimate.

    Returns:
        The shape of `q`, float32 or wider.
    """
    check_shape("targets", targets, q.shape, "give the shape of q")
    q, targets = upcast(q), upcast(targets)
    dtype = torch.promote_types(q.dtype, targets.dtype)
    step = torch.as_tensor(alpha, dtype=dtype, device=q.device)
    if step.shape not in (torch.Size([]), q.shape):
        raise ValueError(f"alpha {tuple(step.shape)}: give a float, or one for each estimate, {tuple(q.shape)}.")
    if not bool(((step >= 0) & (step <= 1)).all()):
        raise ValueError("alpha has entries outside [0, 1]: give step sizes such as 0.1, or 1 / n at the n-th visit.")
    return torch.lerp(q.to(dtype), targets.to(dtype), step)


def _check(rewards: Tensor, next_q: Tensor, terminated: Tensor, gamma: float) -> None:
    check_discount(gamma)
    check_shape("terminated", terminated, rewards.shape, "give the shape of rewards")
    if next_q.ndim != rewards.ndim + 1 or next_q.shape[:-1] != rewards.shape or not next_q.shape[-1]:
        raise ValueError(
            f"next_q {tuple(next_q.shape)} with rewards {tuple(rewards.shape)}: give the values of all actions in the "
            "next states, (N, A) with rewards (N,)."
        )
