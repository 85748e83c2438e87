"""FIPO: numbers worked by hand, and the paper's equations as plain loops."""

import math

import pytest
import torch
from torch import Tensor

from rl_plugins.functional import ppo_clip
from rl_plugins.functional.policy_losses.future_kl import fipo


def batch(seed: int = 0, rows: int = 5, length: int = 9) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities, old ones, advantages and a ragged mask with holes, in float64."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(3, rows, length, generator=generator, dtype=torch.float64)
    old = -draw[0].abs()
    lengths = torch.randint(1, length + 1, (rows, 1), generator=generator)
    mask = (torch.arange(length) < lengths) & (torch.rand(rows, length, generator=generator) > 0.2)
    return old + 0.5 * draw[1], old, draw[2], mask


def gradient(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), x)[0]


def test_fipo_by_hand() -> None:
    # Half-life 1: F_3 = ln 1.1, F_2 = ln 0.9 + F_3 / 2, F_1 = 0 + F_2 / 2; weights 1.1, 0.944, 0.972.
    ratio = torch.tensor([[1.0, 0.9, 1.1]])
    logps, old = ratio.log().requires_grad_(), torch.zeros(1, 3)
    weights = torch.tensor([[math.sqrt(0.9 * math.sqrt(1.1)), 0.9 * math.sqrt(1.1), 1.1]])
    advantages = torch.tensor([[2.0, -1.0, 3.0]])
    out = fipo(logps, old, advantages, half_life=1.0, weight_low=0.2)
    torch.testing.assert_close(out, -ratio * weights * advantages)
    torch.testing.assert_close(gradient(out, logps), -ratio * weights * advantages)  # no path through the weights
    # The weights of the 32B run are never below 1, and here at most 1.05.
    out = fipo(logps, old, advantages, half_life=1.0, weight_high=0.05)
    torch.testing.assert_close(out, -ratio * torch.tensor([[1.0, 1.0, 1.05]]) * advantages)


def test_extreme_tokens_are_left_out() -> None:
    # The second token's ratio of 20 counts neither for itself nor for the first; no decay.
    ratio = torch.tensor([[1.0, 20.0, 1.1]])
    logps, old = ratio.log(), torch.zeros(1, 3)
    out = fipo(logps, old, torch.ones(1), half_life=math.inf)
    torch.testing.assert_close(out, -torch.tensor([[1.1, 1.28 * 1.1, 1.1 * 1.1]]))
    out = fipo(logps, old, torch.ones(1), half_life=math.inf, max_ratio=30.0)
    torch.testing.assert_close(out, -torch.tensor([[1.2, 1.28 * 1.2, 1.1 * 1.1]]))
    # With a loss it is not weighted: 1 where the future asks for 1.1.
    out = fipo(logps, old, -torch.ones(1), half_life=math.inf)
    torch.testing.assert_close(out, torch.tensor([[1.1, 20.0, 1.1 * 1.1]]))


def test_holes_take_no_time() -> None:
    logps, old, advantages, _ = batch(1, rows=2, length=4)
    spread = torch.tensor([0, 2, 3, 6])
    wide = [torch.full((2, 8), math.nan, dtype=torch.float64) for _ in range(3)]
    for x, y in zip(wide, (logps, old, advantages), strict=True):
        x[:, spread] = y
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[:, spread] = True
    torch.testing.assert_close(
        fipo(*wide, mask, half_life=2.0)[:, spread], fipo(logps, old, advantages, half_life=2.0)
    )


@pytest.mark.parametrize("half_life", [1.5, 32.0, math.inf])
def test_fipo_is_the_papers_equation(half_life: float) -> None:
    """arXiv 2603.19835, eq. 6 to 8, over the real tokens of each sequence."""
    logps, old, advantages, mask = batch(2)
    options = {"weight_low": 0.3, "weight_high": 0.4, "max_ratio": 1.8, "safe_ratio": 1.4}
    x = logps.clone().requires_grad_()
    out = fipo(x, old, advantages, mask, half_life=half_life, epsilon_low=0.2, epsilon_high=0.28, **options)
    slopes, gamma = gradient(out, x), 2 ** (-1 / half_life)
    left_out = reset = 0
    for i in range(mask.shape[0]):
        real = [t for t in range(mask.shape[1]) if mask[i, t]]
        for n, t in enumerate(real):
            future = 0.0
            for k, s in enumerate(real[n:]):
                shift = (logps[i, s] - old[i, s]).item()
                left_out += math.exp(shift) > 1.8
                future += gamma**k * shift * (math.exp(shift) <= 1.8)
            r, a = (logps[i, t] - old[i, t]).exp().item(), advantages[i, t].item()
            weight = min(max(math.exp(future), 0.7), 1.4)
            if a < 0 and r > 1.4:
                weight, reset = 1.0, reset + 1
            plain, clipped = r * weight * a, min(max(r, 0.8), 1.28) * weight * a
            assert out[i, t].item() == pytest.approx(-min(plain, clipped))
            assert slopes[i, t].item() == pytest.approx(-plain if plain <= clipped else 0.0)
    assert left_out and reset
    assert not out[~mask].any()


def test_without_a_weight_it_is_ppo_clip() -> None:
    logps, old, advantages, mask = batch(3)
    out = fipo(logps, old, advantages, mask, weight_low=0.0, weight_high=0.0, epsilon_low=0.1, epsilon_high=0.3)
    plain = ppo_clip(logps * mask, old * mask, advantages * mask, epsilon_low=0.1, epsilon_high=0.3)
    torch.testing.assert_close(out, plain, rtol=0, atol=0)


def test_gradient_at_ratio_one_is_the_policy_gradient() -> None:
    logps, _, advantages, mask = batch(4)
    x = logps.clone().requires_grad_()
    torch.testing.assert_close(gradient(fipo(x, logps, advantages, mask, weight_low=0.2), x), -advantages * mask)


@pytest.mark.parametrize(
    "name",
    ["half_life", "weight_low", "weight_high", "max_ratio", "safe_ratio", "epsilon_low", "epsilon_high"],
)
def test_numbers_are_checked(name: str) -> None:
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=name):
        fipo(x, x, x, **{name: -1.0})
    with pytest.raises(ValueError, match="one per sequence"):
        fipo(x, x, torch.zeros(3))
