"""The critic's training signal: advantages for the policy, and targets on which the value heads regress."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rl_plugins.functional.advantages.scaling import value_scaled
from rl_plugins.functional.alignment import head_targets, last_real, lookahead_values, next_state_values
from rl_plugins.functional.masking import (
    Reduce,
    explained_variance,
    masked_line,
    masked_mean,
    masked_moments,
    masked_sum,
    masked_whiten,
    upcast,
    zero_masked,
)
from rl_plugins.functional.returns import (
    check_discount,
    discount_factors,
    discounted_returns,
    lambda_returns,
    length_adaptive_lambda,
    td_errors,
)
from rl_plugins.functional.turns import in_time_unit, turn_ends
from rl_plugins.functional.value_losses import clipped_squared_error, huber, squared_error

ESTIMATORS = ("gae", "td", "mc")
SCALINGS = ("none", "whiten", "value")

ValueLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(values, targets, old_values) -> elementwise loss`."""


def value_losses(clip_range: float = 0.2, huber_delta: float = 1.0) -> dict[str, ValueLoss]:
    """Return the value losses by the names that configs use."""
    return {
        "squared": lambda v, y, old: squared_error(v, y),
        "clipped": lambda v, y, old: clipped_squared_error(v, y, old, clip_range=clip_range),
        "huber": lambda v, y, old: huber(v, y, delta=huber_delta),
    }


class CriticTargets(NamedTuple):
    """Advantages, regression targets and errors of one batch of completions, all (B, T).

    Attributes:
        advantages: For the policy, before scaling.
        returns: Regression target of value head 1.
        monte_carlo: Discounted return that was observed; explained variance is measured against it.
        td_errors: `delta_t`, the temporal-difference error.
    """

    advantages: Tensor
    returns: Tensor
    monte_carlo: Tensor
    td_errors: Tensor


def _lambdas(
    estimator: str,
    lam_policy: float,
    lam_value: float,
    length_alpha: float | None,
    lengths: Tensor,
) -> tuple[float | Tensor, float]:
    if estimator == "td":
        return 0.0, 0.0
    if estimator == "mc":
        return 1.0, 1.0
    if estimator != "gae":
        raise ValueError(f"Unknown advantage estimator {estimator!r}; choose one of {', '.join(ESTIMATORS)}.")
    if length_alpha is None:
        return lam_policy, lam_value
    return length_adaptive_lambda(lengths, length_alpha), lam_value


@torch.no_grad()
def critic_targets(
    rewards: Tensor,
    values: Tensor,
    target_values: Tensor,
    mask: Tensor,
    *,
    estimator: str = "gae",
    gamma: float = 1.0,
    lam_policy: float = 1.0,
    lam_value: float = 1.0,
    length_alpha: float | None = None,
    lookahead: bool = False,
    ahead: int = 1,
    time_unit: str = "token",
    after: Tensor | None = None,
) -> CriticTargets:
    """Compute the advantages and value targets of completions.

    `Y_t = r_t + gamma v_1'[t+1]`, `delta_t = Y_t - v_1[t]`, where `'` marks the slow
    target heads. The policy gets `A_t = G_t(lam_policy) - v_1[t]` and head 1 regresses on `G_t(lam_value)`, the
    lambda-returns bootstrapped from the target heads (decoupled lambdas: VC-PPO, 2503.01491). `td` sets both lambdas
    to 0, so `A_t = delta_t`; `mc` sets both to 1.

    If target and online values are equal, `A_t` is GAE's sum of `(gamma lam)^l delta_{t+l}` (1506.02438, equation 16).
    Otherwise this sum would add the gap between the two once per step: a lag of 0.1 becomes -2 over a completion of 20
    tokens.

    Args:
        rewards: Token rewards (B, T).
        values: Values of all heads when the completion was made (B, T, K).
        target_values: Values of the target heads (B, T, K).
        mask: Real tokens (B, T); may have holes.
        estimator: `gae`, `td` or `mc`.
        gamma: Discount.
        lam_policy: Lambda of the advantages (`gae` only).
        lam_value: Lambda of the value targets (`gae` only).
        length_alpha: Alpha of VAPO's length-adaptive lambda, which then replaces `lam_policy` (`gae` only).
        lookahead: Bootstrap from the mean of all heads' forecasts of `V(s_{t+1})` instead of head 1's alone.
        ahead: Tokens that each head looks further ahead than the head before it, see [`~rl_plugins.nn.MTPHeads`].
        time_unit: `token`, or `turn`: gamma and the lambdas act where a turn ends, and inside a turn both are 1.
        after: Values of the states after the last tokens (B,), 0 where an episode has ended there; by default all
            episodes have. The observed return of an episode that goes on includes this value.

    Raises:
        ValueError: If the estimator or the unit is unknown, or gamma or a lambda lies outside [0, 1].
    """
    dtype = upcast(values).dtype
    check_discount(gamma)
    lengths = (turn_ends(mask) if time_unit == "turn" else mask).sum(1, dtype=dtype)
    factors = gamma, *_lambdas(estimator, lam_policy, lam_value, length_alpha, lengths)
    discount, lam_advantage, lam_target = (
        in_time_unit(factor, mask, time_unit=time_unit, dtype=dtype) for factor in factors
    )
    bootstrap = lookahead_values(target_values, mask, ahead=ahead) if lookahead else target_values[..., 0]
    next_values, observed = next_state_values(bootstrap, mask), rewards
    if after is not None:
        beyond = torch.where(last_real(mask), upcast(after)[:, None], 0.0)
        next_values, observed = next_values + beyond, zero_masked(rewards, mask) + discount * beyond
    baseline = values[..., 0]
    return CriticTargets(
        advantages=zero_masked(
            lambda_returns(rewards, baseline, mask, gamma=discount, lam=lam_advantage, next_values=next_values)
            - baseline,
            mask,
        ),
        returns=lambda_returns(rewards, baseline, mask, gamma=discount, lam=lam_target, next_values=next_values),
        monte_carlo=discounted_returns(observed, mask, gamma=discount),
        td_errors=td_errors(rewards, baseline, mask, gamma=discount, next_values=next_values),
    )


@torch.no_grad()
def scale_advantages(
    advantages: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    scaling: str = "whiten",
    reward_range: tuple[float, float] = (0.0, 1.0),
    reduce: Reduce | None = None,
) -> Tensor:
    """Scale advantages over the batch or per prompt.

    `whiten`: zero mean and unit variance over all real tokens of all ranks (PPO's convention). `value`: divide by the
    standard deviation that `V(s_0)` implies, so that rare successes count more, as they do in GRPO, without a group.

    Args:
        advantages: (B, T).
        values: Values of head 1 (B, T), for `value`.
        mask: Real tokens (B, T).
        scaling: `none`, `whiten` or `value`.
        reward_range: Smallest and largest reward, for `value`.
        reduce: Sums statistics over ranks.

    Returns:
        (B, T), 0 at masked positions; for `none` the advantages as they came.

    Raises:
        ValueError: If `scaling` is unknown.
    """
    if scaling == "whiten":
        return masked_whiten(advantages, mask, reduce=reduce)
    if scaling == "value":
        low, high = reward_range
        real = zero_masked(advantages, mask)
        return value_scaled(real, initial_values(values, mask), low=low, high=high, min_std=0.1)
    if scaling != "none":
        raise ValueError(f"Unknown advantage scaling {scaling!r}; choose one of {', '.join(SCALINGS)}.")
    return advantages


def initial_values(values: Tensor, mask: Tensor) -> Tensor:
    """Pick `V(s_0)` (B,) from head-1 values (B, T): the value at the first real token, 0 where a row has none."""
    real = mask.bool()
    return masked_sum(values, real & (real.cumsum(1) == 1), dim=1)


def value_loss(
    values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    num_items: Tensor | float,
    loss: ValueLoss,
    old_values: Tensor,
    ahead: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the value loss of all heads.

    In the time index of [`rl_plugins.functional`], parallel head k at t regresses on the target of head 1 at t+k-1,
    and every sequential head at t on that at t.

    `L_TD = 1 / (K N) sum_k sum_t l(v_k[t], sg(Y_{t + (k-1) ahead}))`.

    Args:
        values: Online values with gradient (B, T, K).
        returns: Targets of head 1 (B, T).
        mask: Real tokens that count (B, T).
        num_items: N, real tokens that the loss is averaged over.
        loss: Elementwise loss.
        old_values: Values when the completion was made (B, T, K), for the clipped loss.
        ahead: Tokens that each head looks further ahead than the head before it.

    Returns:
        The loss (0-d), its sum per head (K,) and the number of targets per head (K,), the latter two detached.
    """
    targets, target_mask = head_targets(returns, mask, values.shape[-1], ahead=ahead)
    # Masked before the loss: NaN in padding that is masked only afterwards is still NaN in the gradient.
    error = loss(zero_masked(values, target_mask), targets.detach(), zero_masked(old_values, target_mask))
    per_head = masked_sum(error, target_mask, dim=0).sum(0)
    return (
        per_head.sum() / (values.shape[-1] * num_items),
        per_head.detach(),
        target_mask.sum(dim=(0, 1)).float(),
    )


@torch.no_grad()
def rollout_metrics(
    targets: CriticTargets,
    values: Tensor,
    target_values: Tensor,
    mask: Tensor,
    *,
    ahead: int = 1,
    reduce: Reduce | None = None,
) -> dict[str, Tensor]:
    """Measure how good the saved values were, before the critic learns from this batch.

    `critic/explained_variance` is `1 - Var(G - v) / Var(G)` with the observed return G: 1 is a perfect forecast, and 0
    is no better than a constant. Since G is observed, bootstrapping cannot make the number look better. Head k is
    compared with the return at `t + (k-1) ahead`.

    Args:
        targets: From [`critic_targets`].
        values: (B, T, K).
        target_values: (B, T, K).
        mask: Real tokens that count (B, T).
        ahead: Tokens that each head looks further ahead than the head before it.
        reduce: Sums statistics over ranks.

    Returns:
        0-d tensors by metric name.
    """
    metrics: dict[str, Tensor] = {}
    for name, x in (
        ("value", values[..., 0]),
        ("return", targets.monte_carlo),
        ("advantage", targets.advantages),
    ):
        mean, var, _ = masked_moments(x, mask, reduce=reduce)
        metrics[f"critic/{name}_mean"], metrics[f"critic/{name}_std"] = mean, var.sqrt()
    metrics["critic/td_error_abs"] = masked_moments(targets.td_errors.abs(), mask, reduce=reduce)[0]
    gap = (upcast(values[..., 0]) - upcast(target_values[..., 0])).abs()
    metrics["critic/target_gap"] = masked_moments(gap, mask, reduce=reduce)[0]
    goals, goal_mask = head_targets(targets.monte_carlo, mask, values.shape[-1], ahead=ahead)
    for k in range(values.shape[-1]):
        score = explained_variance(values[..., k], goals[..., k], goal_mask[..., k], reduce=reduce)
        metrics[f"critic/explained_variance/head_{k + 1}"] = score
    metrics["critic/explained_variance"] = metrics["critic/explained_variance/head_1"]
    return metrics


@torch.no_grad()
def critic_signal(
    rewards: Tensor,
    values: Tensor,
    target_values: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    scaling: str = "whiten",
    reward_range: tuple[float, float] = (0.0, 1.0),
    discounted_objective: bool = False,
    calibrate: bool = False,
    reduce: Reduce | None = None,
    after: Tensor | None = None,
    cut: Tensor | None = None,
    **options: Any,
) -> tuple[CriticTargets, Tensor, dict[str, Tensor]]:
    """Compute advantages, value targets and metrics of a batch just generated.

    Values are a control variate of the policy's gradient. With `calibrate`, advantages are made of `a + b v` instead
    of the values `v`. The line, with `b` between 0 and 1, is the one that forecasts the observed returns of this batch
    best. So good values remove most variance, and bad values do no harm: if values explain nothing, `b` is 0, and the
    baseline is the mean of the batch, as in REINFORCE++.

    Args:
        rewards: Token rewards (B, T).
        values: Values of all heads when the completion was made (B, T, K).
        target_values: Values of the target heads (B, T, K).
        mask: Real tokens that count (B, T).
        gamma: Discount.
        scaling: See [`scale_advantages`].
        reward_range: See [`scale_advantages`].
        discounted_objective: Multiply the scaled advantage of token `t` by `gamma^t`. Without this factor, and with
            `gamma < 1`, the gradient is not that of the discounted return: late tokens count too much.
        calibrate: Correct the values by a line before they become advantages. Value targets stay as they are.
        reduce: Sums statistics over ranks.
        after: See [`critic_targets`].
        cut: Whether the episode was cut (B,), bool, so that `after` has a value of it.
        options: Further keyword arguments of [`critic_targets`].

    Returns:
        The targets, the policy's scaled advantages (B, T), and metrics (0-d): [`rollout_metrics`],
        `critic/calibration`, which is `b`, and `critic/skipped_completions`, the number of completions without a token
        that counts.
    """

    targets = critic_targets(rewards, values, target_values, mask, gamma=gamma, after=after, **options)
    metrics: dict[str, Tensor] = {}
    baseline = values
    if calibrate:
        slope, intercept = masked_line(values[..., 0], targets.monte_carlo, mask, slopes=(0.0, 1.0), reduce=reduce)
        metrics["critic/calibration"] = slope.float()

        def calibrated(x: Tensor) -> Tensor:
            return (slope * x.double() + intercept).to(x.dtype)

        baseline = calibrated(values)
        if after is not None and cut is not None:
            after = torch.where(cut.bool(), calibrated(after), 0.0)
        corrected = critic_targets(
            rewards, baseline, calibrated(target_values), mask, gamma=gamma, after=after, **options
        )
        targets = targets._replace(advantages=corrected.advantages, td_errors=corrected.td_errors)
    advantages = scale_advantages(
        targets.advantages, baseline[..., 0], mask, scaling=scaling, reward_range=reward_range, reduce=reduce
    )
    metrics |= rollout_metrics(targets, values, target_values, mask, ahead=options.get("ahead", 1), reduce=reduce)
    if discounted_objective:
        dtype = advantages.dtype
        discount = in_time_unit(gamma, mask, time_unit=options.get("time_unit", "token"), dtype=dtype)
        advantages = advantages * discount_factors(mask, gamma=discount, dtype=dtype)
    skipped = (~mask.any(dim=1)).sum().float().view(1)
    metrics["critic/skipped_completions"] = (skipped if reduce is None else reduce(skipped))[0]
    return targets, advantages, metrics


def sequence_means(x: Tensor, mask: Tensor) -> Tensor:
    """Compute the mean over the real tokens of each sequence, (B, T) -> (B,); 0 where there are none."""
    return masked_mean(x, mask, dim=1)
