"""What every policy loss has in common, whichever file it is in: masks, shapes, dtypes."""

import math

import pytest
import torch
from torch import Tensor

from rl_plugins.objectives import POLICY_LOSSES, PolicyLoss

# Shares that choose something among the few tokens of these tests.
OPTIONS = {"clip_cov": {"ratio": 0.3, "cov_low": -5.0}, "kl_cov": {"ratio": 0.3}}
GROUPS = torch.tensor([0, 0, 1, 1])
WITHOUT_OLD = ("vanilla", "gpg")


def batch(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    logps = -3 * torch.rand(4, 6, generator=g)
    old = logps + 0.3 * torch.randn(4, 6, generator=g)
    mask = torch.arange(6) < torch.tensor([[6], [3], [5], [1]])
    mask[0, 2] = False  # a hole
    return logps, old, torch.randn(4, 6, generator=g), mask


def per_token(name: str, logps: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return PolicyLoss(name, options=OPTIONS.get(name, {})).per_token(logps, old, advantages, mask, {"groups": GROUPS})


def suited(name: str, advantages: Tensor) -> Tensor:
    """GVPO is about whole completions."""
    return advantages[:, 0].clone() if name == "gvpo" else advantages


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_padding_reaches_neither_value_nor_gradient(name: str, garbage: float) -> None:
    logps, old, advantages, mask = batch(0)
    found = []
    for spoil in (False, True):
        inputs = [logps.clone(), old.clone(), suited(name, advantages.clone())]
        for x in inputs if spoil else []:
            if x.ndim == 2:
                x[~mask] = garbage
        inputs[0].requires_grad_()
        torch.manual_seed(0)  # of the draw of clip_cov
        out = per_token(name, *inputs, mask)
        found.append((out.detach(), *torch.autograd.grad(out.sum(), inputs[0])))
    for clean, dirty in zip(*found, strict=True):
        torch.testing.assert_close(dirty, clean, rtol=0, atol=0)
        assert not dirty[~mask].any() and dirty[mask].any()


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_a_row_without_tokens_teaches_nothing(name: str) -> None:
    logps, old, advantages, mask = batch(1)
    mask = mask & (torch.arange(4) != 3)[:, None]
    logps.requires_grad_()
    out = per_token(name, logps, old, suited(name, advantages), mask)
    (gradient,) = torch.autograd.grad(out.sum(), logps)
    assert out.isfinite().all() and gradient.isfinite().all()
    assert not out[3].any() and not gradient[3].any()


@pytest.mark.parametrize("name", [name for name in POLICY_LOSSES if name != "gvpo"])
def test_one_advantage_per_sequence_is_one_for_each_of_its_tokens(name: str) -> None:
    logps, old, advantages, mask = batch(2)
    single = advantages[:, 0]
    torch.manual_seed(0)
    expected = per_token(name, logps, old, single[:, None].expand_as(logps), mask)
    torch.manual_seed(0)
    torch.testing.assert_close(per_token(name, logps, old, single, mask), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_half_precision_is_upcast(name: str) -> None:
    logps, old, advantages, mask = batch(3)
    halves = [x.to(torch.bfloat16) for x in (logps, old, suited(name, advantages))]
    torch.manual_seed(0)
    out = per_token(name, *halves, mask.long())
    assert out.dtype == torch.float32
    torch.manual_seed(0)
    torch.testing.assert_close(out, per_token(name, *(x.float() for x in halves), mask), rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in POLICY_LOSSES if name != "gvpo"])
def test_shapes_are_checked(name: str) -> None:
    x = torch.zeros(4, 6)
    with pytest.raises(ValueError, match="advantages"):
        per_token(name, x, x, torch.zeros(3), x)
    if name not in WITHOUT_OLD:
        with pytest.raises(ValueError, match="differ"):
            per_token(name, x, torch.zeros(4, 5), torch.zeros(4), x)


# On-policy

ACTIVE = {"kl_cov": {"ratio": 0.3}, "clip_cov": {"ratio": 0.3, "cov_low": -5.0}, "dppo": {"threshold": 0.01}}


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_what_acts_on_policy_is_what_the_table_says(name: str) -> None:
    """At ratio 1, and where the policy has moved, against the gradient of the plain loss, `-A` at every token."""
    logps, old, advantages, mask = batch(4)
    advantages = advantages[:, 0] + 3 * (GROUPS - 0.5)  # GVPO centres them in their groups
    advantages = advantages - torch.stack([advantages[k == GROUPS].mean() for k in (0, 1)])[GROUPS]
    plain = -advantages[:, None] * mask

    def slopes(sampler: Tensor) -> Tensor:
        leaf = logps.clone().requires_grad_()
        torch.manual_seed(0)
        loss = PolicyLoss(name, options=ACTIVE.get(name, {}))
        out = loss.per_token(leaf, sampler, advantages, mask, {"groups": GROUPS})
        return torch.autograd.grad(out.sum(), leaf)[0]

    def same_but_for_a_factor(slope: Tensor) -> bool:
        # One positive factor for each completion.
        factors = slope[mask] / plain[mask]
        rows = torch.arange(4)[:, None].expand_as(mask)[mask]
        return all(
            bool((factors[rows == i] > 0).all()) and float(factors[rows == i].std(correction=0)) < 1e-5
            for i in range(4)
        )

    moved = logps + torch.where(mask, 2.0, 0.0) * torch.randn(4, 6, generator=torch.Generator().manual_seed(9))
    on_policy, off_policy = slopes(logps.detach()), slopes(moved)
    if not POLICY_LOSSES[name].acts_on_policy:
        assert same_but_for_a_factor(on_policy), name
        assert not torch.allclose(off_policy, on_policy, atol=1e-3), name
    elif name in WITHOUT_OLD:
        torch.testing.assert_close(on_policy, plain)
        torch.testing.assert_close(off_policy, plain)
    else:
        assert not same_but_for_a_factor(on_policy), name
