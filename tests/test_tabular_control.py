"""Methods that learn tables from samples against the exact values of what they learn."""

import math

import gymnasium as gym
import pytest
import torch
from torch import Tensor

from rl_plugins.tabular import (
    MDP,
    Learned,
    ParallelMDP,
    action_values,
    constant_step_size,
    expected_sarsa,
    finite_horizon_values,
    greedy_policy,
    learn_action_values,
    learn_state_values,
    monte_carlo,
    monte_carlo_basic,
    n_step_sarsa,
    policy_iteration,
    polynomial_step_size,
    q_learning,
    sarsa,
    solve_values,
    update_table,
    value_iteration,
)

from .helpers.environments import copies_of, corridor
from .helpers.random_mdps import random_mdp, random_policy, random_tables

SEEDS = (0, 1, 2)
TOLERANCE = 0.15  # action values reach up to 2
STEPS = polynomial_step_size(0.8, offset=2)


def short_mdp(seed: int) -> MDP:
    """Episodes of 5 steps on average, so that Monte Carlo does not wait long for the last one."""
    return MDP(*random_tables(seed=seed, weight_of_last=0.5), 0.95)


def exact_q(mdp: MDP, policy: Tensor) -> Tensor:
    return action_values(mdp, solve_values(mdp, policy))


def optimal_q(mdp: MDP) -> Tensor:
    return action_values(mdp, value_iteration(mdp).values)


def largest_error(learned: Tensor, exact: Tensor) -> float:
    return float((learned - exact).abs().max())


# Step sizes and the update


def test_step_sizes_by_hand() -> None:
    counts = torch.tensor([1, 2, 4, 16])
    assert polynomial_step_size()(counts).tolist() == [1.0, 0.5, 0.25, 0.0625]
    assert polynomial_step_size(0.75)(counts)[[0, 3]].tolist() == [1.0, 0.125]
    assert polynomial_step_size(offset=2)(counts).tolist() == [1.0, 0.75, 0.5, 3 / 18]
    assert constant_step_size(0.25)(counts).tolist() == [0.25] * 4


@pytest.mark.parametrize("omega", [0.51, 0.8, 1.0])
def test_robbins_and_monro(omega: float) -> None:
    """Sums of steps keep growing by as much from each million to the next decade, those of squares do not."""
    decades = [torch.arange(10**k, 10 ** (k + 1)) for k in (3, 4, 5)]
    steps = [polynomial_step_size(omega)(decade) for decade in decades]
    sums, squares = [float(s.sum()) for s in steps], [float((s**2).sum()) for s in steps]
    assert sums[0] <= sums[1] * 1.001 and sums[1] <= sums[2] * 1.001
    assert squares[0] > squares[1] > squares[2]


@pytest.mark.parametrize("omega", [0.5, 0.0, 1.01, math.nan])
def test_other_exponents_are_refused(omega: float) -> None:
    with pytest.raises(ValueError, match="omega"):
        polynomial_step_size(omega)


def test_other_step_sizes_are_refused() -> None:
    for offset in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="offset"):
            polynomial_step_size(offset=offset)
    for alpha in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="alpha"):
            constant_step_size(alpha)


def test_update_by_hand() -> None:
    """Entry 1 has two targets, 4 and 8, and moves half-way to 6; entry 3 is new and moves to its target."""
    table = Learned(torch.tensor([[1.0, 2.0], [3.0, 4.0]]).double(), torch.tensor([[5, 1], [0, 0]]))
    new = update_table(table, torch.tensor([1, 3, 1]), torch.tensor([4.0, 7.0, 8.0]).double(), polynomial_step_size())
    assert new.values.tolist() == [[1.0, 4.0], [3.0, 7.0]]
    assert new.updates.tolist() == [[5, 2], [0, 1]]
    assert table.values.tolist() == [[1.0, 2.0], [3.0, 4.0]]  # out of place
    none = update_table(table, torch.tensor([], dtype=torch.long), torch.tensor([]).double(), polynomial_step_size())
    assert torch.equal(none.values, table.values) and torch.equal(none.updates, table.updates)


def test_targets_by_hand() -> None:
    """0 -> 1 -> 2 -> end, rewards 0, 1, 2, gamma 1/2."""
    mdp = corridor(3, gamma=0.5)
    policy = torch.ones(4, 1).double()
    q = torch.tensor([[10.0], [20.0], [40.0], [math.nan]]).double()
    rollout = copies_of(mdp, 1).rollout(policy, 3)
    one_step = [[10.0, 21.0, 2.0]]
    for target in (sarsa, expected_sarsa, q_learning, n_step_sarsa(1)):
        assert target(q, policy, rollout, 0.5).tolist() == one_step
    assert n_step_sarsa(2)(q, policy, rollout, 0.5).tolist() == [[10.5, 2.0, 2.0]]
    for target in (monte_carlo, n_step_sarsa(3), n_step_sarsa(100)):
        assert target(q, policy, rollout, 0.5).tolist() == [[1.0, 2.0, 2.0]]
    cut = copies_of(mdp, 1).rollout(policy, 2)
    assert n_step_sarsa(5)(q, policy, cut, 0.5).tolist() == [[10.5, 21.0]]
    assert monte_carlo(q, policy, cut, 0.5).tolist() == [[0.5, 1.0]]


# Convergence. Every pair starts some episodes, as the error is that of the pair which is tried least.


ON_POLICY = {
    "sarsa": (sarsa, {"updates": 100}),
    "expected_sarsa": (expected_sarsa, {"updates": 100}),
    "n_step_sarsa": (n_step_sarsa(4), {"updates": 50, "steps": 4}),
    "monte_carlo": (monte_carlo, {"updates": 40, "steps": 60, "fresh_episodes": True}),
}


def explore(mdp: MDP, seed: int) -> ParallelMDP:
    return copies_of(mdp, 1000, seed, exploring_starts=True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ON_POLICY)
def test_on_policy_methods_learn_the_values_of_their_policy(name: str, seed: int) -> None:
    mdp = short_mdp(seed)
    policy = random_policy(mdp, seed)
    target, options = ON_POLICY[name]
    learned = learn_action_values(explore(mdp, seed), target, policy=policy, step_size=STEPS, **options)
    exact = exact_q(mdp, policy)
    assert largest_error(learned.values, exact) < TOLERANCE
    assert largest_error(exact, optimal_q(mdp)) > 2 * TOLERANCE
    assert int(learned.updates[:-1].min()) >= 20 and int(learned.updates[-1].max()) == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_td_learns_the_values_of_its_policy(seed: int) -> None:
    for mdp in (short_mdp(seed), random_mdp(seed=seed, end=False, gamma=0.8)):
        policy = random_policy(mdp, seed)
        learned = learn_state_values(copies_of(mdp, 1000, seed), policy, updates=200, step_size=STEPS)
        assert largest_error(learned.values, solve_values(mdp, policy)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [0.2, 1.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_q_learning_learns_the_optimum_whatever_acts(seed: int, epsilon: float) -> None:
    mdp = short_mdp(seed)
    learned = learn_action_values(explore(mdp, seed), q_learning, epsilon=epsilon, updates=150, step_size=STEPS)
    assert largest_error(learned.values, optimal_q(mdp)) < TOLERANCE
    achieved = solve_values(mdp, greedy_policy(learned.values))
    torch.testing.assert_close(achieved, value_iteration(mdp).values, atol=0.05, rtol=0)


def best_soft_q(mdp: MDP, epsilon: float) -> Tensor:
    """`q` of the best epsilon-soft policy: the optimum of a world that replaces so many actions by random ones."""
    transitions, rewards = mdp.transitions(), mdp.rewards
    slipping = (1 - epsilon) * transitions + epsilon * transitions.mean(1, keepdim=True)
    paid = (1 - epsilon) * rewards + epsilon * rewards.mean(1, keepdim=True)
    return action_values(mdp, policy_iteration(MDP(slipping, paid, mdp.gamma)).values)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ON_POLICY)
def test_on_policy_control_learns_the_best_soft_policy(name: str, seed: int) -> None:
    mdp = short_mdp(seed)
    target, options = ON_POLICY[name]
    learned = learn_action_values(explore(mdp, seed), target, epsilon=0.4, step_size=STEPS, **options)
    exact = best_soft_q(mdp, 0.4)
    assert largest_error(learned.values, exact) < TOLERANCE
    assert largest_error(exact, optimal_q(mdp)) > 1.5 * TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_monte_carlo_with_exploring_starts_finds_the_optimum(seed: int) -> None:
    mdp, options = short_mdp(seed), ON_POLICY["monte_carlo"][1] | {"updates": 60}  # the first policies are forgotten
    learned = learn_action_values(explore(mdp, seed), monte_carlo, epsilon=0.0, step_size=STEPS, **options)
    assert largest_error(learned.values, optimal_q(mdp)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_monte_carlo_basic_is_policy_iteration(seed: int) -> None:
    """0.35 is some 3.5 standard errors of a mean of 400 returns."""
    mdp = short_mdp(seed)
    policy = random_policy(mdp, seed)
    options = {"episodes": 400, "max_steps": 60, "generator": torch.Generator().manual_seed(seed)}
    first = monte_carlo_basic(mdp, improvements=1, policy=policy, **options)
    assert largest_error(first.values, exact_q(mdp, policy)) < 0.35
    last = monte_carlo_basic(mdp, improvements=3, **options)
    assert last.updates.tolist() == [[3] * 3] * 6
    assert largest_error(last.values, optimal_q(mdp)) < 0.35


def test_monte_carlo_basic_is_exact_without_noise() -> None:
    learned = monte_carlo_basic(corridor(3), improvements=1, episodes=1, max_steps=5)
    assert learned.values.flatten().tolist() == [3.0, 3.0, 2.0, 0.0]


def test_rollouts_go_on_or_start_anew() -> None:
    """Two steps at a time of an episode of three: fresh episodes never come to the last state."""
    options = {"updates": 4, "steps": 2, "step_size": constant_step_size(1.0)}
    on = learn_action_values(copies_of(corridor(3), 1), sarsa, **options)
    anew = learn_action_values(copies_of(corridor(3), 1), sarsa, fresh_episodes=True, **options)
    assert on.updates.flatten().tolist() == [2, 2, 2, 0] and anew.updates.flatten().tolist() == [4, 4, 0, 0]
    assert on.values.flatten().tolist() == [1.0, 3.0, 2.0, 0.0]
    assert anew.values.flatten().tolist() == [1.0, 1.0, 0.0, 0.0]


def test_the_end_is_worth_nothing_whatever_the_table_says() -> None:
    garbage = torch.full((4,), 100.0)
    options = {"updates": 4, "steps": 3, "step_size": constant_step_size(1.0)}
    v = learn_state_values(copies_of(corridor(3), 1), torch.ones(4, 1), initial=garbage, **options)
    assert v.values.tolist() == [3.0, 3.0, 2.0, 100.0]
    for target in (sarsa, expected_sarsa, q_learning, n_step_sarsa(2), monte_carlo):
        q = learn_action_values(copies_of(corridor(3), 1), target, initial=garbage[:, None], **options)
        assert q.values.flatten().tolist() == [3.0, 3.0, 2.0, 100.0]


def test_the_same_seed_gives_the_same_table() -> None:
    mdp = random_mdp()
    runs = [learn_action_values(copies_of(mdp, 10, 7), sarsa, updates=50, step_size=STEPS) for _ in range(2)]
    assert torch.equal(runs[0].values, runs[1].values) and torch.equal(runs[0].updates, runs[1].updates)
    other = learn_action_values(copies_of(mdp, 10, 8), sarsa, updates=50, step_size=STEPS)
    assert not torch.equal(runs[0].values, other.values)


@pytest.mark.slow
def test_a_constant_step_keeps_its_noise() -> None:
    """The error of decreasing steps goes on falling where that of a constant step has stopped."""
    mdp = short_mdp(0)
    policy = random_policy(mdp)
    errors = {}
    for name, steps in {"polynomial": STEPS, "constant": constant_step_size(0.5)}.items():
        copies = copies_of(mdp, 50, exploring_starts=True)
        learned = learn_action_values(copies, sarsa, policy=policy, updates=500, step_size=steps)
        errors[name] = largest_error(learned.values, exact_q(mdp, policy))
    assert errors["polynomial"] < 0.2 < 0.6 < errors["constant"]


def test_errors() -> None:
    mdp = random_mdp()
    copies = copies_of(mdp, 2)
    for call, message in (
        (lambda: learn_action_values(copies, sarsa, updates=1, step_size=STEPS, initial=torch.zeros(6)), "initial"),
        (lambda: learn_action_values(copies, sarsa, updates=1, step_size=STEPS, epsilon=2.0), "epsilon"),
        (lambda: learn_action_values(copies, n_step_sarsa(0), updates=1, step_size=STEPS), "n=0"),
        (lambda: learn_action_values(copies, sarsa, updates=1, step_size=lambda n: 2.0 * n), "alpha"),
        (lambda: monte_carlo_basic(mdp, improvements=0, episodes=1, max_steps=1), "improvements=0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_frozen_lake_is_learned(seed: int) -> None:
    """8x8, slippery, 1.5 million samples: what the greedy policy is worth, and its success in 200 steps, exactly."""
    env = gym.make("FrozenLake-v1", map_name="8x8")
    mdp, undiscounted = MDP.from_gymnasium(env, 0.99), MDP.from_gymnasium(env, 1.0)
    copies = copies_of(mdp, 1000, seed, exploring_starts=True)
    steps = polynomial_step_size(0.8, offset=20)
    learned = learn_action_values(copies, q_learning, updates=1500, epsilon=0.3, step_size=steps)
    policy = greedy_policy(learned.values)
    assert solve_values(mdp, policy)[0].item() == pytest.approx(0.41464, abs=0.01)
    assert 0.84 < finite_horizon_values(undiscounted, 200, policy).values[0, 0].item() <= 0.9133
