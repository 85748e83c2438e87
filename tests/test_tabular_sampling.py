"""Parallel copies against the tables they sample, and the package's returns on their rows against exact values."""

import pytest
import torch
from torch import Tensor

from rl_plugins.functional import discounted_returns, gae, lambda_returns, n_step_returns, td_errors
from rl_plugins.tabular import MDP, ParallelMDP, Rollout, action_values, solve_values

from .helpers.environments import copies_of, corridor
from .helpers.random_mdps import random_mdp, random_policy, random_tables


def z_scores(samples: Tensor, groups: Tensor, expected: Tensor) -> Tensor:
    """For each group, how many standard errors its mean is off."""
    counts = torch.bincount(groups, minlength=len(expected)).double()
    sums = torch.zeros_like(counts).index_add(0, groups, samples)
    squares = torch.zeros_like(counts).index_add(0, groups, samples**2)
    mean = sums / counts
    error = ((squares / counts - mean**2) / counts).sqrt()
    return ((mean - expected) / error)[counts > 100]


def test_rows_end_with_their_episodes() -> None:
    copies = copies_of(corridor(3), 2)
    rollout = copies.rollout(torch.ones(4, 1), 10)
    assert rollout.states.tolist() == [[0, 1, 2]] * 2  # no columns without a step
    assert rollout.next_states.tolist() == [[1, 2, 3]] * 2
    assert rollout.rewards.tolist() == [[0.0, 1.0, 2.0]] * 2
    assert rollout.terminated.tolist() == [[False, False, True]] * 2
    assert rollout.mask.all()
    copies.set(torch.tensor([2, 0]), torch.tensor([0, 0]))
    rollout = copies.rollout(torch.ones(4, 1), 2)
    assert rollout.mask.tolist() == [[True, False], [True, True]]
    assert rollout.states[1].tolist() == [0, 1] and rollout.terminated.tolist() == [[True, False], [False, False]]
    # The first copy starts again, the second one goes on.
    rollout = copies.rollout(torch.ones(4, 1), 2)
    assert rollout.states.tolist()[0] == [0, 1] and rollout.states[1, 0].item() == 2
    assert rollout.mask.tolist() == [[True, True], [True, False]]
    copies.reset()
    assert copies.rollout(torch.ones(4, 1)).states.tolist() == [[0], [0]]


def test_time_limits_cut_but_do_not_end() -> None:
    copies = copies_of(corridor(5), 1, max_episode_steps=3)
    states, ended = [], []
    for _ in range(4):
        rollout = copies.rollout(torch.ones(6, 1), 2)
        states += rollout.states[rollout.mask].tolist()
        ended += rollout.terminated[rollout.mask].tolist()
    assert states == [0, 1, 2, 0, 1, 2] and not any(ended)
    copies.rollout(torch.ones(6, 1), 2)
    copies.set(torch.tensor([1]), torch.tensor([0]))  # counts from here
    assert copies.rollout(torch.ones(6, 1), 9).states.tolist() == [[1, 2, 3]]
    long = copies_of(corridor(5), 1, max_episode_steps=5).rollout(torch.ones(6, 1), 9)
    assert long.terminated.tolist() == [[False, False, False, False, True]]


def test_next_actions_are_taken() -> None:
    mdp = random_mdp(end=False)
    copies = copies_of(mdp, 100)
    policy = random_policy(mdp)
    first, second = copies.rollout(policy, 3), copies.rollout(policy, 2)
    assert torch.equal(first.next_actions[:, :-1], first.actions[:, 1:])
    assert torch.equal(first.next_states[:, :-1], first.states[:, 1:])
    assert torch.equal(first.next_actions[:, -1], second.actions[:, 0])
    assert torch.equal(first.next_states[:, -1], second.states[:, 0])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_frequencies_are_the_tables(seed: int) -> None:
    start = torch.tensor([0.5, 0.3, 0.0, 0.2, 0.0, 0.0])
    mdp = MDP(*random_tables(seed=seed), 0.9, start=start)
    policy = random_policy(mdp, seed)
    rollout = copies_of(mdp, 100_000, seed).rollout(policy, 2)
    first = torch.bincount(rollout.states[:, 0], minlength=6) / 100_000
    torch.testing.assert_close(first.double(), start.double(), atol=6e-3, rtol=0)
    joint = torch.bincount(rollout.states[:, 0] * 3 + rollout.actions[:, 0], minlength=18) / 100_000
    torch.testing.assert_close(joint.double(), (start[:, None] * policy).flatten(), atol=6e-3, rtol=0)
    # Transitions of all steps: deviations in units of their standard error.
    _, rewards = random_tables(seed=seed)
    real = rollout.mask
    s, a, t = rollout.states[real], rollout.actions[real], rollout.next_states[real]
    assert torch.equal(rollout.rewards[real], rewards[s, a, t])
    assert torch.equal(rollout.terminated[real], mdp.terminal[t])
    seen = torch.bincount((s * 3 + a) * 6 + t, minlength=108).view(6, 3, 6).double()
    n, p = seen.sum(-1, keepdim=True), mdp.transitions()
    assert float(seen[p == 0].sum()) == 0
    z = (seen - n * p) / (n * p * (1 - p)).sqrt()
    assert float(z[(p > 0) & (p < 1) & (n > 100)].abs().max()) < 4.5


def test_exploring_starts_are_uniform_over_live_pairs() -> None:
    mdp = MDP(*random_tables(), 0.9, start=torch.tensor([1.0, 0, 0, 0, 0, 0]))
    greedy = torch.zeros(6, 3)
    greedy[:, 0] = 1.0
    rollout = copies_of(mdp, 90_000, exploring_starts=True).rollout(greedy, 2)
    share = torch.bincount(rollout.states[:, 0] * 3 + rollout.actions[:, 0], minlength=18) / 90_000
    assert share[15:].sum() == 0
    torch.testing.assert_close(share[:15], torch.full((15,), 1 / 15), atol=4e-3, rtol=0)
    assert (rollout.actions[:, 1][rollout.mask[:, 1]] == 0).all()


def test_rounding_never_draws_the_padding() -> None:
    """Ten times 0.1 is below 1; a random number above that must draw the last successor, not the filled-up entry."""
    transitions = torch.zeros(11, 2, 11)
    transitions[:, 0, :10] = 0.1
    transitions[:, 1, :] = 1 / 11
    copies = ParallelMDP(MDP(transitions, torch.zeros(11, 2), 0.9), 1)
    assert copies._thresholds.shape == (11, 11, 2)
    assert torch.isinf(copies._thresholds[9:, :, 0]).all() and torch.isfinite(copies._thresholds[:9]).all()


# The package's returns on sampled rows


def long_rows(seed: int, end: bool) -> tuple[MDP, Tensor, Rollout]:
    """4,000 rows of 100 steps at most, which end or are cut off, and the exact values."""
    mdp = random_mdp(seed=seed, end=end)
    policy = random_policy(mdp, seed)
    return mdp, solve_values(mdp, policy), copies_of(mdp, 4000, seed).rollout(policy, 100)


@pytest.mark.slow
@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_returns_of_exact_values_average_to_exact_values(seed: int, end: bool) -> None:
    """`E[G_t | s_t] = v(s_t)` for n-step and lambda returns, with the exact bootstrap; `E[G_t | s_t, a_t] = q`."""
    mdp, values, rows = long_rows(seed, end)
    real = rows.mask
    here, following = values[rows.states], torch.where(rows.terminated, 0.0, values[rows.next_states])
    args = {"gamma": mdp.gamma, "next_values": following}
    q = action_values(mdp, values).flatten()
    for targets in (
        lambda_returns(rows.rewards, here, real, lam=0.0, **args),
        lambda_returns(rows.rewards, here, real, lam=0.8, **args),
        lambda_returns(rows.rewards, here, real, lam=1.0, **args),
        n_step_returns(rows.rewards, here, real, n=4, **args),
        here + gae(rows.rewards, here, real, lam=0.9, **args),
    ):
        # One column at a time: targets of the same row depend on each other, and a place chosen by the length of its
        # row would know the future.
        for t in (0, 3):
            at, targets_at = rows.states[real[:, t], t], targets[real[:, t], t]
            assert float(z_scores(targets_at, at, values).abs().max()) < 4
            assert float(z_scores(targets_at, at * 3 + rows.actions[real[:, t], t], q).abs().max()) < 4.5
    ended = rows.terminated.any(1)
    monte_carlo = discounted_returns(rows.rewards, real, gamma=mdp.gamma)
    whole = lambda_returns(rows.rewards, here, real, lam=1.0, **args)
    torch.testing.assert_close(monte_carlo[ended], whole[ended])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_td_errors_of_exact_values_have_mean_zero(seed: int) -> None:
    """Per state; per pair their mean is the advantage `q - v`."""
    mdp, values, rows = long_rows(seed, end=True)
    real = rows.mask
    following = torch.where(rows.terminated, 0.0, values[rows.next_states])
    errors = td_errors(rows.rewards, values[rows.states], real, gamma=mdp.gamma, next_values=following)[real]
    assert float(z_scores(errors, rows.states[real], torch.zeros(6)).abs().max()) < 4
    advantages = (action_values(mdp, values) - values[:, None]).flatten()
    assert float(z_scores(errors, (rows.states * 3 + rows.actions)[real], advantages).abs().max()) < 4.5
    # Values that are wrong by 0.1 in one state are found out.
    wrong = values.clone()
    wrong[0] += 0.1
    following = torch.where(rows.terminated, 0.0, wrong[rows.next_states])
    errors = td_errors(rows.rewards, wrong[rows.states], real, gamma=mdp.gamma, next_values=following)[real]
    assert float(z_scores(errors, rows.states[real], torch.zeros(6)).abs().max()) > 5


def test_errors() -> None:
    mdp = random_mdp()
    for call, message in (
        (lambda: ParallelMDP(mdp, 0), "copies=0"),
        (lambda: ParallelMDP(mdp, 1, max_episode_steps=0), "max_episode_steps=0"),
        (lambda: ParallelMDP(MDP(torch.ones(1, 1, 1), torch.zeros(1, 1), 0.9), 1), "terminal"),
        (lambda: ParallelMDP(mdp, 2).rollout(random_policy(mdp), 0), "steps=0"),
        (lambda: ParallelMDP(mdp, 2).rollout(random_policy(mdp)[:3]), "policy"),
        (lambda: ParallelMDP(mdp, 2).set(torch.tensor([0, 6]), torch.tensor([0, 0])), r"states .* 0 \.\. 5"),
        (lambda: ParallelMDP(mdp, 2).set(torch.tensor([0, 1]), torch.tensor([0])), "actions"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
