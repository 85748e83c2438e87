"""Advantages from groups of completions of one prompt: GRPO and its variants, without a critic.

Arguments that functions here share, and do not list again:
    rewards: `r (B,)`, one per completion; the completions of a prompt are adjacent, so that row `i` belongs to group
        `i // group_size`. A NaN reward marks a completion that could not be scored: it enters no statistic and its
        advantage is 0.
    group_size: completions per prompt.
    eps: a small positive number, which keeps a divisor from being 0. It is added to a standard deviation or, where the
        equation says so, to a variance or a mean.
    reduce: a function that sums a 1-D tensor across ranks; it is called twice.

Unless a function says otherwise, results are `(B,)`, and 0 in groups with fewer than two scorable rows. `n` in the
equations counts the scorable rows of the group. All functions raise `ValueError` where the rewards do not divide into
groups or a number is out of range.

Where a constant added to all rewards of a group does not change its advantages, they are computed from `r - min r`.
Equal rewards then give advantages of exactly 0, although the mean of equal floats may be off by a unit in the last
place.
"""

import torch
from torch import Tensor

from rl_plugins.functional.checks import check_groups, check_positive, check_shape
from rl_plugins.functional.masking import Reduce, masked_moments, masked_whiten, same_group, upcast, zero_masked


def group_normalized(rewards: Tensor, group_size: int, *, eps: float = 1e-4) -> Tensor:
    """Compare a completion with the others of its prompt, in units of their spread.

    `A_i = (r_i - mean) / (std + eps)`. GRPO (arXiv 2402.03300). `std` has Bessel's correction.
    """
    _check_eps(eps)
    grouped, scorable = _grouped(rewards, group_size)
    centered = _centered(grouped, scorable)
    var = (centered**2).sum(1, keepdim=True) / (_count(scorable) - 1).clamp(min=1)
    return (centered / (var.sqrt() + eps)).flatten()


def group_centered(rewards: Tensor, group_size: int) -> Tensor:
    """Compare a completion with the others of its prompt, without more weight for very easy and very hard prompts.

    `A_i = r_i - mean`. Dr. GRPO (arXiv 2503.20783).
    """
    return _centered(*_grouped(rewards, group_size)).flatten()


def group_min_max(rewards: Tensor, group_size: int) -> Tensor:
    """Give the best completion of a prompt the advantage 1 and the worst -1, without a baseline.

    `A_i = 2 (r_i - min r) / (max r - min r) - 1`. Reinforce-Rej (arXiv 2504.11343, eq. 5). In the paper the advantage
    is a verifier's reward, which is 1 or -1, and groups of equal rewards are left out. The groups that remain contain
    both rewards, so that `A_i` is the paper's advantage. It is also 1 or -1 if the two rewards are 0 and 1, or any
    other two values. Without a baseline, a group with few right answers has more negative advantages than positive
    ones.

    Returns:
        `(B,)`; 0 in groups of equal rewards.
    """
    grouped, scorable = _grouped(rewards, group_size)
    shifted = _shifted(grouped, scorable)
    spread = shifted.amax(1, keepdim=True)
    signed = 2 * shifted / torch.where(spread > 0, spread, 1.0) - 1
    return torch.where(scorable & (spread > 0), signed, 0.0).flatten()


def leave_one_out(rewards: Tensor, group_size: int) -> Tensor:
    """Compare a completion with the mean of the others alone, an unbiased baseline: `A_i = r_i - mean_{j != i} r_j`.

    RLOO (arXiv 2402.14740), computed as `(r_i - mean) n / (n - 1)`.
    """
    grouped, scorable = _grouped(rewards, group_size)
    count = _count(scorable)
    return (_centered(grouped, scorable) * count / (count - 1).clamp(min=1)).flatten()


def max_likelihood(rewards: Tensor, group_size: int, *, eps: float = 1e-6) -> Tensor:
    """Weigh prompts by how seldom they succeed: `A_i = (r_i - mean) / (mean + eps)`.

    MaxRL (arXiv 2602.02710). For 0/1 rewards the weight of a prompt is the inverse of its success rate, as in the
    gradient of `ln P(success)`. No reward may be negative.

    Returns:
        `(B,)`; 0 where the whole group has reward 0.
    """
    _check_eps(eps)
    grouped, scorable = _grouped(rewards, group_size)
    if bool((grouped < 0).any()):
        raise ValueError(
            "negative rewards: max_likelihood divides by the mean reward. Add a number to all rewards, so that the "
            "smallest is 0."
        )
    mean = grouped.sum(1, keepdim=True) / _count(scorable).clamp(min=1)
    return (_centered(grouped, scorable) / (mean + eps)).flatten()


def length_weighted(rewards: Tensor, group_size: int, lengths: Tensor) -> Tensor:
    """Subtract the baseline that gives the gradient the least variance, if long completions have large gradients.

    `A_i = r_i - sum_j l_j r_j / sum_j l_j`. OPO (arXiv 2505.23585). The baseline is optimal where the squared norm of
    a completion's gradient is proportional to its length.

    Args:
        lengths: `l`, real tokens of each completion `(B,)`, 0 or more.

    Returns:
        `(B,)`; 0 in groups with fewer than two scorable rows, and where all scorable rows are empty.
    """
    grouped, scorable = _grouped(rewards, group_size)
    check_shape("lengths", lengths, rewards.shape, "give the real tokens per reward")
    if bool((lengths < 0).any()):
        raise ValueError("negative lengths: give the count of real tokens, mask.sum(1).")
    weights = zero_masked(lengths.to(grouped.dtype).reshape(grouped.shape), scorable)
    total = weights.sum(1, keepdim=True)
    shifted = _shifted(grouped, scorable)
    baseline = (weights * shifted).sum(1, keepdim=True) / torch.where(total > 0, total, 1.0)
    return torch.where(scorable & (total > 0), shifted - baseline, 0.0).flatten()


def batch_normalized(
    returns: Tensor, *, mask: Tensor | None = None, eps: float = 1e-8, reduce: Reduce | None = None
) -> Tensor:
    """Compare a completion with the whole batch, where there are no groups: `A = (R - mean) / sqrt(var + eps)`.

    REINFORCE++ (arXiv 2501.03262), with the population variance.

    Args:
        returns: `R`, one per completion `(B,)` or per token `(B, T)`; NaN is left out.
        mask: `(B,)` or `(B, T)`, or any leading part of the shape of `returns`; all entries by default.

    Returns:
        The shape of `returns`; 0 outside the mask, at NaN, and everywhere if the returns do not vary.
    """
    _check_eps(eps)
    if returns.ndim not in (1, 2):
        raise ValueError(f"returns {tuple(returns.shape)}: give one per completion, (B,), or per token, (B, T).")
    real = ~returns.isnan()
    if mask is not None:
        # zero_masked checks the shapes and repeats the mask along the rest of the dimensions.
        real = zero_masked(real, mask).bool()
    return masked_whiten(returns, real, eps=eps, reduce=reduce)


def group_centered_batch_normalized(
    rewards: Tensor, group_size: int, *, eps: float = 1e-8, reduce: Reduce | None = None
) -> Tensor:
    """Compare a completion with the others of its prompt, in units of the spread in the batch.

    `A_i = c_i / sqrt(var_batch(c) + eps)`. REINFORCE++-baseline (arXiv 2501.03262): `group_centered`, then
    `batch_normalized`. `c_i = r_i - mean_group`, whose mean over the batch is 0 already. Each completion counts once;
    where long completions are to count more, call `batch_normalized` on `(B, T)` copies of `c` with the completion
    mask.
    """
    _check_eps(eps)
    grouped, scorable = _grouped(rewards, group_size)
    centered = _centered(grouped, scorable)
    _, var, _ = masked_moments(centered, scorable, reduce=reduce)
    # Not centred again: the mean is only rounding noise, and groups without spread should stay at exactly 0.
    return (centered * torch.rsqrt(var + eps)).flatten()


def group_centered_batch_scaled(
    rewards: Tensor, group_size: int, *, eps: float = 1e-4, reduce: Reduce | None = None
) -> Tensor:
    """Compare a completion with the others of its prompt, in units of the spread of all rewards.

    `A_i = (r_i - mean_group) / (std_batch(r) + eps)`. Lite PPO (arXiv 2508.08221). `std_batch` is the deviation, with
    Bessel's correction, of the rewards themselves, so it includes the spread between prompts.
    """
    _check_eps(eps)
    grouped, scorable = _grouped(rewards, group_size)
    _, var, count = masked_moments(grouped, scorable, reduce=reduce)
    std = (var * count / (count - 1).clamp(min=1)).sqrt()
    return (_centered(grouped, scorable) / (std + eps)).flatten()


def pass_at_k(rewards: Tensor, group_size: int, *, k: int, normalize: bool = False, eps: float = 1e-6) -> Tensor:
    """Reward what a completion adds to the best of `k` attempts (pass@k training).

    `A_i = E[max of a k-subset of the group | i in it] - E[max of a k-subset]`.

    The expectations are exact for any real rewards, by order statistics. With the rewards sorted,
    `r_0 <= .. <= r_{n-1}`, `E[max] = sum_m r_m C(m, k-1) / C(n, k)` and
    `E[max | i] = (r_i C(i, k-1) + sum_{m > i} r_m C(m-1, k-2)) / C(n-1, k-1)`. For 0/1 rewards these are the
    analytical advantages of Chen et al. (arXiv 2508.10751, section 2.4) before their division by
    `sigma = sqrt(E[max] (1 - E[max]))`; here `sigma` is the deviation of the maximum over the k-subsets, which has
    this value for 0/1 rewards. `E[max | i]` is `n / k` times the transformed reward of PKPO (arXiv 2505.15201, eq.
    19).

    `A_i = (1 - k / n) (E[max | i in it] - E[max | i not in it])` is unbiased up to the factor, and 0 at `k = n`.
    Choose `k` well below the group size.

    Args:
        k: attempts of which the best counts, in `[1, group_size]`; 1 is `group_centered`.
        normalize: whether to divide by `sigma + eps`.

    Returns:
        `(B,)`; 0 in groups with fewer than `k` scorable rows, and where every k-subset has the same maximum.
    """
    _check_eps(eps)
    grouped, scorable = _grouped(rewards, group_size)
    if not 1 <= k <= group_size:
        raise ValueError(f"k={k}: give 1 to group_size={group_size}; a k-subset is drawn from the group.")
    # The rewards in order, r_0 <= .. <= r_{n-1}, unscorable ones behind them as 0. Binomials of very different size
    # cancel, so all steps are in double precision, and only the result is rounded.
    shifted = _shifted(grouped.double(), scorable)
    ordered, order = shifted.masked_fill(~scorable, torch.inf).sort(dim=1, stable=True)
    count, rank = _count(scorable).double(), torch.arange(group_size, device=rewards.device).double()
    ordered = torch.where(rank < count, ordered, 0.0)

    # First sum, E[max] = sum_m r_m C(m, k-1) / C(n, k): r_m is the largest in the subsets of row m and k-1 rows below
    # it. For rewards 0 0 1 3 and k = 2 the shares are 0 1 2 3 of 6 subsets, and the mean is (0 + 0 + 2 + 9) / 6.
    p_max = torch.exp(_log_binomial(rank, k - 1) - _log_binomial(count, k))
    p_max = torch.where((rank < count) & (count >= k), p_max, 0.0)
    mean = (p_max * ordered).sum(1, keepdim=True)

    # Second sum, over the C(n-1, k-1) subsets that contain row i. Row i itself is the largest in C(i, k-1) of them.
    # For i = 2 above these are 2 of 3 subsets, which add 2 / 3 * 1.
    subsets = _log_binomial(count - 1, k - 1)
    own = ordered * torch.exp(_log_binomial(rank, k - 1) - subsets)
    # A row m > i is the largest in C(m-1, k-2) of them, with row i and k-2 others below it. The reversed running sum
    # adds up m >= i, minus the term of i. For i = 2 this adds 1 / 3 * 3, and so A_2 = 5/3 - 11/6.
    above = ordered * torch.exp(_log_binomial(rank - 1, k - 2) - subsets)
    above = above.flip(1).cumsum(1).flip(1) - above
    advantages = own + above - mean
    if normalize:
        sigma = (p_max * (ordered - mean) ** 2).sum(1, keepdim=True).sqrt()
        advantages = advantages / (sigma + eps)
    # The smallest and the largest maximum of a k-subset: if they are equal, the advantages are only rounding errors.
    varies = ordered[:, k - 1 : k] < ordered.amax(1, keepdim=True)
    advantages = torch.where((rank < count) & (count >= k) & varies, advantages, 0.0)
    return torch.empty_like(advantages).scatter_(1, order, advantages).to(grouped.dtype).flatten()


def kalman(
    rewards: Tensor,
    group_size: int,
    *,
    process_var: float = 1e-5,
    measurement_var: float = 1e-2,
    initial_mean: float = 0.0,
    initial_var: float = 1.0,
    eps: float = 1e-8,
) -> Tensor:
    """Compare each reward with a Kalman filter's estimate of the prompt's baseline, in units of its uncertainty.

    KRPO (arXiv 2505.07527). Each reward is a noisy measurement of the baseline `x`. From `x_0` and `P_0`, for the
    rewards of the group in their order: `P' = P_{i-1} + Q`, `K = P' / (P' + R)`, `x_i = x_{i-1} + K (r_i - x_{i-1})`,
    `P_i = (1 - K) P'`, and `A_i = (r_i - x_i) / (sqrt(P_i) + eps)`: each reward is compared with the estimate that
    already includes it.

    The result depends on the order of the rows, is not centred, and does not vanish for equal rewards unless they
    equal `initial_mean`. Unscorable rows do not change the state of the filter.

    Args:
        process_var: `Q`, by how much the baseline may drift from row to row; may be 0.
        measurement_var: `R`, the noise of a reward.
        initial_mean: `x_0`.
        initial_var: `P_0`.

    Returns:
        `(B,)`; a single scorable row has an advantage, too.
    """
    _check_eps(eps)
    if process_var < 0 or measurement_var <= 0 or initial_var <= 0:
        raise ValueError(
            f"process_var={process_var}, measurement_var={measurement_var}, initial_var={initial_var}: "
            "give variances above 0 (process_var may be 0)."
        )
    grouped, scorable = _grouped(rewards, group_size)
    last = grouped.new_full(grouped.shape[:1], initial_mean)
    gap = torch.zeros_like(last)
    var = grouped.new_full(grouped.shape[:1], initial_var)
    advantages = []
    for reward, real in zip(grouped.unbind(1), scorable.unbind(1), strict=True):
        predicted_var = var + process_var
        share = measurement_var / (predicted_var + measurement_var)
        # `share` is 1 - K, computed without a difference. `gap` is r_i - x_i = (1 - K) (r_i - x_{i-1}). The loop
        # updates it in place of x, which would lose digits where the rewards are large and differ little.
        gap = torch.where(real, share * (gap + (reward - last)), gap)
        last = torch.where(real, reward, last)
        var = torch.where(real, share * predicted_var, var)
        advantages.append(gap / (var.sqrt() + eps))
    return zero_masked(torch.stack(advantages, dim=1), scorable).flatten()


def _grouped(rewards: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Return the rewards as `(B / group_size, group_size)`, 0 where unscorable, and the mask of scorable rewards."""
    check_groups("rewards", rewards, group_size)
    grouped = rewards.reshape(-1, group_size)
    scorable = ~grouped.isnan()
    return zero_masked(grouped, scorable), scorable


def _count(scorable: Tensor) -> Tensor:
    return scorable.sum(1, keepdim=True)


def _shifted(grouped: Tensor, scorable: Tensor) -> Tensor:
    """Compute `r - min r` over the scorable rows of each group, 0 elsewhere."""
    least = grouped.masked_fill(~scorable, torch.inf).amin(1, keepdim=True)
    return torch.where(scorable, grouped - least, 0.0)


def _centered(grouped: Tensor, scorable: Tensor) -> Tensor:
    """Compute `r - mean r` over the scorable rows of each group, 0 elsewhere."""
    shifted = _shifted(grouped, scorable)
    return zero_masked(shifted - shifted.sum(1, keepdim=True) / _count(scorable).clamp(min=1), scorable)


def _log_binomial(n: Tensor, k: int) -> Tensor:
    """Compute `ln C(n, k)`, `-inf` where there is no such subset."""
    if k < 0:
        return torch.full_like(n, -torch.inf)
    enough = n >= k
    n = torch.where(enough, n, float(k))
    log = torch.lgamma(n + 1) - torch.lgamma(n.new_tensor(k + 1.0)) - torch.lgamma(n - k + 1)
    return torch.where(enough, log, -torch.inf)


def _check_eps(eps: float) -> None:
    check_positive("give a small positive number, which keeps a divisor from being 0", eps=eps)


def gpg_scale(advantages: Tensor, groups: Tensor, *, reduce: Reduce | None = None) -> Tensor:
    """Compute a factor that makes up for groups of equal advantages, which only dilute the mean over a batch.

    `alpha = B / (B - M)`. GPG's factor for the advantages (Chu et al., arXiv 2504.02546); `M` rows are in such groups,
    for example in groups whose advantages are all 0. The rest of GPG's loss is `vanilla` with advantages that are
    centred but not divided by their deviation. Compute the factor where the advantages are computed: one for the whole
    batch, not one per micro-batch.

    Args:
        advantages: `(B,)`, or the rewards themselves.
        groups: id of each row's prompt `(B,)`.
        reduce: called once.

    Returns:
        0-d; `B` where no group has a signal.
    """
    if advantages.ndim != 1:
        raise ValueError(f"advantages {tuple(advantages.shape)}: give one per sequence.")
    same = same_group(groups, torch.ones_like(advantages, dtype=torch.bool))
    # Advantages are compared with each other, not with 0: equal rewards stay equal after centring, but may differ from
    # their mean by rounding.
    signal = ((advantages[:, None] != advantages[None, :]) & same).any(1)
    counts = torch.stack([torch.ones_like(signal).sum(), signal.sum()]).to(upcast(advantages).dtype)
    total, useful = (reduce(counts) if reduce else counts).unbind()
    return total / useful.clamp(min=1)


def informative_groups(rewards: Tensor, group_size: int, *, tolerance: float = 1e-6) -> Tensor:
    """Find the prompts worth training on, whose rewards differ: `max r - min r > tolerance max(1, |max r|)`.

    Where all rewards of a prompt are equal, every advantage that subtracts the group's mean is 0 (DAPO, Yu et al.,
    arXiv 2503.14476, eq. 11, keeps the prompts with `0 < number right < G`).

    Args:
        tolerance: rewards that are closer than this count as equal.

    Returns:
        `(B / G,)`, bool, one per group; False with fewer than two scorable rows.
    """
    check_groups("rewards", rewards, group_size)
    groups = upcast(rewards).view(-1, group_size)
    highest = groups.nan_to_num(nan=-torch.inf).max(dim=1).values
    lowest = groups.nan_to_num(nan=torch.inf).min(dim=1).values
    return highest - lowest > tolerance * torch.maximum(highest.abs(), torch.ones_like(highest))
