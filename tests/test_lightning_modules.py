"""Lightning's language-model modules on a tiny model: exact resumption, target heads, optimizers, warm-ups, errors."""

import copy
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from datasets import Dataset
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.utils.data import DataLoader

from rl_plugins.lightning import (
    GRPOModule,
    MTPCriticModule,
    MTPSFTModule,
    PolyakCallback,
    PromptDataModule,
)
from rl_plugins.lightning import module as online_module
from rl_plugins.lightning.language import LanguageCallback
from rl_plugins.nn import MTPHeads, attach_mtp_heads
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

from .helpers.lightning_runs import (
    KINDS,
    Numbers,
    assert_equal_states,
    changed,
    every_step,
    fit,
    module_factory,
    prompts,
    state_of,
    weights,
)

pytestmark = pytest.mark.filterwarnings(r"ignore:::lightning\.pytorch.*")
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def dice() -> None:
    torch.manual_seed(0)


@pytest.fixture
def make(tiny_model: Callable[..., Any], tokenizer: Any, reward: Any) -> Make:
    """Factory: a module on a tiny model; keywords go to the module."""
    return module_factory(tiny_model, tokenizer, reward)


def demonstrations(size: int = 8) -> list[dict[str, Any]]:
    rewards = [1.0, 0.0, None, 0.5]
    return [{**row, "completion": row["answer"], "reward": rewards[i % 4]} for i, row in enumerate(prompts(size))]


# Resumption

CYCLE: dict[str, Any] = {"steps_per_generation": 2, "num_iterations": 2}
# Kind of module, its options, the Trainer's, and the steps after which it is killed. 8 prompts in batches of 4: with
# CYCLE each batch makes 4 steps, and the second epoch begins after step 8.
RESUMED: dict[str, tuple[str, dict[str, Any], dict[str, Any], list[int]]] = {
    "critic": ("critic", CYCLE, {"max_steps": 10}, [1, 6, 9]),
    "critic_warmup": (
        "critic",
        {"target_update_every": 3, "num_iterations": 2, "value_warmup_steps": 4, "weight_decay": 0.1},
        {"max_steps": 6},
        [2, 5],
    ),
    "ppo_validated": ("ppo", {**CYCLE, "beta": 0.1}, {"max_steps": 5, "val_check_interval": 1}, [3]),
    "tracker": (
        "grpo",
        {"advantage": "value_tracker", "num_generations": 1, "lr_scheduler_type": "linear", **CYCLE},
        {"max_epochs": 2},
        [5, 10],
    ),
    "accumulated": (
        "grpo",
        {"num_iterations": 4, "beta": 0.1},
        {"max_steps": 4, "accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
        [1],
    ),
    "limited": ("grpo", {}, {"max_epochs": 2, "limit_train_batches": 2}, [1, 2]),
    "sft": ("sft", {"lr_scheduler_type": "cosine"}, {"max_epochs": 2, "gradient_clip_val": 0.5}, [3]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_resumption_is_exact(make: Make, tmp_path: Path, name: str) -> None:
    kind, options, settings, stops = RESUMED[name]
    rows = demonstrations() if kind == "sft" else prompts()
    validated = rows[:4] if "val_check_interval" in settings else None

    def data() -> PromptDataModule:
        return PromptDataModule(rows, validated, batch_size=2 if name == "limited" else 4)

    def trained(numbers: Numbers) -> list[dict[str, float]]:
        window = settings.get("accumulate_grad_batches", 1)  # numbers are those of a whole window
        rows = numbers.rows[window - 1 :: window]
        return [{k: v for k, v in row.items() if not k.startswith("eval_")} for row in rows]

    numbers = Numbers()
    torch.manual_seed(0)
    module = make(kind, **options)
    whole = fit(module, data(), numbers, every_step(tmp_path), **settings)
    expected, tracker = state_of(whole), getattr(module, "value_tracker", None)
    for stop in stops:
        torch.manual_seed(100 + stop)  # whatever the new process has drawn so far
        again, rest = make(kind, **options), Numbers()
        resumed = fit(again, data(), rest, ckpt_path=tmp_path / f"step={stop}.ckpt", **settings)
        assert_equal_states(state_of(resumed), expected)
        found, every = trained(rest), trained(numbers)
        assert 0 < len(found) < len(every)
        assert found == every[-len(found) :], stop
        if tracker is not None:
            assert again.value_tracker.counts == tracker.counts


@pytest.mark.slow
def test_validation_leaves_training_as_it_is(make: Make) -> None:
    """Its rollouts draw tokens, too, but from dice of their own."""
    states = []
    for validated in (None, prompts(4)):
        torch.manual_seed(0)
        module = make("critic")
        trainer = fit(module, PromptDataModule(prompts(), validated, batch_size=2), max_steps=3, val_check_interval=1)
        states.append(state_of(trainer))
        assert ("eval_reward" in trainer.callback_metrics) == (validated is not None)
    assert_equal_states(*states)


@pytest.mark.slow
def test_weights_of_a_checkpoint_in_a_new_run(
    make: Make, tmp_path: Path, tiny_model: Callable[..., Any], tokenizer: Any, reward: Any
) -> None:
    """Only `fit(ckpt_path=...)` goes on where the run was, which takes as many processes."""
    first = make("critic", **CYCLE)
    fit(first, PromptDataModule(prompts(), batch_size=4), every_step(tmp_path), max_steps=3)
    state = torch.load(tmp_path / "step=3.ckpt")
    state["rl_plugins"]["ranks"] *= 2
    torch.save(state, checkpoint := tmp_path / "two_processes.ckpt")
    options = {"max_completion_length": 5, "num_mtp_heads": 2, **CYCLE}
    loaded = MTPCriticModule.load_from_checkpoint(
        checkpoint, model=tiny_model(), tokenizer=tokenizer, reward_funcs=reward, **options
    )
    assert not changed(weights(first), weights(loaded))
    validated = make("critic", **CYCLE)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.validate(validated, PromptDataModule(prompts(), prompts(4)), ckpt_path=checkpoint, verbose=False)
    assert not changed(weights(first), weights(validated))
    assert not changed(weights(first.polyak_target), weights(validated.polyak_target)), "of which it validates, too"
    assert changed(weights(first.polyak_target.heads), weights(first.mtp_heads))
    for module in (loaded, validated):
        assert fit(module, PromptDataModule(prompts(), batch_size=4, seed=5), max_steps=1).global_step == 1


@pytest.mark.slow
def test_a_run_may_go_on_for_longer(make: Make, tmp_path: Path) -> None:
    """`max_steps` may end a run in the middle of a batch of completions; its last checkpoint calls the epoch over."""
    module = make("grpo", **CYCLE)
    checkpoint = ModelCheckpoint(tmp_path)
    fit(module, PromptDataModule(prompts(), batch_size=4), checkpoint, max_steps=3)
    longer = make("grpo", **CYCLE)
    trainer = fit(
        longer, PromptDataModule(prompts(), batch_size=4), ckpt_path=checkpoint.best_model_path, max_steps=12
    )
    assert trainer.global_step == 12


def test_a_run_that_was_interrupted_starts_anew(make: Make) -> None:
    class Interrupted(GRPOModule):
        fails = True

        def on_train_batch_end(self, *args: Any) -> None:
            if self.fails:
                raise RuntimeError("stop")

    module = make("grpo", cls=Interrupted, **CYCLE)
    with pytest.raises(RuntimeError, match="stop"):
        fit(module, PromptDataModule(prompts(), batch_size=4), max_steps=3)
    module.fails = False
    fit(module, PromptDataModule(prompts(), batch_size=4, seed=1), max_steps=3)


# Target heads


class Recorded(Callback):
    """Heads and target heads after every batch, when all callbacks have seen it."""

    def __init__(self) -> None:
        self.heads: list[list[torch.Tensor]] = []
        self.targets: list[list[torch.Tensor]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.heads.append([p.detach().clone() for p in pl_module.mtp_heads.parameters()])
        self.targets.append([p.detach().clone() for p in pl_module.polyak_target.parameters()])

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.on_train_batch_start(trainer, pl_module)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["critic", "sft"])
def test_target_heads_follow_after_optimizer_steps(make: Make, kind: str) -> None:
    module, recorded = make(kind, target_tau=0.25, head_learning_rate=1e-2), Recorded()
    start = [p.detach().clone() for p in module.mtp_heads.parameters()]
    rows = demonstrations(12) if kind == "sft" else prompts(12)
    fit(module, PromptDataModule(rows, batch_size=2), recorded, max_steps=3, accumulate_grad_batches=2)
    assert len(recorded.targets) == 7
    expected = start
    for batches, (heads, targets) in enumerate(zip(recorded.heads, recorded.targets, strict=True)):
        if batches and batches % 2 == 0:  # the second micro-step of a window is over
            expected = [0.25 * new + 0.75 * old for new, old in zip(heads, expected, strict=True)]
        for target, value in zip(targets, expected, strict=True):
            torch.testing.assert_close(target, value, rtol=1e-6, atol=1e-7)
    assert any(not torch.equal(a, b) for a, b in zip(start, expected, strict=True))


@pytest.mark.slow
def test_target_heads_are_copied_every_few_steps(make: Make) -> None:
    module, recorded = make("critic", target_update_every=2, head_learning_rate=1e-2), Recorded()
    start = [p.detach().clone() for p in module.mtp_heads.parameters()]
    fit(module, PromptDataModule(prompts(), batch_size=2), recorded, max_steps=5, accumulate_grad_batches=2)
    assert len(recorded.targets) == 11
    for batches, targets in enumerate(recorded.targets):
        source = recorded.heads[batches // 4 * 4]  # of the newest even step
        assert all(torch.equal(a, b) for a, b in zip(targets, source, strict=True)), batches
    assert not torch.equal(start[0], recorded.targets[-1][0])


@pytest.mark.slow
@pytest.mark.parametrize("head_type", ["parallel", "sequential"])
def test_a_callback_of_ones_own_leaves_the_target_heads_alone(make: Make, head_type: str) -> None:
    """The callback is for other modules: it copies the heads once more, and the critic's own targets go on as ever."""
    states = []
    for callbacks in ([], [own := PolyakCallback(tau=1.0)]):
        torch.manual_seed(0)
        module = make("critic", target_tau=0.1, head_learning_rate=1e-2, mtp_head_type=head_type)
        trainer = fit(module, PromptDataModule(prompts(), batch_size=2), *callbacks, max_steps=2)
        assert module.polyak_target is module.critic.target is not own.target
        states.append(state_of(trainer))
    assert_equal_states(*states)
    for target, head in zip(own.target.parameters(), module.mtp_heads.value_path.parameters(), strict=True):
        torch.testing.assert_close(target, head, rtol=0.0, atol=1e-7)
    assert not torch.equal(next(iter(own.target.parameters())), next(iter(module.polyak_target.parameters())))


@pytest.mark.slow
def test_a_validation_after_training_has_the_targets_of_training(make: Make) -> None:
    module, data = make("critic", head_learning_rate=1e-2), PromptDataModule(prompts(), prompts(4), batch_size=2)
    trainer = fit(module, data, max_steps=2, limit_val_batches=0)
    before = weights(module.polyak_target)
    trainer.limit_val_batches = 1
    (numbers,) = trainer.validate(module, data, verbose=False)
    assert not changed(before, weights(module.polyak_target)) and numbers["eval_critic/target_gap"] > 1e-4
    fit(module, data, max_steps=0)  # a new run begins with copies of the heads as they are
    assert not changed(weights(module.polyak_target.heads), weights(module.mtp_heads))


def test_no_heads_to_follow(make: Make) -> None:
    with pytest.raises(ValueError, match="GRPOModule holds no model with MTP heads for PolyakCallback to follow"):
        fit(make("grpo"), PromptDataModule(prompts(), batch_size=2), PolyakCallback(), max_steps=1)


# What learns, and how fast


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "critic"), [("critic", "mtp_heads"), ("ppo", "value_model")])
def test_warm_up_moves_the_critic_only(make: Make, tmp_path: Path, kind: str, critic: str) -> None:
    options = {"value_warmup_steps": 2, "weight_decay": 0.5, "num_iterations": 1}
    if kind == "critic":
        options["mtp_detach_trunk"] = False  # not even the heads' token loss
    module = make(kind, **options)
    start = weights(module)
    fit(module, PromptDataModule(prompts(12), batch_size=4), every_step(tmp_path), max_steps=3)
    states = [torch.load(tmp_path / f"step={i}.ckpt")["state_dict"] for i in (1, 2, 3)]
    warm = {name for name in start if critic in name.split(".")}
    # The value head's norm stands after weights of zero, so it takes one step more than the rest.
    assert changed(start, {name: states[1][name] for name in start}) == warm
    assert changed(start, {name: states[2][name] for name in start}) == set(start)
    if kind == "critic":
        resumed = make(kind, **options)
        trainer = fit(
            resumed, PromptDataModule(prompts(12), batch_size=4), ckpt_path=tmp_path / "step=1.ckpt", max_steps=3
        )
        assert {group["weight_decay"] for group in trainer.optimizers[0].param_groups} == {0.0, 0.5}
        assert not changed(weights(resumed), {name: states[2][name] for name in start})


@pytest.mark.parametrize("kind", KINDS)
def test_rates_and_decay_are_those_of_trl(make: Make, kind: str, tmp_path: Path, request: Any) -> None:
    rate = {
        "critic": {"head_learning_rate": 0.03, "num_mtp_heads": 2},
        "sft": {"head_learning_rate": 0.03, "num_mtp_heads": 2},
        "ppo": {"value_learning_rate": 0.03},
    }
    options = {"weight_decay": 0.1, "learning_rate": 0.01, **rate.get(kind, {})}
    module = make(kind, **options)
    names = {id(p): name for name, p in module.model.named_parameters()}
    ours = {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in module.parameter_groups()
        for p in group["params"]
    }
    config, trainer_class = {
        "critic": (MTPCriticConfig, MTPCriticTrainer),
        "grpo": (GRPOVariantConfig, GRPOVariantTrainer),
        "ppo": (PPOConfig, PPOTrainer),
        "sft": (MTPSFTConfig, MTPSFTTrainer),
    }[kind]
    args = config(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        **options,
        **({} if kind == "sft" else {"beta": 0.0}),
    )
    tokenizer, dataset = request.getfixturevalue("tokenizer"), Dataset.from_list(demonstrations())
    model = make("grpo").model
    if kind == "sft":
        trainer = trainer_class(model, args, train_dataset=dataset, processing_class=tokenizer)
    else:
        trainer = trainer_class(model, request.getfixturevalue("reward"), args, dataset, processing_class=tokenizer)
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    theirs = {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in trainer.create_optimizer().param_groups
        for p in group["params"]
    }
    assert ours == theirs
    assert set(ours.values()) == {(0.01, 0.1), (0.01, 0.0)} | ({(0.03, 0.1), (0.03, 0.0)} if kind != "grpo" else set())


def test_one_rate_for_everything(make: Make) -> None:
    groups = make("critic", head_learning_rate=None, weight_decay=0.0).parameter_groups()
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-2, 0.0)]


def test_a_frozen_trunk(make: Make) -> None:
    module = make("sft", freeze_trunk=True, weight_decay=0.1)
    before = weights(module)
    trainer = fit(module, PromptDataModule(demonstrations(), batch_size=4), max_steps=3)
    assert changed(before, weights(module)) == {name for name in before if "mtp_heads" in name}
    assert sum(len(group["params"]) for group in trainer.optimizers[0].param_groups) == len(
        list(module.mtp_heads.parameters())
    )


@pytest.mark.slow
def test_schedules(make: Make) -> None:
    rates: list[float] = []

    class Rates(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    module = make("grpo", lr_scheduler_type="linear", warmup_steps=1, learning_rate=0.04)
    fit(module, PromptDataModule(prompts(), batch_size=1), Rates(), max_steps=5, accumulate_grad_batches=2)
    assert rates == pytest.approx([0.0, 0.04, 0.03, 0.02, 0.01])  # per optimizer step
    with pytest.raises(ValueError, match="lr_scheduler_type='linear' needs the number of steps: set max_steps"):
        fit(make("grpo", lr_scheduler_type="linear"), PromptDataModule(prompts(), batch_size=1), max_epochs=-1)


def test_an_optimizer_of_ones_own(make: Make) -> None:
    class Plain(MTPCriticModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameter_groups(), lr=0.1)

    module = make("critic", cls=Plain, learning_rate=0.1, head_learning_rate=0.0)
    before = weights(module)
    fit(module, PromptDataModule(prompts(), batch_size=4), Gradients(), max_steps=1)
    moved = changed(before, weights(module))
    assert moved == {name for name in before if "mtp_heads" not in name}
    for name, p in module.named_parameters():
        rate = 0.0 if "mtp_heads" in name else 0.1
        torch.testing.assert_close(p.detach(), before[name] - rate * Gradients.newest[name], rtol=1e-6, atol=1e-8)


class Gradients(Callback):
    """Of the newest optimizer step."""

    newest: dict[str, torch.Tensor] = {}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        Gradients.newest = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["critic", "ppo", "sft"])
def test_gradient_checkpointing_changes_nothing(make: Make, kind: str) -> None:
    states = []
    rows = demonstrations() if kind == "sft" else prompts()
    for checkpointed in (False, True):
        torch.manual_seed(0)
        module = make(kind, gradient_checkpointing=checkpointed, **({} if kind == "sft" else {"num_iterations": 2}))
        assert module.model.is_gradient_checkpointing == checkpointed
        if kind == "ppo":
            assert module.value_model.trunk.is_gradient_checkpointing == checkpointed
        states.append(state_of(fit(module, PromptDataModule(rows, batch_size=4), max_steps=2)))
    for name, value in states[0].items():
        if name.startswith("weight/"):
            torch.testing.assert_close(states[1][name], value, rtol=1e-6, atol=1e-7)


# Errors


@pytest.mark.slow
def test_other_architectures_and_ranks_are_refused(make: Make, tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    fit(make("critic"), PromptDataModule(prompts(), batch_size=4), every_step(tmp_path), max_steps=1)
    checkpoint = tmp_path / "step=1.ckpt"
    name = r"model\.mtp_heads\.heads\.2\.norm\.weight: None in the checkpoint, \(32,\) here"
    with pytest.raises(
        ValueError, match=rf"another architecture than this MTPCriticModule: 6 parameters differ \({name}"
    ):
        fit(make("critic", num_mtp_heads=3), PromptDataModule(prompts()), ckpt_path=checkpoint, max_steps=2)
    wide = make("critic", tiny_model(intermediate_size=48))
    name = r"model\.model\.layers\.0\.mlp\.gate_proj\.weight: \(64, 32\) in the checkpoint, \(48, 32\) here"
    with pytest.raises(ValueError, match=rf"6 parameters differ \({name}"):
        fit(wide, PromptDataModule(prompts()), ckpt_path=checkpoint, max_steps=2)
    state = torch.load(checkpoint)
    state["rl_plugins"]["ranks"] *= 2
    torch.save(state, tmp_path / "two.ckpt")
    with pytest.raises(ValueError, match="written by 2 processes, and this run has 1. Resume with as many"):
        fit(make("critic"), PromptDataModule(prompts()), ckpt_path=tmp_path / "two.ckpt", max_steps=2)


def test_models_that_cannot_be_trained(
    make: Make, tiny_model: Callable[..., Any], tokenizer: Any, tmp_path: Path, reward: Any
) -> None:
    for kind in KINDS:
        with pytest.raises(ValueError, match="Qwen3Model has no LM head.*Load the model with AutoModelForCausalLM"):
            make(kind, tiny_model().model)
        with pytest.raises(TypeError, match="Expected a transformers PreTrainedModel .* got Linear"):
            make(kind, torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Give a tokenizer: this model was not loaded from a folder or the hub"):
        GRPOModule(tiny_model(), None, reward)
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    GRPOModule(tiny_model(), bare, reward)
    assert bare.pad_token_id == bare.eos_token_id == 1
    bare.pad_token = bare.eos_token = None
    with pytest.raises(ValueError, match="neither a pad token nor an end-of-text token"):
        GRPOModule(tiny_model(), bare, reward)
    with pytest.raises(ValueError, match="comes with 2 MTP heads, but 3 are asked for"):
        make("critic", make("critic").model, num_mtp_heads=3)
    tiny_model(hidden_size=16).save_pretrained(tmp_path / "small")
    attach_mtp_heads(small := tiny_model(hidden_size=16), 2)
    MTPHeads.of(small).save(tmp_path / "small")
    with pytest.raises(ValueError, match="trained for hidden size 16, but this model has 32"):
        make("critic", mtp_heads_path=str(tmp_path / "small"))


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("grpo", {"policy_loss": "nope"}, "Unknown policy_loss 'nope'; choose one of grpo, bnpo"),
    ("grpo", {"policy_loss_kwargs": {"nope": 1}}, "'dapo' has no option 'nope'; it has"),
    ("grpo", {"aggregation": "nope"}, "Unknown aggregation 'nope'"),
    ("grpo", {"advantage": "nope"}, "Unknown advantage 'nope'; choose one of reward, group_normalized"),
    (
        "grpo",
        {"advantage": "pass_at_k", "advantage_kwargs": {"nope": 1}},
        "'pass_at_k' has no option 'nope'; it has k",
    ),
    ("grpo", {"num_generations": 1}, "compares the completions of a prompt, but num_generations is 1"),
    (
        "grpo",
        {"kl_in_reward": True},
        "needs advantage='batch_normalized' or 'reward_to_go' and beta > 0; they are 'group_normalized' and",
    ),
    ("grpo", {"policy_loss": "gvpo", "advantage": "lambda_trace"}, "policy_loss='gvpo' compares whole completions"),
    ("grpo", {"num_generations": 0}, "num_generations must be at least 1, got 0"),
    ("grpo", {"steps_per_generation": 0}, "steps_per_generation must be at least 1"),
    ("grpo", {"num_iterations": 0}, "num_iterations must be at least 1"),
    ("grpo", {"max_completion_length": 0}, "max_completion_length must be at least 1"),
    ("grpo", {"temperature": 0.0}, "temperature must be above 0, got 0.0"),
    ("grpo", {"beta": -0.1}, "beta must be at least 0, got -0.1"),
    ("grpo", {"learning_rate": -1.0}, "learning_rate must be at least 0"),
    ("grpo", {"weight_decay": -1.0}, "weight_decay must be at least 0"),
    ("grpo", {"reward_weights": [1.0, 2.0]}, "reward_weights has 2 numbers for 1 reward functions"),
    ("grpo", {"reward_funcs": None}, "There are no reward functions"),
    ("critic", {"policy_loss": "gvpo"}, "policy_loss='gvpo' compares the completions of a prompt as wholes"),
    ("critic", {"advantage_estimator": "nope"}, "Unknown advantage_estimator 'nope'; choose one of"),
    ("critic", {"advantage_scaling": "nope"}, "Unknown advantage_scaling 'nope'; choose one of"),
    ("critic", {"value_loss_type": "nope"}, "Unknown value_loss_type 'nope'; choose one of squared"),
    ("critic", {"gamma": 1.1}, r"gamma must be in \[0, 1\], got 1.1"),
    ("critic", {"lam_policy": -0.1}, r"lam_policy must be in \[0, 1\]"),
    ("critic", {"lam_value": 2}, r"lam_value must be in \[0, 1\]"),
    ("critic", {"length_adaptive_alpha": 0.0}, "length_adaptive_alpha must be above 0"),
    ("critic", {"reward_range": (1.0, 0.0)}, r"reward_range must be \[smallest, largest\], got \(1.0, 0.0\)"),
    ("critic", {"kl_in_reward": True}, "subtracts beta \\* KL from the rewards, but beta is 0"),
    ("critic", {"value_clip_range": 0.0}, "value_clip_range must be above 0"),
    ("critic", {"value_warmup_steps": -1}, "value_warmup_steps must be at least 0"),
    ("critic", {"value_loss_coef": -1.0}, "value_loss_coef must be at least 0"),
    ("critic", {"mtp_loss_coef": -1.0}, "mtp_loss_coef must be at least 0"),
    ("critic", {"value_grad_clip": -1.0}, "value_grad_clip must be at least 0"),
    ("critic", {"num_mtp_heads": 0}, "num_mtp_heads must be at least 1"),
    ("critic", {"mtp_inner_size": 0}, "mtp_inner_size must be at least 1"),
    ("critic", {"target_tau": 1.5}, r"target_tau must be in \[0, 1\]"),
    ("critic", {"target_update_every": 0}, "target_update_every must be at least 1"),
    ("critic", {"head_learning_rate": -1.0}, "head_learning_rate must be at least 0"),
    ("ppo", {"value_learning_rate": -1.0}, "value_learning_rate must be at least 0"),
    ("sft", {"max_length": 1}, "max_length must be at least 2"),
    ("sft", {"advantage_estimator": "nope"}, "Unknown advantage_estimator 'nope'"),
    ("sft", {"target_tau": -1.0}, r"target_tau must be in \[0, 1\]"),
]


@pytest.mark.parametrize(("kind", "options", "message"), WRONG, ids=lambda x: str(x)[:40])
def test_settings_are_checked_before_work_starts(make: Make, kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(kind, **options)


@pytest.mark.parametrize(
    ("kind", "options", "at_construction", "at_start"),
    [
        ("grpo", {"policy_loss": "dapo"}, 1, 0),
        ("critic", {"policy_loss": "cispo"}, 1, 0),
        ("grpo", {"policy_loss": "dapo", "steps_per_generation": 2}, 0, 1),  # both slices are one optimizer step
        ("grpo", {"policy_loss": "dapo", "steps_per_generation": 2, "num_iterations": 2}, 0, 0),
        ("grpo", {"policy_loss": "vanilla"}, 0, 0),
        ("ppo", {"num_iterations": 1}, 0, 0),  # no loss is named
        ("critic", {}, 0, 0),
    ],
    ids=str,
)
def test_a_loss_that_cannot_act_says_so(
    make: Make, kind: str, options: dict[str, Any], at_construction: int, at_start: int
) -> None:
    def warned(act: Callable[[], Any]) -> int:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            act()
        return sum("compares the policy with the one that sampled" in str(w.message) for w in caught)

    modules: list[Any] = []
    assert warned(lambda: modules.append(make(kind, **options))) == at_construction
    data = PromptDataModule(prompts(), batch_size=4)
    assert warned(lambda: fit(modules[0], data, max_steps=1, accumulate_grad_batches=2)) == at_start


@pytest.mark.slow
def test_batches_that_do_not_fit(make: Make) -> None:
    rows = DataLoader(prompts(), batch_size=4, collate_fn=list)
    with pytest.raises(ValueError, match="= 2 training steps, but the loader went on.*PromptDataModule"):
        fit(make("grpo", num_iterations=2), rows, max_steps=2)
    with pytest.raises(ValueError, match="6 completions .* which steps_per_generation=4 does not divide"):
        fit(make("grpo", steps_per_generation=4), PromptDataModule(prompts(), batch_size=3), max_steps=1)
    gvpo = {"advantage": "group_centered", "policy_loss": "gvpo", "num_generations": 4}
    with pytest.raises(ValueError, match="a slice has 2 completions, which num_generations=4 does not divide"):
        fit(make("grpo", steps_per_generation=2, **gvpo), PromptDataModule(prompts(), batch_size=1), max_steps=1)


def test_reward_functions_that_return_the_wrong_length(make: Make) -> None:
    def short(completions: list[str], **kwargs: Any) -> list[float]:
        return [1.0] * (len(completions) - 1)

    with pytest.raises(ValueError, match="'short' returned 7 rewards for 8 completions"):
        fit(make("grpo", reward_funcs=short), PromptDataModule(prompts(), batch_size=4), max_steps=1)


def test_every_rank_has_dice_of_its_own(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """After `seed_everything` all ranks would draw the same numbers for different prompts."""
    drawn = []
    for number in (0, 1, 2, 1):
        monkeypatch.setattr(online_module, "rank", lambda number=number: number)
        torch.manual_seed(3)
        make("grpo").on_train_start()
        drawn.append(torch.rand(()).item())
    assert len(set(drawn)) == 3 and drawn[1] == drawn[3]
    torch.manual_seed(3)
    make("grpo")
    assert drawn[0] == torch.rand(()).item()


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_fsdp_is_refused_before_anything_is_sharded(
    strategy: type, tiny_model: Callable[..., Any], tokenizer: Any
) -> None:
    class Sharded(MTPSFTModule):
        def configure_model(self) -> None:
            """Shards by itself."""

    module, own = MTPSFTModule(tiny_model(), tokenizer), Sharded(tiny_model(), tokenizer)
    module._trainer = own._trainer = Mock(strategy=strategy())
    with pytest.raises(TypeError, match=f"MTPSFTModule does not run under {strategy.__name__}.*deepspeed_stage_3"):
        LanguageCallback().setup(module.trainer, module, "fit")
    if strategy is ModelParallelStrategy:
        LanguageCallback().setup(own.trainer, own, "fit")
