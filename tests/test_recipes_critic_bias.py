"""The critic's policy gradient against the exact one of a token MDP, all strings enumerated (docs/critic.md)."""

import re
import sys
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from rl_plugins.functional.policy_losses.aggregation import aggregate, prompt_weights
from rl_plugins.functional.rewards import terminal_rewards
from rl_plugins.signals import PolicyLoss, critic_signal, policy_loss
from rl_plugins.tabular import policy_gradient

ROOT = Path(__file__).parents[1]
GAMMA = 0.8


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    path = ROOT / "recipes" / "benchmarks" / "critic_bias.py"
    spec = util.spec_from_file_location("critic_bias", path)
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules["critic_bias"] = module  # where dataclasses look up the annotations
    spec.loader.exec_module(module)
    return module


def expected_loss_gradient(language: object, advantages: Tensor, aggregation: str) -> Tensor:
    """Minus the expected gradient of the package's own loss: all strings as one batch, weighed by probability. Right
    for what averages over rows."""
    logps = language.log_probs()  # type: ignore[attr-defined]
    probabilities = len(logps) * language.probabilities()  # type: ignore[attr-defined]
    loss, _ = policy_loss(
        PolicyLoss("vanilla", aggregation),
        logps,
        logps.detach(),
        advantages,
        language.mask,  # type: ignore[attr-defined]
        weights=probabilities[:, None],
        max_length=logps.shape[1],
        batch={"prompt_weights": prompt_weights(language.lengths.double(), 1)},  # type: ignore[attr-defined]
    )
    return -torch.autograd.grad(loss, language.logits)[0].flatten()  # type: ignore[attr-defined]


def close(x: Tensor, y: Tensor) -> None:
    torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


def test_the_exact_gradient_is_that_of_the_oracle(recipe: ModuleType) -> None:
    """The sum over strings against the policy gradient theorem on the same process as a general MDP."""
    language = recipe.make_language(3, vocab_size=3, max_length=4)
    mdp, _ = language.mdp(GAMMA).to_mdp()
    logits = torch.cat([language.logits.detach(), torch.zeros(1, 3, dtype=torch.float64)])
    oracle = policy_gradient(mdp, logits)[:-1].flatten()
    close(recipe.exact_gradient(language, GAMMA), oracle)


@pytest.mark.parametrize(("aggregation", "scale"), [("sequence_sum", 1.0), ("constant", 1 / 5)])
def test_sums_over_tokens_are_unbiased(recipe: ModuleType, aggregation: str, scale: float) -> None:
    language = recipe.make_language(2, vocab_size=4, max_length=5)
    advantages = language.mdp().advantages(language.tokens)
    close(expected_loss_gradient(language, advantages, aggregation), scale * recipe.exact_gradient(language))


def test_means_over_a_completion_are_not(recipe: ModuleType) -> None:
    """The package's losses have the expected gradients that the recipe computes, and these are off."""
    language = recipe.make_language(2, vocab_size=4, max_length=5)
    advantages = language.mdp().advantages(language.tokens)
    found = expected_loss_gradient(language, advantages, "sequence")
    close(found, recipe.expected_gradient(language, advantages, 1 / language.lengths.double()))
    close(found, recipe.expected_gradient(language, advantages, recipe.batch_factors(language, 1)))
    assert recipe.cosine(found, recipe.exact_gradient(language)) < 0.98


@pytest.mark.parametrize("aggregation", ["token", "micro_batch", "prompt"])
def test_the_ratio_of_sums_by_every_pair_of_completions(recipe: ModuleType, aggregation: str) -> None:
    """Two completions: each pair of strings as a batch of its own, weighed by its probability."""
    language = recipe.make_language(1, vocab_size=3, max_length=3)
    advantages, p = language.mdp().advantages(language.tokens), language.probabilities()
    token_loss, total = -advantages * language.log_probs(), torch.zeros((), dtype=torch.float64)
    for i in range(len(p)):
        for j in range(len(p)):
            pair = [i, j]
            weights = prompt_weights(language.lengths[pair].double(), 2)
            loss = aggregate(token_loss[pair], language.mask[pair], aggregation, row_weights=weights)
            total = total + p[i] * p[j] * loss
    found = -torch.autograd.grad(total, language.logits)[0].flatten()
    close(found, recipe.expected_gradient(language, advantages, recipe.batch_factors(language, 2)))


def test_the_error_of_a_batch_falls_as_one_over_its_size(recipe: ModuleType) -> None:
    language = recipe.make_language(2)
    cosines = recipe.of_aggregations(language, (1, 16, 64))
    sines = [(1 - cosines[f"token, {n} completions"] ** 2) ** 0.5 for n in (16, 64)]
    assert sines[0] / sines[1] == pytest.approx(4.0, rel=0.1) and sines[1] > 1e-5


@pytest.mark.parametrize("estimator", ["mc", "gae", "td"])
def test_the_discounted_objective_has_its_own_gradient(recipe: ModuleType, estimator: str) -> None:
    """With the factor the expected gradient is exactly that of the discounted return; without, it is not."""
    language = recipe.make_language(2)
    values = language.mdp(GAMMA).state_values(language.tokens).unsqueeze(-1)
    exact = recipe.exact_gradient(language, GAMMA)
    found = {}
    for discounted in (True, False):
        _, advantages, _ = critic_signal(
            terminal_rewards(language.rewards, language.mask),
            values,
            values,
            language.mask,
            gamma=GAMMA,
            scaling="none",
            discounted_objective=discounted,
            estimator=estimator,
        )
        found[discounted] = expected_loss_gradient(language, advantages, "sequence_sum")
    torch.testing.assert_close(found[True], exact, rtol=1e-6, atol=1e-8)  # gamma^t is in float32
    assert recipe.cosine(found[False], exact) < 0.995


def test_the_lookahead_biases_td_only_where_it_bootstraps(recipe: ModuleType) -> None:
    language = recipe.make_language(2)
    cosines = recipe.of_lookahead(language, (1, 2))
    assert all(value == pytest.approx(1.0, abs=1e-9) for name, value in cosines.items() if "head 1" in name)
    assert cosines["lambda 0.0, look-ahead of 1"] == pytest.approx(1.0, abs=1e-9)
    ahead = [cosines[f"lambda {lam}, look-ahead of 2"] for lam in (0.0, 0.5, 0.95)]
    assert ahead == sorted(ahead) and ahead[0] < 0.98 and ahead[-1] > 0.999


@pytest.mark.slow
def test_the_figures_of_the_documentation(recipe: ModuleType) -> None:
    section = (ROOT / "docs" / "critic.md").read_text().split("## Bias of the policy's gradient", 1)[1]
    table = re.findall(r"^\| [^|]+ \| `([^`]+)` \| ([\d.]+) \| ([\d.]+) \|$", section.split("\n## ", 1)[0], re.M)
    report = recipe.measure()
    assert len(table) >= 12
    for name, mean, worst in table:
        assert (report[name]["mean"], report[name]["worst"]) == pytest.approx((float(mean), float(worst)), abs=6e-6)
