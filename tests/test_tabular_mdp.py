"""The tables of an MDP against hand-worked numbers, slow loops over Gymnasium's `P`, and the other oracle."""

import math
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import pytest
import torch
from torch import Tensor

from rl_plugins.tabular import MDP, TokenMDP, action_values, policy_evaluation, solve_values, value_iteration

from .helpers.random_mdps import random_mdp, random_policy, random_tables


def loop_values(table: dict[int, dict[int, list[Any]]], gamma: float, sweeps: int) -> list[float]:
    """Value iteration on Gymnasium's table as it is, with a value of 0 behind `terminated`."""
    values = [0.0] * len(table)
    for _ in range(sweeps):
        values = [
            max(sum(p * (r + gamma * (0.0 if ended else values[t])) for p, t, r, ended in row[a]) for a in row)
            for row in table.values()
        ]
    return values


def test_by_hand() -> None:
    """State 0 pays 1 and stays with 1/2 (action 0), or pays 2 and ends (action 1); state 1 is the end."""
    transitions = torch.tensor([[[0.5, 0.5], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]])
    mdp = MDP(transitions, torch.tensor([[1.0, 2.0], [0.0, 0.0]]), 0.5)
    assert mdp.terminal.tolist() == [False, True]
    assert mdp.start.tolist() == [1.0, 0.0]
    assert mdp.successors[:, 0].tolist() == [[0, 1], [1, 0]]  # K = 2; the second list is filled up
    assert mdp.probabilities[:, 0].tolist() == [[0.5, 1.0], [0.5, 0.0]]
    # v = 1 + v / 4 for action 0; half of the time each: v = 1.5 + v / 8
    assert solve_values(mdp, torch.tensor([[1.0, 0.0], [0.5, 0.5]])).tolist() == pytest.approx([4 / 3, 0.0])
    assert solve_values(mdp, torch.full((2, 2), 0.5)).tolist() == pytest.approx([12 / 7, 0.0])
    assert action_values(mdp, torch.tensor([8.0, 0.0]).double()).tolist() == [[3.0, 2.0], [0.0, 0.0]]
    matrix, rewards = mdp.chain(torch.tensor([[0.5, 0.5], [0.5, 0.5]]))
    assert matrix.tolist() == [[0.25, 0.75], [0.0, 1.0]] and rewards.tolist() == [1.5, 0.0]


def test_dense_and_sparse_tables_are_the_same() -> None:
    transitions, rewards = random_tables()
    zeroed = torch.where(rewards.abs() < 0.5, 0.0, rewards)  # sparse rewards without entries for some transitions
    dense = MDP(transitions, zeroed, 0.9)
    assert dense.probabilities.shape[0] == int((transitions > 0).sum(-1).max())
    for p, r in (
        (transitions.to_sparse(), zeroed),
        (transitions, zeroed.to_sparse()),
        (transitions.to_sparse(), zeroed.to_sparse()),
    ):
        other = MDP(p, r, 0.9)
        for name in ("successors", "probabilities", "outcome_rewards", "rewards", "terminal", "start"):
            assert torch.equal(getattr(dense, name), getattr(other, name)), name
    torch.testing.assert_close(dense.transitions(), transitions, atol=1e-15, rtol=0)
    torch.testing.assert_close(dense.rewards, (transitions * zeroed).sum(-1))
    # Rewards of pairs: the same values, although single outcomes pay differently.
    mean = MDP(transitions, dense.rewards, 0.9)
    policy = random_policy(dense)
    torch.testing.assert_close(solve_values(mean, policy), solve_values(dense, policy))
    assert MDP(transitions, torch.zeros_like(rewards).to_sparse(), 0.9).rewards.abs().max() == 0


def test_transitions_without_reward_and_their_own_rewards() -> None:
    """Every stored outcome has the reward of its own successor."""
    transitions, rewards = random_tables(seed=3)
    mdp = MDP(transitions, rewards, 0.9)
    for k in range(mdp.probabilities.shape[0]):
        for s in range(mdp.n_states):
            for a in range(mdp.n_actions):
                if mdp.probabilities[k, s, a] > 0:
                    assert mdp.outcome_rewards[k, s, a] == rewards[s, a, mdp.successors[k, s, a]]


def test_chain_against_loop_and_its_gradient() -> None:
    mdp = random_mdp(end=False)
    policy = random_policy(mdp).requires_grad_()
    matrix, rewards = mdp.chain(policy)
    dense = mdp.transitions()
    for s in range(mdp.n_states):
        expected = sum(policy[s, a] * dense[s, a] for a in range(mdp.n_actions))
        torch.testing.assert_close(matrix[s], expected)
        assert rewards[s].item() == pytest.approx((policy[s] @ mdp.rewards[s]).item())
    matrix[2, 0].backward()
    assert policy.grad is not None
    torch.testing.assert_close(policy.grad[2], dense[2, :, 0])


def test_what_is_terminal() -> None:
    """Staying is not enough: the reward must be 0, and every action must stay."""
    stay = torch.eye(3).unsqueeze(1).repeat(1, 2, 1)
    stay[1, 1] = torch.tensor([1.0, 0.0, 0.0])
    rewards = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    mdp = MDP(stay, rewards, 0.5)
    assert mdp.terminal.tolist() == [True, False, False]
    assert mdp.start.tolist() == [0.0, 0.5, 0.5]


@pytest.mark.parametrize("name", ["FrozenLake-v1", "CliffWalking-v1", "Taxi-v4"])
def test_gymnasium_against_a_loop_over_its_table(name: str) -> None:
    env = gym.make(name)
    mdp = MDP.from_gymnasium(env, 0.8)
    values = value_iteration(mdp, tolerance=1e-12).values
    expected = torch.tensor(loop_values(env.unwrapped.P, 0.8, 150), dtype=torch.float64)
    # Behind a terminal state Gymnasium's table goes on, which episodes never see. Taxi also has states with the
    # passenger delivered, which lead there, and which no episode visits.
    seen = ~mdp.terminal
    if name == "Taxi-v4":
        seen &= torch.tensor([divmod(s // 4, 5)[1] != s % 4 for s in range(500)])
    assert int(seen.sum()) >= {"FrozenLake-v1": 11, "CliffWalking-v1": 47, "Taxi-v4": 400}[name]
    torch.testing.assert_close(values[seen], expected[seen], atol=1e-10, rtol=0)
    torch.testing.assert_close(mdp.start, torch.as_tensor(env.unwrapped.initial_state_distrib).double())
    assert values[mdp.terminal].abs().max() == 0


def test_gymnasium_lists_are_merged() -> None:
    """In the corner of FrozenLake two of three slips stay: one successor of probability 2/3."""
    mdp = MDP.from_gymnasium(gym.make("FrozenLake-v1"), 0.9)
    assert mdp.probabilities.shape == (3, 16, 4)
    torch.testing.assert_close(mdp.probabilities[:, 0, 0], torch.tensor([2 / 3, 1 / 3, 0.0]).double())
    assert mdp.successors[:2, 0, 0].tolist() == [0, 4]
    assert mdp.terminal.nonzero().flatten().tolist() == [5, 7, 11, 12, 15]


def fake(table: dict[int, dict[int, list[Any]]]) -> Any:
    start = [1.0] + [0.0] * (len(table) - 1)
    return SimpleNamespace(unwrapped=SimpleNamespace(P=table, initial_state_distrib=start))


def test_rewards_of_the_same_successor_are_averaged() -> None:
    rows = [(0.25, 1, 4.0, True), (0.75, 1, 8.0, True), (0.0, 0, math.inf, True)]  # the last one never happens
    mdp = MDP.from_gymnasium(fake({0: {0: rows}, 1: {0: [(1.0, 0, 5.0, False)]}}), 0.9)
    assert mdp.probabilities[:, 0, 0].tolist() == [1.0] and mdp.outcome_rewards[:, 0, 0].tolist() == [7.0]
    assert mdp.terminal.tolist() == [False, True]  # what Gymnasium lists behind the end is not followed


def test_gymnasium_errors() -> None:
    with pytest.raises(ValueError, match="no table P"):
        MDP.from_gymnasium(gym.make("Blackjack-v1"), 1.0)
    ends_on_the_way = {0: {0: [(0.5, 1, 0.0, True), (0.5, 1, 0.0, False)]}, 1: {0: [(1.0, 0, 0.0, False)]}}
    with pytest.raises(ValueError, match=r"states \[1\].*passed through"):
        MDP.from_gymnasium(fake(ends_on_the_way), 0.9)
    with pytest.raises(ValueError, match=r"states \[0\].*passed through"):  # ends where it starts
        MDP.from_gymnasium(fake({0: {0: [(1.0, 0, 1.0, True)]}}), 0.9)


@pytest.mark.parametrize(("eos", "gamma"), [(None, 1.0), (2, 0.8), (0, 1.0)])
def test_both_oracles_agree(eos: int | None, gamma: float) -> None:
    def policy(prefixes: Tensor) -> Tensor:
        code = (prefixes * torch.arange(1, prefixes.shape[1] + 1)).sum(1, keepdim=True)
        return torch.softmax(torch.sin((code + 1.0) * torch.tensor([1.3, 2.1, 0.7])).double(), dim=-1)

    def reward(strings: Tensor) -> Tensor:
        return torch.cos((strings * torch.arange(1, strings.shape[1] + 1)).sum(1).double() + strings.shape[1])

    tokens = TokenMDP(policy, reward, vocab_size=3, max_length=4, eos_token_id=eos, gamma=gamma)
    mdp, table = tokens.to_mdp()
    assert mdp.n_states == 1 + 3 + 9 + 27 + 1 and mdp.terminal[-1]
    values = torch.cat([*tokens.values[:-1], torch.zeros(1, dtype=torch.float64)])
    torch.testing.assert_close(solve_values(mdp, table), values, atol=1e-12, rtol=0)
    torch.testing.assert_close(policy_evaluation(mdp, table).values, values, atol=1e-12, rtol=0)
    q = torch.cat([*tokens.action_values, torch.zeros(1, 3, dtype=torch.float64)])
    torch.testing.assert_close(action_values(mdp, values), q, atol=1e-12, rtol=0)
    assert float(mdp.start @ values) == pytest.approx(tokens.values[0].item(), abs=1e-12)


def test_errors() -> None:
    transitions, rewards = random_tables()
    for p, r, gamma, start, message in (
        (transitions, rewards, 1.1, None, "gamma=1.1"),
        (transitions, rewards, math.nan, None, "gamma=nan"),
        (transitions[:, :, :4], rewards, 0.9, None, r"\(S, A, S\)"),
        (transitions[0], rewards, 0.9, None, r"\(S, A, S\)"),
        (transitions, rewards[:, 0], 0.9, None, r"rewards \(6, 6\)"),
        (2 * transitions, rewards, 0.9, None, "state 0, action 0"),
        (torch.where(torch.arange(6)[:, None, None] == 3, 0.0, transitions), rewards, 0.9, None, "state 3, action 0"),
        (transitions.index_fill(2, torch.tensor([0]), math.nan), rewards, 0.9, None, "state 0, action 0"),
        (transitions, rewards * math.inf, 0.9, None, "not finite"),
        (transitions, rewards, 0.9, torch.ones(6), "sum to 1"),
        (transitions, rewards, 0.9, torch.ones(5) / 5, "6 probabilities"),
    ):
        with pytest.raises(ValueError, match=message):
            MDP(p, r, gamma, start=start)
    negative = transitions.clone()
    negative[2, 1, 0] -= 0.5
    negative[2, 1, 1] += 0.5
    with pytest.raises(ValueError, match="state 2, action 1"):
        MDP(negative, rewards, 0.9)


def test_policies_are_checked() -> None:
    mdp = random_mdp()
    policy = random_policy(mdp)
    for wrong in (
        policy[:-1],
        policy.T,
        2 * policy,
        policy * torch.nan,
        torch.cat([-policy[:, :1], policy[:, 1:]], 1),
    ):
        with pytest.raises(ValueError, match="policy"):
            mdp.chain(wrong)
    assert mdp.check_policy(policy.float()).dtype == torch.float64
