"""Planning against slow loops, brute force, each other, and the known values of FrozenLake."""

import math
from functools import cache

import gymnasium as gym
import pytest
import torch
from torch import Tensor

from rl_plugins.functional import expected_sarsa_targets, q_learning_targets
from rl_plugins.tabular import (
    MDP,
    Plan,
    action_values,
    bellman_expectation,
    bellman_expectation_q,
    bellman_optimality,
    bellman_optimality_q,
    epsilon_greedy_policy,
    finite_horizon_values,
    greedy_policy,
    policy_evaluation,
    policy_iteration,
    solve_values,
    state_values,
    truncated_policy_iteration,
    value_iteration,
)

from .helpers.random_mdps import random_mdp, random_policy

SEEDS = (0, 1, 2)


def random_values(mdp: MDP, seed: int = 0) -> Tensor:
    values = torch.randn(mdp.n_states, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.where(mdp.terminal, 0.0, values)


def loop_action_values(mdp: MDP, values: Tensor) -> list[list[float]]:
    dense = mdp.transitions()
    return [
        [
            float(mdp.rewards[s, a])
            + mdp.gamma * sum(float(dense[s, a, t]) * float(values[t]) for t in range(mdp.n_states))
            for a in range(mdp.n_actions)
        ]
        for s in range(mdp.n_states)
    ]


# Operators


@pytest.mark.parametrize("seed", SEEDS)
def test_operators_against_loops(seed: int) -> None:
    mdp = random_mdp(seed=seed)
    policy, values = random_policy(mdp, seed), random_values(mdp, seed)
    q = torch.tensor(loop_action_values(mdp, values), dtype=torch.float64)
    close = torch.testing.assert_close
    close(action_values(mdp, values), q)
    close(bellman_optimality(mdp, values), torch.tensor([max(row) for row in q.tolist()]).double())
    mixed = [sum(p * x for p, x in zip(*rows, strict=True)) for rows in zip(policy.tolist(), q.tolist(), strict=True)]
    close(bellman_expectation(mdp, policy, values), torch.tensor(mixed).double())
    # The operators for q and for v are the same ones, seen half a step later.
    one_step = bellman_expectation(mdp, policy, state_values(policy, q))
    close(state_values(policy, bellman_expectation_q(mdp, policy, q)), one_step)
    assert torch.equal(bellman_optimality_q(mdp, q), action_values(mdp, q.amax(-1)))


def test_operators_are_means_of_the_targets() -> None:
    """The expectation of a sampled target over its outcomes is the operator: what Sarsa and Q-learning solve."""
    mdp = random_mdp()
    policy = random_policy(mdp)
    q = torch.where(mdp.terminal[:, None], 0.0, random_policy(mdp, 1))
    outcome = mdp.outcome_rewards, q[mdp.successors]
    ended = mdp.terminal[mdp.successors]
    expected = expected_sarsa_targets(*outcome, policy[mdp.successors], ended, gamma=mdp.gamma)
    mean = (mdp.probabilities * expected).sum(0)
    torch.testing.assert_close(mean, bellman_expectation_q(mdp, policy, q))
    best = q_learning_targets(*outcome, ended, gamma=mdp.gamma)
    torch.testing.assert_close((mdp.probabilities * best).sum(0), bellman_optimality_q(mdp, q))


@pytest.mark.parametrize("seed", SEEDS)
def test_operators_contract_to_their_fixed_points(seed: int) -> None:
    mdp = random_mdp(seed=seed, end=False)
    policy, first, second = random_policy(mdp, seed), random_values(mdp, seed), random_values(mdp, seed + 9)
    distance = (first - second).abs().max()
    for one, other in (
        (bellman_optimality(mdp, first), bellman_optimality(mdp, second)),
        (bellman_expectation(mdp, policy, first), bellman_expectation(mdp, policy, second)),
    ):
        assert (one - other).abs().max() <= mdp.gamma * distance
    close = torch.testing.assert_close
    values = solve_values(mdp, policy)
    close(bellman_expectation(mdp, policy, values), values, atol=1e-12, rtol=0)
    best = value_iteration(mdp, tolerance=1e-13).values
    close(bellman_optimality(mdp, best), best, atol=1e-12, rtol=0)
    for operator, q in (
        (lambda q: bellman_expectation_q(mdp, policy, q), action_values(mdp, values)),
        (lambda q: bellman_optimality_q(mdp, q), action_values(mdp, best)),
    ):
        close(operator(q), q, atol=1e-12, rtol=0)


def test_policies_of_action_values_by_hand() -> None:
    q = torch.tensor([[1.0, 3.0, 3.0, 0.0], [2.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    assert greedy_policy(q).tolist() == [[0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]
    assert epsilon_greedy_policy(q, 0.5).tolist() == [[0.125, 0.625, 0.125, 0.125], [0.625, 0.125, 0.125, 0.125]]
    assert epsilon_greedy_policy(q, 1.0).tolist() == [[0.25] * 4] * 2
    assert torch.equal(epsilon_greedy_policy(q, 0.0), greedy_policy(q))
    for epsilon in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="epsilon"):
            epsilon_greedy_policy(q, epsilon)


# Evaluation


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_evaluation_is_the_closed_form(seed: int, gamma: float) -> None:
    mdp = random_mdp(seed=seed, gamma=gamma)
    policy = random_policy(mdp, seed)
    values = solve_values(mdp, policy)
    torch.testing.assert_close(policy_evaluation(mdp, policy).values, values, atol=1e-8, rtol=0)
    garbage = policy_evaluation(mdp, policy, initial=torch.full((6,), 7.0))  # in the terminal state, too
    torch.testing.assert_close(garbage.values, values, atol=1e-8, rtol=0)


def test_sweeps_of_evaluation_are_counted() -> None:
    """Two steps to the end: the second sweep is exact, the third one sees it."""
    line = torch.zeros(3, 1, 3).index_put(
        (torch.arange(3), torch.zeros(3).long(), torch.tensor([1, 2, 2])), torch.ones(3)
    )
    mdp = MDP(line, torch.tensor([[1.0], [2.0], [0.0]]), 1.0)
    values, iterations = policy_evaluation(mdp, torch.ones(3, 1))
    assert values.tolist() == [3.0, 2.0, 0.0] and iterations == 3
    assert policy_evaluation(mdp, torch.ones(3, 1), initial=values).iterations == 1
    assert policy_evaluation(mdp, torch.ones(3, 1), tolerance=1.5).iterations == 3  # changes of 2, then of 2, then 0
    assert policy_evaluation(mdp, torch.ones(3, 1), tolerance=2.0).iterations == 1


def test_policies_that_never_end() -> None:
    mdp = MDP.from_gymnasium(gym.make("CliffWalking-v1"), 1.0)
    up = torch.zeros(48, 4)
    up[:, 0] = 1.0
    with pytest.raises(ValueError, match=r"never ends from states \[0, 1, 2, 3, 4\]"):
        solve_values(mdp, up)
    with pytest.raises(RuntimeError, match="gamma = 1"):
        policy_evaluation(mdp, up, max_iterations=50)
    with pytest.raises(RuntimeError, match="not converged after 3"):
        value_iteration(mdp, max_iterations=3)
    assert value_iteration(mdp).values[36].item() == -13.0


# Iterations


def one_by_one(mdp: MDP, tolerance: float) -> Plan:
    """Value iteration by the operator alone."""
    values, iterations = torch.zeros(mdp.n_states, dtype=torch.float64), 0
    while True:
        iterations += 1
        improved = bellman_optimality(mdp, values)
        if float((improved - values).abs().max()) <= tolerance:
            return Plan(improved, greedy_policy(action_values(mdp, improved)), iterations)
        values = improved


@pytest.mark.parametrize("seed", SEEDS)
def test_one_sweep_is_value_iteration_to_the_last_bit(seed: int) -> None:
    """Every tolerance stops at another iterate."""
    mdp = random_mdp(seed=seed, gamma=0.95)
    stops = set()
    for tolerance in (1.0, 0.5, 0.2, 0.1, 1e-2, 1e-3, 1e-5, 1e-8, 1e-12):
        expected = one_by_one(mdp, tolerance)
        for plan in (
            value_iteration(mdp, tolerance=tolerance),
            truncated_policy_iteration(mdp, 1, tolerance=tolerance),
        ):
            assert torch.equal(plan.values, expected.values) and torch.equal(plan.policy, expected.policy)
            assert plan.iterations == expected.iterations
        stops.add(expected.iterations)
    assert len(stops) >= 6


@pytest.mark.parametrize("sweeps", [2, 5])
@pytest.mark.parametrize("seed", SEEDS)
def test_so_many_sweeps_are_made(seed: int, sweeps: int) -> None:
    """The iterates of the operators alone: greedy, then so many sweeps of the expectation operator."""
    mdp = random_mdp(seed=seed, gamma=0.95)
    for tolerance in (0.5, 0.1, 1e-2, 1e-4):
        values, iterations = torch.zeros(6, dtype=torch.float64), 1
        while float((bellman_optimality(mdp, values) - values).abs().max()) > tolerance:
            policy, iterations = greedy_policy(action_values(mdp, values)), iterations + 1
            for _ in range(sweeps):
                values = bellman_expectation(mdp, policy, values)
        plan = truncated_policy_iteration(mdp, sweeps, tolerance=tolerance)
        assert plan.iterations == iterations > 1
        torch.testing.assert_close(plan.values, bellman_optimality(mdp, values), atol=1e-12, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_many_sweeps_are_policy_iteration(seed: int) -> None:
    mdp = random_mdp(n_states=20, n_actions=5, seed=seed, gamma=0.95)
    by_policy, by_value = policy_iteration(mdp), value_iteration(mdp)
    truncated = truncated_policy_iteration(mdp, 1000)
    assert truncated.iterations == by_policy.iterations < by_value.iterations
    assert torch.equal(truncated.policy, by_policy.policy)
    torch.testing.assert_close(truncated.values, by_policy.values, atol=1e-9, rtol=0)
    counts = [truncated_policy_iteration(mdp, j).iterations for j in (1, 2, 5, 20, 1000)]
    assert counts == sorted(counts, reverse=True)
    for j in (2, 5, 20):
        plan = truncated_policy_iteration(mdp, j)
        torch.testing.assert_close(plan.values, by_value.values, atol=1e-8, rtol=0)


def slow_policy_iteration(mdp: MDP) -> tuple[Tensor, int]:
    """Exact evaluation by the linear system, starting from the policy that is greedy in values of 0."""
    policy, rounds = greedy_policy(mdp.rewards), 1
    while True:
        improved = greedy_policy(action_values(mdp, solve_values(mdp, policy)))
        if torch.equal(improved, policy):
            return policy, rounds
        policy, rounds = improved, rounds + 1


@pytest.mark.parametrize("seed", SEEDS)
def test_policy_iteration_against_exact_evaluation(seed: int) -> None:
    mdp = random_mdp(n_states=20, n_actions=5, seed=seed, gamma=0.95)
    policy, rounds = slow_policy_iteration(mdp)
    plan = policy_iteration(mdp)
    assert torch.equal(plan.policy[:-1], policy[:-1])  # in the terminal state all actions are the same
    assert plan.iterations == rounds + 1  # the last one finds that nothing changes
    torch.testing.assert_close(plan.values, solve_values(mdp, policy), atol=1e-8, rtol=0)


def test_optimal_values_against_all_policies() -> None:
    mdp = random_mdp(n_states=4, n_actions=2, seed=5)
    every = [
        solve_values(mdp, greedy_policy(torch.tensor([[0.0, float(bits >> s & 1) - 0.5] for s in range(4)]).double()))
        for bits in range(16)
    ]
    torch.testing.assert_close(value_iteration(mdp).values, torch.stack(every).amax(0), atol=1e-8, rtol=0)


@pytest.mark.parametrize(("name", "best"), [("4x4", 0.54203), ("8x8", 0.41464)])
def test_frozen_lake_at_099(name: str, best: float) -> None:
    mdp = MDP.from_gymnasium(gym.make("FrozenLake-v1", map_name=name), 0.99)
    for plan in (value_iteration(mdp), truncated_policy_iteration(mdp, 10), policy_iteration(mdp)):
        assert plan.values[0].item() == pytest.approx(best, abs=1e-5)
        assert solve_values(mdp, plan.policy)[0].item() == pytest.approx(best, abs=1e-5)


@pytest.mark.slow
def test_64x64_lake_is_solved() -> None:
    """4,096 states: no table of S^2 entries is made on the way."""
    desc = ["".join("H" if (7 * i + 5 * j) % 23 == 0 else "F" for j in range(64)) for i in range(64)]
    desc[0], desc[-1] = "S" + desc[0][1:], desc[-1][:-1] + "G"
    mdp = MDP.from_gymnasium(gym.make("FrozenLake-v1", desc=desc), 0.99)
    assert mdp.probabilities.shape == (3, 4096, 4)
    plan = value_iteration(mdp, tolerance=1e-9)
    assert float((bellman_optimality(mdp, plan.values) - plan.values).abs().max()) <= 1e-9
    evaluated = policy_evaluation(mdp, plan.policy, tolerance=1e-9, initial=plan.values).values
    torch.testing.assert_close(evaluated, plan.values, atol=1e-6, rtol=0)
    assert 0.9 < plan.values[4094] <= 1 and 0 <= plan.values[0] < 0.1


# Finite horizons


@pytest.mark.parametrize(("name", "horizon", "best"), [("4x4", 100, 0.7442), ("8x8", 200, 0.9132)])
def test_best_success_probability_of_frozen_lake(name: str, horizon: int, best: float) -> None:
    mdp = MDP.from_gymnasium(gym.make("FrozenLake-v1", map_name=name), 1.0)
    values, policy = finite_horizon_values(mdp, horizon)
    assert values.shape == (horizon + 1, mdp.n_states) and policy.shape == (horizon, mdp.n_states, 4)
    assert values[0, 0].item() == pytest.approx(best, abs=5e-5)
    # The best policy for ever is not better within the limit.
    plan = value_iteration(MDP.from_gymnasium(gym.make("FrozenLake-v1", map_name=name), 0.99))
    assert finite_horizon_values(mdp, horizon, plan.policy).values[0, 0] <= values[0, 0] + 1e-12


def test_finite_horizon_against_recursion() -> None:
    mdp = random_mdp(n_states=4, n_actions=2, seed=1, gamma=0.9)
    dense = mdp.transitions().tolist()
    rewards = mdp.rewards.tolist()
    given = random_policy(mdp)

    @cache
    def value(state: int, left: int, best: bool) -> float:
        if left == 0:
            return 0.0
        q = [
            rewards[state][a] + 0.9 * sum(dense[state][a][t] * value(t, left - 1, best) for t in range(4))
            for a in range(2)
        ]
        return max(q) if best else sum(p * x for p, x in zip(given[state].tolist(), q, strict=True))

    for best, policy in ((True, None), (False, given)):
        values = finite_horizon_values(mdp, 6, policy).values
        expected = torch.tensor([[value(s, 6 - t, best) for s in range(4)] for t in range(7)], dtype=torch.float64)
        torch.testing.assert_close(values, expected)


def test_finite_horizon_policy_changes_with_time_and_limits() -> None:
    """State 0 pays 1 and stays, or moves to state 1, which pays 4 and ends: move with the last step but one."""
    transitions = torch.zeros(3, 2, 3)
    transitions[[0, 0, 1, 1, 2, 2], [0, 1, 0, 1, 0, 1], [0, 1, 2, 2, 2, 2]] = 1.0
    mdp = MDP(transitions, torch.tensor([[1.0, 0.0], [4.0, 4.0], [0.0, 0.0]]), 1.0)
    values, policy = finite_horizon_values(mdp, 4)
    assert values[:, 0].tolist() == [6.0, 5.0, 4.0, 1.0, 0.0]
    assert policy[:, 0].argmax(-1).tolist() == [0, 0, 1, 0]
    mdp = random_mdp()
    values = finite_horizon_values(mdp, 400).values
    torch.testing.assert_close(values[0], value_iteration(mdp).values, atol=1e-8, rtol=0)
    assert finite_horizon_values(mdp, 0).values.tolist() == [[0.0] * 6]


def test_errors() -> None:
    mdp = random_mdp()
    policy = random_policy(mdp)
    for call, message in (
        (lambda: truncated_policy_iteration(mdp, 0), "sweeps=0"),
        (lambda: value_iteration(mdp, tolerance=-1.0), "tolerance"),
        (lambda: value_iteration(mdp, tolerance=math.nan), "tolerance"),
        (lambda: policy_iteration(mdp, initial=torch.zeros(5)), r"\(5,\)"),
        (lambda: policy_evaluation(mdp, policy[:-1]), "policy"),
        (lambda: finite_horizon_values(mdp, -1), "horizon"),
        (lambda: finite_horizon_values(mdp, 3, 2 * policy), "policy"),
        (lambda: action_values(mdp, torch.zeros(6, 1)), r"\(6, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
