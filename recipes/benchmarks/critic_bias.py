"""Measure how far the critic's policy gradient is from the exact one, by aggregation, discount and bootstrap.

    OMP_NUM_THREADS=1 python recipes/benchmarks/critic_bias.py

The benchmark makes random languages of short strings (`rl_plugins.tabular.TokenMDP`). Every prefix has logits of its
own, drawn from a normal distribution, and every finished string has a reward of 0 or 1. All strings are enumerated and
their values are exact, so the expected gradient of each choice of options is exact, too, without sampling. It is
compared with the gradient of the expected return by the cosine of the two over all logits. The benchmark prints the
mean cosine over the languages, and the worst.

With `N` completions in a batch, `token` divides the sum of their losses by the sum of their lengths. The expectation
of this ratio needs only the distribution of the sum of lengths, which is a convolution. `micro_batch` is the same with
the completions of one device, `prompt` with those of one prompt; `sequence` is `N = 1`.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rl_plugins.functional.returns import discount_factors
from rl_plugins.functional.rewards import terminal_rewards
from rl_plugins.signals import critic_targets
from rl_plugins.tabular import TokenMDP

SIZES = (1, 2, 8, 32, 128)
GAMMAS = (0.99, 0.95, 0.9, 0.5)


@dataclass(frozen=True)
class Language:
    """All strings of a language, and the policy's logits.

    Attributes:
        logits: one table of all prefixes `(prefixes, V)`, depth by depth, with gradient.
        rows: row in that table of each state of each string `(N, T)`.
        tokens: all strings `(N, T)`, padded with eos.
        mask: real tokens `(N, T)`.
        rewards: of each string `(N,)`.
    """

    logits: Tensor
    rows: Tensor
    tokens: Tensor
    mask: Tensor
    rewards: Tensor

    @property
    def lengths(self) -> Tensor:
        """Tokens of each string, eos included `(N,)`."""
        return self.mask.sum(1)

    def log_probs(self) -> Tensor:
        """Compute `ln pi(y_t|s_t)` of every string `(N, T)`, with gradient; 0 after the end."""
        logps = torch.log_softmax(self.logits, -1)[self.rows, self.tokens]
        return torch.where(self.mask, logps, 0.0)

    def probabilities(self) -> Tensor:
        """Compute the probability of each string `(N,)`, without gradient."""
        return self.log_probs().detach().sum(1).exp()

    def mdp(self, gamma: float = 1.0) -> TokenMDP:
        """Make the decision process with the exact values of the policy."""
        vocab_size, max_length = self.logits.shape[1], self.tokens.shape[1]
        table = torch.zeros(sum(vocab_size**d for d in range(max_length + 1)), dtype=torch.float64)
        for n in range(1, max_length + 1):
            chosen = self.lengths == n
            table[prefix_rows(self.tokens[chosen, :n], vocab_size)] = self.rewards[chosen]

        def policy(prefixes: Tensor) -> Tensor:
            return torch.softmax(self.logits.detach(), -1)[prefix_rows(prefixes, vocab_size)]

        def reward(strings: Tensor) -> Tensor:
            return table[prefix_rows(strings, vocab_size)]

        return TokenMDP(
            policy, reward, vocab_size=vocab_size, max_length=max_length, eos_token_id=vocab_size - 1, gamma=gamma
        )


def prefix_rows(prefixes: Tensor, vocab_size: int) -> Tensor:
    """Return the rows `(N,)` of prefixes `(N, d)` in a table of all prefixes, depth by depth."""
    depth = prefixes.shape[1]
    powers = vocab_size ** torch.arange(depth - 1, -1, -1)
    return sum(vocab_size**d for d in range(depth)) + (prefixes * powers).sum(1)


def make_language(seed: int, vocab_size: int = 4, max_length: int = 6, sharpness: float = 1.0) -> Language:
    """Make a random language; the last token of its vocabulary is eos."""
    g = torch.Generator().manual_seed(seed)
    eos = vocab_size - 1
    strings = torch.cartesian_prod(*[torch.arange(vocab_size)] * max_length).view(-1, max_length)
    mask = ((strings == eos).long().cumsum(1) - (strings == eos).long()) == 0
    strings = strings.masked_fill(~mask, eos).unique(dim=0)
    mask = ((strings == eos).long().cumsum(1) - (strings == eos).long()) == 0
    rows = torch.stack([prefix_rows(strings[:, :t], vocab_size) for t in range(max_length)], dim=1)
    prefixes = sum(vocab_size**d for d in range(max_length))
    logits = sharpness * torch.randn(prefixes, vocab_size, generator=g, dtype=torch.float64)
    rewards = torch.randint(2, (len(strings),), generator=g).double()
    return Language(logits.requires_grad_(), rows, strings, mask, rewards)


def expected_gradient(language: Language, advantages: Tensor, factors: Tensor | float = 1.0) -> Tensor:
    """Compute `E[f(y) sum_t A_t grad ln pi(y_t|s_t)]` over all strings, flat.

    Args:
        language: The strings.
        advantages: `A_t` of each string `(N, T)`.
        factors: `f` of each string `(N,)`: the aggregation multiplies the sum over its tokens by this, on average.
    """
    weights = language.probabilities() * factors
    total = (weights[:, None] * advantages * language.log_probs()).sum()
    return torch.autograd.grad(total, language.logits)[0].flatten()


def exact_gradient(language: Language, gamma: float = 1.0) -> Tensor:
    """Compute the gradient of the expected discounted return, `E[gamma^(|y| - 1) r(y)]`, over all strings, flat."""
    returns = gamma ** (language.lengths - 1).double() * language.rewards
    return torch.autograd.grad((language.log_probs().sum(1).exp() * returns).sum(), language.logits)[0].flatten()


def batch_factors(language: Language, size: int) -> Tensor:
    """Compute `E[n / (|y| + the lengths of n - 1 others)]` of each string `(N,)`: its factor `f` for `token` with n
    completions in a batch."""
    lengths, probabilities = language.lengths, language.probabilities()
    one = torch.zeros(language.tokens.shape[1] + 1, dtype=torch.float64).index_add(0, lengths, probabilities)
    others = torch.ones(1, dtype=torch.float64)
    for _ in range(size - 1):
        padded = torch.nn.functional.pad(others, (len(one) - 1, len(one) - 1))
        others = torch.nn.functional.conv1d(padded[None, None], one.flip(0)[None, None])[0, 0]
    totals = torch.arange(len(others)).double()
    by_length = [(size * others / (n + totals)).sum() for n in range(1, len(one))]
    return torch.stack(by_length)[lengths - 1]


def cosine(x: Tensor, y: Tensor) -> float:
    """Compute the cosine of two flat gradients."""
    return float(x @ y / (x.norm() * y.norm()))


def noise(language: Language, size: int) -> float:
    """Compute the root mean square of the sampling error of a batch's gradient, in units of the exact gradient's norm,
    for `sequence_sum` with exact advantages."""
    advantages, exact = language.mdp().advantages(language.tokens), exact_gradient(language)
    policy = torch.softmax(language.logits.detach(), -1)[language.rows]
    chosen = torch.nn.functional.one_hot(language.tokens, policy.shape[-1])
    # The states of a string are different rows of the table, so their squares add up.
    squares = (advantages**2 * ((chosen - policy) ** 2).sum(-1) * language.mask).sum(1)
    variance = language.probabilities() @ squares - exact @ exact
    return float((variance / size).sqrt() / exact.norm())


def of_aggregations(language: Language, sizes: tuple[int, ...] = SIZES) -> dict[str, float]:
    """Compute the cosine of every aggregation's expected gradient to the exact one, with exact advantages."""
    advantages, exact = language.mdp().advantages(language.tokens), exact_gradient(language)
    found = {"sequence_sum, constant": cosine(expected_gradient(language, advantages), exact)}
    for size in sizes:
        gradient = expected_gradient(language, advantages, batch_factors(language, size))
        found["sequence" if size == 1 else f"token, {size} completions"] = cosine(gradient, exact)
    return found


def of_discounts(language: Language, gammas: tuple[float, ...] = GAMMAS) -> dict[str, float]:
    """Measure the bias of the discount, with and without the factor `gamma^t` of the discounted objective."""
    found = {}
    for gamma in gammas:
        advantages, exact = language.mdp(gamma).advantages(language.tokens), exact_gradient(language, gamma)
        factors = discount_factors(language.mask, gamma=gamma)
        found[f"gamma {gamma}"] = cosine(expected_gradient(language, advantages), exact)
        found[f"gamma {gamma}, discounted_objective"] = cosine(
            expected_gradient(language, factors * advantages), exact
        )
    return found


def of_lookahead(language: Language, heads: tuple[int, ...] = (2, 4)) -> dict[str, float]:
    """Measure the bias of the bootstrap from all heads, each with its exact forecast."""
    mdp, exact = language.mdp(), exact_gradient(language)
    rewards = terminal_rewards(language.rewards, language.mask)
    found = {}
    for number in heads:
        values = torch.stack([mdp.forecast(language.tokens, k + 1) for k in range(number)], dim=-1)
        for estimator, lam in (("td", 0.0), ("gae", 0.5), ("gae", 0.95)):
            for lookahead in (False, True):
                targets = critic_targets(
                    rewards, values, values, language.mask, estimator=estimator, lam_policy=lam, lookahead=lookahead
                )
                name = "look-ahead" if lookahead else "head 1"
                gradient = expected_gradient(language, targets.advantages)
                found[f"lambda {lam}, {name} of {number}"] = cosine(gradient, exact)
    return found


def measure(languages: int = 50, vocab_size: int = 4, max_length: int = 6) -> dict[str, dict[str, float]]:
    """Compute mean and worst cosine over random languages, for each choice of options."""
    found: dict[str, list[float]] = {}
    for seed in range(languages):
        language = make_language(seed, vocab_size, max_length)
        for cosines in (of_aggregations(language), of_discounts(language), of_lookahead(language)):
            for name, value in cosines.items():
                found.setdefault(name, []).append(value)
    return {name: {"mean": sum(xs) / len(xs), "worst": min(xs)} for name, xs in found.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--languages", type=int, default=50, help="random languages")
    parser.add_argument("--vocab-size", type=int, default=4, help="tokens, eos included")
    parser.add_argument("--max-length", type=int, default=6, help="tokens of a string at most")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    report = measure(args.languages, args.vocab_size, args.max_length)
    print(f"{args.languages} languages, {args.vocab_size} tokens, strings of at most {args.max_length}")
    for name, figures in report.items():
        print(f"{name:34} cosine {figures['mean']:.5f}, worst {figures['worst']:.5f}")
    noises = [noise(make_language(seed, args.vocab_size, args.max_length), 32) for seed in range(args.languages)]
    print(f"sampling error of a batch of 32: {sum(noises) / len(noises):.2f} times the gradient, on average")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
