"""`PPOTrainer` on a tiny model: rollout, losses and epochs by hand, and everything that a run keeps."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2Model,
    Qwen3ForSequenceClassification,
)
from trl import GRPOConfig
from trl.generation.vllm_generation import VLLMGeneration

from rl_plugins.functional.alignment import completion_states, last_real
from rl_plugins.nn import ValueModel
from rl_plugins.signals import HeadCritic, PolicyLoss, ValueModelCritic, critic_targets, policy_loss, scale_advantages
from rl_plugins.signals.critics import Values
from rl_plugins.trl import MTPCriticTrainer, PPOConfig, PPOTrainer
from rl_plugins.trl.host import hide_attachments_from_vllm

from .helpers.tiny import ON_CPU, change_values

Make = Callable[..., PPOTrainer]
Batch = dict[str, Any]
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
# Every completion has the full length (TRL takes a sampled padding token for an end, too).
NO_END = {"suppress_tokens": [0, 1]}
STILL = {"learning_rate": 0.0, "value_learning_rate": 0.0}


@pytest.fixture
def make(tiny_model: Callable[..., Any], tokenizer: Any, dataset: Dataset, reward: Any, tmp_path: Path) -> Make:
    """Factory: a trainer on a tiny model; keywords go to the config, the named ones to the trainer."""

    def factory(
        model: Any = None,
        reward_funcs: Any = reward,
        output_dir: str = "run",
        **options: Any,
    ) -> PPOTrainer:
        ours = ("peft_config", "eval_dataset", "value_model", "rollout_func")
        given = {name: options.pop(name) for name in ours if name in options}
        args = PPOConfig(
            **{
                "output_dir": str(tmp_path / output_dir),
                **ON_CPU,
                "per_device_train_batch_size": 8,
                "max_completion_length": 6,
                "max_steps": 2,
                "logging_steps": 1,
                "learning_rate": 1e-3,
                "value_learning_rate": 1e-2,
                "beta": 0.0,  # a reference model is loaded from a path
                **options,
            }
        )
        return PPOTrainer(
            tiny_model() if model is None else model,
            reward_funcs,
            args,
            dataset,
            processing_class=tokenizer,
            **given,
        )

    return factory


@pytest.fixture
def path(tiny_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> str:
    """A folder with model and tokenizer."""
    tiny_model().save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    return str(tmp_path / "start")


@pytest.fixture
def critic(tiny_model: Callable[..., Any]) -> ValueModel:
    """A value model whose values differ between states."""
    model = ValueModel(tiny_model(seed=5, initializer_range=0.2).model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.head.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def weights(trainer: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def is_critic(name: str) -> bool:
    return "value_model" in name.split(".")


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def tokens_of(batch: Batch) -> tuple[Tensor, Tensor]:
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    return ids, torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)


def values_of(trainer: PPOTrainer, batch: Batch) -> Tensor:
    """Values (B, T) of the value model alone, with today's weights and gradient."""
    assert trainer.value_model is not None
    return completion_states(trainer.value_model(*tokens_of(batch)), batch["completion_ids"].shape[1])


def logps_of(trainer: PPOTrainer, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies (B, T) from the policy's plain logits, with gradient."""
    ids, mask = tokens_of(batch)
    logits = trainer.model(input_ids=ids, attention_mask=mask).logits
    distribution = completion_states(logits, batch["completion_ids"].shape[1]).log_softmax(-1)
    chosen = distribution.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)
    return chosen, -(distribution.exp() * distribution).sum(-1)


def gradients(trainer: PPOTrainer, loss: Tensor) -> dict[str, Tensor]:
    """Gradient of every parameter; zeros where there is none."""
    trainer.model.zero_grad()
    loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trainer.model.named_parameters()}


def batch_in_training(trainer: PPOTrainer, steps: int) -> Batch:
    """Train, and return what the last step learnt from, ready for `_compute_loss`."""
    seen: list[Batch] = []
    host = trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: (seen.append(inputs), host(model, inputs))[1]  # type: ignore
    trainer.train()
    trainer._compute_loss = host  # type: ignore[method-assign]
    assert len(seen) == steps
    trainer.model.train()
    return seen[-1]


# Start


@pytest.mark.slow
def test_first_values_are_zero_and_everything_moves(make: Make) -> None:
    trainer = make(max_steps=4, num_iterations=1)
    assert trainer.value_model is not None
    for name, p in trainer.value_model.trunk.named_parameters():
        policy = trainer.model.get_parameter(f"model.{name}")
        assert torch.equal(p, policy) and p.untyped_storage().data_ptr() != policy.untyped_storage().data_ptr()
    before = weights(trainer)
    trainer.train()
    assert trainer.state.global_step == 4
    # The head's norm stands after weights of zero, so it takes one step more than the rest.
    assert changed(before, weights(trainer)) == set(before)
    assert logged(trainer, "critic/value_mean")[0] == 0.0 == logged(trainer, "critic/value_std")[0]
    assert logged(trainer, "critic/value_mean")[1] != 0.0
    expected = logged(trainer, "critic/return_mean")[0] ** 2 + logged(trainer, "critic/return_std")[0] ** 2
    assert logged(trainer, "critic/value_loss")[0] == pytest.approx(expected, rel=1e-4)
    assert logged(trainer, "critic/explained_variance")[0] == pytest.approx(0.0, abs=1e-5)


def test_wrong_arguments(make: Make, tiny_model: Callable[..., Any], reward: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="args must be of type PPOConfig, got GRPOConfig"):
        PPOTrainer(tiny_model(), reward, GRPOConfig(str(tmp_path), use_cpu=True, bf16=False))
    with pytest.raises(ValueError, match="The value model knows 12 tokens and the policy 16"):
        make(value_model=tiny_model(vocab_size=12))
    with pytest.raises(TypeError, match="Cannot make a value model from Linear"):
        make(value_model=torch.nn.Linear(2, 2))
    model = make().model
    with pytest.raises(
        ValueError, match="has `value_model` already. Call ValueModel.of.model. to reach it, or ValueModel.det"
    ):
        make(model=model, value_model=tiny_model())


@pytest.mark.slow
def test_a_second_trainer_goes_on_with_the_value_model_of_the_first(make: Make) -> None:
    first = make(max_steps=1, output_dir="first")
    first.train()
    assert first.value_model is not None
    weights = {name: w.clone() for name, w in first.value_model.state_dict().items()}
    second = make(model=first.model, output_dir="second")
    assert second.value_model is first.value_model and second.value_model.head.weight.any()
    for name, w in second.value_model.state_dict().items():
        assert torch.equal(w, weights[name]), name


@pytest.mark.slow
def test_value_model_path(make: Make, tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    tiny_model(seed=8, num_hidden_layers=1, hidden_size=16).save_pretrained(tmp_path / "small")
    small = str(tmp_path / "small")
    trainer = make(value_model_path=small, value_model_init_kwargs={"dtype": "bfloat16"}, max_steps=1)
    assert trainer.value_model is not None
    assert trainer.value_model.trunk.config.num_hidden_layers == 1
    assert {p.dtype for p in trainer.value_model.parameters()} == {torch.bfloat16}
    given = make(value_model=tiny_model(seed=3), value_model_path=small)
    assert given.value_model is not None and given.value_model.trunk.config.num_hidden_layers == 2
    before = weights(trainer)
    trainer.train()
    assert {"value_model.head.weight", "model.embed_tokens.weight"} <= changed(before, weights(trainer))


def test_dropout_is_off_in_both_networks(make: Make) -> None:
    config = GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2, n_positions=32, resid_pdrop=0.5)
    ids = torch.arange(2, 8)[None]

    def differ(**options: Any) -> bool:
        trainer = make(value_model=GPT2Model(config), **options)
        assert trainer.value_model is not None
        torch.nn.init.ones_(trainer.value_model.head.weight)
        torch.nn.init.normal_(trainer.value_model.head.rmsnorm_weight)
        trainer.model.train()
        return not torch.equal(trainer.value_model(ids), trainer.value_model(ids))

    assert differ() and not differ(disable_dropout=True)


# Rollout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "rollout_passes", "value_passes"),
    [
        # Off-policy: TRL makes the pass for the old log-probabilities.
        ({"num_iterations": 2, "max_steps": 2}, 1, 1),
        # On-policy TRL makes none, and one of our own gives both.
        ({"num_iterations": 1, "max_steps": 1}, 1, 1),
        # In chunks of the training batch.
        ({"num_iterations": 1, "max_steps": 2, "steps_per_generation": 2, "per_device_train_batch_size": 4}, 2, 2),
        # An adapter's reference is another pass of the same model.
        ({"num_iterations": 2, "max_steps": 2, "peft_config": LORA, "beta": 0.1}, 2, 1),
        ({"num_iterations": 1, "max_steps": 1, "peft_config": LORA, "beta": 0.1}, 2, 1),
        ({"num_iterations": 1, "max_steps": 1, "peft_config": LORA, "beta": 0.1, "kl_in_reward": False}, 1, 1),
    ],
    ids=["off-policy", "on-policy", "chunks", "lora", "lora on-policy", "lora kl in the loss"],
)
def test_one_pass_gives_log_probabilities_and_values(
    make: Make, critic: ValueModel, options: dict[str, Any], rollout_passes: int, value_passes: int
) -> None:
    options = {**STILL, **options}
    trainer = make(value_model=critic, generation_kwargs=NO_END, **options)
    calls = {"policy": 0, "values": 0}
    base = trainer.model.get_base_model() if "peft_config" in options else trainer.model
    base.model.register_forward_hook(lambda *_: calls.__setitem__("policy", calls["policy"] + 1))
    critic.trunk.register_forward_hook(lambda *_: calls.__setitem__("values", calls["values"] + 1))
    with torch.no_grad():
        for name, p in trainer.model.named_parameters():
            if "lora_B" in name:
                p.fill_(0.5)
    trainer.train()
    steps = options["max_steps"]
    assert calls == {"policy": 6 + rollout_passes + steps, "values": value_passes + steps}
    batch = trainer.last_rollout
    assert batch["old_values"].shape == (8, 6, 1) and batch["critic_mask"].all()
    with torch.no_grad():
        torch.testing.assert_close(batch["old_values"][..., 0], values_of(trainer, batch), atol=1e-6, rtol=1e-5)
        assert batch["old_values"].std() > 0.1
        if "old_per_token_logps" in batch:
            torch.testing.assert_close(batch["old_per_token_logps"], logps_of(trainer, batch)[0], atol=1e-5, rtol=1e-5)
        assert ("old_per_token_logps" in batch) == options.get("kl_in_reward", True)
        if "ref_per_token_logps" in batch:
            with trainer.model.disable_adapter():
                plain, _ = logps_of(trainer, batch)
            torch.testing.assert_close(batch["ref_per_token_logps"], plain, atol=1e-5, rtol=1e-5)
            assert (plain - logps_of(trainer, batch)[0]).abs().max() > 1e-2


def gae_by_hand(rewards: Tensor, values: Tensor, length: int, gamma: float, lam: float) -> list[float]:
    advantage, out = 0.0, []
    for t in reversed(range(length)):
        after = values[t + 1].item() if t + 1 < length else 0.0
        advantage = rewards[t].item() + gamma * after - values[t].item() + gamma * lam * advantage
        out.append(advantage)
    return out[::-1]


@pytest.mark.slow
@pytest.mark.parametrize("scaling", ["whiten", "value", "none"])
def test_advantages_and_returns(make: Make, path: str, critic: ValueModel, scaling: str) -> None:
    """Token rewards are the score at the end less the charge on each token; GAE and targets follow, by hand."""
    options: dict[str, Any] = {"gamma": 0.9, "lam_policy": 0.8, "lam_value": 0.7}
    trainer = make(
        model=path,
        value_model=critic,
        beta=0.5,
        advantage_scaling=scaling,
        learning_rate=1e-2,
        num_iterations=1,
        max_steps=3,
        **options,
    )
    trainer.train()
    batch = trainer.last_rollout
    mask, values = batch["critic_mask"], batch["old_values"]
    gap = batch["old_per_token_logps"] - batch["ref_per_token_logps"]
    assert gap[mask].abs().max() > 1e-2 and not mask.all() and values.shape == (8, 6, 1)
    rewards = torch.zeros(8, 6)
    for row, length in enumerate(mask.sum(1).tolist()):
        rewards[row, length - 1] = batch["scores"][row]
    rewards -= 0.5 * gap * mask
    assert torch.equal(last_real(mask).sum(1), torch.ones(8, dtype=torch.long))
    targets = critic_targets(rewards, values, values, mask, **options)
    torch.testing.assert_close(batch["returns"], targets.returns, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(batch["td_errors"], targets.td_errors, atol=1e-6, rtol=1e-5)
    expected = scale_advantages(targets.advantages, values[..., 0], mask, scaling=scaling)
    torch.testing.assert_close(batch["advantages"], expected, atol=1e-5, rtol=1e-5)
    if scaling == "none":
        for row, length in enumerate(mask.sum(1).tolist()):
            of_row = rewards[row], values[row, :, 0], length, 0.9
            advantages = torch.tensor(gae_by_hand(*of_row, 0.8))
            torch.testing.assert_close(batch["advantages"][row, :length], advantages, atol=1e-5, rtol=1e-5)
            returns = torch.tensor(gae_by_hand(*of_row, 0.7)) + values[row, :length, 0]
            torch.testing.assert_close(batch["returns"][row, :length], returns, atol=1e-5, rtol=1e-5)
    if scaling == "whiten":
        assert batch["advantages"][mask].mean().item() == pytest.approx(0.0, abs=1e-5)
        assert batch["advantages"][mask].std().item() == pytest.approx(1.0, abs=0.02)
    assert logged(trainer, "kl")[-1] == pytest.approx(gap[mask].mean().item(), abs=1e-6)
    assert logged(trainer, "kl")[0] == pytest.approx(0.0, abs=1e-6)  # policy and reference start equal


@pytest.mark.slow
def test_the_kl_is_in_the_reward_or_in_the_loss(make: Make, path: str) -> None:
    trainer = make(model=path, beta=0.5, max_steps=2, num_iterations=1)
    trainer.train()
    trainer.model.train()
    batch = trainer.last_rollout

    def loss(ref_logps: Tensor) -> float:
        return trainer._compute_loss(trainer.model, {**batch, "ref_per_token_logps": ref_logps}).item()

    ref_logps = batch["ref_per_token_logps"]
    assert loss(ref_logps) == loss(ref_logps - 1) and trainer.beta == 0.5
    change_values(trainer, kl_in_reward=False)
    assert loss(ref_logps) != loss(ref_logps - 1)
    assert trainer.beta == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("scaling", ["whiten", "value", "none"])
def test_unusable_rewards_are_skipped_and_counted(make: Make, scaling: str) -> None:
    def broken(completions: list[str], **kwargs: Any) -> list[float | None]:
        return [math.nan, math.inf, -math.inf, None, 0.0, 1.0, 0.5, 0.25]

    trainer = make(reward_funcs=broken, max_steps=2, num_iterations=1, advantage_scaling=scaling)
    trainer.train()
    assert logged(trainer, "critic/skipped_completions") == [4.0, 4.0]
    assert logged(trainer, "reward") == [pytest.approx(1.75 / 4)] * 2
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert all(map(math.isfinite, logged(trainer, "loss")))
    batch = trainer.last_rollout
    assert not batch["advantages"][:4].any() and not batch["critic_mask"][:4].any() and not batch["returns"][:4].any()
    assert batch["scores"][4:].tolist() == [0.0, 1.0, 0.5, 0.25] and batch["scores"][:4].isnan().all()


@pytest.mark.slow
def test_all_rewards_none(make: Make) -> None:
    trainer = make(reward_funcs=lambda completions, **kwargs: [None] * len(completions), max_steps=2)
    before = weights(trainer)
    trainer.train()
    assert logged(trainer, "critic/skipped_completions") == [8.0]
    assert logged(trainer, "loss") == [0.0, 0.0] and not changed(before, weights(trainer))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
def test_empty_completions_and_holes_of_a_rollout_function(make: Make) -> None:
    completions, holes = [[3, 4, 5, 1], [], [5, 1], []], [[1, 0, 1, 1], [], [1, 1], []]

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        return {
            "prompt_ids": [trainer.processing_class(prompt)["input_ids"] for prompt in prompts],
            "completion_ids": completions * 2,
            "env_mask": holes * 2,
            "logprobs": None,
        }

    trainer = make(rollout_func=rollout, max_steps=2, num_iterations=1, advantage_scaling="none")
    trainer.train()
    assert logged(trainer, "critic/skipped_completions") == [4.0, 4.0]
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    batch = trainer.last_rollout
    assert batch["critic_mask"].sum(1).tolist() == [3, 0, 2, 0] * 2
    # gamma and the targets' lambda are 1: every real token's return is the score.
    torch.testing.assert_close(batch["returns"], batch["scores"].nan_to_num()[:, None] * batch["critic_mask"])
    assert not batch["advantages"][~batch["critic_mask"]].any()


@pytest.mark.slow
def test_several_completions_per_prompt(make: Make) -> None:
    trainer = make(num_generations=4, max_steps=1)
    trainer.train()
    batch = trainer.last_rollout
    assert torch.equal(batch["prompt_ids"][0], batch["prompt_ids"][3])
    assert batch["old_values"].shape[0] == 8 and batch["advantages"].any()


# Loss


def clipped_losses(trainer: PPOTrainer, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Policy term, value term and mean entropy of a batch in one slice, from plain logits."""
    logps, entropies = logps_of(trainer, batch)
    mask, advantages, old = batch["critic_mask"].float(), batch["advantages"], batch["old_values"][..., 0]
    ratio = (logps - batch["old_per_token_logps"]).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    values, returns = values_of(trainer, batch), batch["returns"]
    moved = old + (values - old).clamp(-0.2, 0.2)
    error = torch.maximum((values - returns) ** 2, (moved - returns) ** 2)
    count = mask.sum()
    return -(surrogate * mask).sum() / count, (error * mask).sum() / count, (entropies * mask).sum() / count


@pytest.mark.slow
def test_the_loss_is_the_clipped_sum(make: Make) -> None:
    trainer = make(
        max_steps=4, learning_rate=1e-2, value_learning_rate=6e-3, entropy_coef=0.01, value_loss_coef=0.3, gamma=0.9
    )
    batch = batch_in_training(trainer, steps=4)
    logps, _ = logps_of(trainer, batch)
    mask = batch["critic_mask"]
    ratio = (logps - batch["old_per_token_logps"]).exp()[mask]
    drift = (values_of(trainer, batch) - batch["old_values"][..., 0]).abs()[mask]
    assert (ratio - 1).abs().max() > 0.2 and drift.max() > 0.2 > drift.min(), (
        "both clips must bite, and not everywhere"
    )
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(trainer.model, dict(batch))
    ours = gradients(trainer, loss)
    policy, value, entropy = clipped_losses(trainer, batch)
    assert loss.item() == pytest.approx((policy - 0.01 * entropy + 0.3 * value).item(), rel=1e-5, abs=1e-6)
    assert trainer._metrics["train"]["critic/value_loss"][-1] == pytest.approx(value.item(), rel=1e-5)
    # Two separate backward passes: neither gradient reaches the other network.
    of_policy = gradients(trainer, policy - 0.01 * entropy)
    assert not any(of_policy[n].any() for n in of_policy if is_critic(n))
    _, value, _ = clipped_losses(trainer, batch)
    of_value = gradients(trainer, 0.3 * value)
    assert not any(of_value[n].any() for n in of_value if not is_critic(n))
    for name, gradient in ours.items():
        expected = of_value[name] if is_critic(name) else of_policy[name]
        assert expected.abs().max() > 0, name
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.slow
def test_gradients_do_not_cross(make: Make) -> None:
    trainer = make(max_steps=2)
    batch = batch_in_training(trainer, steps=2)
    trainer.current_gradient_accumulation_steps = 1
    change_values(trainer, value_loss_coef=0.0)
    only_policy = gradients(trainer, trainer._compute_loss(trainer.model, dict(batch)))
    assert {n for n, g in only_policy.items() if g.any()} == {n for n in only_policy if not is_critic(n)}
    change_values(trainer, value_loss_coef=1.0)
    still = {**batch, "advantages": torch.zeros_like(batch["advantages"])}
    only_value = gradients(trainer, trainer._compute_loss(trainer.model, still))
    assert {n for n, g in only_value.items() if g.any()} == {n for n in only_value if is_critic(n)}


@pytest.mark.slow
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_warmup_leaves_the_policy_bit_identical(make: Make, weight_decay: float) -> None:
    trainer = make(value_warmup_steps=3, max_steps=3, entropy_coef=0.1, weight_decay=weight_decay)
    before = weights(trainer)
    trainer.train()
    assert changed(before, weights(trainer)) == {name for name in before if is_critic(name)}
    losses = logged(trainer, "critic/value_loss")
    assert losses[2] < losses[1] < losses[0]
    trainer = make(value_warmup_steps=3, max_steps=4, weight_decay=weight_decay)
    trainer.train()
    assert "model.embed_tokens.weight" in changed(before, weights(trainer))
    decays = {group["weight_decay"] for group in trainer.optimizer.param_groups}
    assert decays == {0.0, weight_decay}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gspo_token", "dppo", "cispo", "vanilla"])
def test_any_policy_loss(make: Make, name: str) -> None:
    trainer = make(policy_loss=name, max_steps=2, value_loss_coef=0.0, learning_rate=1e-2)
    batch = batch_in_training(trainer, steps=2)
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(trainer.model, dict(batch))
    logps, _ = logps_of(trainer, batch)
    expected, _ = policy_loss(
        PolicyLoss(name),
        logps,
        batch["old_per_token_logps"],
        batch["advantages"],
        batch["completion_mask"],
        num_items=batch["num_items_in_batch"],
    )
    assert (logps - batch["old_per_token_logps"]).abs().max() > 1e-2
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-5, atol=1e-6)
    ours, theirs = gradients(trainer, loss), gradients(trainer, expected)
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], atol=1e-6, rtol=1e-4)


@pytest.mark.slow
def test_accumulation_changes_nothing(make: Make) -> None:
    def number_in_prompt(prompts: list[str], **kwargs: Any) -> list[float]:
        return [int(prompt.split("+")[0]) % 5 / 4 for prompt in prompts]

    def run(size: int, accumulation: int) -> tuple[list[float], dict[str, Tensor]]:
        trainer = make(
            reward_funcs=number_in_prompt,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            generation_kwargs={"do_sample": False},
            optim="sgd",  # Adam turns a gradient of rounding errors into a full step
            learning_rate=0.3,
            value_learning_rate=0.03,
            value_loss_coef=1.0,
            max_steps=3,
            max_grad_norm=0.0,
        )
        before = weights(trainer)
        trainer.train()
        after = weights(trainer)
        assert max((after[n] - before[n]).abs().max().item() for n in before) > 1e-3
        return logged(trainer, "loss"), after

    losses, whole = run(8, 1)
    for size, accumulation in ((1, 8), (4, 2)):
        split_losses, split = run(size, accumulation)
        assert split_losses == pytest.approx(losses, abs=1e-5)
        for name in whole:
            torch.testing.assert_close(split[name], whole[name], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing(make: Make, tiny_model: Callable[..., Any]) -> None:
    def run(checkpointing: bool) -> tuple[list[float], list[float], dict[str, Tensor], int]:
        critic = ValueModel(tiny_model(seed=3).model)
        calls: list[int] = []
        critic.trunk.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        trainer = make(value_model=critic, gradient_checkpointing=checkpointing, max_steps=3, num_iterations=3)
        trainer.train()
        return logged(trainer, "loss"), logged(trainer, "grad_norm"), weights(trainer), len(calls)

    losses, norms, plain, calls = run(False)
    again, norms_again, checkpointed, more_calls = run(True)
    assert calls == 1 + 3 and more_calls == 1 + 3 * 2, "the value model must recompute its layers"
    assert again == pytest.approx(losses, abs=1e-6) and norms_again == pytest.approx(norms, rel=1e-5)
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], atol=1e-6, rtol=1e-5)


# Epochs


@pytest.mark.slow
def test_epochs_use_every_completion_once_in_minibatches_of_their_own(make: Make) -> None:
    trainer = make(
        num_iterations=3,
        steps_per_generation=4,
        per_device_train_batch_size=2,
        max_steps=24,
        generation_kwargs=NO_END,
        **STILL,
    )
    steps: list[list[tuple[int, ...]]] = []
    advantages: list[dict[tuple[int, ...], list[float]]] = []
    host = trainer._compute_loss

    def spy(model: Any, inputs: Batch) -> Tensor:
        rows = [tuple(row) for row in tokens_of(inputs)[0].tolist()]
        steps.append(rows)
        advantages.append(dict(zip(rows, inputs["advantages"].tolist(), strict=True)))
        return host(model, inputs)

    trainer._compute_loss = spy  # type: ignore[method-assign]
    trainer.train()
    assert len(steps) == 24 and len(logged(trainer, "reward")) == 2
    for start in (0, 12):  # two batches of completions
        epochs = [steps[start + 4 * epoch : start + 4 * epoch + 4] for epoch in range(3)]
        everything = sorted(row for minibatch in epochs[0] for row in minibatch)
        assert len(set(everything)) == 8
        assert all(sorted(row for minibatch in epoch for row in minibatch) == everything for epoch in epochs)
        compositions = [{frozenset(minibatch) for minibatch in epoch} for epoch in epochs]
        assert compositions[0] != compositions[1] != compositions[2] != compositions[0]
        by_row: dict[tuple[int, ...], list[list[float]]] = {}
        for mine in advantages[start : start + 12]:
            for row, advantage in mine.items():
                by_row.setdefault(row, []).append(advantage)
        assert all(len(seen) == 3 and seen[0] == seen[1] == seen[2] for seen in by_row.values())


@pytest.mark.parametrize("rate", [1e-2, None])
def test_value_learning_rate(make: Make, rate: float | None) -> None:
    trainer = make(value_learning_rate=rate, learning_rate=1e-3, weight_decay=0.1)
    optimizer = trainer.create_optimizer()
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    groups = [({names[id(p)] for p in g["params"]}, g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert sorted(name for members, _, _ in groups for name in members) == sorted(names.values())
    for members, lr, decay in groups:
        ours = {is_critic(name) for name in members}
        assert len(ours) == 1 or rate is None
        assert lr == (rate if rate is not None and True in ours else 1e-3)
        assert decay == (0.0 if any("norm" in n or n.endswith("bias") for n in members) else 0.1)
    assert len(groups) == (4 if rate is not None else 2)


# Vanilla policy gradient


@pytest.mark.slow
def test_vpg_is_reinforce_with_a_learned_baseline(make: Make, critic: ValueModel) -> None:
    trainer = make(preset="vpg", advantage_scaling="none", value_model=critic, max_steps=1, gamma=0.9, **STILL)
    batch = batch_in_training(trainer, steps=1)
    assert trainer.num_iterations == 1 and trainer.args.value_loss_type == "squared"
    mask, values = batch["critic_mask"], batch["old_values"][..., 0]
    score = trainer.last_rollout["scores"]
    order = [trainer.last_rollout["completion_ids"].tolist().index(ids) for ids in batch["completion_ids"].tolist()]
    steps_left = mask.flip(1).cumsum(1).flip(1) - 1
    returns = score[order][:, None] * 0.9**steps_left * mask
    torch.testing.assert_close(batch["returns"], returns)
    torch.testing.assert_close(batch["advantages"], (returns - values) * mask)
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(trainer.model, dict(batch))
    ours = gradients(trainer, loss)
    logps, _ = logps_of(trainer, batch)
    policy = -(batch["advantages"] * logps * mask).sum() / mask.sum()
    value = ((values_of(trainer, batch) - returns) ** 2 * mask).sum() / mask.sum()
    torch.testing.assert_close(loss.detach(), (policy + 0.1 * value).detach(), atol=1e-6, rtol=1e-5)
    by_hand = gradients(trainer, policy + 0.1 * value)
    for name in ours:
        torch.testing.assert_close(ours[name], by_hand[name], atol=1e-6, rtol=1e-4)


@pytest.mark.slow
def test_ppo_with_everything_off_is_vpg(make: Make, tiny_model: Callable[..., Any]) -> None:
    def gradient(**options: Any) -> dict[str, Tensor]:
        model = tiny_model(initializer_range=0.2)
        trainer = make(model=model, generation_kwargs={"do_sample": False}, max_steps=1, **STILL, **options)
        batch = batch_in_training(trainer, steps=1)
        trainer.current_gradient_accumulation_steps = 1
        return gradients(trainer, trainer._compute_loss(trainer.model, dict(batch)))

    vpg = gradient(preset="vpg")
    ppo = gradient(num_iterations=1, advantage_estimator="mc", value_loss_type="squared")
    clipped = gradient(advantage_estimator="mc")
    assert max(g.abs().max().item() for g in vpg.values()) > 1e-3
    for name in vpg:
        torch.testing.assert_close(ppo[name], vpg[name], atol=1e-7, rtol=1e-5)
        # At ratio 1 and old values nothing is clipped, whatever the number of epochs.
        torch.testing.assert_close(clipped[name], vpg[name], atol=1e-6, rtol=1e-4)


# The sibling


@pytest.mark.slow
def test_ppo_and_the_mtp_critic_differ_only_in_where_values_come_from(
    make: Make,
    path: str,
    tokenizer: Any,
    dataset: Dataset,
    reward: Any,
    critic_args: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared: dict[str, Any] = {
        "beta": 0.3,
        "kl_in_reward": True,
        "num_iterations": 2,
        "max_steps": 2,
        "gamma": 0.9,
        "lam_value": 0.8,
        "lam_policy": 0.95,
        "calibrate_values": False,
        "value_loss_coef": 0.0,
        "learning_rate": 1e-2,
        "generation_kwargs": {"do_sample": False},
    }

    def made_up(self: Any, output: Batch, host: Any) -> Values:
        if "old_per_token_logps" not in output:
            output["old_per_token_logps"] = host.log_probs(output)
        values = torch.sin(output["completion_ids"].cumsum(1).float()).unsqueeze(-1)
        return Values(values, values)

    for critic_class in (ValueModelCritic, HeadCritic):
        monkeypatch.setattr(critic_class, "recorded", made_up)
    ppo = make(model=path, **shared)
    args = critic_args(tmp_path / "mtp", num_mtp_heads=1, mtp_loss_coef=0.0, **shared)
    mtp = MTPCriticTrainer(path, reward, args, dataset, processing_class=tokenizer)
    ppo.train()
    mtp.train()
    for name in ("old_values", "advantages", "returns", "td_errors", "critic_mask", "scores", "completion_ids"):
        torch.testing.assert_close(ppo.last_rollout[name], mtp.last_rollout[name], rtol=0, atol=1e-6, equal_nan=True)
    assert ppo.last_rollout["advantages"].std() > 0.5
    rollout = {name for name in ppo.state.log_history[0] if name.startswith(("critic/", "reward", "completions/"))}
    rollout -= {name for name in rollout if "value_loss" in name}
    assert len(rollout) > 12
    for name in [*rollout, "loss", "kl", "entropy", "clip_ratio/region_mean"]:
        assert logged(ppo, name) == pytest.approx(logged(mtp, name), abs=1e-6), name
    # The same gradient moves the policy to the same place.
    theirs = weights(mtp)
    for name, weight in weights(ppo).items():
        if not is_critic(name):
            # Adam's first steps are as large as the learning rate, 1e-2, however small the gradient: where it is next
            # to nothing, rounding moves a weight by some thousandths of a step.
            torch.testing.assert_close(weight, theirs[name], atol=1e-4, rtol=1e-4)


# LoRA


@pytest.mark.slow
def test_lora_trains_adapters_and_value_model_and_saves_both(
    make: Make, tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    trainer = make(peft_config=LORA, beta=0.1, max_steps=4)
    before = weights(trainer)
    trainer.train()
    moved = changed(before, weights(trainer))
    assert moved == {name for name in before if "lora_" in name or is_critic(name)}
    assert any("lora_" in name for name in moved) and not any("lora_" in name for name in moved if is_critic(name))
    trainer.save_model(str(tmp_path / "saved"))
    assert not any("value_model" in key for key in load_file(tmp_path / "saved" / "adapter_model.safetensors"))
    reloaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "saved")
    after = weights(trainer)
    for name, p in reloaded.named_parameters():
        assert torch.equal(p, after[name]), name
    critic = ValueModel.from_pretrained(tmp_path / "saved" / "value_model")
    assert trainer.value_model is not None
    for name, p in critic.state_dict().items():
        assert torch.equal(p, trainer.value_model.state_dict()[name]), name


@pytest.mark.slow
def test_vpg_with_lora_on_policy(make: Make) -> None:
    """TRL makes only the reference pass here: its log-probabilities are not the policy's."""
    trainer = make(peft_config=LORA, preset="vpg", beta=0.5, max_steps=2, learning_rate=3e-1)
    trainer.train()
    batch = trainer.last_rollout
    mask = batch["critic_mask"]
    gap = batch["old_per_token_logps"] - batch["ref_per_token_logps"]
    assert gap[mask].abs().max() > 1e-4
    charge = 0.5 * gap.masked_fill(~mask, 0.0).sum(1)
    torch.testing.assert_close(batch["returns"][:, 0], batch["scores"] - charge)
    assert logged(trainer, "kl")[1] == pytest.approx(gap[mask].mean().item(), abs=1e-6)


# Reward models


@pytest.fixture
def ranker(tiny_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> str:
    """A folder with a reward model."""
    torch.manual_seed(0)
    model = Qwen3ForSequenceClassification(tiny_model(num_labels=1, initializer_range=0.2).config)
    model.save_pretrained(tmp_path / "ranker")
    tokenizer.save_pretrained(tmp_path / "ranker")
    return str(tmp_path / "ranker")


@pytest.mark.slow
def test_a_reward_model_scores_and_starts_the_value_model(make: Make, ranker: str, tokenizer: Any) -> None:
    trainer = make(
        reward_funcs=ranker, value_model_path=ranker, max_steps=2, num_iterations=1, generation_kwargs=NO_END
    )
    judge = AutoModelForSequenceClassification.from_pretrained(ranker).eval()
    before = weights(trainer)
    for name, p in judge.model.named_parameters():
        assert torch.equal(before[f"value_model.trunk.{name}"], p)
    trainer.train()
    batch = trainer.last_rollout
    for row in range(8):
        ids = tokens_of(batch)[0][row, tokens_of(batch)[1][row].bool()][None]
        with torch.no_grad():
            expected = judge(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.item()
        assert batch["scores"][row].item() == pytest.approx(expected, abs=1e-4)
    assert batch["scores"].std() > 1e-2
    assert {"value_model.trunk.embed_tokens.weight"} <= changed(before, weights(trainer))


@pytest.mark.slow
def test_one_object_may_judge_and_start_the_value_model(make: Make, ranker: str) -> None:
    judge = AutoModelForSequenceClassification.from_pretrained(ranker)
    before = {name: p.clone() for name, p in judge.named_parameters()}
    trainer = make(reward_funcs=judge, value_model=judge, max_steps=2)
    trainer.train()
    assert trainer.value_model is not None and trainer.value_model.trunk is not judge.model
    for name, p in judge.named_parameters():
        assert torch.equal(p, before[name]), f"the reward function has changed: {name}"


# Evaluation


@pytest.mark.slow
def test_evaluation(make: Make, dataset: Dataset) -> None:
    trainer = make(eval_dataset=dataset.select(range(8)), max_steps=1, per_device_eval_batch_size=8)
    trainer.train()
    metrics = trainer.evaluate()
    batch = trainer.last_rollout
    mask = batch["critic_mask"]
    assert math.isfinite(metrics["eval_loss"]) and batch["old_values"].shape == (*mask.shape, 1)
    values = batch["old_values"][..., 0]
    assert logged(trainer, "eval_critic/value_mean") == [pytest.approx(values[mask].mean().item(), abs=1e-6)]
    assert values[mask].abs().max() > 0
    assert logged(trainer, "eval_reward") == [pytest.approx(batch["scores"].mean().item(), abs=1e-6)]
    error = (values - batch["returns"])[mask].square().mean().item()
    assert logged(trainer, "eval_critic/value_loss") == [pytest.approx(error, rel=1e-4)]
    assert logged(trainer, "eval_critic/skipped_completions") == [0.0] and not trainer._metrics["eval"]


@pytest.mark.slow
def test_evaluation_in_the_middle_of_an_epoch_changes_nothing(make: Make, dataset: Dataset) -> None:
    def run(**options: Any) -> tuple[list[float], dict[str, Tensor]]:
        trainer = make(
            generation_kwargs={"do_sample": False},
            num_iterations=2,
            steps_per_generation=1,
            max_steps=4,
            **options,
        )
        trainer.train()
        return logged(trainer, "loss"), weights(trainer)

    plain, without = run()
    evaluated, with_evaluation = run(eval_dataset=dataset.select(range(8)), eval_strategy="steps", eval_steps=1)
    # Only the order of the rows differs: evaluation draws from the same random numbers.
    assert evaluated == pytest.approx(plain, abs=1e-5)
    assert max((with_evaluation[n] - without[n]).abs().max().item() for n in without) < 1e-2


# vLLM


@pytest.mark.parametrize("peft", [False, True])
def test_vllm_is_sent_the_stock_parameters_only(make: Make, tiny_model: Callable[..., Any], peft: bool) -> None:
    trainer = make(peft_config=LORA) if peft else make()
    gathered: list[str] = []
    names = {id(p): name for name, p in trainer.model.named_parameters()}

    def gather(params: list[Tensor]) -> Any:
        gathered.extend(names[id(p)] for p in params)
        return nullcontext()

    generation = object.__new__(VLLMGeneration)
    generation.model = trainer.model
    generation.accelerator = trainer.accelerator
    generation._dist = SimpleNamespace(is_fsdp=False, gather_params=gather)
    assert any("value_model" in name for name, _ in generation._iter_named_params())
    gathered.clear()
    hide_attachments_from_vllm(generation)
    sent = dict(generation._iter_named_params())
    stock = tiny_model()
    assert list(sent) == [name for name, _ in stock.named_parameters()]
    assert all(sent[name].shape == p.shape for name, p in stock.named_parameters())
    assert set(gathered) == set(names.values())  # gathering is collective


# Checkpoints


@pytest.mark.slow
def test_a_run_starts_from_the_value_model_of_the_last_one(make: Make, path: str, tmp_path: Path) -> None:
    first = make(model=path, max_steps=2)
    first.train()
    folder = tmp_path / "first"
    first.save_model(str(folder))
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert first.value_model is not None
    trunk = AutoModel.from_pretrained(folder / "value_model")
    trained = first.value_model.trunk.state_dict()
    assert trained.keys() == trunk.state_dict().keys()
    assert all(torch.equal(trunk.state_dict()[name], trained[name]) for name in trained)
    assert not changed(weights(first), weights(make(model=str(folder))))
    fresh = make(model=str(folder), value_model_path=path)
    assert "value_model.head.weight" in changed(weights(first), weights(fresh))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("save_steps", "options"),
    [
        (4, {"num_iterations": 2, "steps_per_generation": 2}),
        (2, {"num_iterations": 2, "steps_per_generation": 2}),
        (3, {"num_iterations": 2, "steps_per_generation": 2}),
        (3, {"num_iterations": 2, "steps_per_generation": 2, "peft_config": LORA, "beta": 0.1}),
        (3, {"num_iterations": 2, "steps_per_generation": 2, "value_warmup_steps": 5, "weight_decay": 0.1}),
    ],
    ids=["between two generations", "between two epochs", "inside an epoch", "lora", "warm-up"],
)
def test_resuming_is_as_if_nothing_had_happened(
    make: Make, tmp_path: Path, save_steps: int, options: dict[str, Any]
) -> None:
    options = {
        "per_device_train_batch_size": 4,
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": save_steps,
        **options,
    }
    through = make(output_dir="through", **options)
    through.train()
    checkpoint = tmp_path / "through" / f"checkpoint-{save_steps}"
    resumed = make(output_dir="resumed", **options)
    start = weights(resumed)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 8
    assert len({*logged(through, "loss")}) == 8
    for name in ("loss", "critic/value_loss", "reward", "critic/explained_variance", "grad_norm"):
        assert logged(resumed, name) == logged(through, name), name
    assert not changed(weights(through), weights(resumed))
    assert any(is_critic(name) for name in changed(start, weights(resumed)))


@pytest.mark.slow
def test_a_checkpoint_without_value_model_is_refused(make: Make, tmp_path: Path) -> None:
    trainer = make(max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    assert {"value_model", "rollout_0.pt", "model.safetensors"} <= {p.name for p in checkpoint.iterdir()}
    (checkpoint / "value_model" / "value_head.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="written by another .*no value_model/value_head.safetensors. Start"):
        make(max_steps=2).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.slow
def test_the_best_model_comes_back_with_its_value_model(make: Make, dataset: Dataset) -> None:
    def worse_and_worse(completions: list[str], trainer_state: Any, **kwargs: Any) -> list[float]:
        return [float(-trainer_state.global_step)] * len(completions)

    trainer = make(
        reward_funcs=worse_and_worse,
        eval_dataset=dataset.select(range(8)),
        max_steps=2,
        num_iterations=1,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_reward",
        greater_is_better=True,
    )
    trainer.train()
    best = Path(str(trainer.state.best_model_checkpoint))
    assert best.name == "checkpoint-1" and trainer.value_model is not None
    saved = ValueModel.from_pretrained(best / "value_model").state_dict()
    assert all(torch.equal(saved[name], p) for name, p in trainer.value_model.state_dict().items())
    last = ValueModel.from_pretrained(best.with_name("checkpoint-2") / "value_model").state_dict()
    assert changed(saved, last)
