"""Target parameters: the update, what is kept, and that a mismatch writes nothing."""

import math

import pytest
import torch
from torch import nn

from rl_plugins.functional import periodic_update, polyak_update


def test_polyak_by_hand() -> None:
    target, online = [torch.tensor([0.0, 8.0])], [torch.tensor([4.0, 0.0])]
    polyak_update(target, online, tau=0.25)
    assert target[0].tolist() == [1.0, 6.0]
    polyak_update(target, online, tau=0.25)
    assert target[0].tolist() == [1.75, 4.5]
    assert online[0].tolist() == [4.0, 0.0]


def test_gap_shrinks_geometrically() -> None:
    target, online = torch.zeros(1), torch.ones(1)
    for _ in range(100):
        polyak_update([target], [online], tau=0.01)
    assert target.item() == pytest.approx(1 - 0.99**100, rel=1e-5)


@pytest.mark.parametrize(("tau", "expected"), [(0.0, 0.1), (1.0, 0.7)])
def test_ends_are_exact(tau: float, expected: float) -> None:
    target = torch.tensor([0.1])
    polyak_update([target], [torch.tensor([0.7])], tau=tau)
    assert torch.equal(target, torch.tensor([expected]))


def test_float32_target_follows_a_bfloat16_model() -> None:
    target, online = torch.ones(1), torch.full((1,), 2.0, dtype=torch.bfloat16)
    polyak_update([target], [online], tau=1e-3)
    assert target.dtype == torch.float32
    assert target.item() == pytest.approx(1.001)


def test_modules_without_gradient() -> None:
    target, online = nn.Linear(3, 2), nn.Linear(3, 2)
    before = target.weight
    polyak_update(target.parameters(), online.parameters(), tau=1.0)
    assert target.weight is before
    assert torch.equal(target.weight, online.weight)
    assert target.weight.grad_fn is None and target.weight.requires_grad


@pytest.mark.parametrize("tau", [-0.1, 1.1, math.nan])
def test_tau_is_checked(tau: float) -> None:
    with pytest.raises(ValueError, match="tau"):
        polyak_update([torch.zeros(1)], [torch.zeros(1)], tau=tau)


@pytest.mark.parametrize("online", [[torch.ones(2)], [torch.ones(2), torch.ones(1)], [torch.ones(2), torch.ones(0)]])
def test_mismatch_writes_nothing(online: list[torch.Tensor]) -> None:
    target = [torch.zeros(2), torch.zeros(3)]
    with pytest.raises(ValueError):
        polyak_update(target, online, tau=0.5)
    assert not any(x.any() for x in target)


def test_periodic_update() -> None:
    target, copied = torch.zeros(1), []
    for step in range(7):
        if periodic_update([target], [torch.full((1,), 10.0 + step)], step=step, period=3):
            copied.append((step, target.item()))
    assert copied == [(0, 10.0), (3, 13.0), (6, 16.0)]
    with pytest.raises(ValueError, match="period"):
        periodic_update([target], [target], step=0, period=0)
