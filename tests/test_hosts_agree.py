"""The same weights and completions through both hosts: TRL's trainers and Lightning's modules give the same rollouts,
losses, gradients, metrics and, after whole runs, the same weights."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from rl_plugins.lightning import MTPSFTModule, PromptDataModule
from rl_plugins.trl import (
    MTPSFTConfig,
    MTPSFTTrainer,
)

from .helpers.host_pairs import (
    QUIET,
    Make,
    assert_gradients_agree,
    assert_hosts_agree,
    attach_trainer,
    pair_factory,
    save_start,
)
from .helpers.lightning_runs import Numbers, fit, perturb

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:::lightning\.pytorch.*"),
    pytest.mark.filterwarnings("ignore:You are using 'rollout_func'"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


@pytest.fixture(scope="session")
def start(tiny_model: Callable[..., Any], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_start(tiny_model, tokenizer, tmp_path_factory.mktemp("start"))


@pytest.fixture
def make(start: str, dataset: Dataset, reward: Any, tmp_path: Path) -> Make:
    return pair_factory(start, dataset, reward, tmp_path)


# One rollout and one loss

VARIANTS: dict[str, dict[str, Any]] = {
    "dapo": {"policy_loss": "dapo", "advantage": "group_normalized"},
    "grpo_kl": {"policy_loss": "grpo", "advantage": "group_normalized", "beta": 0.3},
    "dr_grpo_entropy": {"policy_loss": "dr_grpo", "advantage": "group_centered", "beta": 0.3, "entropy_coef": 0.2},
    "bnpo": {"policy_loss": "bnpo", "advantage": "leave_one_out", "beta": 0.3},
    "cispo": {"policy_loss": "cispo", "advantage": "pass_at_k", "advantage_kwargs": {"k": 2}},
    "vespo": {"policy_loss": "vespo", "advantage": "length_weighted"},
    "prompt": {
        "policy_loss": "bapo", "aggregation": "prompt", "advantage": "group_min_max", "beta": 0.3, "entropy_coef": 0.2,
        "steps_per_generation": 2,
    },
    "gspo": {"policy_loss": "gspo_token", "advantage": "kalman"},
    "gpg": {"policy_loss": "gpg", "advantage": "group_centered_rescaled"},
    "lambda_trace": {"policy_loss": "dppo", "advantage": "lambda_trace", "advantage_kwargs": {"lam": 0.8}},
    "gvpo": {"policy_loss": "gvpo", "advantage": "group_centered"},
    "reinforce++": {"policy_loss": "ppo_clip", "advantage": "batch_normalized", "beta": 0.2, "kl_in_reward": True},
    "reward_to_go": {"policy_loss": "dapo", "advantage": "reward_to_go", "beta": 0.3},
    "tracker": {"policy_loss": "fipo", "advantage": "value_tracker", "num_generations": 1},
    "truncated": {"policy_loss": "gmpo", "advantage": "group_normalized", "mask_truncated_completions": True},
    "hot": {"policy_loss": "kl_cov", "advantage": "reward", "temperature": 1.7, "entropy_coef": 0.1},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_grpo_variants(make: Make, dataset: Dataset, name: str) -> None:
    options = VARIANTS[name]
    prompts = 12 if options.get("num_generations") == 1 else 4
    trainer, module = make("grpo", prompts=prompts, num_iterations=2, **options)
    assert_hosts_agree(trainer, module, dataset, prompts)


CRITICS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "kl": {"beta": 0.2, "entropy_coef": 0.1, "value_loss_type": "huber", "mtp_detach_trunk": False},
    "kl_in_reward": {"beta": 0.2, "kl_in_reward": True, "advantage_estimator": "td", "gamma": 0.9},
    "discounted": {"gamma": 0.8, "discounted_objective": True, "aggregation": "prompt", "num_generations": 2},
    "lookahead": {"bootstrap_lookahead": True, "lam_value": 0.7, "length_adaptive_alpha": 0.05},
    "scaled": {
        "advantage_scaling": "value",
        "reward_range": [-1.0, 2.0],
        "value_grad_clip": 0.1,
        "mtp_loss_coef": 0.0,
    },
    "three_heads": {"num_mtp_heads": 3, "mtp_inner_size": 16, "advantage_scaling": "none", "value_grad_scale": 0.5},
    "truncated": {"mask_truncated_completions": True, "policy_loss": "grpo", "temperature": 0.7},
    "long": {"overlong_shaping": True, "overlong_cache": 4},
    "cut": {"bootstrap_truncated": True, "lam_value": 0.7, "time_unit": "turn", "gamma": 0.9},
    "sequential": {"mtp_head_type": "sequential", "beta": 0.2, "mtp_detach_trunk": False, "lam_value": 0.7},
    "sequential_lookahead": {
        "mtp_head_type": "sequential",
        "bootstrap_lookahead": True,
        "bootstrap_truncated": True,
        "advantage_estimator": "td",
        "mtp_loss_type": "distribution",
        "value_grad_clip": 0.1,
    },
}


@pytest.mark.parametrize("name", CRITICS)
def test_critic_inside_the_policy(make: Make, dataset: Dataset, name: str) -> None:
    prompts = 12 // CRITICS[name].get("num_generations", 1)
    trainer, module = make("critic", prompts=prompts, **{"policy_loss": "dapo", **CRITICS[name]})
    assert_hosts_agree(trainer, module, dataset, prompts)


PPOS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "kl_in_loss": {"kl_in_reward": False, "beta": 0.2, "entropy_coef": 0.1, "value_clip_range": 0.01},
    "cut": {"bootstrap_truncated": True, "lam_value": 0.7, "gamma": 0.9},
    "plain": {"beta": 0.0, "num_iterations": 1, "advantage_estimator": "mc", "value_loss_type": "squared"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PPOS)
def test_ppo(make: Make, dataset: Dataset, name: str) -> None:
    trainer, module = make("ppo", prompts=12, trl={"policy_loss": "ppo_clip"}, **PPOS[name])
    assert_hosts_agree(trainer, module, dataset, 12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "slices", "accumulation"), [("dapo", 2, 2), ("dapo", 4, 2), ("dapo", 2, 4), ("grpo", 2, 2)]
)
def test_tokens_are_counted_over_the_same_window(
    make: Make, dataset: Dataset, loss: str, slices: int, accumulation: int
) -> None:
    """TRL divides by the tokens of the window, the module by those of a slice and Lightning by the accumulation."""
    options = {"steps_per_generation": slices, "policy_loss": loss}
    trainer, module = make("critic", prompts=12, accumulation=accumulation, **options)
    assert_hosts_agree(trainer, module, dataset, 12, window=accumulation)


def sometimes(completions: list[str], **kwargs: Any) -> list[float | None]:
    """No reward, an infinite one, or a number."""
    return [[None, math.inf, 0.25, 1.0][sum(character in "02468" for character in text) % 4] for text in completions]


@pytest.mark.parametrize("name", ["critic", "grpo"])
def test_completions_that_cannot_be_scored(make: Make, dataset: Dataset, reward: Any, name: str) -> None:
    group = {"advantage": "group_normalized"} if name == "grpo" else {}
    trainer, module = make(
        name, prompts=12 if name == "critic" else 4, reward_funcs=[sometimes, reward], reward_weights=[0.5, 2.0],
        policy_loss="dapo", **group
    )  # fmt: skip
    assert_hosts_agree(trainer, module, dataset, 12 if name == "critic" else 4)
    assert module.last_rollout["scores"].isnan().any()


def digits(completion_ids: list[list[int]], **kwargs: Any) -> list[list[float | None]]:
    """A reward for every token, none for some."""
    return [[[None, 0.5, -0.25, 1.0][token % 4] for token in ids] for ids in completion_ids]


STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "critic": ("critic", {"beta": 0.2, "kl_in_reward": True, "bootstrap_truncated": True}),
    "process_normalized": ("grpo", {"advantage": "process_normalized"}),
    "turn_normalized": ("grpo", {"advantage": "turn_normalized"}),
    "reward_to_go": ("grpo", {"advantage": "reward_to_go", "beta": 0.2, "kl_in_reward": True}),
    "ppo": ("ppo", {"beta": 0.2, "bootstrap_truncated": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_rewards_for_every_token(make: Make, dataset: Dataset, name: str) -> None:
    host, options = STEPS[name]
    trainer, module = make(
        host, prompts=4 if host == "grpo" else 12, reward_funcs=[digits, sometimes], reward_weights=[0.5, 2.0],
        policy_loss="dapo", num_iterations=2, **options
    )  # fmt: skip
    assert_hosts_agree(trainer, module, dataset, 4 if host == "grpo" else 12)
    assert module.last_rollout["scores"].isnan().any()


# Supervised fine-tuning


def sums(rewards: list[float | None] | None = None) -> Dataset:
    """Prompts and completions of different lengths."""
    numbers = range(7, 15)
    data = Dataset.from_dict(
        {"prompt": [f"{i}+{i}=" for i in numbers], "completion": [str(i * i % 997) for i in numbers]}
    )
    return data if rewards is None else data.add_column("reward", rewards)


REWARDS = [1.0, 0.0, None, 0.5, math.inf, 1.0, 0.25, 0.0]


def sft_pair(start: str, tokenizer: Any, data: Dataset, tmp_path: Path, **options: Any) -> tuple[Any, MTPSFTModule]:
    """TRL's trainer, and the module with its weights."""
    shared = {"learning_rate": 1e-3, "mtp_loss_coef": 0.3, **options}
    quiet = {key: value for key, value in QUIET.items() if key in MTPSFTConfig.__dataclass_fields__}
    quiet.pop("shuffle_dataset", None)
    args = MTPSFTConfig(
        str(tmp_path / "sft"), per_device_train_batch_size=8, max_steps=3, lr_scheduler_type="constant",
        **{**quiet, **shared}
    )  # fmt: skip
    trainer = MTPSFTTrainer(start, args, train_dataset=data, processing_class=tokenizer)
    module = MTPSFTModule(start, lr_scheduler_type="constant", **shared)
    perturb(trainer.model, 0.05)
    module.model.load_state_dict(trainer.model.state_dict())
    return trainer, module


SFTS: dict[str, dict[str, Any]] = {
    "tokens": {},
    "td": {"advantage_estimator": "td", "gamma": 0.9, "value_loss_type": "huber", "num_mtp_heads": 3},
    "trunk": {"mtp_detach_trunk": False, "value_grad_scale": 0.5, "value_grad_clip": None, "lam_value": 0.8},
    "sequential": {"mtp_head_type": "sequential", "lam_value": 0.8, "mtp_loss_share": 0.4},
}


@pytest.mark.parametrize("name", SFTS)
def test_supervised_fine_tuning(start: str, tokenizer: Any, tmp_path: Path, name: str) -> None:
    data = sums(None if name == "tokens" else REWARDS)
    trainer, module = sft_pair(start, tokenizer, data, tmp_path, **SFTS[name])
    batch = trainer.data_collator(list(trainer.train_dataset))
    ours = module.collate(list(data))
    for key in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(ours[key], batch[key]), key
    attach_trainer(module)
    perturb(trainer.polyak_target, 0.05, seed=5)
    module.polyak_target.load_state_dict(trainer.polyak_target.state_dict())
    items = (batch["labels"][:, 1:] != -100).sum()
    trainer.model.train()
    expected = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items)
    expected.backward()
    loss, metrics = module.loss(ours)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-6, atol=1e-6)
    assert_gradients_agree(trainer, module)
    theirs = {key: values[-1] for key, values in trainer._metrics["train"].items()}
    assert set(metrics) - {"token_loss"} == set(theirs) - {"entropy", "num_tokens"}
    for key in set(metrics) - {"token_loss"}:
        assert float(metrics[key]) == pytest.approx(theirs[key], rel=2e-6, abs=1e-6, nan_ok=True), key


# Whole runs


RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "critic": ("critic", {"num_iterations": 2, "beta": 0.1, "value_warmup_steps": 1, "weight_decay": 0.1}),
    "critic_accumulated": ("critic", {"steps_per_generation": 2, "num_iterations": 2, "head_learning_rate": 1e-2}),
    "critic_sequential": (
        "critic",
        {
            "mtp_head_type": "sequential",
            "num_iterations": 2,
            "beta": 0.1,
            "value_warmup_steps": 1,
            "weight_decay": 0.1,
        },
    ),
    "ppo_accumulated": ("ppo", {"steps_per_generation": 2, "num_iterations": 2, "weight_decay": 0.1}),
    "grpo": ("grpo", {"advantage": "group_centered", "policy_loss": "dr_grpo", "num_iterations": 2, "beta": 0.1}),
    "tracker": ("grpo", {"advantage": "value_tracker", "policy_loss": "dapo", "num_generations": 1}),
}


def assert_same_weights(trainer: Any, module: Any, before: dict[str, Tensor]) -> None:
    for key, ours in module.model.named_parameters():
        theirs = trainer.model.get_parameter(key)
        moved = (theirs - before[key]).abs().max().item()
        assert moved > 0.0, key
        # Adam divides by the root of the squares, which shows the rounding of the smallest gradients: few entries.
        gaps = (ours - theirs).abs() / moved
        assert gaps.max() < 0.05 and (gaps > 3e-3).float().mean() < 3e-3, f"{key}: {gaps.max():.1e}"


def assert_same_logs(trainer: Any, numbers: Numbers, window: int) -> None:
    """Number by number where a step has one slice; the loss in any case."""
    history = [row for row in trainer.state.log_history if "loss" in row]
    steps = [numbers.rows[i : i + window] for i in range(0, len(numbers.rows), window)]
    assert len(history) == len(steps)
    for theirs, ours in zip(history, steps, strict=True):
        loss = ours[-1]["loss"]  # of the whole window, which is logged at its end
        assert loss == pytest.approx(theirs["loss"], rel=1e-4, abs=1e-5)
        for key in ours[0].keys() & theirs.keys() if window == 1 else ():
            assert ours[0][key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), key


SLOW = ("critic_accumulated", "critic_sequential", "ppo_accumulated")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in RUNS])
def test_whole_runs_give_the_same_weights(make: Make, dataset: Dataset, name: str) -> None:
    host, options = RUNS[name]
    window = options.get("steps_per_generation", 1)
    if host == "critic":
        options = {"mtp_loss_share": 1.0, **options}  # of the draws, each host has its own
    prompts = 2 if name == "grpo" else 8
    if name == "tracker":  # forgets when it meets a prompt again
        dataset = dataset.select(range(8))
    trainer, module = make(
        host,
        prompts=prompts,
        accumulation=window,
        scripted_rollouts=True,
        data=dataset,
        trl={"max_steps": 4},
        **options,
    )
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    numbers = Numbers()
    data = PromptDataModule(dataset, batch_size=prompts, shuffle=False)
    fit(module, data, numbers, accumulate_grad_batches=window, max_steps=4)
    trainer.train()
    assert_same_weights(trainer, module, before)
    assert_same_logs(trainer, numbers, window)
    if host == "critic":
        for ours, theirs in zip(module.polyak_target.parameters(), trainer.polyak_target.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-6)
    if name == "tracker":
        ours, theirs = module.value_tracker.counts, trainer.value_tracker.counts
        assert ours.keys() == theirs.keys() and len(ours) == 8
        for key in ours:
            assert ours[key] == pytest.approx(theirs[key], abs=1e-5)


@pytest.mark.slow
def test_whole_runs_of_supervised_fine_tuning(start: str, tokenizer: Any, tmp_path: Path) -> None:
    trainer, module = sft_pair(start, tokenizer, sums(REWARDS), tmp_path, lam_value=0.5, weight_decay=0.1)
    trainer.polyak_target.heads.load_state_dict(trainer.mtp_heads.state_dict())
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    numbers = Numbers()
    fit(module, PromptDataModule(list(sums(REWARDS)), batch_size=8), numbers, max_epochs=3)
    trainer.train()
    assert_same_weights(trainer, module, before)
    assert_same_logs(trainer, numbers, 1)
