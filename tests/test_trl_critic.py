"""`MTPCriticTrainer` on a tiny model: equal to the host where it should be, and numbers of its own."""

import asyncio
import dataclasses
import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration

from rl_plugins.nn import MTPHeads, attach_mtp_heads, load_mtp_heads
from rl_plugins.rollouts.values import ValueRecord, WholeRows
from rl_plugins.signals import sequence_means
from rl_plugins.signals.critics import CriticSignal
from rl_plugins.signals.options import OnlineValueOptions
from rl_plugins.trl import MTPCriticTrainer
from rl_plugins.trl.host import hide_attachments_from_vllm, without_attachments

from .helpers.step_rewards import per_token
from .helpers.tiny import record_passes_only

Make = Callable[..., MTPCriticTrainer]
LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"]
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
# Every completion has the full length (TRL takes a sampled padding token for an end, too).
NO_END = {"suppress_tokens": [0, 1]}


@pytest.fixture
def make(
    tiny_model: Callable[..., Any],
    tokenizer: Any,
    dataset: Dataset,
    reward: Any,
    critic_args: Callable[..., Any],
    tmp_path: Path,
) -> Make:
    """Factory: a trainer on a tiny model; keywords go to the config, `model`, `reward_funcs` and the rest do not."""

    def factory(
        model: Any = None,
        reward_funcs: Any = reward,
        output_dir: str = "run",
        peft_config: Any = None,
        eval_dataset: Any = None,
        **options: Any,
    ) -> MTPCriticTrainer:
        return MTPCriticTrainer(
            tiny_model() if model is None else model,
            reward_funcs,
            critic_args(tmp_path / output_dir, **options),
            train_dataset=dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            peft_config=peft_config,
        )

    return factory


def weights(trainer: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def randomise(heads: MTPHeads, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in heads.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)


def with_random_heads(model: Any) -> Any:
    randomise(attach_mtp_heads(model, 2))
    return model


def number_in_prompt(prompts: list[str], **kwargs: Any) -> list[float]:
    """A reward that differs between completions whatever the policy does."""
    return [int(prompt.split("+")[0]) % 5 / 4 for prompt in prompts]


def no_grad_values(trainer: MTPCriticTrainer, batch: dict[str, Any]) -> Tensor:
    """Values (B, T, K) of one full forward with today's weights."""
    heads = trainer.mtp_heads
    assert heads is not None
    record, num_tokens = ValueRecord(heads), batch["completion_ids"].shape[1]
    with heads.watching(WholeRows(record, num_tokens)), torch.no_grad():
        trainer.model(
            input_ids=torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
            attention_mask=torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
        )
    return record.finish(num_tokens)[0]


# Off is the host


@pytest.mark.slow
def test_without_the_critic_it_is_stock_grpo(
    make: Make, tiny_model: Callable[..., Any], tokenizer: Any, dataset: Dataset, reward: Any, tmp_path: Path
) -> None:
    ours = make(use_critic=False, num_generations=2, max_steps=3)
    ours.train()
    assert ours.mtp_heads is None
    kept = {
        f: getattr(ours.args, f) for f in GRPOConfig.__dataclass_fields__ if GRPOConfig.__dataclass_fields__[f].init
    }
    kept |= {"output_dir": str(tmp_path / "stock"), "generation_batch_size": None}
    stock = GRPOTrainer(tiny_model(), reward, GRPOConfig(**kept), dataset, processing_class=tokenizer)
    stock.train()
    assert len(logged(ours, "loss")) == 3 and any(logged(ours, "grad_norm"))
    for name in ("loss", "grad_norm", "reward", "entropy", "completions/mean_length"):
        assert logged(ours, name) == logged(stock, name)
    assert list(weights(ours)) == list(weights(stock))
    assert not changed(weights(stock), weights(ours))
    ours.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "mtp_heads.safetensors").exists()


# Training


@pytest.mark.slow
def test_every_parameter_moves(make: Make) -> None:
    trainer = make(max_steps=4, head_learning_rate=1e-2)
    before = weights(trainer)
    trainer.train()
    assert changed(before, weights(trainer)) == set(before)
    assert trainer.state.global_step == 4
    for name in (
        "critic/value_loss",
        "critic/value_loss/head_2",
        "mtp/token_loss/head_1",
        "critic/explained_variance",
        "critic/grad_norm",
        "critic/grad_clamped",
        "entropy",
    ):
        assert len(logged(trainer, name)) == 4 and all(map(math.isfinite, logged(trainer, name))), name
    # At the start all values are 0: the value loss of head 1 is the mean squared reward, all of it unexplained.
    expected = logged(trainer, "critic/return_mean")[0] ** 2 + logged(trainer, "critic/return_std")[0] ** 2
    assert logged(trainer, "critic/value_loss/head_1")[0] == pytest.approx(expected, rel=1e-4)
    assert logged(trainer, "critic/explained_variance")[0] == pytest.approx(0.0, abs=1e-5)
    assert logged(trainer, "critic/value_mean")[0] == 0.0
    # And both heads' token logits are the main head's.
    assert logged(trainer, "mtp/token_loss/head_1")[0] == pytest.approx(math.log(16), abs=0.5)


@pytest.mark.slow
def test_the_target_follows_the_heads(make: Make) -> None:
    trainer = make(max_steps=1, target_tau=0.25)
    assert trainer.mtp_heads is not None
    start = {name: p.clone() for name, p in trainer.polyak_target.heads.named_parameters()}
    trainer.train()
    for name, p in trainer.polyak_target.heads.named_parameters():
        online = trainer.mtp_heads.get_parameter(name)
        torch.testing.assert_close(p, 0.75 * start[name] + 0.25 * online, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rate", [1e-2, None])
def test_head_learning_rate(make: Make, rate: float | None) -> None:
    trainer = make(head_learning_rate=rate, learning_rate=1e-3, weight_decay=0.1)
    optimizer = trainer.create_optimizer()
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    groups = [({names[id(p)] for p in g["params"]}, g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert sorted(name for members, _, _ in groups for name in members) == sorted(names.values())
    for members, lr, decay in groups:
        ours = {"mtp_heads" in name for name in members}
        assert len(ours) == 1 or rate is None
        assert lr == (rate if rate is not None and True in ours else 1e-3)
        assert decay == (0.0 if any("norm" in n or n.endswith("bias") for n in members) else 0.1)
    assert len(groups) == (4 if rate is not None else 2)


@pytest.mark.slow
def test_values_come_from_generation_without_another_forward(
    make: Make, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def count(**options: Any) -> tuple[int, MTPCriticTrainer]:
        calls = []
        trainer = make(num_generations=2, max_steps=2, generation_kwargs=NO_END, **options)
        trainer.model.model.register_forward_hook(lambda *_: calls.append(1))
        trainer.train()
        return len(calls), trainer

    assert count(use_critic=False)[0] == 2 * (6 + 1)  # six decoding steps and the loss
    still = {"learning_rate": 0.0, "head_learning_rate": 0.0}
    forwards, trainer = count(model=with_random_heads(tiny_model()), **still)
    assert forwards == 2 * (6 + 1)
    batch = trainer.last_rollout
    values = no_grad_values(trainer, batch)
    assert batch["completion_mask"].all() and values.shape == (8, 6, 2) and values.std() > 0.1
    torch.testing.assert_close(batch["old_values"], values, atol=1e-5, rtol=1e-5)
    # Where generation cannot tell, one pass more fills in, with the same numbers.
    record_passes_only(monkeypatch)
    forwards, trainer = count(model=with_random_heads(tiny_model()), **still)
    assert forwards == 2 * (6 + 1 + 1)
    torch.testing.assert_close(trainer.last_rollout["old_values"], values, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kwargs", "passes"),
    [
        ({"prefill_chunk_size": 4}, 0),  # the last chunk has one token or more
        ({"prefill_chunk_size": 2}, 0),
        ({"prompt_lookup_num_tokens": 3}, 1),
        ({"num_beams": 2}, 1),
        ({"use_cache": False}, 0),
        ({"cache_implementation": "static"}, 0),
        ({"do_sample": False, "no_repeat_ngram_size": 2}, 0),
    ],
)
def test_values_belong_to_their_tokens_however_they_are_generated(
    make: Make, tiny_model: Callable[..., Any], kwargs: dict[str, Any], passes: int
) -> None:
    rows = 1 if "prompt_lookup_num_tokens" in kwargs else 8  # transformers looks up one prompt at a time
    trainer = make(
        model=with_random_heads(tiny_model()),
        generation_kwargs=kwargs,
        learning_rate=0.0,
        head_learning_rate=0.0,
        per_device_train_batch_size=rows,
        max_completion_length=12,
        max_steps=1,
    )
    calls: list[Any] = []
    own_pass = trainer.log_probs
    trainer.log_probs = lambda batch: calls.append(batch) or own_pass(batch)
    trainer.train()
    batch = trainer.last_rollout
    values, mask = no_grad_values(trainer, batch), batch["completion_mask"].bool()
    torch.testing.assert_close(batch["old_values"][mask], values[mask], atol=1e-5, rtol=1e-5)
    assert values[mask].std() > 0.1 and len(calls) == passes


@pytest.mark.slow
def test_values_belong_to_completions_that_a_subclass_has_changed(
    make: Make, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = MTPCriticTrainer._generate_single_turn

    def changed_afterwards(self: Any, *args: Any, **kwargs: Any) -> Any:
        completions, logps = own(self, *args, **kwargs)
        return [[5, *ids[1:]] for ids in completions], logps

    monkeypatch.setattr(MTPCriticTrainer, "_generate_single_turn", changed_afterwards)
    trainer = make(
        model=with_random_heads(tiny_model()), learning_rate=0.0, head_learning_rate=0.0, max_steps=1, temperature=9.0
    )
    trainer.train()
    batch = trainer.last_rollout
    values, mask = no_grad_values(trainer, batch), batch["completion_mask"].bool()
    torch.testing.assert_close(batch["old_values"][mask], values[mask], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_type_takes_advantages_per_token(make: Make, loss_type: str) -> None:
    level = "sequence" if loss_type == "luspo" else "token"
    trainer = make(
        loss_type=loss_type, importance_sampling_level=level, max_steps=1, num_iterations=2, epsilon_high=2.0
    )
    before = weights(trainer)
    trainer.train()
    assert all(map(math.isfinite, logged(trainer, "loss"))) and logged(trainer, "grad_norm")[0] > 0
    assert len(changed(before, weights(trainer))) > 20
    batch = trainer.last_rollout
    assert batch["advantages"].shape == batch["completion_ids"].shape
    trainer.model.train()
    per_row = torch.linspace(-1, 1, 8)
    host_loss = GRPOTrainer._compute_loss
    of_rows = host_loss(trainer, trainer.model, {**batch, "advantages": per_row})
    spread = per_row[:, None].expand_as(batch["advantages"])
    of_tokens = host_loss(trainer, trainer.model, {**batch, "advantages": spread})
    assert of_rows.item() != 0.0
    if loss_type == "luspo":  # one product per row or one per token before the sum
        torch.testing.assert_close(of_rows, of_tokens)
    else:
        assert torch.equal(of_rows, of_tokens)


@pytest.mark.slow
def test_the_loss_is_the_sum_of_its_parts(make: Make, tiny_model: Callable[..., Any]) -> None:
    options: dict[str, Any] = {"learning_rate": 0.0, "head_learning_rate": 0.0, "max_steps": 1}

    def loss(**more: Any) -> float:
        trainer = make(model=with_random_heads(tiny_model()), **options, **more)
        trainer.train()
        (number,) = logged(trainer, "loss")
        sizes = logged(trainer, "critic/value_loss")[0], logged(trainer, "critic/value_loss/head_1")[0]
        assert sizes[0] > 0 and sizes[1] > 0
        return number

    policy = loss(value_loss_coef=0.0, mtp_loss_coef=0.0)
    value = loss(value_loss_coef=1.0, mtp_loss_coef=0.0) - policy
    token = loss(value_loss_coef=0.0, mtp_loss_coef=1.0) - policy
    assert value > 0.01 and token > 0.5
    assert loss(value_loss_coef=0.3, mtp_loss_coef=0.2) == pytest.approx(policy + 0.3 * value + 0.2 * token, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    {"loss_type": "dapo"}, {"loss_type": "dr_grpo"},
    {"reward_funcs": [number_in_prompt, per_token], "bootstrap_truncated": True},
])  # fmt: skip
def test_accumulation_changes_nothing(make: Make, options: dict[str, Any]) -> None:
    def run(size: int, accumulation: int) -> tuple[list[float], dict[str, Tensor]]:
        trainer = make(
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            generation_kwargs={"do_sample": False},
            optim="sgd",  # Adam turns a gradient of rounding errors into a full step
            learning_rate=0.3,
            head_learning_rate=0.3,
            max_steps=3,
            max_grad_norm=0.0,
            value_grad_clip=0.5,
            mtp_detach_trunk=False,
            mtp_loss_share=1.0,  # every micro-batch draws its own
            **{"reward_funcs": number_in_prompt, **options},
        )
        before = weights(trainer)
        trainer.train()
        after = weights(trainer)
        assert max((after[n] - before[n]).abs().max().item() for n in before) > 1e-3
        assert bool(logged(trainer, "step_rewards/before_end")) == ("reward_funcs" in options)
        return logged(trainer, "loss"), after

    losses, whole = run(8, 1)
    for size, accumulation in ((1, 8), (4, 2)):
        split_losses, split = run(size, accumulation)
        assert split_losses == pytest.approx(losses, abs=1e-5)
        for name in whole:
            torch.testing.assert_close(split[name], whole[name], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_several_iterations_on_one_generation(make: Make) -> None:
    trainer = make(num_iterations=2, steps_per_generation=2, max_steps=8, per_device_train_batch_size=4)
    trainer.train()
    assert len(logged(trainer, "reward")) == 2  # two generations, four micro-steps each
    assert len(logged(trainer, "critic/value_loss")) == 8
    assert all(map(math.isfinite, logged(trainer, "loss")))


def test_more_generations_per_prompt_are_scored_one_by_one(make: Make) -> None:
    trainer = make(num_generations=4, max_steps=1)
    trainer.train()
    batch = trainer.last_rollout
    assert (batch["prompt_ids"][0] == batch["prompt_ids"][3]).all()
    assert batch["scores"].shape == (8,) and batch["advantages"].abs().sum() > 0


def test_value_loss_of_zero_logs_finite_gradients(make: Make) -> None:
    trainer = make(value_loss_coef=0.0, max_steps=1)
    trainer.train()
    assert logged(trainer, "critic/grad_norm") == [0.0] and logged(trainer, "critic/grad_clamped") == [0.0]


@pytest.mark.slow
def test_evaluation(make: Make, dataset: Dataset) -> None:
    trainer = make(eval_dataset=dataset.select(range(8)), max_steps=1, per_device_eval_batch_size=8)
    trainer.train()
    metrics = trainer.evaluate()
    batch = trainer.last_rollout
    mask = batch["critic_mask"]
    expected = batch["old_values"][..., 0][mask].mean().item()
    assert math.isfinite(metrics["eval_loss"])
    assert logged(trainer, "eval_critic/value_mean") == [pytest.approx(expected, abs=1e-6)]
    assert logged(trainer, "eval_critic/skipped_completions") == [0.0]
    assert logged(trainer, "eval_reward") == [pytest.approx(batch["scores"].mean().item(), abs=1e-6)]
    error = (batch["old_values"][..., 0] - batch["returns"])[mask].square().mean().item()
    assert logged(trainer, "eval_critic/value_loss/head_1") == [pytest.approx(error, rel=1e-4)]
    assert not trainer._metrics["eval"]


def test_evaluation_without_training(make: Make, dataset: Dataset) -> None:
    trainer = make(eval_dataset=dataset.select(range(8)), per_device_eval_batch_size=4)
    assert math.isfinite(trainer.evaluate()["eval_loss"])


@pytest.mark.slow
def test_completions_table(make: Make, tmp_path: Path) -> None:
    trainer = make(max_steps=2, log_completions=True, num_completions_to_print=0, head_learning_rate=1e-1)
    trainer.train()
    for step in (1, 2):
        table = pd.read_parquet(tmp_path / "run" / "completions" / f"completions_0000{step}.parquet")
        assert len(table) == 8
    batch = trainer.last_rollout
    expected = sequence_means(batch["advantages"], batch["critic_mask"])
    assert table["advantage"].tolist() == pytest.approx(expected.tolist())
    assert table["advantage"].abs().min() > 0
    assert table["critic_value"].tolist() == pytest.approx(batch["old_values"][:, 0, 0].tolist())
    assert table["critic_value"].abs().min() > 0


# LoRA


@pytest.mark.slow
def test_lora_trains_adapters_and_heads_and_saves_both(
    make: Make, tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    trainer = make(peft_config=LORA, max_steps=4, head_learning_rate=1e-2)
    before = weights(trainer)
    trainer.train()
    moved = changed(before, weights(trainer))
    assert moved == {name for name in before if "lora_" in name or "mtp_heads" in name} and len(moved) == 8 + 12
    trainer.save_model(str(tmp_path / "saved"))
    assert not any("mtp_heads" in key for key in load_file(tmp_path / "saved" / "adapter_model.safetensors"))
    reloaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "saved")
    heads = load_mtp_heads(reloaded, tmp_path / "saved")
    again = {name: p for name, p in reloaded.named_parameters()}
    assert MTPHeads.of(reloaded) is heads
    assert not changed(again, weights(trainer))


@pytest.mark.slow
@pytest.mark.parametrize("num_iterations", [1, 2])
@pytest.mark.parametrize("recorded", [True, False])
def test_the_reference_pass_of_lora_does_not_disturb_the_values(
    make: Make, monkeypatch: pytest.MonkeyPatch, num_iterations: int, recorded: bool
) -> None:
    if not recorded:
        record_passes_only(monkeypatch)
    still = {"learning_rate": 0.0, "head_learning_rate": 0.0}
    trainer = make(peft_config=LORA, beta=0.1, max_steps=1, num_iterations=num_iterations, **still)
    assert trainer.mtp_heads is not None
    randomise(trainer.mtp_heads)
    with torch.no_grad():
        for name, p in trainer.model.named_parameters():
            if "lora_B" in name:
                p.fill_(0.5)
    trainer.train()
    batch = trainer.last_rollout
    adapted = no_grad_values(trainer, batch)
    with trainer.model.disable_adapter():
        plain = no_grad_values(trainer, batch)
    mask = batch["critic_mask"]
    assert (adapted - plain)[mask].abs().max() > 1e-2
    torch.testing.assert_close(batch["old_values"][mask], adapted[mask], atol=1e-5, rtol=1e-5)


# Warm-up, KL, phases


@pytest.mark.slow
@pytest.mark.parametrize("mtp_detach_trunk", [True, False])
def test_warmup_leaves_the_trunk_bit_identical(make: Make, mtp_detach_trunk: bool) -> None:
    trainer = make(value_warmup_steps=2, max_steps=2, head_learning_rate=1e-2, mtp_detach_trunk=mtp_detach_trunk)
    before = weights(trainer)
    trainer.train()
    moved = changed(before, weights(trainer))
    assert moved and all("mtp_heads" in name for name in moved)
    trainer = make(value_warmup_steps=2, max_steps=3, mtp_detach_trunk=mtp_detach_trunk)
    trainer.train()
    assert "model.embed_tokens.weight" in changed(before, weights(trainer))


@pytest.mark.slow
def test_kl_in_the_reward(make: Make, tiny_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    path = str(tmp_path / "start")
    trainer = make(model=path, beta=0.5, kl_in_reward=True, max_steps=3, learning_rate=1e-2)
    trainer.train()
    batch = trainer.last_rollout
    mask = batch["critic_mask"]
    gap = batch["old_per_token_logps"] - batch["ref_per_token_logps"]
    assert gap[mask].abs().max() > 1e-3
    # With gamma and lambda 1 the first return is the score less the charges on the whole completion.
    charge = 0.5 * gap.masked_fill(~mask, 0.0).sum(1)
    torch.testing.assert_close(batch["returns"][:, 0], batch["scores"] - charge)
    assert len(logged(trainer, "kl")) == 3
    assert logged(trainer, "kl")[-1] == pytest.approx(gap[mask].mean().item(), abs=1e-6)
    assert logged(trainer, "kl")[0] == pytest.approx(0.0, abs=1e-6)  # policy and reference start equal

    def loss(trainer: MTPCriticTrainer, ref_logps: Tensor) -> float:
        return trainer._compute_loss(trainer.model, {**batch, "ref_per_token_logps": ref_logps}).item()

    assert loss(trainer, batch["ref_per_token_logps"]) == loss(trainer, batch["ref_per_token_logps"] - 1)
    assert trainer.beta == 0.5
    assert trainer.critic is not None and isinstance(trainer.critic.values, OnlineValueOptions)
    trainer.critic.values = dataclasses.replace(trainer.critic.values, kl_in_reward=False)
    trainer.signal = CriticSignal(trainer.critic)
    assert loss(trainer, batch["ref_per_token_logps"]) != loss(trainer, batch["ref_per_token_logps"] - 1)


@pytest.mark.slow
def test_phasic_run(make: Make) -> None:
    trainer = make(phasic_every=2, phasic_epochs=2, max_steps=8, head_learning_rate=1e-2)
    snapshots: list[dict[str, Tensor]] = []
    step = trainer.training_step
    trainer.training_step = lambda *a, **k: (snapshots.append(weights(trainer)), step(*a, **k))[1]  # type: ignore
    trainer.train()
    assert trainer.state.global_step == 8
    steps = {name: [e["step"] for e in trainer.state.log_history if name in e] for name in ("reward", "phasic/kl")}
    assert steps == {"reward": [1, 2, 7, 8], "phasic/kl": [3, 4, 5, 6]}
    assert [e["step"] for e in trainer.state.log_history if "critic/value_loss" in e] == list(range(1, 9))
    divergence = logged(trainer, "phasic/kl")
    assert divergence[0] == pytest.approx(0.0, abs=1e-6)  # nothing has moved since the policies were noted
    assert all(0 < d < 1 for d in divergence[1:])
    for before, after in zip(snapshots[2:6], snapshots[3:7], strict=True):
        assert {"mtp_heads.heads.0.value.weight", "model.embed_tokens.weight"} <= changed(before, after)


@pytest.mark.slow
def test_phasic_kl_holds_the_policy(make: Make) -> None:
    def drift(coef: float) -> float:
        trainer = make(
            phasic_every=1, phasic_epochs=6, max_steps=7, learning_rate=1e-2, phasic_kl_coef=coef, value_loss_coef=5.0
        )
        trainer.train()
        return logged(trainer, "phasic/kl")[-1]

    assert drift(100.0) < 0.5 * drift(0.0)


# Bad rewards


@pytest.mark.slow
@pytest.mark.parametrize("scaling", ["whiten", "value", "none"])
def test_unusable_rewards_are_skipped_and_counted(make: Make, scaling: str) -> None:
    def broken(completions: list[str], **kwargs: Any) -> list[float | None]:
        return [math.nan, math.inf, -math.inf, None, 0.0, 1.0, 0.5, 0.25]

    trainer = make(reward_funcs=broken, max_steps=2, advantage_scaling=scaling)
    trainer.train()
    assert logged(trainer, "critic/skipped_completions") == [4.0, 4.0]
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert all(map(math.isfinite, logged(trainer, "loss")))
    assert logged(trainer, "reward") == [pytest.approx(1.75 / 4)] * 2
    batch = trainer.last_rollout
    assert not batch["advantages"][:4].any() and not batch["critic_mask"][:4].any()
    assert batch["scores"][4:].tolist() == [0.0, 1.0, 0.5, 0.25] and batch["scores"][:4].isnan().all()


@pytest.mark.slow
def test_one_of_two_rewards_is_unusable(make: Make) -> None:
    def none_or_inf(completions: list[str], **kwargs: Any) -> list[float | None]:
        return [None, math.inf, math.nan, 1.0] + [0.0] * 4

    def ones(completions: list[str], **kwargs: Any) -> list[float]:
        return [1.0] * 8

    trainer = make(reward_funcs=[none_or_inf, ones], reward_weights=[2.0, 0.5], max_steps=1)
    trainer.train()
    # Nothing from one function is no reason to skip, infinity is.
    assert logged(trainer, "critic/skipped_completions") == [1.0]
    scores = trainer.last_rollout["scores"].tolist()
    assert math.isnan(scores[1]) and scores[:1] + scores[2:] == [0.5, 0.5, 2.5, 0.5, 0.5, 0.5, 0.5]


@pytest.mark.slow
def test_all_rewards_none(make: Make) -> None:
    trainer = make(reward_funcs=lambda completions, **kwargs: [None] * len(completions), max_steps=2)
    trainer.train()
    assert logged(trainer, "critic/skipped_completions") == [8.0, 8.0]
    assert all(p.isfinite().all() for p in trainer.model.parameters())


@pytest.mark.slow
def test_all_completions_truncated(make: Make) -> None:
    trainer = make(mask_truncated_completions=True, generation_kwargs=NO_END, max_steps=2)
    before = weights(trainer)
    trainer.train()
    assert logged(trainer, "critic/skipped_completions") == [8.0, 8.0]
    assert logged(trainer, "loss") == [0.0, 0.0]
    assert not changed(before, weights(trainer))


@pytest.mark.slow
def test_some_completions_truncated(make: Make) -> None:
    trainer = make(
        mask_truncated_completions=True,
        max_steps=2,
        max_completion_length=12,
        generation_kwargs={"suppress_tokens": [0]},
    )
    trainer.train()
    batch = trainer.last_rollout
    ended = (batch["completion_ids"] == 1).any(1)
    assert 0 < ended.sum() < 8
    assert torch.equal(batch["critic_mask"].any(1), ended)
    assert logged(trainer, "critic/skipped_completions")[-1] == 8 - ended.sum()


class _Callable:
    def __call__(self, completions: list[str], **kwargs: Any) -> list[float]:
        raise KeyError("answer")


class _AsyncCallable:
    async def __call__(self, completions: list[str], **kwargs: Any) -> list[float]:
        await asyncio.sleep(0)
        raise KeyError("answer")


def failing_reward(completions: list[str], **kwargs: Any) -> list[float]:
    raise KeyError("answer")


async def failing_async_reward(completions: list[str], **kwargs: Any) -> list[float]:
    raise KeyError("answer")


@pytest.mark.parametrize(
    ("func", "name"),
    [
        (failing_reward, "failing_reward"),
        (failing_async_reward, "failing_async_reward"),
        (_Callable(), "_Callable"),
        (_AsyncCallable(), "_AsyncCallable"),
    ],
)
def test_a_failing_reward_function_is_named(make: Make, reward: Any, func: Any, name: str) -> None:
    trainer = make(reward_funcs=[reward, func], max_steps=1)
    assert trainer.reward_func_names == ["digit_reward", name]
    with pytest.raises(KeyError, match="answer") as caught:
        trainer.train()
    assert caught.value.__notes__ == [
        f"Raised by the reward function '{name}'.",
        "It was called in step 1 with prompts, completions, completion_ids, answer, trainer_state, log_extra, "
        "log_metric.",
    ]


# What it starts from


@pytest.mark.slow
def test_heads_that_are_there_are_kept(make: Make, tiny_model: Callable[..., Any]) -> None:
    model = with_random_heads(tiny_model())
    heads = MTPHeads.of(model)
    trainer = make(model=model, max_steps=1)
    assert trainer.mtp_heads is heads
    with pytest.raises(ValueError, match=r"comes with 2 MTP heads, but 3 are asked for. Set num_mtp_heads=2"):
        make(model=model, num_mtp_heads=3)
    trainer.train()
    MTPHeads.detach(model)


def test_wrong_arguments(make: Make, tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="args must be of type MTPCriticConfig, got GRPOConfig"):
        MTPCriticTrainer(tiny_model(), failing_reward, GRPOConfig(str(tmp_path), use_cpu=True, bf16=False))  # type: ignore
    with pytest.raises(FileNotFoundError, match="No mtp_heads.safetensors in .*nowhere"):
        make(mtp_heads_path=str(tmp_path / "nowhere"))


@pytest.mark.slow
def test_a_run_starts_from_the_heads_of_the_last_one(
    make: Make, tiny_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    first = make(max_steps=2, head_learning_rate=1e-2)
    first.train()
    first.save_model(str(tmp_path / "first"))
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "first", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not changed(weights(first), weights(make(model=str(tmp_path / "first"))))
    other = make(model=tiny_model(seed=5), mtp_heads_path=str(tmp_path / "first"))
    same = {name for name in weights(first) if "mtp_heads" in name}
    assert changed(weights(first), weights(other)).isdisjoint(same)
    target = dict(other.polyak_target.heads.named_parameters())
    assert all(torch.equal(target[n.removeprefix("mtp_heads.")], weights(other)[n]) for n in same)
    with pytest.raises(ValueError, match="Ask for 2"):
        make(model=str(tmp_path / "first"), num_mtp_heads=1)


# vLLM


@pytest.mark.parametrize("peft", [False, True])
def test_vllm_is_sent_the_stock_parameters_only(make: Make, tiny_model: Callable[..., Any], peft: bool) -> None:
    trainer = make(peft_config=LORA if peft else None)
    gathered: list[str] = []
    names = {id(p): name for name, p in trainer.model.named_parameters()}

    def gather(params: list[Tensor]) -> Any:
        gathered.extend(names[id(p)] for p in params)
        return nullcontext()

    generation = object.__new__(VLLMGeneration)
    generation.model = trainer.model
    generation.accelerator = trainer.accelerator
    generation._dist = SimpleNamespace(is_fsdp=False, gather_params=gather)  # type: ignore[assignment]
    assert any("mtp_heads" in name for name, _ in generation._iter_named_params())
    gathered.clear()
    hide_attachments_from_vllm(generation)
    sent = dict(generation._iter_named_params())
    stock = tiny_model()
    assert list(sent) == [name for name, _ in stock.named_parameters()]
    assert all(sent[name].shape == p.shape for name, p in stock.named_parameters())
    # All ranks must take part in gathering a parameter, whether it is sent or not.
    assert set(gathered) == set(names.values())


def test_heads_are_known_by_a_whole_part_of_the_name() -> None:
    names = ["mtp_heads.heads.0.up.weight", "a.mtp_heads.b", "model.mtp_heads_like.weight", "lm_head.weight"]
    kept = [name for name, _ in without_attachments((name, torch.zeros(1)) for name in names)]
    assert kept == ["model.mtp_heads_like.weight", "lm_head.weight"]


# Checkpoints


@pytest.mark.slow
@pytest.mark.parametrize(
    ("save_steps", "options"),
    [
        (3, {}),
        (2, {"steps_per_generation": 4, "per_device_train_batch_size": 2}),  # in the middle of a generation batch
        (3, {"phasic_every": 1, "phasic_epochs": 4}),  # in the middle of an auxiliary phase
        (3, {"peft_config": LORA}),
    ],
    ids=["between", "mid-generation", "mid-phase", "lora"],
)
def test_resuming_is_as_if_nothing_had_happened(
    make: Make, tmp_path: Path, save_steps: int, options: dict[str, Any]
) -> None:
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": save_steps, "target_tau": 0.3, **options}
    through = make(output_dir="through", head_learning_rate=1e-2, **options)
    through.train()
    checkpoint = tmp_path / "through" / f"checkpoint-{save_steps}"
    resumed = make(output_dir="resumed", head_learning_rate=1e-2, **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 6
    for name in ("loss", "critic/value_loss", "reward"):
        assert logged(resumed, name) == logged(through, name), name
    assert not changed(weights(through), weights(resumed))
    targets = dict(through.polyak_target.heads.named_parameters())
    assert not changed(targets, dict(resumed.polyak_target.heads.named_parameters()))
    assert any(not torch.equal(t, through.mtp_heads.get_parameter(n)) for n, t in targets.items())  # type: ignore


@pytest.mark.slow
def test_a_checkpoint_without_targets_is_refused(make: Make, tmp_path: Path) -> None:
    trainer = make(max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    assert {"mtp_heads.safetensors", "mtp_heads_config.json", "rl_plugins.pt", "rollout_0.pt"} <= {
        p.name for p in checkpoint.iterdir()
    }
    for name, message in (
        ("rl_plugins.pt", "written by another trainer .* it has no rl_plugins.pt"),
        ("mtp_heads.safetensors", "written by another trainer .* it has no mtp_heads.safetensors"),
        ("rollout_0.pt", "rollout_0.pt"),
    ):
        broken = tmp_path / name
        shutil.copytree(checkpoint, broken)
        (broken / name).unlink()
        with pytest.raises(FileNotFoundError, match=message):
            make(max_steps=2).train(resume_from_checkpoint=str(broken))


@pytest.mark.slow
def test_the_best_model_comes_back_with_its_heads(make: Make, dataset: Dataset) -> None:
    def worse_and_worse(completions: list[str], trainer_state: Any, **kwargs: Any) -> list[float]:
        return [float(-trainer_state.global_step)] * len(completions)

    trainer = make(
        reward_funcs=worse_and_worse,
        eval_dataset=dataset.select(range(8)),
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_reward",
        greater_is_better=True,
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-1"
    saved = load_file(best / "mtp_heads.safetensors")
    assert trainer.mtp_heads is not None
    assert all(torch.equal(saved[name], value) for name, value in trainer.mtp_heads.state_dict().items())
