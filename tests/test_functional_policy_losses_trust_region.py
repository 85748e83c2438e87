"""DPPO, BAPO and CPGD: numbers worked by hand, and the papers' equations as plain loops."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rl_plugins.functional import ppo_clip, vanilla
from rl_plugins.functional.policy_losses.trust_region import bapo, bapo_bounds, cpgd, dppo
from rl_plugins.functional.ratios import clipped_objective

LOSSES = {
    "dppo_tv": dppo,
    "dppo_kl": lambda *x, **k: dppo(*x, divergence="kl", **k),
    "dppo_truncated": lambda *x, **k: dppo(*x, max_ratio=1.5, **k),
    "bapo": bapo,
    "cpgd": cpgd,
}


def batch(seed: int = 0, rows: int = 5, length: int = 9, spread: float = 0.6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities, old ones, advantages and a ragged mask with holes, in float64."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(3, rows, length, generator=generator, dtype=torch.float64)
    old = -draw[0].abs() - 0.01
    logps = (old + spread * draw[1]).clamp(max=-1e-3)
    lengths = torch.randint(1, length + 1, (rows, 1), generator=generator)
    mask = (torch.arange(length) < lengths) & (torch.rand(rows, length, generator=generator) > 0.2)
    return logps, old, draw[2], mask


def gradient(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), x)[0]


def dppo_by_hand(
    logp: float, old: float, a: float, divergence: str, threshold: float, c: float = math.inf
) -> tuple[float, float]:
    """Loss and slope of one token, arXiv 2602.04879, eq. 11 to 14 and 23."""
    p, q = math.exp(logp), math.exp(old)
    d = abs(q - p) if divergence == "tv" else q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    r = p / q
    if d > threshold and ((a > 0 and r > 1) or (a < 0 and r < 1)):
        return 0.0, 0.0
    return -min(r, c) * a, -min(r, c) * a


@pytest.mark.parametrize(
    ("p", "old_p", "advantage", "loss"),
    [
        (0.5, 0.4, 2.0, -2.5),  # moved by 0.1, inside 0.15
        (0.6, 0.4, 2.0, 0.0),  # by 0.2, outwards: blocked
        (0.6, 0.4, -2.0, 3.0),  # by 0.2, but the update leads back
        (0.2, 0.4, -2.0, 0.0),  # by 0.2 downwards with a loss: blocked
        (0.2, 0.4, 2.0, -1.0),
        (0.04, 0.01, 2.0, -8.0),  # four times as likely, yet moved by 0.03: PPO would clip it
        (0.2, 0.4, 0.0, 0.0),
    ],
)
def test_dppo_tv(p: float, old_p: float, advantage: float, loss: float) -> None:
    logps = torch.tensor([[math.log(p)]], requires_grad=True)
    out = dppo(logps, torch.tensor([[math.log(old_p)]]), torch.tensor([advantage]))
    assert out.item() == pytest.approx(loss, rel=1e-5)
    assert gradient(out, logps).item() == pytest.approx(loss, rel=1e-5)  # d rho / d ln pi = rho


def test_dppo_kl() -> None:
    # From 0.4 to 0.6: 0.4 ln(0.4 / 0.6) + 0.6 ln(0.6 / 0.4) = 0.2 ln 1.5 = 0.0811.
    logps, old = torch.tensor([[math.log(0.6)]], requires_grad=True), torch.tensor([[math.log(0.4)]])
    advantages = torch.tensor([1.0])
    assert dppo(logps, old, advantages, divergence="kl").item() == 0.0
    assert dppo(logps, old, advantages, divergence="kl", threshold=0.0810).item() == 0.0
    out = dppo(logps, old, advantages, divergence="kl", threshold=0.0812)
    assert out.item() == pytest.approx(-1.5)
    assert gradient(out, logps).item() == pytest.approx(-1.5)


def test_dppo_kl_of_certain_tokens() -> None:
    """Probability 1 before, after or both: an infinite divergence blocks, 0 ln 0 is 0."""
    logps = torch.tensor([[0.0, 0.0, -2.0]], requires_grad=True)
    old = torch.tensor([[0.0, -2.0, 0.0]])
    out = dppo(logps, old, torch.tensor([[1.0, 1.0, -1.0]]), divergence="kl")
    assert out.tolist() == [[-1.0, 0.0, 0.0]]
    assert gradient(out, logps).tolist() == [[-1.0, 0.0, 0.0]]


def test_dppo_truncates_the_weight_and_not_the_gradient() -> None:
    logps = torch.tensor([[math.log(0.04)]], requires_grad=True)
    out = dppo(logps, torch.tensor([[math.log(0.01)]]), torch.tensor([2.0]), max_ratio=3.0)
    assert out.item() == pytest.approx(-6.0)
    assert gradient(out, logps).item() == pytest.approx(-6.0)


@pytest.mark.parametrize("divergence", ["tv", "kl"])
@pytest.mark.parametrize("max_ratio", [None, 1.3])
def test_dppo_is_the_papers_equation(divergence: str, max_ratio: float | None) -> None:
    logps, old, advantages, mask = batch()
    logps.requires_grad_()
    out = dppo(logps, old, advantages, mask, divergence=divergence, threshold=0.1, max_ratio=max_ratio)
    slopes = gradient(out, logps)
    blocked = 0
    for i in range(mask.shape[0]):
        for t in range(mask.shape[1]):
            values = logps[i, t].item(), old[i, t].item(), advantages[i, t].item()
            loss, slope = dppo_by_hand(*values, divergence, 0.1, max_ratio or math.inf) if mask[i, t] else (0.0, 0.0)
            blocked += bool(mask[i, t]) and loss == 0
            assert out[i, t].item() == pytest.approx(loss, rel=1e-9, abs=1e-12)
            assert slopes[i, t].item() == pytest.approx(slope, rel=1e-9, abs=1e-12)
    assert blocked  # the case is not empty


def test_dppo_without_a_region_is_the_plain_surrogate() -> None:
    logps, old, advantages, mask = batch(1)
    for divergence in ("tv", "kl"):
        out = dppo(logps, old, advantages, mask, divergence=divergence, threshold=1e9)
        torch.testing.assert_close(out, -torch.exp(logps - old) * advantages * mask)


def bounds_by_hand(
    logps: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, target: float, *, weighted: bool
) -> tuple[float, float]:
    """The while loop of arXiv 2510.18927, algorithm 1, with the share of eq. 8."""
    tokens = [
        ((x - y).exp().item(), a.item(), y.exp().item() if weighted else 1.0)
        for x, y, a in zip(logps[mask], old[mask], advantages[mask], strict=True)
    ]

    def share(low: float, high: float) -> float:
        p = sum(w * min(r, high) * a for r, a, w in tokens if a > 0)
        n = sum(-w * max(r, low) * a for r, a, w in tokens if a < 0)
        return p / (p + n)

    (low, last_low), (high, last_high) = (0.6, 0.9), (1.2, 3.0)
    while share(low, high) < target and low + 0.02 <= last_low + 1e-9:
        if high + 0.05 <= last_high + 1e-9:
            high += 0.05
        else:
            low += 0.02
    return low, high


@pytest.mark.parametrize("weighted", [True, False])
def test_bapo_bounds_are_the_algorithms(weighted: bool) -> None:
    stops = set()
    for seed in range(4):
        logps, old, advantages, mask = batch(seed, rows=8, length=12, spread=1.5)
        for target in (x / 50 for x in range(51)):
            found = bapo_bounds(logps, old, advantages, mask, target_share=target, weighted=weighted)
            expected = bounds_by_hand(logps, old, advantages, mask, target, weighted=weighted)
            assert [x.item() for x in found] == pytest.approx(expected)
            stops.add(round(expected[1], 2))
    assert len(stops) > 6  # most of them on the way


def test_bapo_clips_at_its_bounds() -> None:
    logps, old, advantages, mask = batch(1, spread=1.5)
    low, high = bapo_bounds(logps, old, advantages, mask, target_share=0.5)
    ratio = (logps - old).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    torch.testing.assert_close(bapo(logps, old, advantages, mask, target_share=0.5), -surrogate * mask)


def test_bapo_by_hand() -> None:
    # Ratios 2, 2 and 0.5 with advantages 1, -1 and -1: P = min(2, c), N = 2 + max(0.5, c_low) = 2.6 at first.
    ratio = torch.tensor([[2.0, 2.0, 0.5]])
    logps, old = ratio.log().requires_grad_(), torch.zeros(1, 3)
    advantages = torch.tensor([[1.0, -1.0, -1.0]])
    # 1.35 / 3.95 = 0.3418 and 1.4 / 4.0 = 0.35.
    low, high = bapo_bounds(logps, old, advantages, target_share=0.345)
    assert (low.item(), high.item()) == pytest.approx((0.6, 1.4))
    out = bapo(logps, old, advantages, target_share=0.345)
    torch.testing.assert_close(out, torch.tensor([[-1.4, 2.0, 0.6]]))
    torch.testing.assert_close(gradient(out, logps), torch.tensor([[0.0, 2.0, 0.0]]))
    # At most 2 / 4.6 = 0.43: beyond that both bounds end at their last value.
    assert [x.item() for x in bapo_bounds(logps, old, advantages, target_share=0.44)] == pytest.approx([0.9, 3.0])


def test_bapo_weighs_tokens_by_the_samplers_probability() -> None:
    # As above, but the sampler gave the three tokens 0.5, 0.25 and 0.25: P = 0.5 min(2, c), N = 0.5 + 0.25 * 0.6.
    logps, old = torch.tensor([[1.0, 0.5, 0.125]]).log(), torch.tensor([[0.5, 0.25, 0.25]]).log()
    advantages = torch.tensor([[1.0, -1.0, -1.0]])
    # 0.625 / 1.275 = 0.490 and 0.65 / 1.3 = 0.5.
    bounds = [x.item() for x in bapo_bounds(logps, old, advantages, target_share=0.495)]
    assert bounds == pytest.approx([0.6, 1.3])
    # Without the weights at most 2 / 4.6.
    bounds = [x.item() for x in bapo_bounds(logps, old, advantages, target_share=0.495, weighted=False)]
    assert bounds == pytest.approx([0.9, 3.0])


def test_bapo_without_a_target_is_ppo_clip() -> None:
    logps, old, advantages, mask = batch(3)
    expected = ppo_clip(logps * mask, old * mask, advantages * mask, epsilon_low=0.4, epsilon_high=0.2)
    torch.testing.assert_close(bapo(logps, old, advantages, mask, target_share=0.0), expected)


def test_bapo_bounds_are_those_outside_autocast() -> None:
    """Shares that differ by less than bfloat16 resolves: there the search stopped a step early."""
    logps, old, advantages, _ = (x.float() for x in batch(rows=32, length=64))
    for share in (0.42, 0.44, 0.46, 0.48):
        expected = bapo_bounds(logps, old, advantages, target_share=share)
        with torch.autocast("cpu", torch.bfloat16):
            found = bapo_bounds(logps, old, advantages, target_share=share)
        assert found == expected


def test_bapo_of_no_token() -> None:
    logps, old, advantages, mask = batch(3)
    none = torch.zeros_like(mask)
    assert [x.item() for x in bapo_bounds(logps, old, advantages, none)] == pytest.approx([0.6, 1.2])
    assert not bapo(logps, old, advantages, none).any()


def test_bapo_agrees_across_ranks() -> None:
    """Two halves that share their sums choose the bounds of the whole."""
    logps, old, advantages, mask = batch(1, rows=8, length=12)
    whole = bapo_bounds(logps, old, advantages, mask, target_share=0.5)
    halves = [[x[i::2] for x in (logps, old, advantages, mask)] for i in (0, 1)]
    sums: list[Tensor] = []

    def record(x: Tensor) -> Tensor:
        sums.append(x)
        return x

    for half in halves:
        bapo_bounds(*half, target_share=0.5, reduce=record)
    for half in halves:
        torch.testing.assert_close(bapo_bounds(*half, target_share=0.5, reduce=lambda _: sums[0] + sums[1]), whole)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        # -min(l A, clip(l) A) + 0.5 min(rho - 1, 2) ln pi, ln pi = ln rho - 3; slopes -A (or 0) + 0.5 min(rho - 1, 2)
        (1.0, 2.0, 0.0, -2.0),
        (1.1, 2.0, -2 * math.log(1.1) + 0.05 * (math.log(1.1) - 3), -2.0 + 0.05),
        (1.5, 2.0, -2 * math.log(1.2) + 0.25 * (math.log(1.5) - 3), 0.25),
        (1.5, -2.0, 2 * math.log(1.5) + 0.25 * (math.log(1.5) - 3), 2.25),
        (0.5, -2.0, 2 * math.log(0.8) - 0.25 * (math.log(0.5) - 3), -0.25),
        (0.5, 2.0, -2 * math.log(0.5) - 0.25 * (math.log(0.5) - 3), -2.25),
        (5.0, 2.0, -2 * math.log(1.2) + 1.0 * (math.log(5.0) - 3), 1.0),  # the weight stops at c, the pull does not
    ],
)
def test_cpgd(ratio: float, advantage: float, loss: float, slope: float) -> None:
    logps = torch.tensor([[math.log(ratio) - 3.0]], requires_grad=True)
    out = cpgd(logps, torch.full((1, 1), -3.0), torch.tensor([advantage]), drift_coef=0.5)
    assert out.item() == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert gradient(out, logps).item() == pytest.approx(slope, rel=1e-5)


def test_cpgd_is_the_papers_equation() -> None:
    logps, old, advantages, mask = batch(4)
    out = cpgd(logps, old, advantages, mask, epsilon_low=0.1, epsilon_high=0.3, drift_coef=0.7, drift_clip=0.4)
    for i in range(mask.shape[0]):
        for t in range(mask.shape[1]):
            logp, a = logps[i, t].item(), advantages[i, t].item()
            log_ratio = logp - old[i, t].item()
            gain = min(log_ratio * a, min(max(log_ratio, math.log(0.9)), math.log(1.3)) * a)
            drift = min(math.exp(log_ratio) - 1, 0.4) * logp
            expected = -gain + 0.7 * drift if mask[i, t] else 0.0
            assert out[i, t].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_cpgd_without_regularisers_is_the_policy_gradient() -> None:
    logps, old, advantages, mask = batch(5)
    x = logps.clone().requires_grad_()
    wide = cpgd(x, old, advantages, mask, epsilon_low=1.0, epsilon_high=1e9, drift_coef=0.0)
    torch.testing.assert_close(gradient(wide, x), gradient(vanilla(x, advantages) * mask, x))


def test_clipped_objective_takes_numbers_and_tensors() -> None:
    x, advantages = torch.tensor([0.5, 1.5]), torch.tensor([-1.0, 1.0])
    bounds = torch.tensor(0.8), torch.tensor(1.2)
    assert clipped_objective(x, advantages, 0.8, 1.2).tolist() == pytest.approx([-0.8, 1.2])
    torch.testing.assert_close(clipped_objective(x, advantages, *bounds), clipped_objective(x, advantages, 0.8, 1.2))


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_at_ratio_one_is_the_policy_gradient(name: str) -> None:
    logps, _, advantages, mask = batch(6)
    x = logps.clone().requires_grad_()
    torch.testing.assert_close(gradient(LOSSES[name](x, logps, advantages, mask), x), -advantages * mask)


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (dppo, {"divergence": "js"}, "choose one of tv, kl"),
        (dppo, {"threshold": -0.1}, "threshold"),
        (dppo, {"max_ratio": 0.5}, "max_ratio"),
        (bapo, {"target_share": 1.1}, "target_share=1.1: give a share"),
        (bapo, {"low_step": 0.0}, "low_step"),
        (bapo, {"high_step": -0.1}, "high_step"),
        (bapo, {"low_range": (0.9, 0.6)}, "low_range"),
        (bapo, {"low_range": (0.9, 1.1)}, "ratio 1"),
        (bapo, {"high_range": (0.9, 1.1)}, "ratio 1"),
        (cpgd, {"epsilon_low": -0.1}, "epsilon_low"),
        (cpgd, {"epsilon_high": -0.1}, "epsilon_high"),
        (cpgd, {"drift_coef": -0.1}, "drift_coef"),
        (cpgd, {"drift_clip": -0.1}, "drift_clip"),
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
