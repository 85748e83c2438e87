"""The value heads against exact values: on a frozen policy every estimator must find `V` and its forecast."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from rl_plugins.nn import MTPHeads, attach_mtp_heads
from rl_plugins.trl import MTPCriticConfig, MTPCriticTrainer

from .helpers.exact_cases import (
    ENOUGH,
    PROMPT,
    Case,
    accuracy,
    digits_tokenizer,
    election,
    exact_mdp,
    lead,
    random_policy,
    train_heads,
)

pytestmark = pytest.mark.slow


def parity_and_length(strings: Tensor) -> Tensor:
    """Plus or minus a half for the parity of the 1s, and a little for every token."""
    odd = (strings == 1).sum(1) % 2
    return odd.double() - 0.5 + 0.25 * strings.shape[1]


def ordered_pairs(strings: Tensor) -> Tensor:
    """A half for every pair of a 2 after a 1, however far apart, and at most 1."""
    ones_before = (strings == 1).cumsum(1)
    return (ones_before * (strings == 2)).sum(1).clamp(max=2).double() / 2


# Rewards that the frozen random trunk's states can tell apart: regression on the exact values themselves stops at 0.75
# to 0.95 where a pattern needs neighbouring tokens, however wide the heads.
CASES = {
    "fixed length": Case(election, vocab_size=4, max_length=6, steps=250),
    "eos": Case(parity_and_length, vocab_size=5, max_length=6, eos_token_id=4, seed=0),
    "every step": Case(election, vocab_size=5, max_length=6, eos_token_id=4, gamma=0.9, step_reward=lead),
    "eos, discounted": Case(ordered_pairs, vocab_size=6, max_length=6, eos_token_id=5, gamma=0.9),
}


@pytest.mark.parametrize("estimator", ["td", "gae", "mc"])
@pytest.mark.parametrize("name", CASES)
def test_heads_find_the_exact_values(name: str, estimator: str) -> None:
    case = CASES[name]
    model = random_policy(case.vocab_size, case.seed)
    mdp = exact_mdp(model, case)
    heads = attach_mtp_heads(model, 2, inner_size=128)
    assert max(accuracy(model, heads, mdp)) < 0.05, "fresh heads know nothing"
    train_heads(model, heads, mdp, estimator=estimator, steps=case.steps)
    scores = accuracy(model, heads, mdp)
    print(name, estimator, scores)
    assert min(scores) >= ENOUGH, scores


@pytest.mark.parametrize("paid", ["at the end", "after every token"])
def test_trainer_finds_the_exact_values_and_leaves_the_trunk_alone(tmp_path: Path, paid: str) -> None:
    step_reward = None if paid == "at the end" else lead
    case = Case(election, vocab_size=4, max_length=5, eos_token_id=3, gamma=0.9, seed=3, step_reward=step_reward)
    model = random_policy(case.vocab_size, case.seed)
    mdp = exact_mdp(model, case)
    trunk = {name: p.clone() for name, p in model.named_parameters()}

    def reward(completion_ids: list[list[int]], **kwargs: object) -> list[float] | list[list[float]]:
        if step_reward is None:
            return [float(case.reward(torch.tensor([ids]))) for ids in completion_ids]
        tokens = torch.tensor([[*ids, *[3] * (case.max_length - len(ids))] for ids in completion_ids])
        rows = mdp.token_rewards(tokens).tolist()
        return [row[: len(ids)] for row, ids in zip(rows, completion_ids, strict=True)]

    args = MTPCriticConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1000,
        seed=0,
        learning_rate=0.0,
        head_learning_rate=5e-3,
        gamma=case.gamma,
        value_grad_scale=0.0,
        mtp_inner_size=128,
        target_tau=0.1,
        lam_value=0.7,
        max_completion_length=case.max_length,
        per_device_train_batch_size=256,
        num_iterations=2,
        max_steps=200,
    )
    trainer = MTPCriticTrainer(
        model,
        reward,
        args,
        Dataset.from_dict({"prompt": [str(PROMPT)] * 256}),
        processing_class=digits_tokenizer(case.vocab_size, case.eos_token_id),
    )
    trainer.train()
    for name, before in trunk.items():
        assert torch.equal(model.get_parameter(name), before), name
    heads = MTPHeads.of(model)
    assert heads is not None
    scores = accuracy(model.eval(), heads, mdp)
    print("trainer", scores)
    assert min(scores) >= ENOUGH, scores
