"""Sequential heads against exact values: they find `V`, also where one hidden state of the trunk does not hold it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

from rl_plugins.nn import MTPHeads, attach_mtp_heads
from rl_plugins.rollouts import SpeculativeDecoder
from rl_plugins.rollouts.values import EachStep, ValueRecord

from .helpers.exact_cases import (
    ENOUGH,
    Case,
    accuracy,
    election,
    exact_mdp,
    lead,
    random_policy,
    run_heads,
    train_heads,
    with_prompt,
)
from .helpers.speculative_models import randomise_heads

STEPS = 300
STRINGS = {"exact": 96, "td": 96, "gae": 96, "mc": 256}  # few per step, but where the targets are noisy


def pairs(strings: Tensor) -> Tensor:
    """A half for every 2 right after a 1."""
    return ((strings[:, :-1] == 1) & (strings[:, 1:] == 2)).sum(1).double() / 2


def last_repeats_first(strings: Tensor) -> Tensor:
    """Whether the last token is the first one again."""
    return (strings[:, -1] == strings[:, 0]).double()


CASES = {
    "fixed length": Case(election, vocab_size=4, max_length=6, steps=STEPS),
    "eos, every step, discounted": Case(
        election, vocab_size=5, max_length=6, eos_token_id=4, gamma=0.9, step_reward=lead, steps=STEPS
    ),
    "pairs": Case(pairs, vocab_size=4, max_length=6, steps=STEPS),
}


def train_and_score(case: Case, head_type: str, estimator: str, num_heads: int = 1) -> list[float]:
    """Accuracy of new heads after training on a frozen random policy."""
    model = random_policy(case.vocab_size, case.seed)
    mdp, prompt_length = exact_mdp(model, case), case.prompt_length
    inner_size = 128 if head_type == "parallel" else None
    heads = attach_mtp_heads(model, num_heads, head_type=head_type, inner_size=inner_size)
    assert max(accuracy(model, heads, mdp, prompt_length=prompt_length)) < 0.05, "fresh heads know nothing"
    lengths = {"steps": case.steps, "strings": STRINGS[estimator], "prompt_length": prompt_length}
    train_heads(model, heads, mdp, estimator=estimator, **lengths)
    return accuracy(model, heads, mdp, prompt_length=prompt_length)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "estimator"),
    [
        ("fixed length", "td"),
        ("fixed length", "gae"),
        ("eos, every step, discounted", "td"),
        ("eos, every step, discounted", "gae"),
        ("eos, every step, discounted", "mc"),
        ("pairs", "mc"),
    ],
)
def test_one_head_finds_the_exact_values(name: str, estimator: str) -> None:
    """Also in the first state, where it has not read a token before: the prompt is one token long."""
    (score,) = train_and_score(CASES[name], "sequential", estimator)
    print(name, estimator, score)
    assert score >= ENOUGH


@pytest.mark.slow
def test_both_of_two_heads_judge_the_same_state() -> None:
    """The second reads the trunk two tokens before, and both have read all tokens since."""
    case = Case(pairs, vocab_size=4, max_length=5, prompt_length=3, steps=200)
    scores = train_and_score(case, "sequential", "td", num_heads=2)
    print(scores)
    assert min(scores) >= ENOUGH, scores


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reward", "estimator", "enough"),
    [
        (pairs, "exact", ENOUGH),
        (pairs, "td", ENOUGH),
        (last_repeats_first, "exact", ENOUGH),
        (last_repeats_first, "td", 0.85),  # its rewards are the noisiest, and it still learns
    ],
)
def test_attention_over_the_past_judges_what_one_state_does_not_tell(
    reward: Callable[[Tensor], Tensor], estimator: str, enough: float
) -> None:
    """Even regression on the exact values stops where the trunk's state does not tell neighbours apart."""
    case = Case(reward, vocab_size=4, max_length=6, steps=STEPS)
    scores = {head_type: train_and_score(case, head_type, estimator)[0] for head_type in ("parallel", "sequential")}
    print(reward.__name__, estimator, scores)
    assert scores["parallel"] < 0.9 and scores["sequential"] >= enough, scores
    assert scores["sequential"] > scores["parallel"] + 0.1


# The baseline of a token has not seen it


def heads_with_opinions(head_type: str) -> tuple[Qwen3ForCausalLM, MTPHeads]:
    """Two random heads whose values differ between states."""
    model = random_policy(4, seed=0)
    heads = attach_mtp_heads(model, 2, head_type=head_type)
    randomise_heads(heads, 0.5)
    return model, heads


@pytest.mark.parametrize("head_type", ["parallel", "sequential"])
@torch.no_grad()
def test_tokens_from_t_on_do_not_change_values_at_t(head_type: str) -> None:
    model, heads = heads_with_opinions(head_type)
    tokens = torch.randint(4, (32, 6), generator=torch.Generator().manual_seed(2))
    values = run_heads(model, heads, tokens, prompt_length=3)[0].values
    assert values is not None and values.flatten(0, 1).std(0).min() > 0.1
    for t in range(tokens.shape[1]):
        others = tokens.clone()
        others[:, t] = (tokens[:, t] + 1) % 4
        others[:, t + 1 :] = others[:, t + 1 :].flip(0)
        found = run_heads(model, heads, others, prompt_length=3)[0].values
        assert found is not None
        torch.testing.assert_close(found[:, : t + 1], values[:, : t + 1], rtol=0, atol=1e-6)
        if t + 1 < tokens.shape[1]:
            assert (found[:, t + 1] - values[:, t + 1]).abs().amax(0).min() > 0.1, "the next state has seen it"


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("head_type", ["parallel", "sequential"])
def test_rollouts_save_one_baseline_for_all_tokens_of_a_state(head_type: str, speculative: bool) -> None:
    """Rows that share a prefix share its value, whatever token was drawn in it, and it is that of a pass."""
    model, heads = heads_with_opinions(head_type)
    record = ValueRecord(heads)
    prompts = with_prompt(torch.zeros(64, 0, dtype=torch.long), 3)
    options = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": 4, "do_sample": True, "top_k": 0}
    torch.manual_seed(0)
    if speculative:
        decoder = SpeculativeDecoder(draft_cost=0.0)
        decoder.recorder = record
        output = model.generate(prompts, custom_generate=decoder, pad_token_id=0, **options)
    else:
        with EachStep(record).following(model):
            output = model.generate(prompts, pad_token_id=0, **options)
    tokens = output[:, 3:]
    recorded = record.finish(4)
    assert recorded is not None
    with torch.no_grad():
        passed = run_heads(model, heads, tokens, prompt_length=3)[0].values
    torch.testing.assert_close(recorded[0], passed, rtol=0, atol=1e-5)
    several = 0
    for t in range(4):
        for state in output[:, : 3 + t].unique(dim=0):
            rows = (output[:, : 3 + t] == state).all(1)
            assert (recorded[0][rows, t] - recorded[0][rows, t][0]).abs().max() < 1e-5
            several += len(tokens[rows, t].unique()) > 1
    assert several >= 8, "states in which several tokens were drawn"
