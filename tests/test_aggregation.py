"""Aggregations worked by hand; the same sums as TRL's are checked with the losses, in test_policy_losses."""

import math

import pytest
import torch

from rl_plugins.functional.aggregation import AGGREGATIONS, aggregate

LOSS = torch.tensor([[1.0, 2.0, 3.0], [4.0, math.nan, math.inf], [math.nan, math.nan, math.nan]])
MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    ("how", "value", "slopes"),
    [
        ("token", 10 / 20, (1 / 20, 1 / 20)),
        ("micro_batch", 10 / 4, (1 / 4, 1 / 4)),
        ("sequence", (2 + 4 + 0) / 3, (1 / 9, 1 / 3)),
        ("sequence_sum", (6 + 4 + 0) / 3, (1 / 3, 1 / 3)),
        ("constant", 10 / (3 * 5), (1 / 15, 1 / 15)),
    ],
)
def test_by_hand(how: str, value: float, slopes: tuple[float, float]) -> None:
    loss = LOSS.clone().requires_grad_()
    out = aggregate(loss, MASK, how, num_items=20, max_length=5)
    assert out.shape == () and out.item() == pytest.approx(value)
    out.backward()
    expected = torch.tensor([[slopes[0]] * 3, [slopes[1], 0.0, 0.0], [0.0] * 3])
    torch.testing.assert_close(loss.grad, expected)


def test_own_tokens_by_default() -> None:
    assert aggregate(LOSS, MASK, "token").item() == pytest.approx(10 / 4)
    assert aggregate(LOSS, MASK, "token", num_items=torch.tensor(8)).item() == pytest.approx(10 / 8)


def test_micro_batches_of_a_window_add_up() -> None:
    """`token` with the window's count gives the sum that the whole window gives at once."""
    loss, mask = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), torch.ones(4, 5)
    mask[1, 2:], mask[3, 1:] = 0, 0
    whole = aggregate(loss, mask, "token")
    parts = [aggregate(loss[i : i + 2], mask[i : i + 2], "token", num_items=mask.sum()) for i in (0, 2)]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("how", AGGREGATIONS)
@pytest.mark.parametrize("num_items", [None, 0, torch.tensor(0)])
def test_no_token_at_all_is_zero(how: str, num_items: torch.Tensor | float | None) -> None:
    loss = torch.full((2, 3), math.nan, requires_grad=True)
    out = aggregate(loss, torch.zeros(2, 3), how, num_items=num_items, max_length=3)
    out.backward()
    assert out.item() == 0.0
    assert loss.grad is not None and loss.grad.abs().sum() == 0


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_half_precision_is_upcast(how: str) -> None:
    assert (
        aggregate(torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(2, 3), how, max_length=3).dtype == torch.float32
    )


def test_errors() -> None:
    with pytest.raises(ValueError, match=", ".join(AGGREGATIONS)):
        aggregate(LOSS, MASK, "mean")
    with pytest.raises(ValueError, match="max_length"):
        aggregate(LOSS, MASK, "constant")
    for how in AGGREGATIONS:
        with pytest.raises(ValueError, match="mask"):
            aggregate(LOSS, MASK[:, :2], how, num_items=1, max_length=3)
