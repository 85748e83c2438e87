"""The exact oracle against hand-worked numbers, brute-force enumeration and Monte Carlo."""

from collections.abc import Callable, Iterator
from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor

from rl_plugins.tabular import TokenMDP

VOCAB, LENGTH = 3, 4


def random_policy(prefixes: Tensor) -> Tensor:
    """Probabilities (N, V) that depend on every token of the prefix and on its length."""
    weights = torch.arange(1, prefixes.shape[1] + 1) ** 2
    code = (prefixes * weights).sum(1, keepdim=True) + 3 * prefixes.shape[1]
    return torch.softmax(torch.sin((code + 1.0) * torch.tensor([1.3, 2.1, 0.7])).double(), dim=-1)


def random_reward(strings: Tensor) -> Tensor:
    weights = torch.arange(1, strings.shape[1] + 1)
    return torch.cos((strings * weights).sum(1).double() + 0.5 * strings.shape[1])


def build(eos_token_id: int | None = 2, gamma: float = 1.0) -> TokenMDP:
    return TokenMDP(
        random_policy,
        random_reward,
        vocab_size=VOCAB,
        max_length=LENGTH,
        eos_token_id=eos_token_id,
        gamma=gamma,
    )


def finished_strings(eos: int | None) -> Iterator[tuple[int, ...]]:
    for length in range(1, LENGTH + 1):
        for string in product(range(VOCAB), repeat=length):
            if eos not in string[:-1] and (length == LENGTH or string[-1] == eos):
                yield string


def probability(string: tuple[int, ...], start: int) -> float:
    """Chance of string[start:] after string[:start]."""
    chance = 1.0
    for t in range(start, len(string)):
        chance *= next_tokens(string[:t])[string[t]]
    return chance


@cache
def next_tokens(prefix: tuple[int, ...]) -> list[float]:
    return random_policy(torch.tensor(prefix, dtype=torch.long)[None])[0].tolist()


@cache
def reward_of(string: tuple[int, ...]) -> float:
    return float(random_reward(torch.tensor([string])))


def brute_value(prefix: tuple[int, ...], eos: int | None, gamma: float) -> float:
    """V(prefix) as a sum over all finished strings of probability times discounted reward."""
    d = len(prefix)
    return sum(
        probability(s, d) * gamma ** (len(s) - 1 - d) * reward_of(s)
        for s in finished_strings(eos)
        if len(s) > d and s[:d] == prefix
    )


def all_padded(eos: int | None, pad: int) -> Tensor:
    rows = [list(s) + [pad] * (LENGTH - len(s)) for s in finished_strings(eos)]
    return torch.tensor(rows)


def test_two_tokens_by_hand() -> None:
    """Two tokens, length 2, p(1) = 1/4 then 1/2; the reward is the string as a binary number."""
    mdp = TokenMDP(
        lambda s: torch.tensor([[0.75, 0.25]]) if s.shape[1] == 0 else torch.full((len(s), 2), 0.5),
        lambda s: 2.0 * s[:, 0] + s[:, 1],
        vocab_size=2,
        max_length=2,
        gamma=0.5,
    )
    assert mdp.values[1].tolist() == [0.5, 2.5]
    assert mdp.action_values[0].tolist() == [[0.25, 1.25]]
    assert mdp.values[0].tolist() == [0.5]
    tokens = torch.tensor([[1, 0], [0, 1]])
    assert mdp.state_values(tokens).tolist() == [[0.5, 2.5], [0.5, 0.5]]
    assert mdp.advantages(tokens).tolist() == [[0.75, -0.5], [-0.25, 0.5]]
    assert mdp.forecast(tokens, k=2).tolist() == [[1.0, 0.0], [1.0, 0.0]]


def test_eos_by_hand() -> None:
    """eos = 1 with p = 1/2, at most two tokens, reward 1 for stopping at once and 4 for "0, eos"."""
    mdp = TokenMDP(
        lambda s: torch.full((len(s), 2), 0.5),
        lambda s: torch.where(s[:, -1] == 1, float(s.shape[1] ** 2), 0.0),
        vocab_size=2,
        max_length=2,
        eos_token_id=1,
    )
    tokens = torch.tensor([[0, 1], [1, 1]])
    assert mdp.state_values(tokens).tolist() == [[1.5, 2.0], [1.5, 0.0]]
    assert mdp.forecast(tokens, k=2, continuing=True)[:, 0].tolist() == [2.0, 2.0]
    assert mdp.forecast(tokens, k=2, continuing=False)[:, 0].tolist() == [1.0, 1.0]
    assert mdp.completion_mask(tokens).tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize("eos", [None, 0, 2])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_values_equal_enumeration(eos: int | None, gamma: float) -> None:
    mdp = build(eos, gamma)
    tokens = all_padded(eos, pad=0 if eos is None else eos)
    values, mask = mdp.state_values(tokens), mdp.completion_mask(tokens)
    for row, real, string in zip(values, mask, tokens.tolist(), strict=True):
        for t in range(LENGTH):
            expected = brute_value(tuple(string[:t]), eos, gamma) if real[t] else 0.0
            assert float(row[t]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("eos", [None, 2])
def test_two_step_forecast_equals_enumeration(eos: int | None) -> None:
    mdp = build(eos, gamma=0.9)
    tokens = all_padded(eos, pad=0 if eos is None else eos)
    given, plain = mdp.forecast(tokens, k=2), mdp.forecast(tokens, k=2, continuing=False)
    mask = mdp.completion_mask(tokens)
    for i, string in enumerate(tokens.tolist()):
        for t in range(LENGTH):
            prefix = tuple(string[:t])
            going_on = [a for a in range(VOCAB) if a != eos] if mask[i, t] and t + 1 < LENGTH else []
            chances = [probability((*prefix, a), t) for a in going_on]
            total = sum(p * brute_value((*prefix, a), eos, 0.9) for p, a in zip(chances, going_on, strict=True))
            assert float(plain[i, t]) == pytest.approx(total, abs=1e-12)
            assert float(given[i, t]) == pytest.approx(total / sum(chances) if chances else 0.0, abs=1e-12)


@pytest.mark.parametrize("eos", [None, 2])
def test_first_head_forecasts_the_value(eos: int | None) -> None:
    mdp = build(eos)
    tokens = all_padded(eos, pad=0 if eos is None else eos)
    torch.testing.assert_close(mdp.forecast(tokens, k=1), mdp.state_values(tokens))


@pytest.mark.parametrize("k", [2, 3, LENGTH, LENGTH + 1])
def test_tower_property(k: int) -> None:
    """Without eos and discount E[V(s_{t+k-1}) | s_t] = V(s_t) as long as s_{t+k-1} exists."""
    mdp = build(eos_token_id=None)
    tokens = all_padded(None, pad=0)
    expected = mdp.state_values(tokens)
    expected[:, max(0, LENGTH - k + 1) :] = 0.0
    torch.testing.assert_close(mdp.forecast(tokens, k), expected)


def test_advantages_average_to_zero() -> None:
    mdp = build(gamma=0.9)
    for depth in range(LENGTH):
        advantages = mdp.action_values[depth] - mdp.values[depth][:, None]
        mean = (mdp.probabilities[depth] * advantages).sum(-1)
        torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-14, rtol=0)


def test_advantages_telescope_to_the_return() -> None:
    """With gamma = 1 the advantages along a string add up to R - V(s_0)."""
    mdp = build()
    tokens, _, rewards = mdp.sample(64, torch.Generator().manual_seed(0))
    torch.testing.assert_close(mdp.advantages(tokens).sum(1), rewards - mdp.values[0])


@pytest.mark.parametrize("eos", [None, 0, 2])
def test_samples_agree_with_the_value(eos: int | None) -> None:
    mdp = build(eos)
    tokens, mask, rewards = mdp.sample(20_000, torch.Generator().manual_seed(1))
    error = rewards.std() / len(rewards) ** 0.5
    assert abs(rewards.mean() - mdp.values[0].item()) < 4 * error
    lengths = mask.sum(1)
    for i in range(50):
        length = int(lengths[i])
        torch.testing.assert_close(rewards[i : i + 1], random_reward(tokens[i : i + 1, :length]))
        assert (tokens[i, length:] == eos).all() if eos is not None else length == LENGTH


def test_padding_changes_nothing() -> None:
    mdp = build()
    clean, garbage = all_padded(2, pad=2), all_padded(2, pad=-100)
    longer = torch.nn.functional.pad(garbage, (0, 2), value=1)
    for read in (mdp.state_values, mdp.advantages, lambda y: mdp.forecast(y, 2)):
        torch.testing.assert_close(read(garbage), read(clean))
        torch.testing.assert_close(read(longer), torch.nn.functional.pad(read(clean), (0, 2)))


def test_large_tables_are_computed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build()
    monkeypatch.setattr("rl_plugins.tabular.token_mdp.CHUNK", 5)
    torch.testing.assert_close(build().values, whole.values)


def test_errors_say_what_to_do() -> None:
    def make(policy: Callable[[Tensor], Tensor] = random_policy, **sizes: int) -> TokenMDP:
        return TokenMDP(policy, random_reward, **({"vocab_size": 3, "max_length": 2} | sizes))

    with pytest.raises(ValueError, match="reduce max_length"):
        make(vocab_size=8, max_length=12)
    with pytest.raises(ValueError, match="sum to 1"):
        make(policy=lambda s: 2 * random_policy(s))
    with pytest.raises(ValueError, match="sum to 1"):
        make(policy=lambda s: random_policy(s) * float("nan"))
    with pytest.raises(ValueError, match=r"not \(N, V\)"):
        make(policy=lambda s: random_policy(s)[:, :2])
    with pytest.raises(ValueError, match="eos_token_id"):
        make(eos_token_id=3)
    with pytest.raises(ValueError, match="vocab_size >= 2"):
        make(max_length=0)
    with pytest.raises(ValueError, match="numbered from 1"):
        build().forecast(torch.zeros(1, 2, dtype=torch.long), k=0)
    with pytest.raises(ValueError, match="tokens must lie in"):
        build().state_values(torch.tensor([[0, 7]]))
