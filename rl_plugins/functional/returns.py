"""Targets for values and advantages: one reverse scan, and its special cases.

Arguments that functions here share, and do not list again:
    rewards: `r_t (B, T)`.
    values: `V(s_t) (B, T)`.
    mask: real tokens `(B, T)`.
    gamma: discount in `[0, 1]`, a float, or one per token `(B, T)`, for the step from `s_t` to `s_{t+1}`. If time
        should pass only between the turns of a conversation, give `turns.at_turn_ends(gamma, mask)`.
    lam: trace decay in `[0, 1]`, a float, one per sequence `(B,)` or `(B, 1)`, or one per token `(B, T)`. A row may
        hold several episodes if `lam` is 0 where they end, and `next_values` is given.
    next_values: `V'(s_{t+1}) (B, T)`, the value of the state after `y_t`, from another network than `values` (a Polyak
        target). By default it is `V(s_{t+1})` from `values`, 0 after the last real token. A tensor that is given is
        not set to 0 there, so that a truncated completion can be bootstrapped.

Results are `(B, T)`, 0 at masked positions. All functions raise `ValueError` where shapes do not fit or a number is
out of range. Equation numbers without a paper are those of Sutton and Barto 2018.
"""

import torch
from torch import Tensor

from rl_plugins.functional.alignment import last_real, next_state_values, shift_real
from rl_plugins.functional.checks import check_positive
from rl_plugins.functional.masking import upcast, zero_masked


def discounted_returns(rewards: Tensor, mask: Tensor, *, gamma: float | Tensor = 1.0) -> Tensor:
    """Sum up the rewards that follow each token, a target without any bias: `G_t = sum_i gamma^i r_{t+i}` (eq. 3.8).

    This Monte Carlo return has the highest variance of all targets, since it contains all randomness up to the end.
    """
    return _scan_real(_clean(rewards, mask), _discount(gamma, mask), mask)


def discount_factors(mask: Tensor, *, gamma: float | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weigh each token by the discount from the start: `prod_{i<t} gamma_i`, which is `gamma^t` for a float, where `t`
    is the number of real tokens before it.

    The gradient of the discounted objective, `E[sum_t gamma^t A_t grad ln pi(y_t|s_t)]`, has this factor (section
    13.3, box); most implementations leave the factor out.

    Args:
        dtype: that of the numbers to be multiplied by the factors; the factors are float32 at least.
    """
    gamma = _discount(gamma, mask)
    real = mask.bool().to(torch.promote_types(dtype, torch.float32))
    if isinstance(gamma, Tensor):
        steps = torch.where(mask.bool(), gamma.to(real.dtype), 1.0).cumprod(1)
        return zero_masked(torch.cat([torch.ones_like(real[:, :1]), steps[:, :-1]], dim=1), mask)
    return zero_masked(gamma ** (real.cumsum(1) - real), mask)


def td_targets(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float | Tensor = 1.0, next_values: Tensor | None = None
) -> Tensor:
    """Make one-step targets, which bootstrap from the next state: `Y_t = r_t + gamma V'(s_{t+1})` (eq. 6.2)."""
    return _clean(rewards, mask) + _discount(gamma, mask) * _next_values(values, mask, next_values)


def td_errors(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float | Tensor = 1.0, next_values: Tensor | None = None
) -> Tensor:
    """Measure by how much a step turned out better than expected.

    `delta_t = r_t + gamma V'(s_{t+1}) - V(s_t)` (eq. 6.5).
    """
    return td_targets(rewards, values, mask, gamma=gamma, next_values=next_values) - _clean(values, mask)


def n_step_returns(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    n: int,
    gamma: float = 1.0,
    next_values: Tensor | None = None,
) -> Tensor:
    """Make targets of `n` rewards and a bootstrap: `sum_{i<n} gamma^i r_{t+i} + gamma^n V'(s_{t+n})` (eq. 7.1).

    Args:
        n: rewards to sum before the bootstrap, at least 1; where fewer are left, the return runs to the end.
    """
    check_discount(gamma)
    if n < 1:
        raise ValueError(f"n={n}: give at least 1, which is td_targets.")
    following, last = _next_values(values, mask, next_values), last_real(mask)
    # The last token's bootstrap is added to its reward, so that windows which reach the end are no special case.
    window = _clean(rewards, mask) + gamma * torch.where(last, following, 0.0)
    bootstrap = shift_real(torch.where(last, 0.0, following), mask, n - 1)[0]
    return _window_sums(window, mask, n, gamma) + gamma**n * bootstrap


def lambda_returns(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 1.0,
    next_values: Tensor | None = None,
) -> Tensor:
    """Blend targets of all lengths, to trade bias for variance.

    `G_t = r_t + gamma ((1 - lam) V'(s_{t+1}) + lam G_{t+1})`, the lambda-return (eq. 12.18). `lam = 1` is Monte Carlo,
    `lam = 0` is TD.
    """
    gamma, lam = _discount(gamma, mask), _trace_decay(lam, mask)
    following = _next_values(values, mask, next_values)
    # After the last token G and V' are the same number, so there the bootstrap has its whole weight.
    bootstrap = torch.where(last_real(mask), following, (1 - lam) * following)
    return _scan_real(_clean(rewards, mask) + gamma * bootstrap, gamma * lam, mask)


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    next_values: Tensor | None = None,
) -> Tensor:
    """Estimate advantages, with `lam` to trade bias for variance: `A_t = sum_l (gamma lam)^l delta_{t+l}`.

    Generalised advantage estimation (arXiv 1506.02438, eq. 16): the lambda-return minus the value.
    """
    gamma, lam = _discount(gamma, mask), _trace_decay(lam, mask)
    return _scan_real(td_errors(rewards, values, mask, gamma=gamma, next_values=next_values), gamma * lam, mask)


def vtrace(
    rewards: Tensor,
    values: Tensor,
    ratios: Tensor,
    mask: Tensor,
    *,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 1.0,
    clip_rho: float = 1.0,
    clip_c: float = 1.0,
    next_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Correct value targets and advantages of a policy `pi` for steps that another policy `beta` took (V-trace).

    `v_t = V(s_t) + rho_t delta_t + gamma c_t (v_{t+1} - V(s_{t+1}))`, with `rho_t = min(clip_rho, pi / beta)` and
    `c_t = lam min(clip_c, pi / beta)` (Espeholt et al., arXiv 1802.01561, eq. 1 and remarks 1 and 2), and
    `A_t = delta_t + gamma lam (v_{t+1} - V(s_{t+1}))`, which a policy gradient still has to multiply by `rho_t`
    (section 4.2). Where `pi = beta`, these are `lambda_returns` and `gae`; at `lam = 0`, `V(s_t) + rho_t delta_t` and
    `delta_t`.

    Args:
        ratios: `pi(y_t|s_t) / beta(y_t|s_t) (B, T)`.
        clip_rho: largest weight of a TD error, above 0; it decides the values that the targets converge to.
        clip_c: largest weight of the trace, at most 1; it decides how fast they converge.

    Returns:
        `(targets, advantages)`, both `(B, T)`.
    """
    if clip_rho <= 0 or not 0 <= clip_c <= 1:
        raise ValueError(f"clip_rho={clip_rho}, clip_c={clip_c}: give a positive clip_rho, and clip_c in [0, 1].")
    ratios, gamma, lam = _clean(ratios, mask), _discount(gamma, mask), _trace_decay(lam, mask)
    errors = td_errors(rewards, values, mask, gamma=gamma, next_values=next_values)
    corrections = _scan_real(ratios.clamp(max=clip_rho) * errors, gamma * lam * ratios.clamp(max=clip_c), mask)
    advantages = errors + zero_masked(gamma * lam * shift_real(corrections, mask, 1)[0], mask)
    return _clean(values, mask) + corrections, advantages


def length_adaptive_lambda(lengths: Tensor, alpha: float = 0.05) -> Tensor:
    """Make traces longer for longer completions: `lam = clamp(1 - 1 / (alpha l), 0, 1)` (VAPO, arXiv 2504.05118).

    The trace's weights sum to `1 / (1 - lam) = alpha l`, a fixed share of the length.

    Args:
        lengths: `l`, real tokens of each completion `(B,)`.
        alpha: the share of the length, above 0.

    Returns:
        `(B,)`.
    """
    check_positive("give a positive share of the length, such as 0.05", alpha=alpha)
    return (1 - 1 / (alpha * upcast(lengths))).clamp(0, 1)


def _reverse_scan(a: Tensor, b: Tensor) -> Tensor:
    """Solve `x_t = b_t + a_t x_{t+1}`, `x_T = 0`, by doubling: `O(log T)` passes (Hillis and Steele 1986)."""
    length, step = b.shape[1], 1
    while step < length:
        # b_t now sums `step` terms, and a_t is the product of their factors: combine each block with the one after it.
        reach = length - step
        b = torch.cat([torch.addcmul(b[:, :reach], a[:, :reach], b[:, step:]), b[:, reach:]], dim=1)
        # Blocks that end past T meet x_T = 0: their products are never used again, so `a` shrinks.
        a = a[:, : max(reach - step, 0)] * a[:, step:reach]
        step *= 2
    return b


def _scan_real(b: Tensor, decay: float | Tensor, mask: Tensor) -> Tensor:
    """Run the scan over real tokens; a masked token passes the state on unchanged and is 0 in the result."""
    decay = torch.as_tensor(decay, dtype=b.dtype, device=b.device)
    return zero_masked(_reverse_scan(torch.where(mask.bool(), decay, 1.0), b), mask)


def _window_sums(rewards: Tensor, mask: Tensor, n: int, gamma: float) -> Tensor:
    """Compute `sum_{i<n} gamma^i r_{t+i}` by doubling: one window for each binary digit of `n`."""
    total, block, size, done = torch.zeros_like(rewards), rewards, 1, 0
    n = min(n, rewards.shape[1])
    while size <= n:
        if n & size:
            total = total + gamma**done * shift_real(block, mask, done)[0]
            done += size
        block = block + gamma**size * shift_real(block, mask, size)[0]
        size *= 2
    return total


def _next_values(values: Tensor, mask: Tensor, next_values: Tensor | None) -> Tensor:
    if next_values is not None:
        return _clean(next_values, mask)
    _check_shape(values, mask)
    return next_state_values(upcast(values), mask)


def _clean(x: Tensor, mask: Tensor) -> Tensor:
    _check_shape(x, mask)
    return zero_masked(x, mask)


def _check_shape(x: Tensor, mask: Tensor) -> None:
    if x.shape != mask.shape or x.ndim != 2:
        raise ValueError(
            f"A tensor has the shape {tuple(x.shape)}, and the mask {tuple(mask.shape)}: give both as (B, T)."
        )


def check_discount(gamma: float) -> None:
    """Refuse a discount outside [0, 1].

    Raises:
        ValueError: If it is.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma={gamma}: give a discount in [0, 1].")


def check_trace_decay(lam: float, name: str = "lam") -> None:
    """Refuse a trace decay outside [0, 1].

    Args:
        lam: the decay.
        name: the caller's name of the decay, for the message.

    Raises:
        ValueError: If it is.
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"{name}={lam}: give a trace decay in [0, 1].")


def _discount(gamma: float | Tensor, mask: Tensor) -> float | Tensor:
    """Check `gamma`, and return it as a float or `(B, T)`."""
    if not isinstance(gamma, Tensor):
        check_discount(gamma)
        return gamma
    if gamma.shape != mask.shape:
        raise ValueError(f"gamma {tuple(gamma.shape)}: give a float, or one per token, (B, T).")
    gamma = zero_masked(gamma, mask)
    if not _in_unit_interval(gamma):
        raise ValueError("gamma has entries outside [0, 1].")
    return gamma


def _trace_decay(lam: float | Tensor, mask: Tensor) -> float | Tensor:
    """Check `lam`, and return it as a float, `(B, 1)` or `(B, T)`."""
    if not isinstance(lam, Tensor):
        check_trace_decay(lam)
        return lam
    if lam.shape not in ((mask.shape[0],), (mask.shape[0], 1), mask.shape):
        raise ValueError(
            f"lam {tuple(lam.shape)}: give a float, one per sequence, (B,) or (B, 1), or one per token, (B, T)."
        )
    lam = zero_masked(lam, mask) if lam.shape == mask.shape else upcast(lam).reshape(-1, 1)
    if not _in_unit_interval(lam):
        raise ValueError("lam has entries outside [0, 1]: clamp it, as length_adaptive_lambda does.")
    return lam


def _in_unit_interval(x: Tensor) -> bool:
    return bool(((x >= 0) & (x <= 1)).all())
