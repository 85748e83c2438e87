"""Completions that the trainer did not generate itself: holes from an environment, and empty ones."""

import pytest
import torch

from rl_plugins.functional.returns import lambda_returns
from rl_plugins.trl import EpisodeRollouts, MTPCriticTrainer

from .helpers.step_rewards import Sums
from .helpers.tiny import change_values

pytestmark = pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")

COMPLETIONS = [[3, 4, 5, 6, 1], [3, 1], [4, 5, 1], [6, 7, 8, 1]]
HOLES = [[1, 0, 0, 1, 1], [1, 1], [1, 0, 1], [1, 1, 1, 1]]


def scripted(completions, env_mask=None):
    """A rollout function that answers every batch with the same completions."""

    def rollout(prompts, trainer):
        rows = range(len(prompts))
        output = {
            "prompt_ids": [trainer.processing_class(prompt)["input_ids"] for prompt in prompts],
            "completion_ids": [completions[i % len(completions)] for i in rows],
            "logprobs": None,
        }
        if env_mask is not None:
            output["env_mask"] = [env_mask[i % len(env_mask)] for i in rows]
        return output

    return rollout


def train(tmp_path, critic_args, tiny_model, tokenizer, dataset, reward, rollout_func, **overrides):
    args = critic_args(tmp_path, per_device_train_batch_size=4, max_steps=2, logging_steps=1, **overrides)
    trainer = MTPCriticTrainer(
        tiny_model(), reward, args, dataset, processing_class=tokenizer, rollout_func=rollout_func
    )
    trainer.train()
    return trainer


def finite(trainer):
    return all(p.isfinite().all() for p in trainer.model.parameters())


@pytest.mark.slow
def test_tokens_of_the_environment_are_skipped(tmp_path, critic_args, tiny_model, tokenizer, dataset, reward):
    rollout_func = scripted(COMPLETIONS, HOLES)
    trainer = train(
        tmp_path, critic_args, tiny_model, tokenizer, dataset, reward, rollout_func, advantage_scaling="none"
    )
    batch = trainer.last_rollout
    mask = batch["critic_mask"]
    assert mask.sum().item() == sum(map(sum, HOLES))
    assert (batch["advantages"][~mask] == 0).all() and (batch["returns"][~mask] == 0).all()
    # gamma = lambda = 1: the reward, paid at the last real token, is the return of every real token before it.
    expected = batch["scores"].unsqueeze(1).expand_as(mask) * mask
    torch.testing.assert_close(batch["returns"], expected)
    rewards = torch.zeros_like(expected)
    for row, holes in enumerate(HOLES):
        rewards[row, max(i for i, real in enumerate(holes) if real)] = batch["scores"][row]
    values = batch["old_values"][..., 0]
    # Target heads equal the online ones up to one step of averaging; at lambda = 1 they do not matter.
    exact = lambda_returns(rewards, values, mask, gamma=1.0, lam=1.0)
    torch.testing.assert_close(batch["returns"], exact)
    assert finite(trainer)


@pytest.mark.slow
def test_empty_completions_are_skipped_and_counted(tmp_path, critic_args, tiny_model, tokenizer, dataset, reward):
    rollout_func = scripted([[3, 4, 1], [], [5, 1], []])
    trainer = train(tmp_path, critic_args, tiny_model, tokenizer, dataset, reward, rollout_func)
    skipped = [row["critic/skipped_completions"] for row in trainer.state.log_history if "loss" in row]
    assert skipped == [2.0, 2.0]
    assert finite(trainer)


@pytest.mark.slow
def test_a_batch_without_any_real_token_changes_nothing(tmp_path, critic_args, tiny_model, tokenizer, dataset, reward):
    rollout_func = scripted([[3, 4], [5, 6]], env_mask=[[0, 0], [0, 0]])
    model = tiny_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer = train(tmp_path, critic_args, lambda: model, tokenizer, dataset, reward, rollout_func, mtp_loss_coef=0.1)
    skipped = [row["critic/skipped_completions"] for row in trainer.state.log_history if "loss" in row]
    assert skipped == [4.0, 4.0]
    for name, p in model.named_parameters():
        if name in before:
            torch.testing.assert_close(p, before[name], atol=0.0, rtol=0.0)
    assert finite(trainer)


def test_episodes_that_go_on(tmp_path, critic_args, tiny_model, tokenizer, dataset):
    """The environment truncates episode 3, and the limit of turns stops 5. The others have ended, though the last of
    their turns of one token is no end-of-text token."""
    numbers = [1, 2, 3, 4, 5]
    episodes = EpisodeRollouts(Sums, max_turns=2, max_turn_length=1)
    trainer = MTPCriticTrainer(
        tiny_model(),
        episodes.earned,
        critic_args(tmp_path),
        dataset,
        processing_class=tokenizer,
        rollout_func=episodes,
    )
    torch.manual_seed(0)
    for bootstraps, expected in ((None, [3]), (True, [3, 5])):
        change_values(trainer, bootstrap_truncated=bootstraps)
        completions = trainer._generate([f"{number}+{number}=" for number in numbers])[1]
        assert sum(ids[-1] != tokenizer.eos_token_id for ids in completions) >= 4
        assert [number for number, cut in zip(numbers, trainer._cut, strict=True) if cut] == expected
    change_values(trainer, bootstrap_truncated=False)
    trainer._generate(["3+3="])
    assert trainer._cut is None
