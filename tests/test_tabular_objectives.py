"""Objectives and their exact gradients against power series, autograd, finite differences and REINFORCE."""

import pytest
import torch
from torch import Tensor

from rl_plugins.functional import discounted_returns, vanilla
from rl_plugins.tabular import (
    MDP,
    ParallelMDP,
    average_reward,
    average_reward_gradient,
    differential_values,
    discounted_objective,
    discounted_visitation,
    policy_gradient,
    solve_values,
    stationary_distribution,
    value_iteration,
)

from .helpers.random_mdps import random_mdp, random_policy, random_tables

SEEDS = (0, 1, 2)


def random_logits(mdp: MDP, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(mdp.n_states, mdp.n_actions, generator=generator, dtype=torch.float64)


def with_start(seed: int, gamma: float = 0.9, end: bool = True) -> MDP:
    start = torch.tensor([0.5, 0.25, 0.25, 0.0, 0.0, 0.0])
    return MDP(*random_tables(seed=seed, end=end), gamma, start=start)


def test_two_states_by_hand() -> None:
    """0 -> 1 -> 0 or 1, each half of the time; only state 1 pays, 3."""
    transitions = torch.tensor([[[0.0, 1.0]], [[0.5, 0.5]]])
    mdp = MDP(transitions, torch.tensor([[0.0], [3.0]]), 0.5, start=torch.tensor([1.0, 0.0]))
    policy = torch.ones(2, 1)
    assert stationary_distribution(mdp, policy).tolist() == pytest.approx([1 / 3, 2 / 3])
    assert average_reward(mdp, policy).item() == pytest.approx(2.0)
    # h0 = -2 + h1; h1 = 1 + (h0 + h1) / 2; h0 / 3 + 2 h1 / 3 = 0
    assert differential_values(mdp, policy).tolist() == pytest.approx([-4 / 3, 2 / 3])
    # eta0 = 1 + eta1 / 4; eta1 = eta0 / 2 + eta1 / 4
    assert discounted_visitation(mdp, policy).tolist() == pytest.approx([1.2, 0.8])
    assert discounted_objective(mdp, policy).item() == pytest.approx(2.4)


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_visitation_and_objective_against_power_series(seed: int, end: bool) -> None:
    mdp = with_start(seed, end=end)
    policy = random_policy(mdp, seed)
    matrix, rewards = mdp.chain(policy)
    visits, objective, here = torch.zeros(6).double(), 0.0, mdp.start
    for t in range(400):
        visits += 0.9**t * here
        objective += 0.9**t * float(here @ rewards)
        here = here @ matrix
    visits[mdp.terminal] = 0.0
    torch.testing.assert_close(discounted_visitation(mdp, policy), visits)
    assert discounted_objective(mdp, policy).item() == pytest.approx(objective)
    # The seed's two forms of the metric: values of first states, or rewards of visited ones.
    assert float(visits @ rewards) == pytest.approx(objective)
    assert end or float(visits.sum()) == pytest.approx(10.0)


@pytest.mark.parametrize("seed", SEEDS)
def test_average_reward_against_long_runs(seed: int) -> None:
    mdp = random_mdp(seed=seed, end=False)
    policy = random_policy(mdp, seed)
    matrix, rewards = mdp.chain(policy)
    power = torch.linalg.matrix_power(matrix, 1 << 10)
    share = stationary_distribution(mdp, policy)
    torch.testing.assert_close(power, share.expand(6, 6))
    average = average_reward(mdp, policy)
    assert average.item() == pytest.approx(float(power[0] @ rewards))
    # h = sum_t (P^t r - r_bar)
    total, expected = torch.zeros(6).double(), rewards
    for _ in range(500):
        total, expected = total + expected - average, matrix @ expected
    torch.testing.assert_close(differential_values(mdp, policy), total)
    # For gamma -> 1, (1 - gamma) v is the average reward, and v - r_bar / (1 - gamma) the differential value.
    near = MDP(mdp.transitions(), mdp.rewards, 1 - 1e-6)
    values = solve_values(near, policy)
    torch.testing.assert_close(1e-6 * values, average.expand(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(values - 1e6 * average, total, atol=1e-4, rtol=0)


def test_periodic_and_split_chains() -> None:
    cycle = torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]]])
    mdp = MDP(cycle, torch.tensor([[1.0], [2.0]]), 0.9)
    assert stationary_distribution(mdp, torch.ones(2, 1)).tolist() == pytest.approx([0.5, 0.5])
    assert average_reward(mdp, torch.ones(2, 1)).item() == pytest.approx(1.5)
    split = MDP(torch.eye(2)[:, None], torch.tensor([[1.0], [2.0]]), 0.9)
    with pytest.raises(ValueError, match="depends on the start"):
        average_reward(split, torch.ones(2, 1))
    ends = random_mdp()
    assert stationary_distribution(ends, random_policy(ends))[-1].item() == pytest.approx(1.0)
    assert average_reward(ends, random_policy(ends)).item() == pytest.approx(0.0, abs=1e-12)


# Gradients


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_policy_gradient_is_autograd_through_the_linear_system(seed: int, gamma: float) -> None:
    mdp = with_start(seed, gamma=gamma)
    logits = random_logits(mdp, seed).requires_grad_()
    discounted_objective(mdp, torch.softmax(logits, -1)).backward()
    exact = policy_gradient(mdp, logits)
    assert logits.grad is not None and exact.abs().max() > 1e-2
    assert float((exact - logits.grad).abs().max()) < 1e-10
    assert not exact.requires_grad and float(exact.sum(-1).abs().max()) < 1e-12


@pytest.mark.parametrize("seed", SEEDS)
def test_average_reward_gradient_is_autograd(seed: int) -> None:
    mdp = random_mdp(seed=seed, end=False)
    logits = random_logits(mdp, seed).requires_grad_()
    average_reward(mdp, torch.softmax(logits, -1)).backward()
    exact = average_reward_gradient(mdp, logits)
    assert logits.grad is not None and exact.abs().max() > 1e-2
    assert float((exact - logits.grad).abs().max()) < 1e-10


def test_gradients_against_finite_differences() -> None:
    mdp = random_mdp(end=False)
    logits, width = random_logits(mdp, 0), 1e-5
    for objective, exact in (
        (discounted_objective, policy_gradient(mdp, logits)),
        (average_reward, average_reward_gradient(mdp, logits)),
    ):
        for s, a in ((0, 0), (3, 2), (5, 1)):
            nudge = torch.zeros_like(logits)
            nudge[s, a] = width
            up, down = (objective(mdp, torch.softmax(logits + sign * nudge, -1)) for sign in (1, -1))
            assert exact[s, a].item() == pytest.approx(((up - down) / (2 * width)).item(), abs=1e-8)


@pytest.mark.slow
def test_ascent_reaches_the_optimum() -> None:
    mdp = random_mdp(seed=4)
    logits = torch.zeros(6, 3).double()
    for _ in range(1000):
        logits += 50 * policy_gradient(mdp, logits)
    best = mdp.start @ value_iteration(mdp).values
    assert discounted_objective(mdp, torch.softmax(logits, -1)).item() == pytest.approx(best.item(), abs=1e-3)


@pytest.mark.parametrize("seed", SEEDS)
def test_reinforce_is_the_exact_gradient_on_average(seed: int) -> None:
    """The score-function estimate of `functional.vanilla`, `gamma^t G_t grad ln pi` (the seed's 6.5), by autograd.

    100 batches of 200 episodes give a mean and its standard error; no entry is off by more than 4.5 of them.
    """
    mdp = MDP(*random_tables(seed=seed, weight_of_last=0.5), 0.9)
    logits = random_logits(mdp, seed)
    copies = ParallelMDP(mdp, 20_000, generator=torch.Generator().manual_seed(seed))
    rollout = copies.rollout(torch.softmax(logits, -1), 100)
    assert rollout.terminated.any(1).all()
    discount = 0.9 ** torch.arange(rollout.mask.shape[1]).double()
    returns = discount * discounted_returns(rollout.rewards, rollout.mask, gamma=0.9)
    # One table of logits for each batch, so that one backward pass gives one gradient for each.
    tables = logits.repeat(100, 1, 1).requires_grad_()
    batch = torch.arange(20_000)[:, None] // 200
    logps = torch.log_softmax(tables, -1)[batch, rollout.states, rollout.actions]
    (vanilla(logps, returns, rollout.mask).sum() / 200).backward()
    assert tables.grad is not None
    estimates = -tables.grad
    error = estimates.mean(0) - policy_gradient(mdp, logits)
    standard_error = estimates.std(0) / 10
    assert float((error / standard_error)[:-1].abs().max()) < 4.5
    assert float(standard_error.max()) < 0.05
