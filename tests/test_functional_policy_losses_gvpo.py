"""Losses over the completions of one prompt: worked numbers, the paper's sums in loops, its gradient."""

import math

import pytest
import torch
from torch import Tensor

from rl_plugins.functional.advantages.group import gpg_scale
from rl_plugins.functional.policy_losses.aggregation import aggregate
from rl_plugins.functional.policy_losses.gvpo import gvpo

LENGTHS = (4, 2, 3, 1, 4)
MASK = torch.arange(4)[None, :] < torch.tensor(LENGTHS)[:, None]
GROUPS = torch.tensor([7, -1, 7, -1, 7])  # ids may be any integers, in any order
BETA = 0.3


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    old = -3 * torch.rand(5, 4, generator=generator)
    logps = (old + 0.5 * torch.randn(5, 4, generator=generator)).requires_grad_()
    return logps, old, torch.tensor([1.0, 0.0, 0.25, 2.0, -1.0])


def gaps(logps: Tensor, old: Tensor, rewards: Tensor) -> list[float]:
    """`(R - mean R) - (R_theta - mean R_theta)` of every row, one prompt at a time."""
    implicit = [BETA * sum((logps[i, t] - old[i, t]).item() for t in range(n)) for i, n in enumerate(LENGTHS)]
    out = [0.0] * 5
    for prompt in set(GROUPS.tolist()):
        rows = [i for i in range(5) if GROUPS[i] == prompt]
        mean_reward = sum(rewards[i].item() for i in rows) / len(rows)
        mean_implicit = sum(implicit[i] for i in rows) / len(rows)
        for i in rows:
            out[i] = (rewards[i].item() - mean_reward) - (implicit[i] - mean_implicit)
    return out


def test_gvpo_by_hand() -> None:
    """Implicit rewards 2 (ln rho = 4) and 0, rewards 1 and 0: centred gaps of 0.5, so 1/8 at every token."""
    old = torch.zeros(2, 2)
    logps = torch.tensor([[3.0, 1.0], [0.0, 5.0]], requires_grad=True)
    mask = torch.tensor([[1, 1], [1, 0]])
    out = gvpo(logps, old, torch.tensor([1.0, 0.0]), mask, groups=torch.tensor([0, 0]), beta=0.5)
    torch.testing.assert_close(out, torch.tensor([[0.125, 0.125], [0.125, 0.0]]))
    loss = aggregate(out, mask, "sequence")
    assert loss.item() == pytest.approx(0.125)
    loss.backward()
    # Mean of two rows: beta e_i / 2 with e = (0.5, -0.5).
    torch.testing.assert_close(logps.grad, torch.tensor([[0.125, 0.125], [-0.125, 0.0]]))


def test_gvpo_is_the_papers_sum() -> None:
    logps, old, rewards = batch()
    out = gvpo(logps, old, rewards, MASK, groups=GROUPS, beta=BETA)
    expected = sum(0.5 * gap**2 for gap in gaps(logps, old, rewards))
    assert 5 * aggregate(out, MASK, "sequence").item() == pytest.approx(expected, rel=1e-5)


def test_gvpo_gradient_is_the_papers() -> None:
    """`-beta sum_i [(R_i - mean R) - (R_theta,i - mean R_theta)] nabla ln pi(y_i)`."""
    logps, old, rewards = batch()
    out = gvpo(logps, old, rewards, MASK, groups=GROUPS, beta=BETA)
    actual = torch.autograd.grad(5 * aggregate(out, MASK, "sequence"), logps)[0]
    expected = -BETA * torch.tensor(gaps(logps, old, rewards))[:, None] * MASK
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_gvpo_ignores_centring_and_is_zero_at_its_optimum() -> None:
    """Rewards may be shifted per prompt; `pi = pi_old exp(R / beta) / Z` is the minimum, whatever Z."""
    logps, old, rewards = batch()
    shift = torch.where(GROUPS == 7, 3.0, -5.0)
    torch.testing.assert_close(
        gvpo(logps, old, rewards, MASK, groups=GROUPS),
        gvpo(logps, old, rewards + shift, MASK, groups=GROUPS),
        rtol=1e-4,
        atol=1e-5,
    )
    log_ratio = (rewards + shift) / BETA / torch.tensor(LENGTHS)
    out = gvpo(old + log_ratio[:, None], old, rewards, MASK, groups=GROUPS, beta=BETA)
    assert out.abs().max() < 1e-9


def test_groups_do_not_mix() -> None:
    logps, old, rewards = batch()
    whole = gvpo(logps, old, rewards, MASK, groups=GROUPS)
    for prompt in (7, -1):
        rows = prompt == GROUPS
        alone = gvpo(logps[rows], old[rows], rewards[rows], MASK[rows], groups=GROUPS[rows])
        torch.testing.assert_close(whole[rows], alone)
    assert gvpo(logps, old, rewards, MASK, groups=torch.arange(5)).abs().max() == 0  # alone in a group


def test_rows_without_tokens_leave_the_means() -> None:
    logps, old, rewards = batch()
    mask, spoiled = MASK.clone(), rewards.clone()
    mask[2], spoiled[2] = False, math.nan
    out = gvpo(logps, old, spoiled, mask, groups=GROUPS)
    rest = [0, 1, 3, 4]
    torch.testing.assert_close(out[rest], gvpo(logps[rest], old[rest], rewards[rest], mask[rest], groups=GROUPS[rest]))
    assert (out[2] == 0).all()
    assert torch.isfinite(torch.autograd.grad(out.sum(), logps)[0]).all()


def test_gvpo_errors() -> None:
    logps, old, rewards = batch()
    with pytest.raises(ValueError, match="beta"):
        gvpo(logps, old, rewards, MASK, groups=GROUPS, beta=0.0)
    with pytest.raises(ValueError, match="one reward per sequence"):
        gvpo(logps, old, rewards[:, None].expand(5, 4), MASK, groups=GROUPS)
    with pytest.raises(ValueError, match="groups"):
        gvpo(logps, old, rewards, MASK, groups=GROUPS[:4])


def test_gpg_scale() -> None:
    """Six rows, two of them in a group that all got the same: 6 / 4. A zero inside a mixed group counts."""
    groups = torch.tensor([0, 1, 2, 0, 1, 2])
    rewards = torch.tensor([1.0, 0.0, 0.5, 1.0, 1.0, 0.0])
    assert gpg_scale(rewards, groups).item() == pytest.approx(1.5)
    mixed = torch.tensor([-1.0, 0.0, 1.0])
    assert gpg_scale(mixed, torch.zeros(3)).item() == 1.0
    assert gpg_scale(torch.zeros(4), torch.tensor([0, 0, 1, 1])).item() == 4.0  # nothing to scale


def test_gpg_scale_survives_rounding() -> None:
    rewards = torch.full((3,), 0.1)
    centred = rewards - rewards.mean() + 1e-9  # a mean that rounds next to 0.1
    groups = torch.tensor([0, 0, 0, 1, 1])
    assert gpg_scale(torch.cat([centred, torch.tensor([1.0, -1.0])]), groups).item() == pytest.approx(5 / 2)


def test_gpg_scale_across_ranks() -> None:
    """The other rank has 4 rows, 2 of them useful: (6 + 4) / (4 + 2)."""
    rewards, groups = torch.tensor([1.0, 0.0, 0.5, 1.0, 1.0, 0.0]), torch.tensor([0, 1, 2, 0, 1, 2])
    scale = gpg_scale(rewards, groups, reduce=lambda x: x + torch.tensor([4.0, 2.0]))
    assert scale.item() == pytest.approx(10 / 6)


def test_gpg_scale_errors() -> None:
    with pytest.raises(ValueError, match="per sequence"):
        gpg_scale(torch.zeros(2, 2), torch.zeros(2))
    with pytest.raises(ValueError, match="groups"):
        gpg_scale(torch.zeros(2), torch.zeros(3))
