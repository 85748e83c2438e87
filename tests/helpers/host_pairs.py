"""TRL's trainers and Lightning's modules on equal weights, their rollouts of the same prompts, and how they are
compared."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from lightning.pytorch import Trainer
from torch import Tensor

from rl_plugins.lightning import GRPOModule, MTPCriticModule, PPOModule, RLModule
from rl_plugins.rollouts.batch import select_rows
from rl_plugins.rollouts.completions import Completions, pad_left
from rl_plugins.signals import GroupSignal, VariantOptions
from rl_plugins.trl import (
    GRPOVariantConfig,
    GRPOVariantTrainer,
    MTPCriticConfig,
    MTPCriticTrainer,
    PPOConfig,
    PPOTrainer,
    RLConfig,
    RLTrainer,
)

from .lightning_runs import perturb
from .tiny import ON_CPU

GROUPS = VariantOptions(advantage="group_normalized")
HOSTS: dict[str, tuple[Any, Any, Any]] = {
    "critic": (MTPCriticConfig, MTPCriticTrainer, MTPCriticModule),
    "grpo": (GRPOVariantConfig, GRPOVariantTrainer, GRPOModule),
    "ppo": (PPOConfig, PPOTrainer, PPOModule),
    "plain": (
        RLConfig,
        RLTrainer,
        partial(RLModule, signal=GroupSignal(GROUPS)),
    ),
}
# What TRL calls otherwise, and what only it has; the rest of the options has the same name on both sides.
QUIET = {
    **ON_CPU,
    "logging_steps": 1,
    "max_grad_norm": 0.0,
    "shuffle_dataset": False,
    # TRL takes a sampled padding token for an end.
    "generation_kwargs": {"suppress_tokens": [0]},
}
Make = Callable[..., tuple[Any, Any]]


def save_start(tiny_model: Callable[..., Any], tokenizer: Any, path: Path) -> str:
    """Write a model that tells tokens apart, and its tokenizer: TRL makes the reference from a path."""
    tiny_model(initializer_range=0.2).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def attach_trainer(module: Any, accumulation: int = 1) -> None:
    """What `Trainer.fit` sets up before the first step, without training."""
    module.trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        accumulate_grad_batches=accumulation,
    )
    module.trainer.callbacks.extend(module.configure_callbacks())
    for callback in module.trainer.callbacks:
        callback.setup(module.trainer, module, "fit")


def pair_factory(start: str, dataset: Dataset, reward: Any, tmp_path: Path) -> Make:
    """Makes TRL's trainer and Lightning's module on equal weights; `trl` and `lightning` for options of one,
    `given` for arguments of the trainer. Without `attached`, they are left as they are before training starts."""

    def factory(
        name: str,
        *,
        prompts: int = 4,
        accumulation: int = 1,
        reward_funcs: Any = reward,
        scripted_rollouts: bool = False,
        attached: bool | None = None,
        given: dict[str, Any] | None = None,
        cls: Any = None,
        data: Dataset = dataset,
        trl: dict[str, Any] | None = None,
        lightning: dict[str, Any] | None = None,
        **options: Any,
    ) -> tuple[Any, Any]:
        config_class, trainer_class, module_class = HOSTS[name]
        slices = options.get("steps_per_generation", 1)
        group = options.get("num_generations", 4 if name in ("grpo", "plain") else 1)
        heads = {"num_mtp_heads": 2} if name == "critic" else {}
        shared = {"max_completion_length": 6, "learning_rate": 1e-3, "num_generations": group, **heads, **options}
        args = config_class(
            str(tmp_path / "trl"),
            per_device_train_batch_size=prompts * group // slices,
            gradient_accumulation_steps=accumulation,
            lr_scheduler_type="constant",
            **{**QUIET, **{"steps_per_generation": slices}, **shared, **(trl or {})},
        )
        more = {"rollout_func": rollout_func} if scripted_rollouts else {}
        trainer = trainer_class(start, reward_funcs, args, data, **{**more, **(given or {})})
        module_class = cls or (scripted(module_class) if scripted_rollouts else module_class)
        module = module_class(
            start, lr_scheduler_type="constant", **{"reward_funcs": reward_funcs, **shared, **(lightning or {})}
        )
        module.generation["suppress_tokens"] = [0]
        perturb(trainer.model, 0.05)
        module.model.load_state_dict(trainer.model.state_dict())
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = accumulation
        if not (not scripted_rollouts if attached is None else attached):
            if name == "critic":  # the module's target heads are copied when training starts
                trainer.polyak_target.heads.load_state_dict(trainer.mtp_heads.value_path.state_dict())
            return trainer, module
        attach_trainer(module, accumulation)
        if name == "critic":
            perturb(trainer.polyak_target, 0.05, seed=5)
            module.polyak_target.load_state_dict(trainer.polyak_target.state_dict())
        return trainer, module

    return factory


def rollouts(trainer: Any, module: RLModule, dataset: Dataset, prompts: int, seed: int = 7) -> tuple[Any, Any, Any]:
    """The batch that each host makes of the same prompts with the same dice, and the module's metrics."""
    rows = [dict(dataset[i]) for i in range(8, 8 + prompts)]  # of different lengths: 8+8= and 10+10=
    torch.manual_seed(seed)
    theirs = trainer._generate_and_score_completions([dict(r) for r in rows for _ in range(module.num_generations)])
    torch.manual_seed(seed)
    ours, metrics = module.rollout(rows)
    return theirs, ours, metrics


def assert_batches_agree(theirs: Any, ours: Any) -> None:
    """Equal completions, and close numbers at real tokens: TRL has 0 for the log-probabilities of padding."""
    renamed = {"num_items": "num_items_in_batch"}
    assert {renamed.get(key, key) for key in ours} == set(theirs)
    mask = theirs["completion_mask"].bool()
    for key, value in ours.items():
        expected = theirs[renamed.get(key, key)]
        if key.endswith("_ids") or key.endswith("_mask"):
            assert torch.equal(value, expected), key
        elif key == "num_items":
            assert value.shape == ()  # per slice and rank, while TRL's is of the whole batch
        else:
            if expected.shape[:2] == mask.shape:
                value, expected = value[mask], expected[mask]
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


def assert_metrics_agree(trainer: Any, metrics: dict[str, Tensor]) -> None:
    """Every number that both log. What only TRL logs is named here."""
    only_trl = {"num_tokens", "entropy_coef", "clip_ratio/low_min", "clip_ratio/high_max"}
    theirs = {name: values[-1] for name, values in trainer._metrics["train"].items() if name not in only_trl}
    if trainer.num_generations == 1:
        theirs.pop("frac_reward_zero_std", None)  # a group of one has no spread
    assert {name for name in theirs if not math.isnan(theirs[name])} == {
        n for n, v in metrics.items() if not v.isnan()
    }
    for name, value in metrics.items():
        if not value.isnan():
            assert float(value) == pytest.approx(theirs[name], rel=2e-6, abs=1e-6), name


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def assert_gradients_agree(trainer: Any, module: Any) -> None:
    ours, theirs = gradients(module.model), gradients(trainer.model)
    assert ours.keys() == theirs.keys()
    largest = max(g.abs().max().item() for g in theirs.values())
    assert largest > 1e-3
    for name, gradient in theirs.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(
            ours[name], gradient, rtol=1e-5, atol=2e-6 * scale + 1e-9 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_hosts_agree(trainer: Any, module: Any, dataset: Dataset, prompts: int = 4, window: int = 1) -> None:
    """Rollout, and loss and gradients of the first `window` slices, which are one accumulation window."""
    theirs, ours, metrics = rollouts(trainer, module, dataset, prompts)
    assert_batches_agree(theirs, ours)
    assert_metrics_agree(trainer, metrics)
    lengths = ours["completion_mask"].sum(1)
    assert len(lengths.unique()) > 1
    perturb(trainer.model, 0.05, seed=11)  # the policy moves on, so that ratios are not 1
    module.model.load_state_dict(trainer.model.state_dict())
    slices = torch.arange(len(lengths)).chunk(module.steps_per_generation)
    for micro_step in range(window):
        trainer._metrics["train"].clear()
        part = slices[micro_step % len(slices)]
        expected = trainer._compute_loss(trainer.model, select_rows(theirs, part))
        expected.backward()
        loss, metrics = module.loss(select_rows(ours, part))
        (loss / window).backward()  # what Lightning does
        torch.testing.assert_close(loss.detach() / window, expected.detach(), rtol=2e-6, atol=1e-6)
        assert_metrics_agree(trainer, metrics)
    assert_gradients_agree(trainer, module)


# Rollouts that are there already


def canned(prompt: str, number: int) -> list[int]:
    """Completion number `number` of a prompt: ragged, and some without an end."""
    dice = torch.Generator().manual_seed(hash_of(prompt) + number)
    length = int(torch.randint(2, 7, (), generator=dice))
    ids = torch.randint(2, 16, (length,), generator=dice).tolist()
    return ids if length == 6 else [*ids, 1]


def hash_of(text: str) -> int:
    return sum(ord(character) * 31**i for i, character in enumerate(text)) % 100_003


def scripted(module_class: Any, complete: Callable[[str, int], list[int]] = canned) -> Any:
    """A module whose completions are canned: a rollout of the user's own."""

    class Scripted(module_class):
        def generate(self, prompts: Any) -> Completions:
            ids, mask = pad_left(self.tokenizer(text=list(prompts))["input_ids"], 0, "cpu")
            rows = [complete(prompt, i % self.num_generations) for i, prompt in enumerate(prompts)]
            reversed_ids, reversed_mask = pad_left([row[::-1] for row in rows], 0, "cpu")
            ended = torch.tensor([row[-1] == 1 for row in rows])
            return Completions(ids, mask, reversed_ids.flip(1), reversed_mask.flip(1), ended)

    return Scripted


def rollout_func(
    prompts: list[str], trainer: Any, complete: Callable[[str, int], list[int]] = canned
) -> dict[str, Any]:
    return {
        "prompt_ids": trainer.processing_class(text=prompts)["input_ids"],
        "completion_ids": [complete(prompt, i % trainer.num_generations) for i, prompt in enumerate(prompts)],
        "logprobs": None,
    }
