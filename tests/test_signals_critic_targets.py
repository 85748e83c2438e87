"""The critic's signal: targets, losses and metrics worked by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rl_plugins.functional import gae
from rl_plugins.signals import (
    critic_signal,
    critic_targets,
    initial_values,
    rollout_metrics,
    scale_advantages,
    sequence_means,
    value_loss,
    value_losses,
)

REWARDS = torch.tensor([[0.0, 0.0, 1.0]])
VALUES = torch.tensor([[[0.5], [0.2], [0.6]]])  # (B, T, K)
TARGETS = torch.tensor([[[0.4], [0.3], [0.8]]])
MASK = torch.ones(1, 3)


def close(x: Tensor, numbers: list[float]) -> None:
    torch.testing.assert_close(x.flatten(), torch.tensor(numbers))


# Targets


def test_td_is_the_seed_s_delta() -> None:
    out = critic_targets(REWARDS, VALUES, TARGETS, MASK, estimator="td", gamma=0.9)
    # Y_t = r_t + 0.9 v'[t+1], delta_t = Y_t - v[t]
    close(out.returns, [0.27, 0.72, 1.0])
    close(out.advantages, [-0.23, 0.52, 0.4])
    close(out.td_errors, [-0.23, 0.52, 0.4])
    close(out.monte_carlo, [0.81, 0.9, 1.0])


def test_mc_is_the_return_less_the_value() -> None:
    out = critic_targets(REWARDS, VALUES, TARGETS, MASK, estimator="mc", gamma=0.9)
    close(out.returns, [0.81, 0.9, 1.0])
    close(out.advantages, [0.31, 0.7, 0.4])
    close(out.td_errors, [-0.23, 0.52, 0.4])


def test_gae_with_two_lambdas_by_hand() -> None:
    out = critic_targets(REWARDS, VALUES, TARGETS, MASK, lam_policy=0.5, lam_value=0.25)
    # G_2 = 1; G_1 = (1 - lam) 0.8 + lam G_2; G_0 = (1 - lam) 0.3 + lam G_1
    close(out.advantages, [0.15 + 0.45 - 0.5, 0.9 - 0.2, 0.4])
    close(out.returns, [0.225 + 0.2125, 0.85, 1.0])


def test_gae_of_equal_networks_is_the_textbook_s() -> None:
    torch.manual_seed(0)
    rewards, values = torch.randn(4, 9), torch.randn(4, 9, 2)
    mask = torch.rand(4, 9) > 0.3
    out = critic_targets(rewards, values, values, mask, gamma=0.97, lam_policy=0.8)
    torch.testing.assert_close(out.advantages, gae(rewards, values[..., 0], mask, gamma=0.97, lam=0.8))


def test_lag_of_the_target_does_not_add_up() -> None:
    length, lag = 20, 0.1
    rewards, values = torch.zeros(1, length), torch.zeros(1, length, 1)
    mask = torch.ones(1, length)
    plain = critic_targets(rewards, values, values, mask, estimator="mc")
    lagging = critic_targets(rewards, values, values - lag, mask, estimator="mc")
    assert torch.equal(plain.advantages, lagging.advantages)
    for lam in (0.0, 0.5, 0.95):
        out = critic_targets(rewards, values, values - lag, mask, lam_policy=lam)
        # Before the last token every bootstrap is too low by the lag, weighted by 1 - lam^(steps left).
        left = torch.arange(length - 1, -1, -1)
        torch.testing.assert_close(out.advantages[0], -lag * (1 - lam**left), atol=1e-6, rtol=1e-5)
        assert out.advantages.min() >= -lag - 1e-6


def test_length_adaptive_lambda_is_per_row() -> None:
    mask = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0]])
    rewards, values = torch.randn(2, 4), torch.randn(2, 4, 1)
    out = critic_targets(rewards, values, values, mask, length_alpha=0.5)  # lambda 1 - 1/2 and 1 - 1/1
    for row, lam in ((0, 0.5), (1, 0.0)):
        one = critic_targets(rewards[[row]], values[[row]], values[[row]], mask[[row]], lam_policy=lam)
        torch.testing.assert_close(out.advantages[row], one.advantages[0])


def test_lookahead_bootstraps_from_the_mean_forecast() -> None:
    # v_2[t] forecasts V(s_{t+1}), so the bootstrap for s_1 is mean(v_1[1], v_2[0]) and so on.
    target = torch.tensor([[[0.0, 0.6], [0.2, 0.8], [0.4, 9.0]]])
    zeros = torch.zeros(1, 3, 2)
    out = critic_targets(REWARDS, zeros, target, MASK, estimator="td", lookahead=True)
    close(out.returns, [(0.2 + 0.6) / 2, (0.4 + 0.8) / 2, 1.0])
    plain = critic_targets(REWARDS, zeros, target, MASK, estimator="td")
    close(plain.returns, [0.2, 0.4, 1.0])


def test_masked_tokens_change_nothing() -> None:
    mask = torch.tensor([[1.0, 0, 1, 1]])
    rewards = torch.tensor([[0.0, float("nan"), 0.0, 1.0]])
    values = torch.cat([VALUES[:, :1], torch.full((1, 1, 1), float("inf")), VALUES[:, 1:]], dim=1)
    targets = torch.cat([TARGETS[:, :1], torch.full((1, 1, 1), float("nan")), TARGETS[:, 1:]], dim=1)
    for estimator in ("gae", "td", "mc"):
        dense = critic_targets(REWARDS, VALUES, TARGETS, MASK, estimator=estimator, gamma=0.9)
        holed = critic_targets(rewards, values, targets, mask, estimator=estimator, gamma=0.9)
        for a, b in zip(dense, holed, strict=True):
            assert torch.equal(a, b[:, [0, 2, 3]]) and b[0, 1] == 0


def test_targets_carry_no_gradient() -> None:
    values = VALUES.clone().requires_grad_()
    assert not any(x.requires_grad for x in critic_targets(REWARDS, values, values, MASK))


def test_unknown_names_are_refused_with_the_list() -> None:
    with pytest.raises(ValueError, match="Unknown advantage estimator 'ppo'; choose one of gae, td, mc"):
        critic_targets(REWARDS, VALUES, TARGETS, MASK, estimator="ppo")
    with pytest.raises(ValueError, match="Unknown advantage scaling 'batch'; choose one of none, whiten, value"):
        scale_advantages(REWARDS, VALUES[..., 0], MASK, scaling="batch")
    assert list(value_losses()) == ["squared", "clipped", "huber"]
    with pytest.raises(ValueError, match="gamma=1.5"):
        critic_targets(REWARDS, VALUES, TARGETS, MASK, gamma=1.5)


# Scaling


def test_scaling_none_and_whiten() -> None:
    advantages, mask = torch.tensor([[1.0, 2.0, 99.0], [3.0, 99.0, 99.0]]), torch.tensor([[1.0, 1, 0], [1, 0, 0]])
    assert torch.equal(scale_advantages(advantages, advantages, mask, scaling="none"), advantages)
    white = scale_advantages(advantages, advantages, mask)
    close(white, [-(1.5**0.5), 0.0, 0.0, 1.5**0.5, 0.0, 0.0])
    # Two ranks with the same numbers: sums double, moments stay.
    torch.testing.assert_close(scale_advantages(advantages, advantages, mask, reduce=lambda x: 2 * x), white)


def test_scaling_by_value() -> None:
    advantages = torch.ones(4, 2)
    values = torch.tensor([[0.5, 9.0], [9.0, 0.1], [0.999, 9.0], [0.0, 9.0]])
    mask = torch.tensor([[1.0, 1], [0, 1], [1, 1], [1, 1]])
    scaled = scale_advantages(advantages, values, mask, scaling="value")
    assert scaled[1, 0] == 0  # masked
    close(scaled[:, 1], [2.0, 1 / 0.3, 10.0, 10.0])  # 1 / sqrt(v (1 - v)), at most 10
    wide = scale_advantages(advantages, values * 4 - 2, mask, scaling="value", reward_range=(-2.0, 2.0))
    torch.testing.assert_close(wide, scaled / 4)


def test_initial_values_and_means() -> None:
    x, mask = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]]), torch.tensor([[1.0, 1, 0], [0, 1, 1], [0, 0, 0]])
    assert initial_values(x, mask).tolist() == [1.0, 5.0, 0.0]
    assert initial_values(x[:, :0], mask[:, :0]).tolist() == [0.0] * 3
    assert sequence_means(x, mask).tolist() == [1.5, 5.5, 0.0]


# Value loss


def test_value_loss_of_two_heads_with_a_hole_by_hand() -> None:
    values = torch.tensor([[[1.0, 2.0], [50.0, 60.0], [3.0, 4.0], [5.0, 6.0]]], requires_grad=True)
    returns, mask = torch.tensor([[1.5, float("nan"), 2.0, 4.0]]), torch.tensor([[1.0, 0, 1, 1]])
    loss, sums, counts = value_loss(
        values,
        returns,
        mask,
        num_items=torch.tensor(4.0),
        loss=value_losses()["squared"],
        old_values=torch.zeros_like(values),
    )
    # Head 1: (1-1.5)^2 + (3-2)^2 + (5-4)^2. Head 2 takes the next real target: (2-2)^2 + (4-4)^2, none for the last.
    assert counts.tolist() == [3.0, 2.0]
    assert sums.tolist() == [2.25, 0.0] and not sums.requires_grad
    assert loss.item() == pytest.approx(2.25 / (2 * 4))
    loss.backward()
    assert values.grad is not None
    close(values.grad[..., 0], [-1.0 / 8, 0.0, 2.0 / 8, 2.0 / 8])
    close(values.grad[..., 1], [0.0, 0.0, 0.0, 0.0])


def test_value_losses_by_name() -> None:
    v, y, old = torch.tensor([1.5]), torch.tensor([0.0]), torch.tensor([2.5])
    assert value_losses()["squared"](v, y, old).item() == 2.25
    assert value_losses()["huber"](v, y, old).item() == 1.0
    assert value_losses(huber_delta=0.5)["huber"](v, y, old).item() == 0.625
    assert value_losses(0.5)["clipped"](v, y, old).item() == 4.0  # clipped to 2.0, which is worse


# Metrics


def test_rollout_metrics_by_hand() -> None:
    mask = torch.tensor([[1.0, 1, 1, 0]])
    rewards = torch.tensor([[1.0, 1.0, 1.0, float("nan")]])
    values = torch.tensor([[[2.0, 2.0], [2.0, 1.0], [2.0, 7.0], [9.0, 9.0]]])
    targets = critic_targets(rewards, values, values + 0.25, mask, estimator="mc")
    metrics = rollout_metrics(targets, values, values + 0.25, mask)
    # Returns 3, 2, 1; head 1 says 2 throughout, head 2 says 2, 1 for the returns 2, 1 ahead.
    expected = {
        "critic/value_mean": 2.0,
        "critic/value_std": 0.0,
        "critic/return_mean": 2.0,
        "critic/return_std": (2 / 3) ** 0.5,
        "critic/advantage_mean": 0.0,
        "critic/advantage_std": (2 / 3) ** 0.5,
        "critic/td_error_abs": (1.25 + 1.25 + 1.0) / 3,
        "critic/target_gap": 0.25,
        "critic/explained_variance/head_1": 0.0,
        "critic/explained_variance/head_2": 1.0,
        "critic/explained_variance": 0.0,
    }
    assert set(metrics) == set(expected)
    for name, number in expected.items():
        assert metrics[name].item() == pytest.approx(number, abs=1e-6), name


def test_explained_variance_of_a_half_right_critic() -> None:
    mask = torch.ones(1, 3)
    rewards = torch.ones(1, 3)
    values = torch.tensor([[[2.5], [2.0], [1.5]]])  # half the spread of the returns 3, 2, 1
    targets = critic_targets(rewards, values, values, mask)
    assert rollout_metrics(targets, values, values, mask)["critic/explained_variance"].item() == pytest.approx(0.75)


# Calibration


def random_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, observed returns and mask of four completions, padded with garbage."""
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(6) < torch.tensor([[6], [4], [5], [2]])
    rewards = torch.randn(4, 6, generator=g)
    returns = critic_targets(rewards, torch.zeros(4, 6, 1), torch.zeros(4, 6, 1), mask).monte_carlo
    return rewards.masked_fill(~mask, torch.nan), returns.masked_fill(~mask, torch.nan), mask


def advantages_of(values: Tensor, *, calibrate: bool = True, scaling: str = "none", **options: Any) -> Tensor:
    rewards, _, mask = random_batch()
    values = values.unsqueeze(-1)
    return critic_signal(rewards, values, values, mask, scaling=scaling, calibrate=calibrate, **options)[1]


def test_calibrated_values_are_scaled_and_moved_until_they_fit() -> None:
    _, returns, mask = random_batch()
    # 2 G is twice the return: half of it is the return itself, and no advantage is left.
    torch.testing.assert_close(advantages_of(2 * returns), torch.zeros(4, 6))
    # Half the return plus 3 would need a slope of 2, which is more than 1: only its mean is put right.
    half = 0.5 * returns
    mean = half[mask].mean()
    expected = torch.where(mask, half - mean, 0.0)
    torch.testing.assert_close(advantages_of(half + 3), expected)
    assert advantages_of(half + 3, calibrate=False)[mask].mean() < -2


@pytest.mark.parametrize("values", ["constant", "the opposite"])
def test_values_that_explain_nothing_become_the_mean_of_the_batch(values: str) -> None:
    """Whitened, these are the advantages of REINFORCE++."""
    _, returns, mask = random_batch()
    useless = torch.full((4, 6), 7.0) if values == "constant" else -returns
    expected = torch.where(mask, returns - returns[mask].mean(), 0.0)
    torch.testing.assert_close(advantages_of(useless), expected)
    whitened = advantages_of(useless, scaling="whiten")
    torch.testing.assert_close(whitened, torch.where(mask, expected / returns[mask].std(correction=0), 0.0))


def test_the_line_is_that_of_least_squares() -> None:
    """Against numpy's, on values that know part of the return."""
    rewards, returns, mask = random_batch()
    values = (returns + torch.randn(4, 6, generator=torch.Generator().manual_seed(1))).unsqueeze(-1)
    slope, intercept = np.polyfit(values[..., 0][mask].numpy(), returns[mask].numpy(), 1)
    assert 0.2 < slope < 0.9
    targets, advantages, metrics = critic_signal(rewards, values, values, mask, scaling="none", calibrate=True)
    expected = returns - slope * values[..., 0] - intercept
    torch.testing.assert_close(advantages[mask], expected[mask].float())
    assert metrics["critic/calibration"].item() == pytest.approx(slope, abs=1e-6)
    raw, _, before = critic_signal(rewards, values, values, mask, scaling="none")
    assert "critic/calibration" not in before
    # Targets of the values, and what is said of their quality, are those of the values as they are.
    torch.testing.assert_close(targets.returns, raw.returns)
    torch.testing.assert_close(metrics["critic/explained_variance"], before["critic/explained_variance"])


def test_calibration_corrects_what_advantages_bootstrap_from() -> None:
    """Lambda 0: `A = r + V(s') - V(s)` of corrected values, 0 at the end; the value of a cut is corrected, too."""
    rewards, returns, mask = random_batch()
    values = (returns + torch.randn(4, 6, generator=torch.Generator().manual_seed(1))).unsqueeze(-1)
    after, cut = torch.tensor([0.0, 0.7, 0.0, 0.0]), torch.tensor([False, True, False, True])
    options = {"estimator": "td", "after": after, "cut": cut}  # the last one was cut in a state of value 0
    raw, _, _ = critic_signal(rewards, values, values, mask, scaling="none", **options)
    slope, intercept = np.polyfit(values[..., 0][mask].numpy(), raw.monte_carlo[mask].numpy(), 1)
    found = critic_signal(rewards, values, values, mask, scaling="none", calibrate=True, **options)[1]
    for row, length in enumerate([6, 4, 5, 2]):
        corrected = [slope * float(v) + intercept for v in values[row, :length, 0]]
        corrected.append(slope * float(after[row]) + intercept if cut[row] else 0.0)
        expected = [float(rewards[row, t]) + corrected[t + 1] - corrected[t] for t in range(length)]
        torch.testing.assert_close(found[row, :length], torch.tensor(expected, dtype=torch.float32))
