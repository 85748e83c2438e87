"""The loss of an online step and the metrics of its completions, worked by hand and against TRL's arithmetic."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rl_plugins.functional.advantages.tracked import forget_factor
from rl_plugins.signals.metrics import completion_metrics, reward_metrics
from rl_plugins.signals.online import online_loss
from rl_plugins.signals.policy import PolicyLoss
from rl_plugins.signals.value_tracker import TrackedAdvantages

LENGTH = 8


def batch(seed: int = 1) -> dict[str, Tensor]:
    """Three completions of up to 5 tokens, the policy a little away from the sampler and the reference."""
    g = torch.Generator().manual_seed(seed)
    logps = -2.0 * torch.rand(3, 5, generator=g)
    return {
        "logps": logps,
        "old_logps": logps + 0.8 * torch.randn(3, 5, generator=g),
        "advantages": torch.tensor([1.5, -0.7, -2.0]),
        "mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]),
        "ref_logps": logps + 0.3 * torch.randn(3, 5, generator=g),
        "entropies": torch.rand(3, 5, generator=g),
    }


def loss_of(x: dict[str, Tensor], aggregation: str = "token", **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    loss = PolicyLoss("ppo_clip", aggregation)
    return online_loss(
        loss, x["logps"], x["old_logps"], x["advantages"], x["mask"],
        num_items=7.0, max_length=LENGTH, ref_logps=x["ref_logps"], entropies=x["entropies"], **options
    )  # fmt: skip


def trl_loss(x: dict[str, Tensor], aggregation: str, beta: float, entropy_coef: float) -> Tensor:
    """TRL 1.16's `_compute_loss`, without the bias correction of the KL."""
    ratio = (x["logps"] - x["old_logps"]).exp()
    advantages, mask = x["advantages"].unsqueeze(1), x["mask"]
    per_token = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    gap = x["ref_logps"] - x["logps"]
    per_token = per_token + beta * (gap.exp() - gap - 1)
    total = (per_token * mask).sum()
    loss = {
        "token": total / 7.0,
        "sequence": ((per_token * mask).sum(-1) / mask.sum(-1)).mean(),
        "micro_batch": total / mask.sum(),
        "constant": total / (3 * LENGTH),
        "sequence_sum": (per_token * mask).sum(-1).mean(),
    }[aggregation]
    return loss - entropy_coef * (x["entropies"] * mask).sum() / mask.sum()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_forced_tokens_leave_loss_and_gradient_finite(level: str) -> None:
    """A token that the sampler, the policy or the reference gives next to no probability."""
    x = batch()
    x["old_logps"][0, 1], x["ref_logps"][1, 1] = -200.0, -math.inf
    x["logps"][2, 0], x["old_logps"][2, 1] = -150.0, -math.inf
    x["logps"].requires_grad_()
    loss, metrics = online_loss(
        PolicyLoss("ppo_clip", options={"level": level}), x["logps"], x["old_logps"], x["advantages"], x["mask"],
        num_items=7.0, max_length=LENGTH, ref_logps=x["ref_logps"], beta=0.1, correct_kl=True,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, x["logps"])
    assert loss.isfinite() and gradient.isfinite().all() and metrics["kl"].isfinite()


@pytest.mark.parametrize("aggregation", ["token", "sequence", "micro_batch", "constant", "sequence_sum"])
def test_loss_and_gradient_are_trls(aggregation: str) -> None:
    gradients = []
    losses = []
    for compute in (
        lambda x: loss_of(x, aggregation, beta=0.3, entropy_coef=0.2)[0],
        lambda x: trl_loss(x, aggregation, 0.3, 0.2),
    ):
        x = batch()
        x["logps"].requires_grad_(), x["entropies"].requires_grad_()
        losses.append(compute(x))
        losses[-1].backward()
        gradients.append((x["logps"].grad, x["entropies"].grad))
    torch.testing.assert_close(losses[0], losses[1])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert theirs.abs().max() > 1e-3


def test_parts_add_up_and_are_logged() -> None:
    x = batch()
    mask, tokens = x["mask"].bool(), x["mask"].sum()
    plain, metrics = loss_of(x)
    whole, more = loss_of(x, beta=0.3, entropy_coef=0.2)
    gap = (x["ref_logps"] - x["logps"])[mask]
    kl, entropy = (gap.exp() - gap - 1).sum(), x["entropies"][mask].sum()
    torch.testing.assert_close(whole - plain, 0.3 * kl / 7.0 - 0.2 * entropy / tokens)
    torch.testing.assert_close(more["kl"], kl / tokens)  # a mean over tokens, whatever the loss is averaged by
    torch.testing.assert_close(more["entropy"], entropy / tokens)
    torch.testing.assert_close(metrics["entropy"], entropy / tokens)
    assert "kl" not in metrics
    ratio, advantages = (x["logps"] - x["old_logps"]).exp(), x["advantages"].unsqueeze(1)
    low, high = (ratio < 0.8) & (advantages < 0) & mask, (ratio > 1.2) & (advantages > 0) & mask
    assert low.any() and high.any()
    for name, cut in (("low", low), ("high", high), ("region", low | high)):
        torch.testing.assert_close(metrics[f"clip_ratio/{name}_mean"], cut.sum() / tokens)


def test_padding_may_hold_anything() -> None:
    clean = loss_of(batch(), beta=0.3, entropy_coef=0.2)
    x = batch()
    for name in ("logps", "old_logps", "ref_logps", "entropies"):
        x[name][x["mask"] == 0] = torch.nan if name != "old_logps" else torch.inf
    x["logps"].requires_grad_()
    loss, metrics = loss_of(x, beta=0.3, entropy_coef=0.2)
    loss.backward()
    assert torch.equal(loss.detach(), clean[0])
    for name, value in metrics.items():
        assert torch.equal(value, clean[1][name]), name
    assert x["logps"].grad is not None and x["logps"].grad.isfinite().all()
    assert (x["logps"].grad[x["mask"] == 0] == 0).all()


def test_metrics_are_of_all_ranks() -> None:
    """Two ranks with the same rows: sums double, means stay."""
    once = loss_of(batch(), beta=0.3)[1]
    twice = loss_of(batch(), beta=0.3, reduce=lambda sums: 2 * sums)[1]
    for name, value in once.items():
        torch.testing.assert_close(twice[name], value)
    # And with an empty rank beside one, which adds nothing.
    sums: list[Tensor] = []
    loss_of(batch(), beta=0.3, reduce=lambda x: sums.append(x) or x)
    assert len(sums) >= 5


def test_a_kl_term_needs_a_reference() -> None:
    x = batch()
    x["ref_logps"] = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"beta=0\.1 weighs the KL to a reference: give ref_logps, or set beta=0"):
        loss_of(x, beta=0.1)


def test_lengths_by_hand() -> None:
    lengths, ended = torch.tensor([3, 6, 1, 6]), torch.tensor([True, False, True, True])
    expected = {
        "completions/mean_terminated_length": 10 / 3,
        "completions/min_terminated_length": 1.0,
        "completions/max_terminated_length": 6.0,
        "completions/mean_length": 4.0,
        "completions/min_length": 1.0,
        "completions/max_length": 6.0,
        "completions/clipped_ratio": 0.25,
    }
    assert {k: v.item() for k, v in completion_metrics(lengths, ended).items()} == pytest.approx(expected)
    none = completion_metrics(lengths, torch.zeros(4, dtype=torch.bool))
    assert all(none[f"completions/{name}_terminated_length"] == 0.0 for name in ("mean", "min", "max"))
    assert none["completions/clipped_ratio"] == 1.0


def test_rewards_by_hand() -> None:
    nan = math.nan
    rewards = torch.tensor([[1.0, nan], [0.0, nan], [1.0, nan], [1.0, 4.0], [nan, nan], [0.5, 2.0]])
    scores = torch.tensor([1.0, 0.0, 1.0, 1.0, nan, 0.5])
    metrics = {k: v.item() for k, v in reward_metrics(rewards, scores, ["right", "style"], 2).items()}
    assert metrics == pytest.approx(
        {
            "reward": 0.7,
            "reward_std": math.sqrt((3 * 0.09 + 0.49 + 0.04) / 4),
            "rewards/right/mean": 0.7,
            "rewards/right/std": math.sqrt((3 * 0.09 + 0.49 + 0.04) / 4),
            "rewards/style/mean": 3.0,
            "rewards/style/std": math.sqrt(2.0),
            "frac_reward_zero_std": 1 / 3,  # the second group; the third has one number and no spread
        }
    )
    assert "frac_reward_zero_std" not in reward_metrics(rewards, scores, ["right", "style"], 1)
    nothing = reward_metrics(torch.full((2, 1), nan), torch.full((2,), nan), ["f"], 1)
    assert all(value.isnan() for value in nothing.values()) and set(nothing) == {
        "reward", "reward_std", "rewards/f/mean", "rewards/f/std"
    }  # fmt: skip


# SPO's advantages, which remember prompts


def test_tracked_advantages_by_hand() -> None:
    tracked = TrackedAdvantages({"forget": 0.5})
    assert not tracked.needs_rows
    advantages, metrics = tracked.advantages(["a", "b"], torch.tensor([1.0, 0.0]))
    # Both prompts are new: Beta(1/2, 1/2) expects a half, and the batch is normalised.
    torch.testing.assert_close(advantages[0], -advantages[1])
    assert advantages[0] > 0 and metrics["value_tracker/value_mean"] == 0.5 and metrics["value_tracker/prompts"] == 0
    tracked.remember(["a", "b"], torch.tensor([1.0, 0.0]), None)
    assert not tracked.tracker.counts, "one step of delay"
    assert tracked.absorb(lambda rows: pytest.fail("a constant needs no distances")) == {}
    assert tracked.tracker.counts == {"a": (1.25, 0.25), "b": (0.25, 1.25)}
    assert tracked.absorb(lambda rows: pytest.fail("taken in already")) == {}
    _, metrics = tracked.advantages(["a", "b"], torch.tensor([1.0, math.nan]))
    assert metrics["value_tracker/value_mean"] == 0.5 and metrics["value_tracker/prompts"] == 2
    tracked.remember(["a", "b"], torch.tensor([1.0, math.nan]), None)
    tracked.absorb(lambda rows: torch.zeros(2))
    assert tracked.tracker.counts == {"a": (1.625, 0.125), "b": (0.25, 1.25)}


def test_old_counts_fade_as_the_policy_moves() -> None:
    tracked = TrackedAdvantages({})
    distances = torch.tensor([0.0, 0.05])
    for _ in range(2):
        tracked.remember(["a", "b"], torch.tensor([1.0, 1.0]), "rows")
        metrics = tracked.absorb(lambda rows: distances if rows == "rows" else pytest.fail("other rows"))
    forget = forget_factor(distances)
    assert forget[0] > forget[1]
    assert metrics["value_tracker/forget_mean"] == forget.mean()
    for key, rho in zip("ab", forget.double().tolist(), strict=True):
        alpha = beta = 0.5
        for _ in range(2):
            alpha, beta = rho * alpha + 1.0, rho * beta
        assert tracked.tracker.counts[key] == pytest.approx((alpha, beta))


def test_tracked_rewards_are_shares_of_success() -> None:
    with pytest.raises(ValueError, match="with rewards in .0, 1., but there are rewards from -1 to 2. Scale them"):
        TrackedAdvantages({}).advantages(["a", "b"], torch.tensor([-1.0, 2.0]))
