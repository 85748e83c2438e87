"""Soft prompts of PEFT, and policies that were made in memory, in every online trainer of both hosts."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from rl_plugins.functional.alignment import completion_states
from rl_plugins.lightning import PromptDataModule
from rl_plugins.nn.cache_name import cache_name
from rl_plugins.rollouts.values import ValueRecord, WholeRows
from rl_plugins.trl import (
    GRPOVariantConfig,
    GRPOVariantTrainer,
    MTPCriticConfig,
    MTPCriticTrainer,
    PPOConfig,
    PPOTrainer,
)

from .helpers.lightning_runs import fit, module_factory, prompts
from .helpers.tiny import ON_CPU

pytestmark = pytest.mark.filterwarnings(r"ignore:::lightning\.pytorch.*")

SOFT: dict[str, Callable[[], Any]] = {
    "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "encoder": lambda: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16),
}
TRAINERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "stock": (GRPOTrainer, GRPOConfig, {"num_generations": 2}),
    "variant": (GRPOVariantTrainer, GRPOVariantConfig, {"num_generations": 2, "policy_loss": "dapo"}),
    "critic": (MTPCriticTrainer, MTPCriticConfig, {}),
    "ppo": (PPOTrainer, PPOConfig, {"num_iterations": 1}),
}
Make = Callable[..., Any]


@pytest.fixture
def make(tiny_model: Callable[..., Any], tokenizer: Any, dataset: Dataset, reward: Any, tmp_path: Path) -> Make:
    """Makes a trainer with a KL to the reference; keywords go to the config."""

    def factory(kind: str, model: Any = None, peft_config: Any = None, **options: Any) -> Any:
        trainer, config, own = TRAINERS[kind]
        args = config(
            **{
                "output_dir": str(tmp_path / kind),
                **ON_CPU,
                "per_device_train_batch_size": 8,
                "max_completion_length": 6,
                "max_steps": 2,
                "logging_steps": 1,
                "learning_rate": 1e-2,
                "beta": 0.1,
                **own,
                **options,
            }
        )
        model = tiny_model(initializer_range=0.2) if model is None else model
        return trainer(model, reward, args, dataset, processing_class=tokenizer, peft_config=peft_config)

    return factory


def logged(trainer: Any, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if "loss" in row]


def whole(batch: dict[str, Any]) -> dict[str, Tensor]:
    parts = ("prompt", "completion")
    ids, mask = (torch.cat([batch[f"{part}_{what}"] for part in parts], 1) for what in ("ids", "mask"))
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.slow
@pytest.mark.parametrize("soft", SOFT)
def test_soft_prompts_train_as_stock_does(make: Make, soft: str) -> None:
    trainers = {}
    for kind in ("stock", "variant"):
        # Named, as stock needs it; the reference is the model without its soft prompt.
        trainers[kind] = make(kind, peft_config=SOFT[soft]())
        trainers[kind].train()
    for name in ("loss", "grad_norm", "kl"):
        theirs = logged(trainers["stock"], name)
        assert logged(trainers["variant"], name) == pytest.approx(theirs, rel=1e-4, abs=1e-6) and any(theirs)


@pytest.mark.slow
@pytest.mark.parametrize("soft", SOFT)
def test_values_with_a_soft_prompt(make: Make, soft: str) -> None:
    if soft == "prefix" and cache_name() == "cache":
        pytest.skip("PEFT's prefix does not reach generate of transformers 5.24")
    still = {"learning_rate": 0.0, "max_steps": 1}
    critic = make("critic", peft_config=SOFT[soft](), head_learning_rate=0.0, **still)
    with torch.no_grad():
        for p in critic.mtp_heads.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * 0.3)
    critic.train()
    batch = critic.last_rollout
    record, num_tokens = ValueRecord(critic.mtp_heads), batch["completion_ids"].shape[1]
    with critic.mtp_heads.watching(WholeRows(record, num_tokens)), torch.no_grad():
        critic.model(**whole(batch), use_cache=False)
    values, mask = record.finish(num_tokens)[0], batch["completion_mask"].bool()
    torch.testing.assert_close(batch["old_values"][mask], values[mask], atol=1e-5, rtol=1e-5)
    assert values[mask].std() > 0.1

    ppo = make("ppo", peft_config=SOFT[soft](), value_learning_rate=0.0, **still)
    with torch.no_grad():
        ppo.value_model.head.weight.normal_(generator=torch.Generator().manual_seed(0))
    ppo.train()
    batch = ppo.last_rollout
    with torch.no_grad():  # the value model reads the tokens, and no soft prompt
        plain = completion_states(ppo.value_model(**whole(batch)), batch["completion_ids"].shape[1])
    mask = batch["completion_mask"].bool()
    torch.testing.assert_close(batch["old_values"][..., 0][mask], plain[mask], atol=1e-5, rtol=1e-5)
    assert plain[mask].std() > 0.1


@pytest.mark.slow
def test_a_policy_that_has_its_soft_prompt_already(make: Make, tiny_model: Callable[..., Any]) -> None:
    policy = get_peft_model(tiny_model(initializer_range=0.2), SOFT["prompt"]())
    start = {name: p.clone() for name, p in policy.named_parameters()}
    trainer = make("ppo", model=policy)
    trunk = dict(trainer.value_model.trunk.named_parameters())
    assert all(torch.equal(p, start[f"base_model.model.{name}"]) for name, p in trunk.items())
    trainer.train()
    assert all(p.requires_grad for p in trunk.values())
    assert not any(torch.equal(p, start[f"base_model.model.{name}"]) for name, p in trunk.items())


@pytest.mark.parametrize("kind", ["variant", "critic"])
def test_drafting_with_a_soft_prompt_is_refused(make: Make, kind: str) -> None:
    with pytest.raises(ValueError, match="does not know the places that PEFT's soft prompts take"):
        make(kind, peft_config=SOFT["prompt"](), speculative=True)


@pytest.mark.slow
@pytest.mark.parametrize("soft", SOFT)
@pytest.mark.parametrize("kind", ["grpo", "critic", "ppo"])
def test_soft_prompts_in_lightning(
    tiny_model: Callable[..., Any], tokenizer: Any, reward: Any, kind: str, soft: str
) -> None:
    torch.manual_seed(0)
    policy = get_peft_model(tiny_model(initializer_range=0.2), SOFT[soft]())
    module = module_factory(tiny_model, tokenizer, reward)(kind, model=policy, beta=0.1)
    before = {name: p.clone() for name, p in policy.named_parameters() if "prompt_encoder" in name}
    fit(module, PromptDataModule(prompts(), batch_size=4), max_steps=2)
    assert before and not any(torch.equal(p, before[n]) for n, p in policy.named_parameters() if n in before)
    batch = module.last_rollout
    with torch.no_grad():
        logps = module.log_probs(batch)
    assert logps.shape == batch["completion_ids"].shape and batch["ref_per_token_logps"].isfinite().all()
    if kind == "ppo":
        assert batch["old_values"].shape[:2] == batch["completion_ids"].shape


# Policies without a name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["variant", "critic", "ppo"])
def test_a_model_without_a_name_is_its_own_reference(
    make: Make, tiny_model: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    nameless = tiny_model(initializer_range=0.2)
    assert nameless.config._name_or_path == ""
    start = copy.deepcopy(nameless.state_dict())
    nameless.save_pretrained(tmp_path / "named")
    ours = make(kind, model=nameless)
    assert ours.model.config._name_or_path == "" and ours.beta == 0.1
    reference = ours.ref_model.state_dict()
    assert reference.keys() == start.keys() and all(torch.equal(reference[key], start[key]) for key in start)
    ours.train()
    assert all(torch.equal(weight, start[key]) for key, weight in ours.ref_model.state_dict().items())
    named = make(kind, model=AutoModelForCausalLM.from_pretrained(tmp_path / "named"))
    named.train()
    for name in ("loss", "grad_norm", "kl"):
        assert logged(ours, name) == logged(named, name)
    assert logged(ours, "kl")[0] == pytest.approx(0.0, abs=1e-6) and logged(ours, "kl")[1] > 1e-3


def test_a_model_without_a_name_needs_its_tokenizer(
    tiny_model: Callable[..., Any], dataset: Dataset, reward: Any, tmp_path: Path
) -> None:
    for kind, model_class in (("critic", MTPCriticTrainer), ("ppo", PPOTrainer)):
        args = TRAINERS[kind][1](str(tmp_path), use_cpu=True, bf16=False)
        with pytest.raises(ValueError, match="made in memory and has no name to load a tokenizer by"):
            model_class(tiny_model(), reward, args, dataset)
