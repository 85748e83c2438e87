"""Aggregations worked by hand; TRL's sums are checked with the losses, in test_functional_policy_losses_clip."""

import math

import pytest
import torch

from rl_plugins.functional.policy_losses.aggregation import AGGREGATIONS, aggregate, prompt_weights

LOSS = torch.tensor([[1.0, 2.0, 3.0], [4.0, math.nan, math.inf], [math.nan, math.nan, math.nan]])
MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    ("how", "value", "slopes"),
    [
        ("token", 10 / 20, (1 / 20, 1 / 20)),
        # Three rows of two prompts, of 5 tokens and of 2: each row counts 3 / 2 over its prompt's tokens.
        ("prompt", 0.5 * 6 / 5 + 0.5 * 4 / 2, (0.5 / 5, 0.5 / 2)),
        ("micro_batch", 10 / 4, (1 / 4, 1 / 4)),
        ("sequence", (2 + 4 + 0) / 3, (1 / 9, 1 / 3)),
        ("sequence_sum", (6 + 4 + 0) / 3, (1 / 3, 1 / 3)),
        ("constant", 10 / (3 * 5), (1 / 15, 1 / 15)),
    ],
)
def test_by_hand(how: str, value: float, slopes: tuple[float, float]) -> None:
    loss = LOSS.clone().requires_grad_()
    out = aggregate(loss, MASK, how, num_items=20, max_length=5, row_weights=torch.tensor([1.5 / 5, 1.5 / 2, 0.75]))
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
    row_weights = prompt_weights(torch.zeros(2), 1)
    out = aggregate(loss, torch.zeros(2, 3), how, num_items=num_items, max_length=3, row_weights=row_weights)
    out.backward()
    assert out.item() == 0.0
    assert loss.grad is not None and loss.grad.abs().sum() == 0


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_half_precision_is_upcast(how: str) -> None:
    loss = torch.ones(2, 3, dtype=torch.bfloat16)
    out = aggregate(loss, torch.ones(2, 3), how, max_length=3, row_weights=prompt_weights(torch.tensor([3, 3]), 1))
    assert out.dtype == torch.float32


def prompts_by_hand(loss: torch.Tensor, mask: torch.Tensor, group_size: int) -> torch.Tensor:
    """DAPO, arXiv 2503.14476, eq. 8, as loops: one mean for each prompt, of the prompts that have a token."""
    means = []
    for first in range(0, len(loss), group_size):
        rows = range(first, first + group_size)
        tokens = [loss[i, t] for i in rows for t in range(loss.shape[1]) if mask[i, t]]
        means += [sum(tokens) / len(tokens)] if tokens else []
    return torch.stack(means).mean()


def test_prompts_weigh_the_same_however_the_batch_is_cut() -> None:
    """Whole, shuffled and cut through the groups, or row by row: one number, which is the papers'. A prompt without
    tokens, which was rejected, is no prompt."""
    g = torch.Generator().manual_seed(0)
    loss = torch.randn(12, 7, generator=g, dtype=torch.float64)
    lengths = torch.randint(1, 8, (12, 1), generator=g)
    lengths[6:9] = 0
    mask = torch.arange(7) < lengths
    weights = prompt_weights(mask.sum(1).double(), 3)
    expected = prompts_by_hand(loss, mask, 3)
    order = torch.randperm(12, generator=g)
    for size in (12, 4, 1):
        parts = [aggregate(loss[i], mask[i], "prompt", row_weights=weights[i]) for i in order.split(size)]
        torch.testing.assert_close(torch.stack(parts).mean(), expected, rtol=1e-12, atol=0)
    # Every prompt of one completion: what GRPO does.
    single = prompt_weights(mask[:6].sum(1).double(), 1)
    torch.testing.assert_close(
        aggregate(loss[:6], mask[:6], "prompt", row_weights=single), aggregate(loss[:6], mask[:6], "sequence")
    )
    # All of one prompt: what TRL's dapo does.
    one = prompt_weights(mask.sum(1).double(), 12)
    torch.testing.assert_close(aggregate(loss, mask, "prompt", row_weights=one), aggregate(loss, mask, "token"))


def test_errors() -> None:
    with pytest.raises(ValueError, match=", ".join(AGGREGATIONS)):
        aggregate(LOSS, MASK, "mean")
    with pytest.raises(ValueError, match="which completions share a prompt: .* not None"):
        aggregate(LOSS, MASK, "prompt")
    with pytest.raises(ValueError, match=r"give row_weights \(3,\), .* not \(2,\)"):
        aggregate(LOSS, MASK, "prompt", row_weights=torch.ones(2))
    for lengths, group_size in ((torch.ones(3), 2), (torch.ones(2, 2), 2), (torch.ones(2), 0)):
        with pytest.raises(ValueError, match="that divides B"):
            prompt_weights(lengths, group_size)
    with pytest.raises(ValueError, match="max_length"):
        aggregate(LOSS, MASK, "constant")
    for how in AGGREGATIONS:
        with pytest.raises(ValueError, match="mask"):
            aggregate(LOSS, MASK[:, :2], how, num_items=1, max_length=3, row_weights=torch.ones(3))
