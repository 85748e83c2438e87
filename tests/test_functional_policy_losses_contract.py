"""What every policy loss has in common, whichever file it is in: masks, shapes, dtypes."""

import math

import pytest
import torch
from torch import Tensor

from rl_plugins.signals import POLICY_LOSSES, PolicyLoss, policy_loss

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


# Ratios that no float32 holds: tokens that were forced, filtered or replayed.

LOG_RATIOS = [-math.inf, -3e38, -1e4, -100.0, -20.5, 0.0, 20.5, 88.8, 100.0, 1e4, 3e38, math.inf]


def strange_batch(log_ratio: float, advantage: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """An ordinary batch of which three tokens have a given log-ratio and advantage; the other policy is at -1."""
    logps, old, advantages, mask = batch(4)
    for row, t in ((0, 1), (1, 2), (2, 3)):
        # A log-probability is at most 0, so the lower one makes the ratio.
        lower, upper = (logps, old) if log_ratio < 0 else (old, logps)
        upper[row, t], lower[row, t] = -1.0, -1.0 - abs(log_ratio)
        advantages[row, t] = advantage
    return logps, old, advantages, mask


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_any_ratio_has_a_finite_loss_and_gradient(name: str, advantage: float, masked: bool) -> None:
    for log_ratio in LOG_RATIOS:
        logps, old, advantages, mask = strange_batch(log_ratio, advantage)
        logps.requires_grad_()
        mask = mask if masked else torch.ones_like(mask)
        total, cut = policy_loss(
            PolicyLoss(name, "token", OPTIONS.get(name, {})),
            logps,
            old,
            suited(name, advantages),
            mask,
            batch={"groups": GROUPS},
        )
        (gradient,) = torch.autograd.grad(total, logps)
        assert total.isfinite(), log_ratio
        assert gradient.isfinite().all() and gradient.any(), log_ratio
        assert cut.dtype == torch.bool


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_impossible_tokens_of_both_policies_have_a_finite_loss(name: str) -> None:
    """A filter that forbids the token under both: -inf less -inf would be NaN."""
    logps, old, advantages, mask = batch(5)
    logps[0, 1] = old[0, 1] = old[1, 0] = logps[2, 3] = -math.inf
    logps.requires_grad_()
    out = per_token(name, logps, old, suited(name, advantages), mask)
    (gradient,) = torch.autograd.grad(out.sum(), logps)
    assert out.isfinite().all() and gradient.isfinite().all()
    # Nothing can raise a probability of 0.
    assert gradient[0, 1] == 0 and gradient[2, 3] == 0


@pytest.mark.parametrize("name", [name for name in POLICY_LOSSES if name not in WITHOUT_OLD])
def test_outside_the_clamp_the_ratio_is_that_of_its_edge(name: str) -> None:
    for edge in (-20.0, 20.0):
        found = []
        for beyond in (0.0, 5.0, 1e3):
            logps, old, advantages, mask = batch(6)
            # In the old policy, as some losses read the log-probabilities of the new one.
            old[0, 1] = logps[0, 1] - math.copysign(20.0 + beyond, edge)
            torch.manual_seed(0)
            found.append(per_token(name, logps, old, suited(name, advantages), mask))
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_a_nan_of_a_real_token_is_not_hidden(name: str) -> None:
    logps, old, advantages, mask = batch(7)
    logps[0, 1] = math.nan
    assert per_token(name, logps, old, suited(name, advantages), mask).isnan().any()


def test_a_token_outside_the_clamp_is_not_pulled_through_its_ratio() -> None:
    logps = torch.tensor([[-1.0, -1.0, -1.0]], requires_grad=True)
    old = torch.tensor([[-22.0, -18.0, -1.0]])
    out = per_token("ppo_clip", logps, old, torch.tensor([-1.0]), torch.ones(1, 3))
    torch.testing.assert_close(out, torch.tensor([[20.0, 17.0, 0.0]]).exp())
    torch.testing.assert_close(torch.autograd.grad(out.sum(), logps)[0], torch.tensor([[0.0, math.exp(17), 1.0]]))


def test_dppo_sees_the_region_behind_the_clamp() -> None:
    """A token at 37 % that the policy has given up: both divergences are large, whatever the ratio is clamped to."""
    logps, old = torch.tensor([[-1e4]]), torch.tensor([[-1.0]])
    for divergence in ("tv", "kl"):
        loss = PolicyLoss("dppo", options={"divergence": divergence})
        assert loss.per_token(logps, old, torch.tensor([-1.0]), torch.ones(1, 1)).item() == 0.0
