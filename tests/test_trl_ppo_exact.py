"""The separate value model against exact values: on a frozen policy every estimator must find them."""

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from rl_plugins.functional.alignment import completion_states
from rl_plugins.nn import ValueModel
from rl_plugins.tabular import TokenMDP
from rl_plugins.trl import PPOConfig, PPOTrainer

from .helpers import exact_cases as exact

pytestmark = pytest.mark.slow

ENOUGH = 0.9


@torch.no_grad()
def accuracy(critic: ValueModel, mdp: TokenMDP, strings: int = 4000) -> tuple[float, float]:
    """`1 - E[(v - exact)^2] / Var(exact)`, which counts bias, and the explained variance, which does not."""
    tokens, mask, _ = mdp.sample(strings, torch.Generator().manual_seed(2))
    values = completion_states(critic(exact.with_prompt(tokens)), tokens.shape[1])[mask].double()
    goal = mdp.forecast(tokens, 1)[mask]
    error = values - goal
    return float(1 - error.square().mean() / goal.var()), float(1 - error.var() / goal.var())


@pytest.mark.parametrize("estimator", ["td", "gae", "mc"])
def test_the_value_model_finds_the_exact_values(tmp_path: Path, estimator: str) -> None:
    case = exact.Case(exact.election, vocab_size=4, max_length=5, eos_token_id=3, gamma=0.9, seed=3)
    model = exact.random_policy(case.vocab_size, case.seed)
    mdp = exact.exact_mdp(model, case)
    policy = {name: p.clone() for name, p in model.named_parameters()}

    def reward(completion_ids: list[list[int]], **kwargs: object) -> list[float]:
        return [float(case.reward(torch.tensor([ids]))) for ids in completion_ids]

    args = PPOConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_steps=10,
        disable_tqdm=True,
        seed=0,
        beta=0.0,
        learning_rate=0.0,
        value_learning_rate=3e-3,
        value_loss_coef=1.0,
        value_loss_type="squared",
        advantage_estimator=estimator,
        gamma=case.gamma,
        lam_value=0.7,
        max_completion_length=case.max_length,
        per_device_train_batch_size=128,
        steps_per_generation=2,
        num_iterations=2,
        max_steps=100,
    )
    trainer = PPOTrainer(
        model,
        reward,
        args,
        Dataset.from_dict({"prompt": [str(exact.PROMPT)] * 256}),
        processing_class=exact.digits_tokenizer(case.vocab_size, case.eos_token_id),
    )
    assert trainer.value_model is not None
    assert accuracy(trainer.value_model, mdp)[0] < 0.05, "a fresh value model knows nothing"
    trainer.train()
    for name, before in policy.items():
        assert torch.equal(model.get_parameter(name), before), name
    score, explained = accuracy(trainer.value_model.eval(), mdp)
    print("trainer", estimator, score, explained)
    assert min(score, explained) >= ENOUGH
    # Against the return of one string much is chance: no value model explains more than the exact one.
    tokens, mask, scores = mdp.sample(4000, torch.Generator().manual_seed(3))
    steps_left = mask.flip(1).cumsum(1).flip(1) - 1
    returns = (scores[:, None] * case.gamma**steps_left)[mask]
    ceiling = float(1 - (returns - mdp.forecast(tokens, 1)[mask]).var() / returns.var())
    logged = [e["critic/explained_variance"] for e in trainer.state.log_history if "critic/explained_variance" in e]
    late = sum(logged[-5:]) / 5
    print("explained variance of returns", late, "of at most", ceiling)
    assert all(map(math.isfinite, logged)) and late == pytest.approx(ceiling, abs=0.1)
