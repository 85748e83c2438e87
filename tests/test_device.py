"""Every part on the device and in the precision that two environment variables name (`tests/conftest.py`):
`recipes/benchmarks/gpu_check.sh` runs this file on a GPU. Without them the same tests run on the CPU in bfloat16."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from lightning.pytorch import Trainer
from torch import Tensor

from rl_plugins.classic import DQNAgent, PPOAgent
from rl_plugins.functional import expert_counts, gae, load_fractions, switch_balance_loss, token_log_probs
from rl_plugins.lightning import GRPOModule, MTPCriticModule, PromptDataModule
from rl_plugins.moe import BalancingConfig, RouterBalancer
from rl_plugins.nn import attach_mtp_heads
from rl_plugins.rollouts import SpeculativeDecoder, completion_values
from rl_plugins.signals import POLICY_LOSSES, PolicyLoss
from rl_plugins.trl import (
    GRPOVariantConfig,
    GRPOVariantTrainer,
    MTPCriticConfig,
    MTPCriticTrainer,
    MTPSFTConfig,
    MTPSFTTrainer,
    PPOConfig,
    PPOTrainer,
)

from .helpers.moe_models import make_moe_model
from .helpers.speculative_models import PROMPTS, padded, randomise_heads
from .helpers.tiny import DEVICE, DTYPE

PRECISION = "bf16-mixed" if torch.bfloat16 == DTYPE else "32-true"
GROUPS = torch.tensor([0, 0, 1, 1])
TRAINERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "critic": (MTPCriticTrainer, MTPCriticConfig, {"head_learning_rate": 1e-2}),
    "critic_speculative": (MTPCriticTrainer, MTPCriticConfig, {"head_learning_rate": 1e-2, "speculative": True}),
    "ppo": (PPOTrainer, PPOConfig, {"value_learning_rate": 1e-2, "beta": 0.0}),
    "dapo": (GRPOVariantTrainer, GRPOVariantConfig, {"preset": "dapo", "num_generations": 4}),
    "gspo_token": (GRPOVariantTrainer, GRPOVariantConfig, {"preset": "gspo_token", "num_generations": 4}),
}


def on_device(*tensors: Tensor) -> list[Tensor]:
    return [x.to(DEVICE, DTYPE) if x.is_floating_point() else x.to(DEVICE) for x in tensors]


def close(ours: Tensor, exact: Tensor) -> None:
    """Equal to the float64 value of the same rounded inputs, on the right device."""
    assert ours.device.type == DEVICE and ours.dtype == torch.float32
    torch.testing.assert_close(ours.cpu().double(), exact, rtol=2e-3, atol=2e-4)


def device_of(module: torch.nn.Module) -> set[str]:
    return {p.device.type for p in module.parameters()}


# Functions


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_policy_loss_is_the_float64_loss_of_the_rounded_inputs(name: str) -> None:
    g = torch.Generator().manual_seed(0)
    logps = -3 * torch.rand(4, 6, generator=g)
    old, mask = logps + 0.3 * torch.randn(4, 6, generator=g), torch.arange(6) < torch.tensor([[6], [3], [5], [1]])
    advantages = torch.randn(4, generator=g) if name == "gvpo" else torch.randn(4, 6, generator=g)
    options = {"clip_cov": {"ratio": 1.0, "cov_low": -5.0}, "kl_cov": {"ratio": 0.3}}.get(name, {})
    loss = PolicyLoss(name, options=options)
    inputs = on_device(logps, old, advantages, mask)
    ours = loss.per_token(*inputs, {"groups": GROUPS.to(DEVICE)})
    exact = loss.per_token(*(x.cpu().double() for x in inputs[:3]), mask, {"groups": GROUPS})
    close(ours, exact.double())


def test_advantages_log_probs_and_balance_loss() -> None:
    g = torch.Generator().manual_seed(1)
    rewards, values, mask = torch.randn(4, 6, generator=g), torch.randn(4, 6, generator=g), torch.ones(4, 6) > 0
    r, v, m = on_device(rewards, values, mask)
    close(gae(r, v, m, gamma=0.9, lam=0.8), gae(r.cpu().double(), v.cpu().double(), mask, gamma=0.9, lam=0.8))
    logits, ids = torch.randn(3, 5, 40, generator=g), torch.randint(40, (3, 5), generator=g)
    x, y = on_device(logits, ids)
    close(token_log_probs(x, y), token_log_probs(x.cpu().double(), ids))
    routed = torch.randn(30, 8, generator=g)
    (z,) = on_device(routed)
    shares = load_fractions(expert_counts(z.topk(2).indices, 8), 2)
    close(switch_balance_loss(z, shares), switch_balance_loss(z.cpu().double(), shares.cpu()))


# TRL


def arguments(folder: Path, config: Any, **options: Any) -> Any:
    return config(
        **{
            "output_dir": str(folder),
            "use_cpu": DEVICE == "cpu",
            "bf16": torch.bfloat16 == DTYPE,
            "gradient_checkpointing": False,
            "per_device_train_batch_size": 8,
            "max_steps": 2,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            **options,
        }
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINERS)
def test_online_trainer_learns(
    name: str, tiny_model: Callable[..., Any], tokenizer: Any, dataset: Dataset, reward: Any, tmp_path: Path
) -> None:
    trainer_class, config_class, options = TRAINERS[name]
    model = tiny_model(initializer_range=0.2)
    if "critic" in name:
        randomise_heads(attach_mtp_heads(model, 2), 0.1)
        options = {**options, "num_mtp_heads": 2}
    args = arguments(tmp_path, config_class, max_completion_length=6, temperature=1.0, **options)
    trainer = trainer_class(model, reward, args, dataset, processing_class=tokenizer)
    before = {key: p.detach().clone().cpu() for key, p in trainer.model.named_parameters()}
    batches: list[dict[str, Any]] = []
    generate = trainer._generate_and_score_completions

    def noted(inputs: Any) -> Any:
        batch = generate(inputs)
        if trainer.mtp_heads is not None and not batches:
            rows = [
                [row[m.bool()].tolist() for row, m in zip(batch[f"{x}_ids"], batch[f"{x}_mask"], strict=True)]
                for x in ("prompt", "completion")
            ]
            with torch.autocast(DEVICE, DTYPE, enabled=torch.bfloat16 == DTYPE):
                alone = completion_values(trainer.accelerator.unwrap_model(trainer.model), *rows)
            for values, expected in zip(batch["old_values"], alone, strict=True):
                torch.testing.assert_close(values[: len(expected)], expected, rtol=0.05, atol=0.05)
                assert expected.std() > 0.05, "there is something to tell apart"
        batches.append(batch)
        return batch

    if not hasattr(trainer, "mtp_heads"):
        trainer.mtp_heads = None
    trainer._generate_and_score_completions = noted
    trainer.train()
    assert device_of(trainer.model) == {DEVICE}
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
    moved = {key for key, p in trainer.model.named_parameters() if not torch.equal(p.cpu(), before[key])}
    assert moved == set(before)
    if "critic" in name:
        target = trainer.polyak_target
        assert device_of(target) == {DEVICE} and all(p.dtype == torch.float32 for p in target.parameters())
        assert batches[0]["old_values"].dtype == torch.float32


@pytest.mark.slow
def test_sft_trainer_learns_and_goes_on_where_it_stopped(
    tiny_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    rows = Dataset.from_dict({"prompt": [f"{i}+1=" for i in range(64)], "completion": [str(i + 1) for i in range(64)]})

    def make() -> MTPSFTTrainer:
        args = arguments(tmp_path, MTPSFTConfig, save_strategy="steps", save_steps=1, max_steps=3)
        return MTPSFTTrainer(tiny_model(), args, train_dataset=rows, processing_class=tokenizer)

    whole, resumed = make(), make()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert device_of(resumed.model) == {DEVICE}
    for (name, ours), theirs in zip(
        resumed.model.named_parameters(), whole.model.parameters(), strict=True
    ):  # a GPU adds gradients in another order each time
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)


# Experts


@pytest.mark.parametrize("family", ["deepseek_v3", "mixtral"])
def test_experts_are_counted_and_biases_move(family: str) -> None:
    model = make_moe_model(family).to(DEVICE, DTYPE).train()
    balancer = RouterBalancer(model, BalancingConfig(rate=0.01, aux_loss_coef=0.01))
    ids = torch.randint(2, 40, (4, 16), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    model(input_ids=ids, labels=ids).loss.backward()
    metrics = balancer.update(0.0)
    assert all(sum(counts) == 4 * 16 * 2 for counts in balancer.last_counts)
    assert all(torch.as_tensor(value).isfinite() for value in metrics.values())
    for router, counts, bias in zip(
        balancer.routers, balancer.last_counts, balancer.state_dict().values(), strict=True
    ):
        load = torch.as_tensor(counts).cpu().double()
        step = 0.01 * (load.mean() - load).sign()
        torch.testing.assert_close(bias.cpu().double(), step - step.mean(), rtol=0, atol=1e-6)
        assert router.bias.device.type == DEVICE and bias.dtype == torch.float32


# Drafts


def test_greedy_drafting_chooses_the_same_tokens(tiny_model: Callable[..., Any]) -> None:
    """In float32: rounding to bfloat16 makes ties, which a pass over several tokens may break otherwise."""
    model = tiny_model(vocab_size=40, initializer_range=0.2)
    randomise_heads(attach_mtp_heads(model, 3), 0.05)
    model = model.to(DEVICE).eval()
    inputs = {name: x.to(DEVICE) for name, x in padded(PROMPTS).items()}
    options = {"max_new_tokens": 16, "do_sample": False}
    ours = model.generate(**inputs, **options, custom_generate=SpeculativeDecoder(draft_cost=0.0))
    assert torch.equal(ours, model.generate(**inputs, **options)) and ours.device.type == DEVICE


# Lightning


def fit(module: Any, data: Any = None, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accelerator = "gpu" if DEVICE == "cuda" else DEVICE
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        Trainer(accelerator=accelerator, devices=1, **quiet, **options).fit(module, data)


def test_lightning_critic_learns(tiny_model: Callable[..., Any], tokenizer: Any, reward: Any) -> None:
    module = MTPCriticModule(tiny_model(initializer_range=0.2), tokenizer, reward, max_completion_length=5)
    before = {name: p.detach().clone().cpu() for name, p in module.named_parameters()}
    data = PromptDataModule([{"prompt": f"{i}+{i}="} for i in range(8)], None, batch_size=4)
    fit(module, data, max_steps=2, precision=PRECISION)
    after = dict(module.named_parameters())
    assert all(p.isfinite().all() for p in after.values())
    assert all(not torch.equal(after[name].cpu(), p) for name, p in before.items() if "embed" in name or "mtp" in name)


def test_lightning_tracker_follows_its_prompts(tiny_model: Callable[..., Any], tokenizer: Any, reward: Any) -> None:
    """Its counts live on the CPU, its advantages where the model is."""
    options = {"advantage": "value_tracker", "num_generations": 1, "max_completion_length": 5}
    module = GRPOModule(tiny_model(initializer_range=0.2), tokenizer, reward, **options)
    fit(module, PromptDataModule([{"prompt": f"{i}+{i}="} for i in range(8)], None, batch_size=4), max_steps=2)
    assert len(module.value_tracker) == 4 and module.trainer.callback_metrics["value_tracker/prompts"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("agent", [DQNAgent, PPOAgent])
def test_classic_agent_learns(agent: Any) -> None:
    size = {"learning_starts": 32} if agent is DQNAgent else {"rollout_steps": 32}
    module = agent("CartPole-v1", total_steps=128, seed=0, **size)
    before = {name: x.clone().cpu() for name, x in module.state_dict().items()}
    fit(module, max_epochs=1, limit_val_batches=0)
    after = module.state_dict()
    assert all(x.isfinite().all() for x in after.values())
    assert any(not torch.equal(after[name].cpu(), x) for name, x in before.items())
