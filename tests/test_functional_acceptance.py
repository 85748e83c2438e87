"""Equations of speculative sampling: by hand, and the identity that makes it exact."""

import pytest
import torch
from torch import Tensor

from rl_plugins.functional.acceptance import (
    acceptance_probs,
    count_accepted,
    expected_tokens,
    inverse_cdf,
    residual_probs,
)

ALMOST_ONE = 1.0 - 2.0**-53  # the largest float64 below 1


def test_acceptance_probs_by_hand() -> None:
    target = torch.tensor([0.1, 0.5, 0.0, 0.3])
    draft = torch.tensor([0.4, 0.25, 0.7, 0.3])
    assert acceptance_probs(target, draft).tolist() == [0.25, 1.0, 0.0, 1.0]


def test_acceptance_probs_of_a_draft_that_was_all_but_impossible() -> None:
    assert acceptance_probs(torch.tensor([0.5]), torch.tensor([1e-45])).tolist() == [1.0]


def test_count_accepted_stops_at_the_first_rejection() -> None:
    accepted = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 1], [0, 0, 0]], dtype=torch.bool)
    count = count_accepted(accepted)
    assert count.tolist() == [3, 1, 0, 0]
    assert count.dtype == torch.int64
    assert count_accepted(accepted[:, :0]).tolist() == [0, 0, 0, 0]


def test_residual_probs_by_hand() -> None:
    target = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [0.5, 0.5, 0.0]], dtype=torch.float64)
    draft = torch.tensor([[0.125, 0.25, 0.625], [0.0, 0.0, 0.0], [0.5, 0.5, 0.0]], dtype=torch.float64)
    expected = [[1.0, 0.0, 0.0], [0.5, 0.25, 0.25], [0.5, 0.5, 0.0]]  # rejected, nothing drafted, nothing left
    assert residual_probs(target, draft).tolist() == expected


def test_expected_tokens_by_hand() -> None:
    assert expected_tokens(torch.tensor([0.5, 0.5, 0.0])).tolist() == [1.0, 1.5, 1.75, 1.75]
    assert expected_tokens(torch.tensor([])).tolist() == [1.0]


def test_expected_tokens_is_equation_1_where_the_rates_are_equal() -> None:
    rate = 0.8
    expected = [(1 - rate ** (k + 1)) / (1 - rate) for k in range(6)]
    assert expected_tokens(torch.full((5,), rate, dtype=torch.float64)).tolist() == pytest.approx(expected)


def test_expected_tokens_is_the_mean_of_count_accepted() -> None:
    rates = torch.tensor([0.9, 0.3, 0.7], dtype=torch.float64)
    every = torch.cartesian_prod(*[torch.tensor([False, True])] * 3)  # (8, 3)
    weights = torch.where(every, rates, 1.0 - rates).prod(dim=1)
    mean = ((1 + count_accepted(every)) * weights).sum()
    assert expected_tokens(rates)[-1].item() == pytest.approx(mean.item(), abs=1e-12)


def distributions(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random distributions (500, 11), peaked and flat, with zeros."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(500, 1, generator=generator, dtype=dtype) * 8
    probs = (torch.randn(500, 11, generator=generator, dtype=dtype) * scale).softmax(dim=-1)
    zeros = torch.rand(500, 11, generator=generator) < 0.4
    zeros[:, 0] = False
    probs = probs.masked_fill(zeros, 0.0)
    return probs / probs.sum(dim=-1, keepdim=True)


def test_what_comes_out_has_the_distribution_of_the_target() -> None:
    p, q = distributions(0), distributions(1)
    stays = q * acceptance_probs(p, q.clamp(min=1e-300))  # a token of probability 0 is never drafted
    rejected = 1.0 - torch.minimum(p, q).sum(dim=-1, keepdim=True)
    torch.testing.assert_close(stays.sum(dim=-1, keepdim=True), 1.0 - rejected, atol=1e-14, rtol=0)
    torch.testing.assert_close(stays + rejected * residual_probs(p, q), p, atol=1e-14, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_residual_probs_is_a_distribution_over_possible_tokens(dtype: torch.dtype) -> None:
    p, q = distributions(2, dtype), distributions(3, dtype)
    rest = residual_probs(p, q)
    assert (rest >= 0).all()
    assert not rest[p == 0].any()
    torch.testing.assert_close(rest.sum(dim=-1), torch.ones(500, dtype=dtype))
    # A draft that differs by rounding only leaves rounding errors, of possible tokens.
    near = residual_probs(p, p * (1.0 + 2 * torch.finfo(dtype).eps))
    assert near.isfinite().all() and not near[p == 0].any()


@pytest.mark.parametrize("scale", [1.0, 0.25, 7.0])
def test_inverse_cdf_by_hand(scale: float) -> None:
    probs = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0], dtype=torch.float64) * scale
    uniforms = torch.tensor([0.0, 0.2499, 0.25, 0.5, 0.7499, 0.75, ALMOST_ONE], dtype=torch.float64)
    assert inverse_cdf(probs.expand(7, 6), uniforms).tolist() == [1, 1, 3, 3, 3, 4, 4]


def test_inverse_cdf_keeps_leading_dimensions() -> None:
    probs = torch.eye(4).reshape(2, 2, 4)
    assert inverse_cdf(probs, torch.full((2, 2), 0.3, dtype=torch.float64)).tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize("uniform", [0.0, 2.0**-53, 0.5, ALMOST_ONE])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 3.7, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse_cdf_never_takes_an_impossible_token(uniform: float, scale: float, dtype: torch.dtype) -> None:
    probs = distributions(4, dtype).flip(-1) * scale  # zeros at the front and at the back
    probs[:, -1] = 0.0
    probs[:, 5] += scale * 1e-3
    tokens = inverse_cdf(probs, torch.full((500,), uniform, dtype=torch.float64))
    assert (probs.gather(1, tokens.unsqueeze(1)) > 0).all()


def test_inverse_cdf_is_fair_to_rare_tokens_of_a_large_vocabulary() -> None:
    rare = 100_003
    probs = torch.full((rare + 1,), 0.5 / rare)  # float32, whose own sums would be off by several tokens
    probs[0] = 0.5
    tokens = torch.arange(1, rare, rare // 40)
    uniforms = 0.5 + (tokens.double() - 0.5) * (0.5 / rare)
    assert inverse_cdf(probs.expand(len(tokens), -1), uniforms).tolist() == tokens.tolist()


def test_inverse_cdf_finds_a_token_that_float32_sums_would_lose() -> None:
    rare = 1e-8  # 0.5 + 1e-8 is 0.5 in float32
    place = torch.tensor([0.5 + rare / 2], dtype=torch.float64) / (1.0 + rare)
    assert inverse_cdf(torch.tensor([[0.5, rare, 0.5]]), place).tolist() == [1]


def test_inverse_cdf_draws_the_distribution() -> None:
    probs = torch.tensor([3.0, 0.0, 1.0, 4.0])
    grid = (torch.arange(8000, dtype=torch.float64) + 0.5) / 8000
    counts = inverse_cdf(probs.expand(8000, 4), grid).bincount(minlength=4)
    assert counts.tolist() == [3000, 0, 1000, 4000]
