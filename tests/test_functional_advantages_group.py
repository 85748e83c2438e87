"""Group advantages against numbers worked by hand, slow transcriptions of the equations, TRL and one another."""

import itertools
import math
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rl_plugins.functional.advantages.group import (
    batch_normalized,
    group_centered,
    group_centered_batch_normalized,
    group_centered_batch_scaled,
    group_min_max,
    group_normalized,
    informative_groups,
    kalman,
    leave_one_out,
    length_weighted,
    max_likelihood,
    pass_at_k,
)

NAN = math.nan
GROUPED: dict[str, Callable[[Tensor, int], Tensor]] = {
    "group_normalized": group_normalized,
    "group_centered": group_centered,
    "group_min_max": group_min_max,
    "leave_one_out": leave_one_out,
    "max_likelihood": max_likelihood,
    "length_weighted": lambda r, g: length_weighted(r, g, torch.arange(1, len(r) + 1)),
    "group_centered_batch_normalized": group_centered_batch_normalized,
    "group_centered_batch_scaled": group_centered_batch_scaled,
    "pass_at_2": lambda r, g: pass_at_k(r, g, k=min(2, g)),
    "pass_at_2_normalized": lambda r, g: pass_at_k(r, g, k=min(2, g), normalize=True),
    "kalman": kalman,
}
ANY_ORDER = [name for name in GROUPED if name not in ("kalman", "length_weighted")]
CENTRED = [name for name in GROUPED if name != "kalman"]


def random_rewards(groups: int = 5, group_size: int = 6, unscorable: float = 0.2) -> Tensor:
    """Rewards in [0, 3], with NaN rows, one group without any scorable row and one with a single one."""
    torch.manual_seed(3)
    rewards = 3 * torch.rand(groups, group_size, dtype=torch.float64)
    rewards[torch.rand_like(rewards) < unscorable] = NAN
    rewards[1], rewards[2, 1:], rewards[2, 0] = NAN, NAN, 0.7
    return rewards.flatten()


def by_group(rewards: Tensor, group_size: int) -> list[list[float]]:
    return rewards.reshape(-1, group_size).tolist()


def known(group: list[float]) -> list[float]:
    return [r for r in group if not math.isnan(r)]


def per_row(rewards: Tensor, group_size: int, rule: Callable[[float, list[float]], float]) -> list[float]:
    """Apply `rule(reward, scorable rewards of its group)` row by row; 0 where the group has no two of them."""
    return [
        0.0 if math.isnan(r) or len(known(group)) < 2 else rule(r, known(group))
        for group in by_group(rewards, group_size)
        for r in group
    ]


def assert_rows(actual: Tensor, expected: list[float], tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), rtol=tolerance, atol=tolerance)


# By hand. Group 1: 1, 0, 0, 1, mean 0.5, sum of squares 1, std sqrt(1/3). Group 2: 3, 1, -, -, mean 2, std sqrt(2).
BY_HAND = torch.tensor([1.0, 0.0, 0.0, 1.0, 3.0, 1.0, NAN, NAN])


def test_centered_by_hand() -> None:
    assert group_centered(BY_HAND, 4).tolist() == [0.5, -0.5, -0.5, 0.5, 1.0, -1.0, 0.0, 0.0]


def test_min_max_by_hand() -> None:
    rewards = torch.tensor([0.0, 0.25, 1.0, 0.5, -1.0, -1.0, NAN, 3.0, 2.0, 2.0, 2.0, 2.0])
    expected = [-1.0, -0.5, 1.0, 0.0, -1.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert group_min_max(rewards, 4).tolist() == expected


@pytest.mark.parametrize(("wrong", "right"), [(0.0, 1.0), (-1.0, 1.0), (0.1, 0.7)])
def test_min_max_is_reinforce_rejs_reward_whatever_the_two_are(wrong: float, right: float) -> None:
    """arXiv 2504.11343, eq. 5: the reward is 1 or -1, and groups without both are left out."""
    verdicts = torch.tensor([1.0, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1, 1, -1, 1, 1])
    rewards = torch.where(verdicts > 0, right, wrong)
    mixed = torch.tensor([True, False, False, True]).repeat_interleave(4)
    assert torch.equal(group_min_max(rewards, 4), torch.where(mixed, verdicts, 0.0))


def test_normalized_by_hand() -> None:
    first, second = 0.5 / (math.sqrt(1 / 3) + 0.1), 1 / (math.sqrt(2) + 0.1)
    expected = [first, -first, -first, first, second, -second, 0.0, 0.0]
    assert_rows(group_normalized(BY_HAND, 4, eps=0.1), expected, 1e-6)


def test_leave_one_out_by_hand() -> None:
    # 1 - (0 + 0 + 1) / 3 and 0 - (1 + 0 + 1) / 3; 3 - 1 and 1 - 3.
    assert_rows(leave_one_out(BY_HAND, 4), [2 / 3, -2 / 3, -2 / 3, 2 / 3, 2.0, -2.0, 0.0, 0.0], 1e-6)


def test_max_likelihood_by_hand() -> None:
    # 1 success in 4: 3 for it, -1 for the rest; none in 4: nothing.
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert_rows(max_likelihood(rewards, 4), [3.0, -1.0, -1.0, -1.0, 0.0, 0.0, 0.0, 0.0], 1e-5)


def test_length_weighted_by_hand() -> None:
    # (10 * 1 + 30 * 0) / 40 = 0.25; the row without a score counts with neither its length nor its reward.
    advantages = length_weighted(torch.tensor([1.0, 0.0, NAN]), 3, torch.tensor([10, 30, 1000]))
    assert advantages.tolist() == [0.75, -0.25, 0.0]


def test_batch_normalized_by_hand() -> None:
    # 1, 3, 5: mean 3, variance 8 / 3.
    expected = 2 / math.sqrt(8 / 3 + 1e-8)
    assert_rows(batch_normalized(torch.tensor([1.0, NAN, 3.0, 5.0])), [-expected, 0.0, 0.0, expected], 1e-6)
    tokens = torch.tensor([[1.0, 3.0, NAN], [5.0, 100.0, 100.0]])
    whitened = batch_normalized(tokens, mask=torch.tensor([[1, 1, 0], [1, 0, 0]]))
    assert_rows(whitened.flatten(), [-expected, 0.0, 0.0, expected, 0.0, 0.0], 1e-6)
    rows = batch_normalized(torch.tensor([[1.0, 1.0], [9.0, 9.0], [5.0, 5.0]]), mask=torch.tensor([1, 0, 1]))
    assert_rows(rows.flatten(), [-1.0, -1.0, 0.0, 0.0, 1.0, 1.0], 1e-6)


def test_group_centered_batch_normalized_by_hand() -> None:
    # Centred: +-0.5 four times and +-1 twice: variance (4 * 0.25 + 2) / 6 = 0.5.
    root = math.sqrt(0.5)
    expected = [0.5 / root, -0.5 / root, -0.5 / root, 0.5 / root, 1 / root, -1 / root, 0.0, 0.0]
    assert_rows(group_centered_batch_normalized(BY_HAND, 4), expected, 1e-6)


def test_group_centered_batch_scaled_by_hand() -> None:
    # 1, 0, 0, 1, 3, 1: mean 1, sum of squared deviations 1 + 1 + 4 = 6 over 5.
    std = math.sqrt(6 / 5) + 1e-4
    expected = [0.5 / std, -0.5 / std, -0.5 / std, 0.5 / std, 1 / std, -1 / std, 0.0, 0.0]
    assert_rows(group_centered_batch_scaled(BY_HAND, 4), expected, 1e-6)


def test_pass_at_k_by_hand() -> None:
    # 1 success in 4, k = 2. Of the 6 pairs 3 succeed: E[max] = 1/2. With the success all do: 1 - 1/2. With another
    # row 1 of 3 pairs does: 1/3 - 1/2. sigma = sqrt(1/2 * 1/2).
    rewards = torch.tensor([0.0, 1.0, 0.0, 0.0])
    assert_rows(pass_at_k(rewards, 4, k=2), [-1 / 6, 1 / 2, -1 / 6, -1 / 6], 1e-6)
    assert_rows(pass_at_k(rewards, 4, k=2, normalize=True), [-1 / 3, 1.0, -1 / 3, -1 / 3], 1e-5)


def test_kalman_by_hand() -> None:
    # Q = 0, R = 1, x = 0, P = 1. First row 1: K = 1/2, x = 1/2, P = 1/2, A = 1/2 / sqrt(1/2). The next is skipped.
    # Third row 2: K = (1/2) / (3/2) = 1/3, x = 1/2 + 1/2 = 1, P = 1/3, A = 1 / sqrt(1/3).
    advantages = kalman(torch.tensor([1.0, NAN, 2.0]), 3, process_var=0.0, measurement_var=1.0)
    assert_rows(advantages, [math.sqrt(0.5), 0.0, math.sqrt(3)], 1e-6)


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        (group_centered, lambda r, g: r - statistics.fmean(g)),
        (group_normalized, lambda r, g: (r - statistics.fmean(g)) / (statistics.stdev(g) + 1e-4)),
        (leave_one_out, lambda r, g: r - (sum(g) - r) / (len(g) - 1)),
        (max_likelihood, lambda r, g: (r - statistics.fmean(g)) / (statistics.fmean(g) + 1e-6)),
    ],
)
def test_per_group_equations(
    function: Callable[[Tensor, int], Tensor], rule: Callable[[float, list[float]], float]
) -> None:
    rewards = random_rewards()
    assert_rows(function(rewards, 6), per_row(rewards, 6, rule))


def test_batch_equations() -> None:
    rewards = random_rewards()
    std = statistics.stdev(known(rewards.tolist())) + 1e-4
    scaled = per_row(rewards, 6, lambda r, g: (r - statistics.fmean(g)) / std)
    assert_rows(group_centered_batch_scaled(rewards, 6), scaled)
    centered = per_row(rewards, 6, lambda r, g: r - statistics.fmean(g))
    scorable = [c for c, r in zip(centered, rewards.tolist(), strict=True) if not math.isnan(r)]
    std = math.sqrt(statistics.pvariance(scorable) + 1e-8)
    assert_rows(group_centered_batch_normalized(rewards, 6), [c / std for c in centered])


def test_length_weighted_equation() -> None:
    rewards, lengths = random_rewards(), torch.randint(1, 900, (30,))
    expected = []
    for group, tokens in zip(by_group(rewards, 6), lengths.reshape(-1, 6).tolist(), strict=True):
        real = [(r, n) for r, n in zip(group, tokens, strict=True) if not math.isnan(r)]
        baseline = sum(r * n for r, n in real) / sum(n for _, n in real) if real else 0.0
        expected += [0.0 if math.isnan(r) else r - baseline for r in group]
    assert_rows(length_weighted(rewards, 6, lengths), expected)


def trl_advantages(rewards: Tensor, group_size: int, scale: str) -> Tensor:
    """What `GRPOTrainer` of TRL 1.16 computes, from its own `nanstd`."""
    utils = pytest.importorskip("trl.trainer.utils")
    grouped = rewards.view(-1, group_size)
    mean = torch.nanmean(grouped, dim=1).repeat_interleave(group_size, dim=0)
    if scale == "group":
        std = utils.nanstd(grouped, dim=1).repeat_interleave(group_size, dim=0)
    else:
        std = utils.nanstd(rewards).expand_as(rewards)
    return torch.nan_to_num((rewards - mean) / (std + 1e-4), nan=0.0)


@pytest.mark.parametrize("group_size", [2, 6, 8])
def test_equals_trl(group_size: int) -> None:
    rewards = random_rewards(8, group_size).float()
    for scale, function in [("group", group_normalized), ("batch", group_centered_batch_scaled)]:
        expected = trl_advantages(rewards, group_size, scale)
        torch.testing.assert_close(function(rewards, group_size), expected, rtol=1e-6, atol=1e-6)


def enumerated_pass_at_k(group: list[float], k: int) -> tuple[list[float], float]:
    """Advantages and sigma from every subset of size `k`."""
    rows = [i for i, r in enumerate(group) if not math.isnan(r)]
    if len(rows) < k:
        return [0.0] * len(group), 1.0
    best = {subset: max(group[i] for i in subset) for subset in itertools.combinations(rows, k)}
    mean = statistics.fmean(best.values())
    advantages = [
        statistics.fmean(v for subset, v in best.items() if i in subset) - mean if i in rows else 0.0
        for i in range(len(group))
    ]
    return advantages, statistics.pstdev(best.values())


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("binary", [False, True])
def test_pass_at_k_is_the_mean_over_subsets(k: int, binary: bool) -> None:
    rewards = random_rewards(9, 7) - 1.0
    rewards[-7:] = torch.tensor([0.5, 0.5, -2.0, 0.5, -2.0, 1.0, 1.0])  # ties
    if binary:
        rewards = torch.where(rewards.isnan(), rewards, (rewards > 0).double())
    plain, normalized = [], []
    for group in by_group(rewards, 7):
        advantages, sigma = enumerated_pass_at_k(group, k)
        plain += advantages
        normalized += [a / (sigma + 1e-6) if abs(a) > 1e-12 else 0.0 for a in advantages]
    assert_rows(pass_at_k(rewards, 7, k=k), plain, 1e-12)
    assert_rows(pass_at_k(rewards, 7, k=k, normalize=True), normalized, 1e-9)


@pytest.mark.parametrize(("size", "k"), [(8, 2), (16, 4), (64, 8), (1024, 500)])
def test_pass_at_k_has_the_closed_form_of_the_paper(size: int, k: int) -> None:
    for successes in (0, 1, size // 3, size - k, size - k + 1, size):
        failures = size - successes
        mean = 1 - math.comb(failures, k) / math.comb(size, k)
        sigma = math.sqrt(mean * (1 - mean)) + 1e-6
        lost = math.comb(failures - 1, k - 1) / math.comb(size - 1, k - 1) if failures else 0.0
        rewards = torch.tensor([1.0] * successes + [0.0] * failures, dtype=torch.float64)
        expected = [1 - mean if successes else 0.0] * successes + [1 - mean - lost] * failures
        assert_rows(pass_at_k(rewards, size, k=k), expected, 1e-10)
        assert_rows(pass_at_k(rewards, size, k=k, normalize=True), [a / sigma for a in expected], 1e-5)


def test_pass_at_k_is_a_shrunk_difference_of_expectations() -> None:
    # (1 - k/n) (E[max | i in it] - E[max | i not in it]), so nothing is left at k = n.
    rewards = torch.tensor([0.3, -1.0, 2.0, 0.9, 0.9], dtype=torch.float64)
    for k in (1, 2, 3, 4):
        best = {s: max(rewards[i].item() for i in s) for s in itertools.combinations(range(5), k)}
        expected = [
            (1 - k / 5)
            * (
                statistics.fmean(v for s, v in best.items() if i in s)
                - statistics.fmean(v for s, v in best.items() if i not in s)
            )
            for i in range(5)
        ]
        assert_rows(pass_at_k(rewards, 5, k=k), expected, 1e-12)
    assert pass_at_k(rewards, 5, k=5).tolist() == [0.0] * 5


def test_kalman_equation() -> None:
    rewards = random_rewards()
    expected = []
    for group in by_group(rewards, 6):
        x, p = 0.4, 2.0
        for r in group:
            if math.isnan(r):
                expected.append(0.0)
                continue
            gain = (p + 0.1) / (p + 0.1 + 0.5)
            x, p = x + gain * (r - x), (1 - gain) * (p + 0.1)
            expected.append((r - x) / (math.sqrt(p) + 1e-8))
    advantages = kalman(rewards, 6, process_var=0.1, measurement_var=0.5, initial_mean=0.4, initial_var=2.0)
    assert_rows(advantages, expected)


def test_kalman_limits() -> None:
    # A vague start and a still baseline: x is the running mean, P = R / i.
    rewards = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
    advantages = kalman(rewards, 3, process_var=0.0, measurement_var=1.0, initial_var=1e9)
    assert_rows(advantages, [0.0, -0.5 * math.sqrt(2), 0.0], 1e-6)
    # Equal rewards vanish only at the initial mean.
    assert kalman(torch.zeros(4), 4).tolist() == [0.0] * 4
    assert (kalman(torch.ones(4), 4) > 0).all()


def test_reductions() -> None:
    rewards = random_rewards()
    centered = group_centered(rewards, 6)
    torch.testing.assert_close(pass_at_k(rewards, 6, k=1), centered)
    torch.testing.assert_close(length_weighted(rewards, 6, torch.full((30,), 7)), centered)
    full = random_rewards(unscorable=0.0)[[*range(6), *range(18, 30)]]
    centered = group_centered(full, 6)
    torch.testing.assert_close(leave_one_out(full, 6), centered * 6 / 5)
    mean = full.reshape(-1, 6).mean(1).repeat_interleave(6)
    torch.testing.assert_close(max_likelihood(full, 6, eps=1e-12) * mean, centered)
    torch.testing.assert_close(group_centered_batch_scaled(full, 18), group_normalized(full, 18))
    torch.testing.assert_close(group_centered_batch_normalized(full, 18), batch_normalized(full))


def test_batch_normalized_has_mean_0_and_variance_1() -> None:
    torch.manual_seed(0)
    mask = torch.rand(16, 50) < 0.7
    whitened = batch_normalized(5 + 3 * torch.randn(16, 50), mask=mask)
    assert (whitened[~mask] == 0).all()
    torch.testing.assert_close(whitened[mask].mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(whitened[mask].var(correction=0), torch.tensor(1.0))


def test_two_ranks_are_one_batch() -> None:
    """The other rank holds the same rewards, so that `all_reduce` doubles."""
    rewards, calls = random_rewards(), 0

    def reduce(local: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return 2 * local

    both = torch.cat([rewards, rewards])
    torch.testing.assert_close(batch_normalized(rewards, reduce=reduce), batch_normalized(both)[:30])
    for function in (group_centered_batch_normalized, group_centered_batch_scaled):
        torch.testing.assert_close(function(rewards, 6, reduce=reduce), function(both, 6)[:30])
    assert calls == 6


@pytest.mark.parametrize("name", GROUPED)
def test_unscorable_rows_are_as_if_absent(name: str) -> None:
    function = GROUPED[name]
    with_nan = function(torch.tensor([0.2, NAN, 0.9, 0.5, 0.1, NAN, 0.0, 0.4]), 4)
    assert with_nan[[1, 5]].tolist() == [0.0, 0.0]
    if name != "length_weighted":
        without = function(torch.tensor([0.2, 0.9, 0.5, 0.1, 0.0, 0.4]), 3)
        torch.testing.assert_close(with_nan[[0, 2, 3, 4, 6, 7]], without)
    assert function(torch.full((4,), NAN), 2).tolist() == [0.0] * 4


@pytest.mark.parametrize("name", CENTRED)
@pytest.mark.parametrize("value", [0.1, 1.0, 1234.567])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_0(name: str, value: float, dtype: torch.dtype) -> None:
    function = GROUPED[name]
    equal = torch.full((7,), value, dtype=dtype)
    assert function(equal, 7).tolist() == [0.0] * 7
    mixed = function(torch.cat([equal, torch.arange(7, dtype=dtype)]), 7)
    assert mixed[:7].tolist() == [0.0] * 7 and (mixed[7:] != 0).any()


@pytest.mark.parametrize("value", [0.1, 1.0, 1234.567])
def test_a_batch_that_does_not_vary_gives_exactly_0(value: float) -> None:
    assert batch_normalized(torch.full((7,), value)).tolist() == [0.0] * 7
    assert batch_normalized(torch.full((3, 7), value)).count_nonzero() == 0
    assert batch_normalized(torch.full((3,), NAN)).tolist() == [0.0] * 3


@pytest.mark.parametrize("name", CENTRED)
def test_one_row_alone_has_no_advantage(name: str) -> None:
    assert GROUPED[name](torch.tensor([0.3, 0.9, NAN]), 1).tolist() == [0.0] * 3
    assert GROUPED[name](torch.tensor([0.3, NAN, NAN, NAN]), 2).tolist() == [0.0] * 4


@pytest.mark.parametrize("name", GROUPED)
def test_groups_keep_to_themselves_and_their_rows(name: str) -> None:
    function, rewards = GROUPED[name], torch.tensor([0.0, 1.0, 0.5, 0.25, 0.75, 0.1])
    advantages = function(rewards, 3)
    assert advantages.shape == (6,) and advantages.dtype == torch.float32
    if name in ANY_ORDER:
        order = torch.tensor([5, 3, 4, 1, 2, 0])  # the groups swapped, and the rows in them
        torch.testing.assert_close(function(rewards[order], 3), advantages[order])
    if name in ANY_ORDER or name == "kalman":
        larger = torch.tensor([0.0, 1.0, 0.5, 0.75, 0.25, 0.1])
        if "batch" not in name:
            torch.testing.assert_close(function(larger, 3)[:3], advantages[:3])


@pytest.mark.parametrize("name", GROUPED)
def test_half_precision_and_integers_are_upcast(name: str) -> None:
    function = GROUPED[name]
    for dtype in (torch.int64, torch.bool, torch.float16, torch.bfloat16):
        advantages = function(torch.tensor([0, 1, 1, 0, 0, 1]).to(dtype), 3)
        torch.testing.assert_close(advantages, function(torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0, 1.0]), 3))
    assert function(torch.tensor([0.0, 1.0], dtype=torch.float64), 2).dtype == torch.float64
    assert function(torch.zeros(0), 2).shape == (0,)


@pytest.mark.parametrize("name", GROUPED)
def test_groups_are_checked(name: str) -> None:
    function = GROUPED[name]
    with pytest.raises(ValueError, match="one number per completion"):
        function(torch.zeros(2, 3), 3)
    for group_size in (0, -1, 4):
        with pytest.raises(ValueError, match="group_size that divides B"):
            function(torch.zeros(6), group_size)


@pytest.mark.parametrize(
    "function",
    [
        lambda eps: group_normalized(torch.zeros(2), 2, eps=eps),
        lambda eps: max_likelihood(torch.zeros(2), 2, eps=eps),
        lambda eps: batch_normalized(torch.zeros(2), eps=eps),
        lambda eps: group_centered_batch_normalized(torch.zeros(2), 2, eps=eps),
        lambda eps: group_centered_batch_scaled(torch.zeros(2), 2, eps=eps),
        lambda eps: pass_at_k(torch.zeros(2), 2, k=1, eps=eps),
        lambda eps: kalman(torch.zeros(2), 2, eps=eps),
    ],
)
@pytest.mark.parametrize("eps", [0.0, -1.0, NAN])
def test_eps_is_checked(function: Callable[[float], Tensor], eps: float) -> None:
    with pytest.raises(ValueError, match="small positive number"):
        function(eps)


def test_other_arguments_are_checked() -> None:
    rewards = torch.zeros(4)
    for k in (0, -1, 3):
        with pytest.raises(ValueError, match="k-subset is drawn from the group"):
            pass_at_k(rewards, 2, k=k)
    with pytest.raises(ValueError, match="negative rewards"):
        max_likelihood(torch.tensor([0.0, -0.1]), 2)
    with pytest.raises(ValueError, match="give the real tokens per reward"):
        length_weighted(rewards, 2, torch.ones(2))
    with pytest.raises(ValueError, match="negative lengths"):
        length_weighted(rewards, 2, torch.tensor([1, -1, 1, 1]))
    for wrong in ({"process_var": -1e-9}, {"measurement_var": 0.0}, {"initial_var": 0.0}):
        with pytest.raises(ValueError, match="give variances above 0"):
            kalman(rewards, 2, **wrong)
    with pytest.raises(ValueError, match="per token"):
        batch_normalized(torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match="mask"):
        batch_normalized(rewards, mask=torch.ones(3))


def test_empty_completions_have_no_length_to_weigh() -> None:
    advantages = length_weighted(torch.tensor([1.0, 0.0, 1.0, 0.0]), 2, torch.tensor([0, 0, 0, 5]))
    assert advantages.tolist() == [0.0, 0.0, 1.0, 0.0]


# Groups with a signal


def test_groups_whose_rewards_differ() -> None:
    rewards = torch.tensor([0.0, 1.0, 0.5, 0.5, NAN, 0.5, NAN, NAN, -1.0, -1.5])
    assert informative_groups(rewards, 2).tolist() == [True, False, False, False, True]
    assert informative_groups(rewards, 5).tolist() == [True, True]
    assert informative_groups(rewards, 1).tolist() == [False] * 10
    assert informative_groups(rewards, 2).dtype == torch.bool


def test_unscorable_rows_do_not_count_as_zero() -> None:
    assert informative_groups(torch.tensor([1.0, NAN, 1.0, NAN, 0.0, 1.0]), 3).tolist() == [False, True]


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([0.1 + 0.2, 0.3], False),  # a unit in the last place
        ([1000.0, 1000.0005], False),  # relative for large rewards
        ([1000.0, 1000.01], True),
        ([0.0, 1e-5], True),
        ([-1000.0, -1000.5], True),
    ],
)
def test_the_tolerance_is_that_of_rounding(rewards: list[float], expected: bool) -> None:
    assert informative_groups(torch.tensor(rewards), 2).tolist() == [expected]
    assert informative_groups(torch.tensor(rewards), 2, tolerance=10.0).tolist() == [False]


def test_half_precision_is_compared_in_float32() -> None:
    rewards = torch.tensor([0.5, 0.5, 0.0, 1.0], dtype=torch.bfloat16)
    assert informative_groups(rewards, 2).tolist() == [False, True]


@pytest.mark.parametrize(("shape", "size"), [((5,), 2), ((2, 2), 2), ((4,), 0)])
def test_what_does_not_divide_is_refused(shape: tuple[int, ...], size: int) -> None:
    with pytest.raises(ValueError, match="do not divide into groups"):
        informative_groups(torch.zeros(shape), size)
