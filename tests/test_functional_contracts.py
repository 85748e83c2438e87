"""Promises of all functions of `functional` and `signals`: precision, autocast, half precision, garbage in padding.

The cases are in `formula_cases`; a new function without one fails here.
"""

import copy
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from rl_plugins import functional, signals
from rl_plugins.functional.policy_losses.covariance import token_covariance

from .helpers.formula_cases import CASES, FUNCTIONAL, GROUP, OBJECTIVES, SETTINGS, Batch, make_batch

MASKS = ("mask", "token_mask")


def functions(module: Any) -> set[str]:
    return {name for name in module.__all__ if inspect.isroutine(getattr(module, name))}


def takes_mask(name: str) -> bool:
    owner = functional if name in functional.__all__ else signals
    function = token_covariance if name == "token_covariance" else getattr(owner, name.split("/")[0])
    return "mask" in inspect.signature(function).parameters


LOOPED = [name for name, case in CASES.items() if case.loop is not None]
# `critic_signal` hands its mask on; what it does with padding is that of its parts.
# `advantages_of` counts tokens by its mask and has none to hide.
MASKED = [name for name in CASES if takes_mask(name) and name != "advantages_of"]


def leaves(result: Any) -> Iterator[Tensor]:
    """All numbers of a result, as tensors."""
    if isinstance(result, Mapping):
        result = list(result.values())
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, Sequence) and any(isinstance(part, Tensor | Sequence | Mapping) for part in result):
        for part in result:
            yield from leaves(part)
    else:
        yield torch.tensor(result, dtype=torch.float64)


def converted(x: Batch, dtype: torch.dtype) -> Batch:
    """A copy with the floating tensors in another precision."""
    change = {name: t.to(dtype) if t.is_floating_point() else t.clone() for name, t in vars(x).items()}
    return Batch(**change)


def evaluated(name: str, x: Batch) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Results, and the gradient of their weighted sum with respect to every floating tensor."""
    x = copy.copy(x)
    inputs = {key: t.clone().requires_grad_() for key, t in vars(x).items() if t.is_floating_point()}
    vars(x).update(inputs)
    torch.manual_seed(0)  # of the draw of clip_cov
    results = list(leaves(CASES[name].call(x)))
    total = sum(
        (t.double() * torch.linspace(1, 2, t.numel(), dtype=torch.float64).view(t.shape)).sum()
        for t in results
        if t.requires_grad
    )
    gradients = {}
    if isinstance(total, Tensor) and total.requires_grad:
        found = torch.autograd.grad(total, list(inputs.values()), allow_unused=True)
        gradients = {key: g for key, g in zip(inputs, found, strict=True) if g is not None}
    return [t.detach() for t in results], gradients


def assert_equal(found: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    assert len(found[0]) == len(expected[0]) and found[1].keys() == expected[1].keys()
    for a, b in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, check_dtype=False)
    for key, gradient in found[1].items():
        torch.testing.assert_close(gradient, expected[1][key], rtol=0, atol=0, check_dtype=False)


def test_every_public_function_has_a_case() -> None:
    assert functions(functional) == FUNCTIONAL.keys()
    covered = {name.split("/")[0] for name in OBJECTIVES} | SETTINGS
    assert {name for name in signals.__all__ if inspect.isfunction(getattr(signals, name))} <= covered


@pytest.mark.parametrize("spread", [0.4, 15.0], ids=["near", "far"])
@pytest.mark.parametrize("name", LOOPED)
def test_float64_is_the_equation_to_the_last_digits(name: str, spread: float) -> None:
    """Against loops over Python floats, without any clamp: log-ratios up to 15 are inside it."""
    loop = CASES[name].loop
    assert loop is not None
    x = make_batch(spread=spread)
    found, expected = (torch.cat([t.flatten().double() for t in leaves(y)]) for y in (CASES[name].call(x), loop(x)))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_no_constant_depends_on_the_default_dtype(name: str) -> None:
    """`where(c, 1.0, 1.05)` and integers divided by integers are float32, whatever else is float64."""
    x = make_batch()
    expected = evaluated(name, x)
    torch.set_default_dtype(torch.float64)
    try:
        found = evaluated(name, x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_equal(found, expected)


@pytest.mark.parametrize("name", CASES)
def test_autocast_changes_nothing(name: str) -> None:
    x = converted(make_batch(), torch.float32)
    expected = evaluated(name, x)
    with torch.autocast("cpu", torch.bfloat16):
        found = evaluated(name, x)
    assert_equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in CASES if not CASES[name].moves])
def test_half_precision_is_upcast(name: str, dtype: torch.dtype) -> None:
    halves = converted(make_batch(), dtype)
    halves.uniforms = halves.uniforms.double()
    found = list(leaves(CASES[name].call(halves)))
    expected = list(leaves(CASES[name].call(converted(halves, torch.float32))))
    for a, b in zip(found, expected, strict=True):
        assert not a.is_floating_point() or torch.finfo(a.dtype).bits >= 32
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def spoilt(x: Batch, garbage: float) -> Batch:
    """Garbage wherever a token is masked, and in what belongs to a row without tokens."""
    x = copy.copy(x)
    empty = ~x.mask.any(1)
    for key, t in vars(x).items():
        if key in (*MASKS, "lengths"):
            continue
        t = t.clone()
        if t.shape[:2] == x.mask.shape and t.is_floating_point():
            t[~x.mask] = garbage
        elif key in ("experts", "sequence_experts"):
            t[~(x.mask if t.ndim == 3 else x.token_mask)] = -7
        elif t.shape[:1] == x.token_mask.shape and t.is_floating_point():
            t[~x.token_mask] = garbage
        elif key in ("scores", "row_advantages", "chances"):
            t[empty] = garbage
        setattr(x, key, t)
    return x


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("name", MASKED)
def test_padding_reaches_neither_value_nor_gradient(name: str, garbage: float) -> None:
    x = make_batch()
    found, expected = evaluated(name, spoilt(x, garbage)), evaluated(name, x)
    assert_equal(found, expected)
    for key, g in found[1].items():
        if g.shape[:2] == x.mask.shape:
            assert not g[~x.mask].any(), key


SIZES = {"no tokens": (6, 0, False), "no rows": (0, 5, False), "nothing": (0, 0, False), "all masked": (6, 5, True)}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", MASKED)
def test_nothing_real_is_no_special_case(name: str, size: str) -> None:
    rows, length, empty = SIZES[size]
    x = make_batch(rows, length, empty=empty)
    results, gradients = evaluated(name, spoilt(x, math.nan))
    for result in results:
        undefined = name == "explained_variance" or name in ("rollout_metrics", "critic_signal")
        assert result.isfinite().all() or undefined and result.ndim == 0
    assert all(g.isfinite().all() for g in gradients.values())


# Equal numbers, and large ones that differ little.

NORMALISERS = {
    "masked_whiten": lambda r: functional.masked_whiten(r, torch.ones_like(r)),
    "scale_advantages": lambda r: signals.scale_advantages(r[:, None], r[:, None], torch.ones_like(r)[:, None]),
    "batch_normalized": lambda r: functional.batch_normalized(r),
    "group_normalized": lambda r: functional.group_normalized(r, GROUP),
    "group_centered": lambda r: functional.group_centered(r, GROUP),
    "leave_one_out": lambda r: functional.leave_one_out(r, GROUP),
    "max_likelihood": lambda r: functional.max_likelihood(r.abs(), GROUP),
    "length_weighted": lambda r: functional.length_weighted(r, GROUP, 1 + torch.arange(len(r))),
    "group_centered_batch_normalized": lambda r: functional.group_centered_batch_normalized(r, GROUP),
    "group_centered_batch_scaled": lambda r: functional.group_centered_batch_scaled(r, GROUP),
    "process_normalized": lambda r: functional.process_normalized(r[:, None], *torch.ones(2, len(r), 1), GROUP),
    "turn_normalized": lambda r: functional.turn_normalized(r[:, None], torch.ones(len(r), 1), GROUP),
    "pass_at_k": lambda r: functional.pass_at_k(r, GROUP, k=2, normalize=True),
    "kalman": lambda r: functional.kalman(r, GROUP, initial_mean=float(r[0])),
    "token_covariance": lambda r: token_covariance(
        r[:, None], torch.arange(len(r)).to(r)[:, None], torch.ones_like(r)
    ),
}
EQUAL = [100.3, 0.1, -1e4 / 3, 1e6 + 0.7, 1e-3, 1e-30]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", NORMALISERS)
def test_equal_numbers_are_exactly_zero(name: str, dtype: torch.dtype) -> None:
    if name == "token_covariance" and dtype == torch.float64:
        pytest.skip("up to rounding: it only ranks tokens")
    for constant in EQUAL:
        for groups in (1, 7, 1000):
            out = NORMALISERS[name](torch.full((groups * GROUP,), constant, dtype=dtype))
            assert not out.any(), (constant, groups, out.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_numbers_have_no_variance(dtype: torch.dtype) -> None:
    for constant in EQUAL:
        x = torch.full((7, 111), constant, dtype=dtype)
        m, var, _ = functional.masked_moments(x, torch.ones_like(x))
        assert var == 0 and m.item() == pytest.approx(constant, rel=1e-6)
        assert functional.explained_variance(torch.zeros_like(x), x, torch.ones_like(x)).isnan()
        white = functional.masked_whiten(x, torch.ones_like(x), shift_mean=False)
        torch.testing.assert_close(white, x, rtol=1e-12 if dtype == torch.float64 else 0, atol=0)


@pytest.mark.parametrize("name", NORMALISERS)
def test_a_small_spread_around_a_large_mean_keeps_its_digits(name: str) -> None:
    """The same float32 numbers, worked on in float32 and in float64."""
    rewards = (1e6 + torch.randn(30, generator=torch.Generator().manual_seed(0))).float()
    expected = NORMALISERS[name](rewards.double())
    torch.testing.assert_close(NORMALISERS[name](rewards).double(), expected, rtol=2e-5, atol=2e-6)


def test_a_nan_of_a_real_entry_is_not_hidden() -> None:
    x = torch.tensor([1.0, math.nan, 2.0])
    assert functional.masked_moments(x, torch.ones(3))[1].isnan()
    assert functional.masked_whiten(x, torch.ones(3)).isnan().all()


def test_explained_variance_around_a_large_mean() -> None:
    g = torch.Generator().manual_seed(0)
    y = (1e6 + torch.randn(40, generator=g)).float()
    forecast = (y + 0.5 * torch.randn(40, generator=g)).float()
    expected = functional.explained_variance(forecast.double(), y.double(), torch.ones(40))
    assert 0.5 < expected < 0.9
    torch.testing.assert_close(functional.explained_variance(forecast, y, torch.ones(40)).double(), expected)


def test_divergences_of_any_two_log_probabilities_are_finite() -> None:
    """Bounded where the exponential overflows; far on the other side k3 stays the line that pulls the policy back."""
    lows = [-1e4, -100.0, -20.5, -math.inf, -3e38]
    logps = torch.tensor([-0.5] * 5 + lows + [-math.inf], requires_grad=True)
    ref = torch.tensor(lows + [-0.5] * 5 + [-math.inf])
    k3 = functional.kl_k3(logps, ref)
    (slope,) = torch.autograd.grad(k3.sum(), logps)
    torch.testing.assert_close(k3[:4].detach(), torch.tensor([9998.5, 98.5, 19.0, 1e6 - 1.5]))
    torch.testing.assert_close(slope[:5], torch.ones(5))
    torch.testing.assert_close(k3[5:7].detach(), torch.full((2,), math.exp(20) - 21))
    assert k3.isfinite().all() and not slope[5:7].any() and slope.isfinite().all() and k3[-1] == 0
    for other in (functional.kl_k1(logps, ref), functional.kl_to_sampler(logps, ref)):
        assert other.isfinite().all() and torch.autograd.grad(other.sum(), logps)[0].isfinite().all()
    mask = torch.ones(1, 11)
    assert functional.policy_distance(logps[None], ref[None], mask).isfinite().all()
    assert functional.kl_shaped_rewards(mask, logps[None], ref[None], mask, beta=0.1).isfinite().all()


def test_forbidden_tokens_have_no_share_in_the_entropy() -> None:
    logits = torch.tensor([[[1.0, -math.inf, 2.0, -math.inf], [0.0, 0.0, 0.0, 0.0], [3.0] + [-math.inf] * 3]])
    logits.requires_grad_()
    out = functional.token_entropies(logits)
    torch.testing.assert_close(out[0, :1], functional.token_entropies(torch.tensor([[[1.0, 2.0]]]))[0])
    assert out[0, 2] == 0
    (gradient,) = torch.autograd.grad(out.sum(), logits)
    assert gradient.isfinite().all() and not gradient[logits == -math.inf].any()
