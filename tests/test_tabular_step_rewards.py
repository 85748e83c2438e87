"""Token MDPs that pay at every step: the oracle itself, shaped rewards, and episodes that are cut before their end."""

from itertools import product

import pytest
import torch
from torch import Tensor

from rl_plugins.signals import critic_targets
from rl_plugins.tabular import TokenMDP, bellman_optimality_q, value_iteration

VOCAB, LENGTH, EOS = 3, 4, 2


def policy(prefixes: Tensor) -> Tensor:
    code = (prefixes * torch.arange(1, prefixes.shape[1] + 1) ** 2).sum(1, keepdim=True) + 3 * prefixes.shape[1]
    return torch.softmax(torch.sin((code + 1.0) * torch.tensor([1.3, 2.1, 0.7])).double(), dim=-1)


def step(strings: Tensor) -> Tensor:
    """What the newest token of a string is paid."""
    return torch.cos((strings * torch.arange(1, strings.shape[1] + 1)).sum(1).double() + strings.shape[1])


def end(strings: Tensor) -> Tensor:
    return 2.0 * step(strings) + 0.3


def build(gamma: float = 1.0, **options: object) -> TokenMDP:
    settings = {"step_reward": step, "vocab_size": VOCAB, "max_length": LENGTH, "eos_token_id": EOS, **options}
    return TokenMDP(policy, end, gamma=gamma, **settings)  # type: ignore[arg-type]


def value_by_loops(prefix: tuple[int, ...], gamma: float) -> float:
    """V of a prefix by recursion over everything that may follow."""
    state = torch.tensor(prefix, dtype=torch.long)[None]
    total = 0.0
    for token, chance in enumerate(policy(state)[0].tolist()):
        string = torch.tensor([[*prefix, token]])
        ends = token == EOS or string.shape[1] == LENGTH
        paid = float((end if ends else step)(string))
        total += chance * (paid + (0.0 if ends else gamma * value_by_loops((*prefix, token), gamma)))
    return total


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_values_are_those_of_a_recursion(gamma: float) -> None:
    mdp = build(gamma)
    for prefix in [(), (0,), (1, 1), (0, 1, 0)]:
        tokens = torch.tensor([[*prefix, *[0] * (LENGTH - len(prefix))]])
        assert float(mdp.state_values(tokens)[0, len(prefix)]) == pytest.approx(
            value_by_loops(prefix, gamma), abs=1e-12
        )


def test_rewards_along_strings_and_their_sums() -> None:
    mdp = build()
    tokens = torch.tensor([[0, 1, 2, 2], [1, 0, 1, 0]])
    strings = [[step(tokens[:1, :1]), step(tokens[:1, :2]), end(tokens[:1, :3]), torch.zeros(1)]]
    strings += [[step(tokens[1:, :1]), step(tokens[1:, :2]), step(tokens[1:, :3]), end(tokens[1:])]]
    expected = torch.tensor([[float(x) for x in row] for row in strings], dtype=torch.float64)
    torch.testing.assert_close(mdp.token_rewards(tokens), expected, rtol=0, atol=1e-12)
    drawn, _, sums = mdp.sample(500, torch.Generator().manual_seed(0))
    torch.testing.assert_close(mdp.token_rewards(drawn).sum(1), sums)
    assert float(sums.mean()) == pytest.approx(float(mdp.values[0]), abs=0.2)


def test_the_general_mdp_has_the_same_values() -> None:
    mdp = build(0.9)
    general, probabilities = mdp.to_mdp()
    values = torch.cat([*mdp.values[:-1], torch.zeros(1)])
    rewards = (probabilities * (general.rewards + 0.9 * torch.einsum(
        "ksa,ksa->sa", general.probabilities, values[general.successors]))).sum(-1)  # fmt: skip
    torch.testing.assert_close(rewards, values)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_shaping_by_a_potential_leaves_the_best_policy_as_it_is(gamma: float) -> None:
    """`F = gamma Phi(s') - Phi(s)` with `Phi = 0` at the end (Ng, Harada and Russell 1999): `V*' = V* - Phi`."""

    def potential(prefixes: Tensor) -> Tensor:
        return torch.sin(prefixes.sum(1).double() * 1.7 + prefixes.shape[1])

    def shaped(strings: Tensor) -> Tensor:
        return step(strings) + gamma * potential(strings) - potential(strings[:, :-1])

    def shaped_end(strings: Tensor) -> Tensor:
        return end(strings) - potential(strings[:, :-1])

    plain = build(gamma).to_mdp()[0]
    other = TokenMDP(
        policy, shaped_end, step_reward=shaped, vocab_size=VOCAB, max_length=LENGTH, eos_token_id=EOS, gamma=gamma
    ).to_mdp()[0]
    best, best_shaped = (value_iteration(m, tolerance=1e-13) for m in (plain, other))
    q, q_shaped = (
        bellman_optimality_q(m, torch.zeros(m.n_states, VOCAB, dtype=torch.float64)) for m in (plain, other)
    )
    for _ in range(LENGTH + 1):
        q, q_shaped = bellman_optimality_q(plain, q), bellman_optimality_q(other, q_shaped)
    mdp = build(gamma)
    states = [(d, i) for d in range(LENGTH) for i in range(VOCAB**d)]
    exists = torch.tensor([bool(mdp._exists[d][i]) for d, i in states])
    phi = torch.cat([potential(mdp.prefixes(torch.arange(VOCAB**d), d)) for d in range(LENGTH)])
    torch.testing.assert_close(best_shaped.values[:-1][exists], (best.values[:-1] - phi)[exists])
    assert torch.equal(q_shaped[:-1][exists].argmax(1), q[:-1][exists].argmax(1))


def all_strings(length: int) -> Tensor:
    return torch.tensor(list(product(range(VOCAB), repeat=length)))


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_an_episode_that_is_cut_is_worth_what_would_follow(gamma: float, lam: float) -> None:
    """A horizon of 2 in episodes of 4: with the exact V after the cut, every estimate has the exact expectation."""
    mdp, horizon = build(gamma, eos_token_id=None), 2
    tokens = all_strings(horizon)
    whole = torch.cat([tokens, torch.zeros(len(tokens), LENGTH - horizon, dtype=torch.long)], dim=1)
    values, rewards = mdp.state_values(whole), mdp.token_rewards(whole)[:, :horizon]
    after, mask = values[:, horizon], torch.ones(len(tokens), horizon)
    now = values[:, :horizon, None]
    cut = critic_targets(rewards, now, now, mask, gamma=gamma, lam_policy=lam, lam_value=lam, after=after)
    ended = critic_targets(rewards, now, now, mask, gamma=gamma, lam_policy=lam, lam_value=lam)
    # The last step's advantage is exact in every string: r + gamma V(s') - V(s).
    torch.testing.assert_close(cut.advantages[:, -1], mdp.advantages(whole)[:, horizon - 1])
    # And the targets of the first state have its value as their mean over the policy's strings.
    chances = mdp.probabilities[0][0][tokens[:, 0]] * mdp.probabilities[1][tokens[:, 0], tokens[:, 1]]
    assert float((chances * cut.returns[:, 0]).sum()) == pytest.approx(float(mdp.values[0]), abs=1e-12)
    missing = gamma**horizon * float((chances * after).sum()) * (lam if lam else 0.0)
    assert float((chances * ended.returns[:, 0]).sum()) == pytest.approx(float(mdp.values[0]) - missing, abs=1e-12)
    torch.testing.assert_close(cut.monte_carlo[:, 0] - ended.monte_carlo[:, 0], gamma**horizon * after)


def test_rows_that_ended_and_rows_that_were_cut() -> None:
    rewards, values = torch.ones(2, 3), torch.full((2, 3, 1), 0.5)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    out = critic_targets(rewards, values, values, mask, estimator="mc", after=torch.tensor([4.0, 0.0]))
    assert out.returns.tolist() == [[6.0, 5.0, 0.0], [3.0, 2.0, 1.0]]
    assert out.td_errors.tolist() == [[1.0, 4.5, 0.0], [1.0, 1.0, 0.5]]


def test_turns_as_the_unit_of_time() -> None:
    rewards = torch.tensor([[0.0, 1.0, 0.0, 0.0, 3.0]])
    mask, values = torch.tensor([[1, 1, 0, 1, 1]]), torch.tensor([[[0.5], [0.4], [9.0], [0.2], [0.1]]])
    out = critic_targets(rewards, values, values, mask, gamma=0.5, lam_policy=0.5, lam_value=0.0, time_unit="turn")
    # Turn 2: nothing decays inside it. Turn 1 ends with 1 + 0.5 ((1 - lam) 0.2 + lam 3).
    assert out.returns.flatten().tolist() == pytest.approx([1.1, 1.1, 0.0, 3.0, 3.0])
    assert out.advantages.flatten().tolist() == pytest.approx([1.8 - 0.5, 1.8 - 0.4, 0.0, 2.8, 2.9])
    assert out.monte_carlo.flatten().tolist() == pytest.approx([2.5, 2.5, 0.0, 3.0, 3.0])
    with pytest.raises(ValueError, match="time unit 'second'; choose one of token, turn"):
        critic_targets(rewards, values, values, mask, time_unit="second")
