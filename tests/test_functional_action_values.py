"""Targets for action values against numbers worked by hand, a slow loop, and each other."""

import math

import pytest
import torch
from torch import Tensor

from rl_plugins.functional import (
    double_q_targets,
    expected_sarsa_targets,
    q_learning_targets,
    sarsa_targets,
    stochastic_update,
)

# Two transitions go on and one ends; gamma = 1/2, so every number is exact in binary.
REWARDS = torch.tensor([1.0, -2.0, 3.0])
NEXT_Q = torch.tensor([[4.0, 8.0], [6.0, -2.0], [math.nan, math.inf]])
OTHER_Q = torch.tensor([[10.0, 20.0], [30.0, 40.0], [math.nan, math.nan]])
POLICY = torch.tensor([[0.25, 0.75], [0.5, 0.5], [math.nan, math.nan]])
ACTIONS = torch.tensor([0, 1, -1])  # garbage after the end
ENDED = torch.tensor([False, False, True])


def random_batch(*shape: int, actions: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(shape, generator=generator, dtype=torch.float64)
    next_q = torch.randn((*shape, actions), generator=generator, dtype=torch.float64)
    policy = torch.rand((*shape, actions), generator=generator, dtype=torch.float64).softmax(-1)
    chosen = torch.randint(actions, shape, generator=generator)
    ended = torch.rand(shape, generator=generator) < 0.3
    return rewards, next_q, policy, chosen, ended


def test_by_hand() -> None:
    assert sarsa_targets(REWARDS, NEXT_Q, ACTIONS, ENDED, gamma=0.5).tolist() == [3.0, -3.0, 3.0]
    # 4 / 4 + 8 * 3 / 4 = 7; 6 / 2 - 2 / 2 = 2
    assert expected_sarsa_targets(REWARDS, NEXT_Q, POLICY, ENDED, gamma=0.5).tolist() == [4.5, -1.0, 3.0]
    assert q_learning_targets(REWARDS, NEXT_Q, ENDED, gamma=0.5).tolist() == [5.0, 1.0, 3.0]
    # NEXT_Q chooses actions 1 and 0, OTHER_Q judges them: 20 and 30.
    assert double_q_targets(REWARDS, NEXT_Q, OTHER_Q, ENDED, gamma=0.5).tolist() == [11.0, 13.0, 3.0]
    assert double_q_targets(REWARDS, OTHER_Q, NEXT_Q, ENDED, gamma=0.5).tolist() == [5.0, -3.0, 3.0]


@pytest.mark.parametrize("shape", [(7,), (5, 3), (2, 3, 4), ()])
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_against_slow_loop(shape: tuple[int, ...], gamma: float) -> None:
    rewards, next_q, policy, chosen, ended = random_batch(*shape)
    results = {
        "sarsa": sarsa_targets(rewards, next_q, chosen, ended, gamma=gamma),
        "expected": expected_sarsa_targets(rewards, next_q, policy, ended, gamma=gamma),
        "greedy": q_learning_targets(rewards, next_q, ended, gamma=gamma),
        "double": double_q_targets(rewards, -next_q, next_q, ended, gamma=gamma),
    }
    assert all(result.shape == shape for result in results.values())
    flat_q, flat_policy = next_q.reshape(-1, 4).tolist(), policy.reshape(-1, 4).tolist()
    for i, reward in enumerate(rewards.reshape(-1).tolist()):
        following = {
            "sarsa": flat_q[i][int(chosen.reshape(-1)[i])],
            "expected": sum(p * q for p, q in zip(flat_policy[i], flat_q[i], strict=True)),
            "greedy": max(flat_q[i]),
            "double": min(flat_q[i]),  # -q chooses the worst action, q judges it
        }
        for name, value in following.items():
            expected = reward if ended.reshape(-1)[i] else reward + gamma * value
            assert results[name].reshape(-1)[i].item() == pytest.approx(expected, abs=1e-12)


def test_special_cases_are_exact() -> None:
    rewards, next_q, _, chosen, ended = random_batch(1000)
    one_hot = torch.eye(4, dtype=torch.float64)
    taken = expected_sarsa_targets(rewards, next_q, one_hot[chosen], ended, gamma=0.9)
    assert torch.equal(taken, sarsa_targets(rewards, next_q, chosen, ended, gamma=0.9))
    best = q_learning_targets(rewards, next_q, ended, gamma=0.9)
    assert torch.equal(best, expected_sarsa_targets(rewards, next_q, one_hot[next_q.argmax(-1)], ended, gamma=0.9))
    assert torch.equal(best, torch.where(ended, rewards, rewards + 0.9 * next_q.max(-1).values))


def test_forbidden_actions_do_not_count() -> None:
    next_q = torch.tensor([[-math.inf, 2.0, math.nan]])
    args = torch.tensor([1.0]), next_q
    ended = torch.tensor([False])
    assert sarsa_targets(*args, torch.tensor([1]), ended, gamma=0.5).tolist() == [2.0]
    assert expected_sarsa_targets(*args, torch.tensor([[0.0, 1.0, 0.0]]), ended, gamma=0.5).tolist() == [2.0]
    # A NaN of an action that does count is not hidden.
    assert expected_sarsa_targets(*args, torch.tensor([[0.0, 0.5, 0.5]]), ended, gamma=0.5).isnan().all()


def test_garbage_after_the_end_reaches_no_gradient() -> None:
    next_q = NEXT_Q.clone().requires_grad_()
    policy = POLICY.clone().requires_grad_()
    expected_sarsa_targets(REWARDS, next_q, policy, ENDED, gamma=0.5).sum().backward()
    assert next_q.grad is not None and policy.grad is not None
    assert next_q.grad.tolist() == [[0.125, 0.375], [0.25, 0.25], [0.0, 0.0]]
    assert policy.grad.tolist() == [[2.0, 4.0], [3.0, -1.0], [0.0, 0.0]]


def test_update_by_hand() -> None:
    q, targets = torch.tensor([4.0, 8.0]), torch.tensor([8.0, 0.0])
    assert stochastic_update(q, targets, 0.25).tolist() == [5.0, 6.0]
    assert stochastic_update(q, targets, torch.tensor(0.25)).tolist() == [5.0, 6.0]
    assert stochastic_update(q, targets, torch.tensor([0.5, 0.75])).tolist() == [6.0, 2.0]
    assert q.tolist() == [4.0, 8.0]  # out of place
    noisy = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(stochastic_update(1e9 * noisy, noisy, 1.0), noisy)
    assert torch.equal(stochastic_update(noisy, 1e9 * noisy, 0.0), noisy)


def test_one_over_n_is_the_mean() -> None:
    """With `alpha_n = 1 / n` the estimate is the average of its targets, whatever it started from."""
    targets = torch.randn(50, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    q = torch.full((3,), 1e6, dtype=torch.float64)
    for n, target in enumerate(targets, start=1):
        q = stochastic_update(q, target, 1 / n)
    torch.testing.assert_close(q, targets.mean(0))


def test_dtypes() -> None:
    half = REWARDS.bfloat16(), NEXT_Q.half(), ENDED
    assert q_learning_targets(*half, gamma=0.5).dtype == torch.float32
    assert q_learning_targets(REWARDS, NEXT_Q.double(), ENDED.long(), gamma=0.5).tolist() == [5.0, 1.0, 3.0]
    assert stochastic_update(torch.zeros(2), torch.ones(2, dtype=torch.float64), 0.1).dtype == torch.float64
    assert stochastic_update(torch.zeros(2, dtype=torch.long), torch.tensor([1, 2]), 0.5).tolist() == [0.5, 1.0]


@pytest.mark.parametrize("gamma", [-0.1, 1.1, math.nan])
def test_gamma_is_checked(gamma: float) -> None:
    for call in (
        lambda: sarsa_targets(REWARDS, NEXT_Q, ACTIONS, ENDED, gamma=gamma),
        lambda: expected_sarsa_targets(REWARDS, NEXT_Q, POLICY, ENDED, gamma=gamma),
        lambda: q_learning_targets(REWARDS, NEXT_Q, ENDED, gamma=gamma),
        lambda: double_q_targets(REWARDS, NEXT_Q, OTHER_Q, ENDED, gamma=gamma),
    ):
        with pytest.raises(ValueError, match="gamma"):
            call()


def test_shapes_are_checked() -> None:
    for call in (
        lambda: q_learning_targets(REWARDS[:, None], NEXT_Q, ENDED, gamma=0.5),
        lambda: q_learning_targets(REWARDS, NEXT_Q[:2], ENDED, gamma=0.5),
        lambda: q_learning_targets(REWARDS, REWARDS, ENDED, gamma=0.5),
        lambda: q_learning_targets(REWARDS, NEXT_Q[:, :0], ENDED, gamma=0.5),
        lambda: q_learning_targets(REWARDS, NEXT_Q, ENDED[:, None], gamma=0.5),
        lambda: sarsa_targets(REWARDS, NEXT_Q, ACTIONS[:, None], ENDED, gamma=0.5),
        lambda: expected_sarsa_targets(REWARDS, NEXT_Q, POLICY[:, :1], ENDED, gamma=0.5),
        lambda: double_q_targets(REWARDS, NEXT_Q, OTHER_Q[:, :1], ENDED, gamma=0.5),
        lambda: stochastic_update(REWARDS, REWARDS[:, None], 0.5),
        lambda: stochastic_update(REWARDS, REWARDS, torch.ones(2)),
    ):
        with pytest.raises(ValueError, match=r"\("):
            call()


@pytest.mark.parametrize("action", [-1, 2])
def test_actions_are_checked(action: int) -> None:
    with pytest.raises(ValueError, match=r"0 \.\. 1"):
        sarsa_targets(REWARDS, NEXT_Q, torch.tensor([0, action, 0]), ENDED, gamma=0.5)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan, torch.tensor([0.5, 0.5, 1.5])])
def test_alpha_is_checked(alpha: float | Tensor) -> None:
    with pytest.raises(ValueError, match="alpha"):
        stochastic_update(REWARDS, REWARDS, alpha)
