"""Value and policy losses per element: numbers and gradients worked by hand."""

import math

import pytest
import torch

from rl_plugins.functional import (
    clipped_squared_error,
    huber,
    masked_mean,
    ppo_clip,
    squared_error,
    vanilla,
    zero_masked,
)


def test_squared_error_has_no_half() -> None:
    values = torch.tensor([[1.0, -2.0]], requires_grad=True)
    loss = squared_error(values, torch.tensor([[3.0, -2.5]]))
    assert loss.tolist() == [[4.0, 0.25]]
    loss.sum().backward()
    assert values.grad is not None and values.grad.tolist() == [[-4.0, 1.0]]


@pytest.mark.parametrize(
    ("value", "target", "loss", "slope"),
    [
        (1.1, 2.0, 0.81, -1.8),  # inside the range: the plain error
        (1.5, 2.0, 0.64, 0.0),  # has moved 0.5 towards the target: pessimistic 1.2, no more pull
        (1.5, 0.0, 2.25, 3.0),  # has moved away from it: full pull back
        (0.5, 2.0, 2.25, -3.0),
    ],
)
def test_clipped_squared_error(value: float, target: float, loss: float, slope: float) -> None:
    v = torch.tensor([[value]], requires_grad=True)
    out = clipped_squared_error(v, torch.tensor([[target]]), torch.ones(1, 1), clip_range=0.2)
    assert out.item() == pytest.approx(loss, abs=1e-6)
    out.sum().backward()
    assert v.grad is not None and v.grad.item() == pytest.approx(slope, abs=1e-6)


def test_clipping_wide_is_not_clipping() -> None:
    torch.manual_seed(0)
    values, targets, old = torch.randn(3, 2, 5, 4)
    torch.testing.assert_close(
        clipped_squared_error(values, targets, old, clip_range=100.0), squared_error(values, targets)
    )


def test_huber() -> None:
    values, targets = torch.tensor([[0.5, 3.0, -3.0]]), torch.zeros(1, 3)
    torch.testing.assert_close(huber(values, targets), torch.tensor([[0.125, 2.5, 2.5]]))
    torch.testing.assert_close(huber(values, targets, delta=2.0), torch.tensor([[0.125, 4.0, 4.0]]))
    torch.testing.assert_close(huber(values, targets, delta=10.0), squared_error(values, targets) / 2)


def test_value_losses_refuse_to_broadcast() -> None:
    heads, single = torch.zeros(2, 2, 2), torch.zeros(2, 2)
    for call in (lambda: squared_error(heads, single), lambda: huber(heads, single)):
        with pytest.raises(ValueError, match="head_targets"):
            call()
    with pytest.raises(ValueError, match=r"old_values \(2, 2\): give the shape of values, \(2, 2, 2\)"):
        clipped_squared_error(heads, heads, single, clip_range=0.2)
    with pytest.raises(ValueError, match="clip_range"):
        clipped_squared_error(single, single, single, clip_range=0.0)
    with pytest.raises(ValueError, match="delta=-1"):
        huber(single, single, delta=-1.0)


def test_vanilla() -> None:
    logps = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    loss = vanilla(logps, torch.tensor([[3.0, -0.5]]))
    assert loss.tolist() == [[3.0, -1.0]]
    loss.sum().backward()
    assert logps.grad is not None and logps.grad.tolist() == [[-3.0, 0.5]]


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.25, 2.0, -2.5, -2.5),  # inside the upper bound of 1.28
        (1.5, 2.0, -2.56, 0.0),  # above it with a gain: clipped
        (1.5, -2.0, 3.0, 3.0),  # above it with a loss: pulled back in full
        (0.5, -2.0, 1.6, 0.0),  # below the lower bound of 0.8 with a loss: clipped
        (0.5, 2.0, -1.0, -1.0),
    ],
)
def test_ppo_clip(ratio: float, advantage: float, loss: float, slope: float) -> None:
    logps = torch.tensor([[math.log(ratio) - 3.0]], requires_grad=True)
    old_logps, advantages = torch.full((1, 1), -3.0), torch.tensor([[advantage]])
    out = ppo_clip(logps, old_logps, advantages, epsilon_low=0.2, epsilon_high=0.28)
    assert out.item() == pytest.approx(loss, rel=1e-5)
    out.sum().backward()
    assert logps.grad is not None and logps.grad.item() == pytest.approx(slope, rel=1e-5)


def test_gradients_agree_at_ratio_one() -> None:
    torch.manual_seed(0)
    logps, advantages = -torch.rand(3, 7), torch.randn(3, 7)
    gradients = []
    for loss in (lambda x: vanilla(x, advantages), lambda x: ppo_clip(x, logps, advantages)):
        x = logps.clone().requires_grad_()
        gradients += torch.autograd.grad(loss(x).sum(), x)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_half_precision_is_upcast() -> None:
    logps = torch.full((1, 4), -1.0, dtype=torch.bfloat16)
    assert vanilla(logps, logps).dtype == torch.float32
    assert ppo_clip(logps, logps, logps).dtype == torch.float32
    assert squared_error(logps, logps.float()).dtype == torch.float32


def test_bounds_are_checked() -> None:
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="epsilon_low"):
        ppo_clip(x, x, x, epsilon_low=-0.1)


def test_padding_is_cut_before_and_after_the_loss() -> None:
    """The long way round, without a mask: zero_masked on the inputs, masked_mean on the result."""
    mask = torch.tensor([[1, 0, 1]])
    logps = torch.tensor([[-1.0, math.nan, -2.0]], requires_grad=True)
    old, advantages = torch.tensor([[-1.0, math.inf, -2.0]]), torch.tensor([[1.0, math.nan, 3.0]])
    loss = masked_mean(ppo_clip(*(zero_masked(x, mask) for x in (logps, old, advantages))), mask)
    assert loss.item() == -2.0
    loss.backward()
    assert logps.grad is not None and logps.grad.tolist() == [[-0.5, 0.0, -1.5]]
