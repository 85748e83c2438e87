"""Target heads: numbers by hand, and float32 whatever the model is."""

import pytest
import torch

from rl_plugins.nn import MTPHeadsConfig, ParallelHeads, PolyakTarget


def make_heads(dtype: torch.dtype = torch.float32) -> ParallelHeads:
    heads = ParallelHeads(MTPHeadsConfig(2, 4, 3)).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in heads.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return heads


def fill(heads: ParallelHeads, number: float) -> None:
    with torch.no_grad():
        for p in heads.parameters():
            p.fill_(number)


def numbers(target: PolyakTarget) -> set[float]:
    """The distinct weights of the target."""
    return set(torch.cat([p.flatten() for p in target.heads.parameters()]).tolist())


def test_starts_as_a_copy_of_its_own() -> None:
    heads = make_heads()
    target = PolyakTarget(heads)
    hidden = torch.randn(2, 5, 4)
    assert torch.equal(target(hidden), heads(hidden))
    assert target.distance(heads.parameters()).item() == 0.0
    fill(heads, 0.0)
    assert numbers(target) != {0.0}


def test_no_gradient_anywhere() -> None:
    heads = make_heads()
    target = PolyakTarget(heads)
    assert not any(p.requires_grad for p in target.parameters())
    assert all(p.requires_grad for p in heads.parameters())
    assert not target(torch.randn(1, 2, 4, requires_grad=True)).requires_grad


def test_moving_average_by_hand() -> None:
    heads = make_heads()
    fill(heads, 0.0)
    target = PolyakTarget(heads, tau=0.25)
    fill(heads, 1.0)
    for step, expected in enumerate((0.25, 0.4375, 0.578125), start=1):  # 1 - 0.75 ** step
        target.update(heads.parameters(), step=step)
        assert numbers(target) == {expected}
    assert target.distance(heads.parameters()).item() == 1 - 0.578125


def test_periodic_copy_by_hand() -> None:
    heads = make_heads()
    fill(heads, 0.0)
    target = PolyakTarget(heads, tau=0.25, period=3)
    seen = []
    for step in range(1, 8):
        fill(heads, float(step))
        target.update(heads.parameters(), step=step)
        (number,) = numbers(target)
        seen.append(number)
    assert seen == [0.0, 0.0, 3.0, 3.0, 3.0, 6.0, 6.0]


def test_small_steps_survive_a_bf16_policy() -> None:
    heads = make_heads(torch.bfloat16)
    fill(heads, 1.0)
    target = PolyakTarget(heads, tau=0.005)
    assert {p.dtype for p in target.parameters()} == {torch.float32}
    assert target(torch.randn(1, 2, 4, dtype=torch.bfloat16)).dtype == torch.float32
    fill(heads, 1.25)
    for step in range(1, 11):
        target.update(heads.parameters(), step=step)
    (number,) = numbers(target)
    assert number == pytest.approx(1.25 - 0.25 * 0.995**10, rel=1e-6)
    assert {p.dtype for p in heads.parameters()} == {torch.bfloat16}


def test_only_the_value_matters_and_it_ignores_autocast() -> None:
    heads = make_heads(torch.bfloat16)
    target = PolyakTarget(heads)
    hidden = torch.randn(1, 3, 4)
    full = target(hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(target(hidden), full)


def test_options_are_checked() -> None:
    heads = make_heads()
    for tau in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"tau must be in \[0, 1\]"):
            PolyakTarget(heads, tau=tau)
    with pytest.raises(ValueError, match="period must be at least 1 step, got 0; use None"):
        PolyakTarget(heads, period=0)
