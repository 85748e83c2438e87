"""Sums and moments over real tokens: hand-worked numbers, padding garbage, two imitated ranks."""

import math
import threading

import pytest
import torch
from torch import Tensor

from rl_plugins.functional import (
    explained_variance,
    masked_mean,
    masked_moments,
    masked_sum,
    masked_whiten,
    zero_masked,
)
from rl_plugins.functional.masking import masked_line

X = torch.tensor([[1.0, 2.0, math.nan], [4.0, math.inf, 5.0]])
MASK = torch.tensor([[1, 1, 0], [1, 0, 1]])


@pytest.mark.parametrize("mask", [MASK, MASK.bool(), MASK.float()], ids=["int", "bool", "float"])
def test_sum_and_mean_by_hand(mask: Tensor) -> None:
    assert masked_sum(X, mask).item() == 12.0
    assert masked_sum(X, mask, dim=1).tolist() == [3.0, 9.0]
    assert masked_sum(X, mask, dim=0).tolist() == [5.0, 2.0, 5.0]
    assert masked_mean(X, mask).item() == 3.0
    assert masked_mean(X, mask, dim=1).tolist() == [1.5, 4.5]


def test_mean_of_nothing_is_zero() -> None:
    assert masked_mean(X, torch.zeros(2, 3)).item() == 0.0
    assert masked_mean(X, torch.tensor([[1, 1, 0], [0, 0, 0]]), dim=1).tolist() == [1.5, 0.0]


def test_mask_leads_trailing_dimensions() -> None:
    stacked = torch.stack([X, 10 * X], -1)  # (B, T, K)
    assert masked_sum(stacked, MASK, dim=1).tolist() == [[3.0, 30.0], [9.0, 90.0]]
    assert masked_mean(stacked, MASK).item() == pytest.approx(16.5)
    with pytest.raises(ValueError, match="must lead"):
        masked_sum(X, MASK[:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_half_precision_is_upcast(dtype: torch.dtype) -> None:
    out = masked_mean(torch.ones(1, 3000, dtype=dtype), torch.ones(1, 3000))
    assert out.item() == 1.0  # a bfloat16 sum would stop at 256
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_garbage_reaches_no_gradient() -> None:
    x = X.clone().requires_grad_()
    (zero_masked(x, MASK) ** 2).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[2.0, 4.0, 0.0], [8.0, 0.0, 10.0]]


def test_moments_by_hand() -> None:
    mean, var, count = masked_moments(X, MASK)  # 1, 2, 4, 5
    assert (mean.item(), var.item(), count.item()) == (3.0, 2.5, 4.0)
    assert mean.shape == var.shape == count.shape == ()
    assert [m.item() for m in masked_moments(X, torch.zeros(2, 3))] == [0.0, 0.0, 0.0]


def test_variance_survives_a_large_mean() -> None:
    x = torch.tensor([[10000.0, 10000.5, 10001.0, 10001.5]])  # E[x^2] - E[x]^2 is off by several units here
    assert masked_moments(x, torch.ones(1, 4))[1].item() == pytest.approx(0.3125)


def test_moments_over_two_ranks_are_those_of_the_whole() -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(4, 7), torch.rand(4, 7) < 0.6
    other, other_mask = x[2:], mask[2:]
    whole = masked_moments(x, mask)
    # The two calls of `reduce` on the first rank, with the second rank's share added as all_reduce would.
    remote = [
        torch.stack([masked_sum(other, other_mask), other_mask.sum().float()]),
        masked_sum((other - whole[0]) ** 2, other_mask).reshape(1),
    ]
    ranks = masked_moments(x[:2], mask[:2], reduce=lambda local: local + remote.pop(0))
    assert not remote
    torch.testing.assert_close(ranks, whole)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten(shift_mean: bool) -> None:
    white = masked_whiten(X, MASK, shift_mean=shift_mean)
    std = math.sqrt(2.5)
    expected = torch.tensor([[-2 / std, -1 / std, 0.0], [1 / std, 0.0, 2 / std]])
    torch.testing.assert_close(white, expected if shift_mean else torch.where(MASK.bool(), expected + 3, 0.0))


def test_whiten_of_equal_numbers_is_zero() -> None:
    assert masked_whiten(torch.full((2, 3), 0.5), MASK).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize(
    ("predictions", "expected"),
    [
        ([1.0, 2.0, 4.0, 5.0], 1.0),
        ([2.0, 3.0, 5.0, 6.0], 1.0),
        ([3.0] * 4, 0.0),
        ([5.0, 4.0, 2.0, 1.0], -3.0),
    ],
    ids=["perfect", "constant offset", "constant", "reversed"],
)
def test_explained_variance(predictions: list[float], expected: float) -> None:
    yhat = torch.full((2, 3), math.nan)
    yhat[MASK.bool()] = torch.tensor(predictions)
    assert explained_variance(yhat, X, MASK).item() == pytest.approx(expected)


@pytest.mark.parametrize("constant", [0.0, 1.0, 0.1, -1e4 / 3])
def test_explained_variance_of_constant_targets_is_nan(constant: float) -> None:
    # Numbers that float32 cannot sum exactly must not pass for variance.
    targets, mask = torch.full((7, 11), constant), torch.ones(7, 11)
    assert explained_variance(torch.randn(7, 11), targets, mask).isnan()


def test_explained_variance_of_nothing_is_nan() -> None:
    assert explained_variance(X, X, torch.zeros(2, 3)).isnan()
    with pytest.raises(ValueError, match="align"):
        explained_variance(X[:, :1], X, MASK)


def test_line_of_least_squares() -> None:
    x, y = torch.tensor([[0.0, 1.0, 2.0, torch.nan]]), torch.tensor([[1.0, 4.0, 4.0, torch.inf]])
    mask = torch.tensor([[1, 1, 1, 0]])
    # Means 1 and 3; the slope is (1 * 2 + 0 * 1 + 1 * 1) / 2.
    assert [float(z) for z in masked_line(x, y, mask)] == [1.5, 1.5]
    assert [float(z) for z in masked_line(x, y, mask, slopes=(0.0, 1.0))] == [1.0, 2.0]
    assert [float(z) for z in masked_line(x, -y, mask, slopes=(0.0, 1.0))] == [0.0, -3.0]
    assert [float(z) for z in masked_line(torch.ones(1, 4), y, mask)] == [0.0, 3.0]


def test_the_line_is_one_for_all_ranks() -> None:
    g = torch.Generator().manual_seed(0)
    x, y, mask = torch.randn(4, 5, generator=g), torch.randn(4, 5, generator=g), torch.rand(4, 5, generator=g) < 0.7
    barrier, sent, lines = threading.Barrier(2, timeout=60), [torch.empty(0)] * 2, [(x, y)] * 2

    def work(rank: int) -> None:
        def reduce(local: Tensor) -> Tensor:
            sent[rank] = local
            barrier.wait()
            total = sent[0] + sent[1]
            barrier.wait()
            return total

        half = slice(2 * rank, 2 * rank + 2)
        lines[rank] = masked_line(x[half], y[half], mask[half], reduce=reduce)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for line in lines:
        torch.testing.assert_close(line, masked_line(x, y, mask))
