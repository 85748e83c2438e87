"""Clip-Cov and KL-Cov: numbers worked by hand, and the paper's equations as plain loops."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rl_plugins.functional import ppo_clip
from rl_plugins.functional.policy_losses.covariance import clip_cov, kl_cov, token_covariance

LOSSES = {
    "clip_cov": lambda *x, **k: clip_cov(*x, ratio=0.2, cov_low=0.1, generator=torch.Generator().manual_seed(0), **k),
    "kl_cov": lambda *x, **k: kl_cov(*x, ratio=0.2, **k),
}


def batch(seed: int = 0, rows: int = 6, length: int = 11) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities, old ones, advantages and a ragged mask with holes, in float64."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(3, rows, length, generator=generator, dtype=torch.float64)
    old = -draw[0].abs()
    lengths = torch.randint(1, length + 1, (rows, 1), generator=generator)
    mask = (torch.arange(length) < lengths) & (torch.rand(rows, length, generator=generator) > 0.2)
    return old + 0.3 * draw[1], old, draw[2], mask


def gradient(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), x)[0]


def covariances_by_hand(logps: Tensor, advantages: Tensor, mask: Tensor) -> dict[tuple[int, int], float]:
    """arXiv 2505.22617, eq. 10, for each real token."""
    real = [(i, t) for i in range(mask.shape[0]) for t in range(mask.shape[1]) if mask[i, t]]
    mean_logp = sum(logps[x].item() for x in real) / len(real)
    mean_a = sum(advantages[x].item() for x in real) / len(real)
    return {x: (logps[x].item() - mean_logp) * (advantages[x].item() - mean_a) for x in real}


def test_token_covariance() -> None:
    # Over the three real tokens the means are -2 and 1.
    logps, advantages = torch.tensor([[-1.0, -2.0, -3.0, 9.0]]), torch.tensor([[4.0, 1.0, -2.0, 9.0]])
    out = token_covariance(logps, advantages, torch.tensor([[1, 1, 1, 0]]))
    assert out.tolist() == [[3.0, 0.0, 3.0, 0.0]]
    logps, _, advantages, mask = batch()
    out = token_covariance(logps, advantages, mask)
    for at, value in covariances_by_hand(logps, advantages, mask).items():
        assert out[at].item() == pytest.approx(value)
    assert not out[~mask].any()


def test_clip_cov_by_hand() -> None:
    # Covariances 3, 0, 3, 0 as above, the fourth real with the means' values; all ratios 1.
    logps = torch.tensor([[-1.0, -2.0, -3.0, -2.0]], requires_grad=True)
    advantages = torch.tensor([[4.0, 1.0, -2.0, 1.0]])
    out = clip_cov(logps, logps.detach(), advantages, ratio=0.5)  # two of four tokens, and two are in the window
    assert out.tolist() == [[0.0, -1.0, 0.0, -1.0]]
    assert gradient(out, logps).tolist() == [[0.0, -1.0, 0.0, -1.0]]
    out = clip_cov(logps, logps.detach(), advantages, ratio=0.25)  # one of them
    assert sorted(out[0].tolist()) in ([-4.0, -1.0, -1.0, 0.0], [-1.0, -1.0, 0.0, 2.0])
    assert clip_cov(logps, logps.detach(), advantages, ratio=0.24).tolist() == [[-4.0, -1.0, 2.0, -1.0]]
    assert clip_cov(logps, logps.detach(), advantages, ratio=1.0, cov_low=3.5).tolist() == [[-4.0, -1.0, 2.0, -1.0]]


def test_clip_cov_is_ppo_clip_but_for_the_draw() -> None:
    logps, old, advantages, mask = batch()
    plain = ppo_clip(logps * mask, old * mask, advantages * mask)
    clipped = {
        at
        for at in zip(*torch.where(mask), strict=True)
        if plain[at] > -(logps[at] - old[at]).exp() * advantages[at] + 1e-12
    }
    eligible = {
        at
        for at, value in covariances_by_hand(logps, advantages, mask).items()
        if 0.1 <= value <= 0.9 and at not in {(int(i), int(t)) for i, t in clipped}
    }
    count = math.floor(0.1 * mask.sum().item())
    assert 0 < count < len(eligible) < mask.sum()
    drawn = set()
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        out = clip_cov(logps, old, advantages, mask, ratio=0.1, cov_low=0.1, cov_high=0.9, generator=generator)
        cut = {(int(i), int(t)) for i, t in zip(*torch.where(mask & (out == 0)), strict=True)}
        assert len(cut) == count and cut <= eligible
        rest = mask & (out != 0)
        torch.testing.assert_close(out[rest], plain[rest])
        drawn |= cut
    assert drawn == eligible  # uniform: all come up in time


def test_clip_cov_draws_alike_from_equal_seeds() -> None:
    logps, old, advantages, mask = batch()
    outs = [LOSSES["clip_cov"](logps, old, advantages, mask) for _ in range(2)]
    torch.testing.assert_close(*outs)
    torch.manual_seed(3)
    one = clip_cov(logps, old, advantages, mask, ratio=0.1, cov_low=0.0)
    torch.manual_seed(3)
    torch.testing.assert_close(clip_cov(logps, old, advantages, mask, ratio=0.1, cov_low=0.0), one)


def test_tokens_that_ppo_clips_are_not_drawn() -> None:
    # Covariances 4.05 and 0.45 twice; the first token is above the upper bound with a gain.
    logps, old = torch.tensor([[-1.0, -2.5, -2.5]]), torch.tensor([[-2.0, -2.5, -2.5]])
    advantages = torch.tensor([[4.0, 0.0, 0.0]])
    out = clip_cov(logps, old, advantages, ratio=1.0, cov_low=0.4)
    torch.testing.assert_close(out, torch.tensor([[-4.8, 0.0, 0.0]]))
    wide = clip_cov(logps, old, advantages, ratio=1.0, cov_low=0.4, epsilon_high=10.0)
    assert wide.tolist() == [[0.0, 0.0, 0.0]]


def test_clip_cov_of_nothing_is_ppo_clip() -> None:
    logps, old, advantages, mask = batch(1)
    for options in ({"ratio": 0.0}, {"ratio": 1.0, "cov_low": 1e8, "cov_high": 1e9}):
        x, y = (logps.clone().requires_grad_() for _ in range(2))
        out = clip_cov(x, old, advantages, mask, epsilon_low=0.1, epsilon_high=0.3, **options)
        plain = ppo_clip(y * mask, old * mask, advantages * mask, epsilon_low=0.1, epsilon_high=0.3)
        torch.testing.assert_close(out, plain, rtol=0, atol=0)
        torch.testing.assert_close(gradient(out, x), gradient(plain, y), rtol=0, atol=0)


def test_kl_cov_by_hand() -> None:
    # Means of ln pi and A over the real tokens: -2 and 1; covariances 3, 0 and 3.2.
    logps = torch.tensor([[-1.0, -2.0, -3.0, 0.0]], requires_grad=True)
    old = torch.tensor([[-1.0, -2.0, -3.0 + math.log(2.0), 0.0]])
    advantages, mask = torch.tensor([[4.0, 1.2, -2.2, 9.0]]), torch.tensor([[1, 1, 1, 0]])
    out = kl_cov(logps, old, advantages, mask, ratio=0.34, kl_coef=0.5)
    torch.testing.assert_close(out, torch.tensor([[-4.0, -1.2, 1.1 + 0.5 * math.log(2.0), 0.0]]))
    torch.testing.assert_close(gradient(out, logps), torch.tensor([[-4.0, -1.2, 1.1 - 0.5, 0.0]]))


@pytest.mark.parametrize("ratio", [0.05, 0.3, 1.0])
def test_kl_cov_is_the_papers_equation(ratio: float) -> None:
    logps, old, advantages, mask = batch(2)
    covariances = covariances_by_hand(logps, advantages, mask)
    ranked = sorted(covariances, key=lambda x: -covariances[x])
    top = set(ranked[: math.floor(ratio * len(ranked))])
    assert top
    out = kl_cov(logps, old, advantages, mask, ratio=ratio, kl_coef=0.7)
    for at in covariances:
        log_ratio = (logps[at] - old[at]).item()
        expected = -math.exp(log_ratio) * advantages[at].item() + 0.7 * abs(log_ratio) * (at in top)
        assert out[at].item() == pytest.approx(expected)
    assert not out[~mask].any()


def test_kl_cov_of_nothing_is_the_plain_surrogate() -> None:
    logps, old, advantages, mask = batch(3)
    out = kl_cov(logps, old, advantages, mask, ratio=0.0)
    torch.testing.assert_close(out, -(logps - old).exp() * advantages * mask)


def test_a_share_that_is_whole_is_not_rounded_down() -> None:
    logps, old, advantages, _ = batch(4, rows=10, length=10)
    out = kl_cov(logps, old, advantages, ratio=0.29, kl_coef=1.0)  # 0.29 * 100 = 28.999..
    plain = kl_cov(logps, old, advantages, ratio=0.0)
    assert (out != plain).sum() == 29


@pytest.mark.parametrize("name", LOSSES)
def test_empty_mask(name: str) -> None:
    logps, old, advantages, mask = batch(4)
    assert not LOSSES[name](logps, old, advantages, torch.zeros_like(mask)).any()


def test_gradient_at_ratio_one_is_the_policy_gradient() -> None:
    logps, _, advantages, mask = batch(5)
    x = logps.clone().requires_grad_()
    torch.testing.assert_close(gradient(kl_cov(x, logps, advantages, mask, ratio=0.5), x), -advantages * mask)
    out = LOSSES["clip_cov"](x, logps, advantages, mask)
    kept = mask & (out != 0)
    assert kept.sum() < mask.sum()
    torch.testing.assert_close(gradient(out, x), -advantages * kept)


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (clip_cov, {"ratio": -0.1}, "ratio=-0.1: give a share"),
        (clip_cov, {"ratio": 1.1}, "share"),
        (clip_cov, {"cov_low": 2.0, "cov_high": 1.0}, "cov_low=2.0 exceeds"),
        (clip_cov, {"epsilon_low": -0.1}, "epsilon_low"),
        (clip_cov, {"epsilon_high": -0.1}, "epsilon_high"),
        (kl_cov, {"ratio": 2.0}, "share"),
        (kl_cov, {"kl_coef": -1.0}, "kl_coef"),
    ],
)
def test_numbers_are_checked(loss: Callable[..., Tensor], options: dict[str, Any], message: str) -> None:
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=message):
        loss(x, x, x, **options)


@pytest.mark.parametrize("name", LOSSES)
def test_shapes_are_checked(name: str) -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="one per sequence"):
        LOSSES[name](x, x, torch.zeros(3))
