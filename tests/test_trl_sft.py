"""`MTPSFTTrainer` on a tiny model: equal to the host where it should be, and losses worked out by hand."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, SFTConfig, SFTTrainer

from rl_plugins.nn import MTPHeads, attach_mtp_heads, load_mtp_heads
from rl_plugins.trl import MTPCriticTrainer, MTPSFTConfig, MTPSFTTrainer

from .helpers.tiny import ON_CPU

Make = Callable[..., MTPSFTTrainer]
Model = Callable[..., Any]
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
STILL: dict[str, Any] = {"learning_rate": 0.0, "head_learning_rate": 0.0, "max_steps": 1}
# Plain descent without clipping of the whole gradient: what reaches one weight does not depend on the others.
PLAIN: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1, "head_learning_rate": 0.1, "max_grad_norm": 0.0}


def sums(size: int = 8) -> Dataset:
    """Prompts and completions of different lengths: `9+9=` and `18`, from 7 on."""
    numbers = range(7, 7 + size)
    return Dataset.from_dict(
        {"prompt": [f"{i}+{i}=" for i in numbers], "completion": [str(i * i % 997) for i in numbers]}
    )


def scored(rewards: list[Any]) -> Dataset:
    return sums(len(rewards)).add_column("reward", rewards)


@pytest.fixture
def make(tiny_model: Model, tokenizer: Any, tmp_path: Path) -> Make:
    """Factory: a trainer on a tiny model and eight sums; other keywords go to the config."""

    def factory(
        model: Any = None,
        data: Any = None,
        output_dir: str = "run",
        trainer_class: Any = MTPSFTTrainer,
        config_class: Any = MTPSFTConfig,
        peft_config: Any = None,
        eval_dataset: Any = None,
        compute_metrics: Any = None,
        **options: Any,
    ) -> Any:
        args = config_class(
            **{
                "output_dir": str(tmp_path / output_dir),
                **ON_CPU,
                "per_device_train_batch_size": 8,
                "max_steps": 2,
                "logging_steps": 1,
                "learning_rate": 1e-2,
                **({"num_mtp_heads": 2} if config_class is MTPSFTConfig else {}),
                **options,
            }
        )
        return trainer_class(
            tiny_model() if model is None else model,
            args,
            train_dataset=sums() if data is None else data,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            peft_config=peft_config,
            compute_metrics=compute_metrics,
        )

    return factory


def weights(trainer: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def trunk(trainer: Any) -> dict[str, Tensor]:
    return {name: p for name, p in weights(trainer).items() if "mtp_heads" not in name}


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def with_random_heads(model: Any, num_heads: int = 2) -> Any:
    heads = attach_mtp_heads(model, num_heads)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in heads.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def whole_batch(trainer: MTPSFTTrainer) -> dict[str, Any]:
    """Every example of the training set in one batch."""
    return trainer.data_collator(list(trainer.train_dataset))


def states(model: Any, batch: dict[str, Any]) -> Tensor:
    return model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state


def slow_token_loss(logits: Tensor, labels: Tensor, ahead: int) -> Tensor:
    """Summed cross-entropy, one position after the other, from all the logits."""
    total = torch.zeros(())
    for row in range(labels.shape[0]):
        for position in range(labels.shape[1] - ahead):
            label = labels[row, position + ahead]
            if label != -100:
                total = total - logits[row, position].log_softmax(-1)[label]
    return total


# Off is the host


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"mtp_loss_coef": 0.0}, {"mtp_loss_coef": 0.0, "gradient_accumulation_steps": 2}, {"max_grad_norm": 0.0}],
    ids=["off", "accumulated", "detached"],
)
def test_the_trunk_learns_as_in_stock_sft(make: Make, options: dict[str, Any]) -> None:
    options = {"max_steps": 3, "per_device_train_batch_size": 4, **options}
    ours = make(**options)
    ours.train()
    stock_options = {name: value for name, value in options.items() if name != "mtp_loss_coef"}
    stock = make(trainer_class=SFTTrainer, config_class=SFTConfig, output_dir="stock", **stock_options)
    stock.train()
    same = ["entropy", "mean_token_accuracy", "num_tokens"]
    if "mtp_loss_coef" in options:
        same += ["loss", "grad_norm"]
    for name in same:
        assert len(logged(ours, name)) == 3 and logged(ours, name) == logged(stock, name), name
    assert list(trunk(ours)) == list(weights(stock))
    assert not changed(weights(stock), trunk(ours))
    fresh = weights(make())
    moved = {name for name in changed(fresh, weights(ours)) if "mtp_heads" in name}
    assert bool(moved) == ("mtp_loss_coef" not in options)


# The loss, by hand


@pytest.mark.slow
@pytest.mark.parametrize("completion_only", [True, False])
@pytest.mark.parametrize("detach", [True, False])
def test_token_losses_equal_those_from_full_logits(
    make: Make, tiny_model: Model, completion_only: bool, detach: bool
) -> None:
    options = {"completion_only_loss": completion_only, "mtp_detach_trunk": detach, "num_mtp_heads": 3}
    trainer = make(model=with_random_heads(tiny_model(), 3), mtp_loss_coef=0.3, **options, **STILL)
    model, batch = trainer.model, whole_batch(trainer)
    labels = batch["labels"]
    counts = (labels != -100).sum(1)
    assert len(set(counts.tolist())) > 1 and (labels[:, 0] == -100).all() == completion_only
    trainer.compute_loss(model, dict(batch)).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    hidden = states(model, batch)
    num_items = (labels[:, 1:] != -100).sum()
    token = slow_token_loss(model.lm_head(hidden), labels, 1) / num_items
    source = hidden.detach() if detach else hidden
    table = model.lm_head.weight.detach()
    per_head = [slow_token_loss(head(source) @ table.T, labels, k + 2) for k, head in enumerate(model.mtp_heads)]
    expected = token + 0.3 * torch.stack(per_head).sum() / (3 * num_items)
    expected.backward()
    for name, p in model.named_parameters():
        naive = torch.zeros_like(p) if p.grad is None else p.grad  # the values have no loss here
        torch.testing.assert_close(grads[name], naive, atol=1e-5, rtol=1e-4, msg=name)
    model.zero_grad()
    trainer.train()
    assert logged(trainer, "loss") == [pytest.approx(expected.item(), abs=1e-5)]
    for k, loss in enumerate(per_head):
        number = (labels[:, k + 2 :] != -100).sum()
        name = f"mtp/token_loss/head_{k + 1}"
        assert logged(trainer, name) == [pytest.approx((loss / number).item(), rel=1e-5)]


def slow_values(trainer: MTPSFTTrainer, batch: dict[str, Any], rewards: list[Any], lam: float, gamma: float) -> Any:
    """Summed squared errors and the returns of head 1, looping over rows, tokens and heads."""
    model, heads = trainer.model, trainer.mtp_heads
    assert heads is not None
    values = heads(states(model, batch)).detach()  # at the start the target heads are the same
    total, returns = 0.0, []
    for row, reward in enumerate(rewards):
        if reward is None or not math.isfinite(reward):
            continue
        places = [p - 1 for p in range(1, batch["labels"].shape[1]) if batch["labels"][row, p] != -100]
        goals = [0.0] * len(places)
        for t in reversed(range(len(places))):
            if t == len(places) - 1:
                goals[t] = reward
            else:
                bootstrap = values[row, places[t + 1], 0].item()
                goals[t] = gamma * ((1 - lam) * bootstrap + lam * goals[t + 1])
        for t, place in enumerate(places):
            for k in range(heads.config.num_heads):
                if t + k < len(places):
                    total += (values[row, place, k].item() - goals[t + k]) ** 2
        returns += goals
    return total, returns


@pytest.mark.slow
@pytest.mark.parametrize(("estimator", "lam"), [("mc", 1.0), ("td", 0.0), ("gae", 0.5)])
@pytest.mark.parametrize("completion_only", [True, False])
def test_value_loss_equals_a_hand_computation(
    make: Make, tiny_model: Model, estimator: str, lam: float, completion_only: bool
) -> None:
    rewards = [1.0, math.nan, -0.5, math.inf, None, -math.inf, 0.25, 2.0]
    options: dict[str, Any] = {"advantage_estimator": estimator, "lam_value": 0.5, "gamma": 0.9}
    options |= {"completion_only_loss": completion_only, "mtp_loss_coef": 0.0, **STILL}
    losses = []
    for coef in (0.0, 0.7):
        trainer = make(with_random_heads(tiny_model()), scored(rewards), value_loss_coef=coef, **options)
        trainer.train()
        losses += logged(trainer, "loss")
    batch = whole_batch(trainer)
    total, _ = slow_values(trainer, batch, [None if r is None else float(r) for r in batch["reward"]], lam, 0.9)
    num_items = (batch["labels"][:, 1:] != -100).sum().item()
    assert losses[1] - losses[0] == pytest.approx(0.7 * total / (2 * num_items), abs=1e-5)
    assert batch["reward"].isfinite().sum() == 4 and total > 0.1
    _, observed = slow_values(trainer, batch, batch["reward"].tolist(), 1.0, 0.9)
    assert logged(trainer, "critic/return_mean") == [pytest.approx(sum(observed) / len(observed), abs=1e-5)]
    assert all(p.isfinite().all() for p in trainer.model.parameters())


@pytest.mark.slow
def test_examples_without_a_usable_reward_teach_tokens_only(make: Make) -> None:
    trainer = make(data=scored([math.nan] * 8), max_steps=2)
    before = weights(trainer)
    trainer.train()
    moved = changed(before, weights(trainer))
    assert all(map(math.isfinite, logged(trainer, "loss")))
    assert "model.embed_tokens.weight" in moved and not any(".value." in name for name in moved)


# Learning


@pytest.mark.slow
def test_heads_learn_what_comes_next(make: Make) -> None:
    data = Dataset.from_dict({"input_ids": [[2 + (start + i) % 10 for i in range(15)] for start in range(8)]})
    trainer = make(data=data, max_steps=40, head_learning_rate=1e-2)
    trainer.train()
    for k in (1, 2):
        losses = logged(trainer, f"mtp/token_loss/head_{k}")
        assert losses[0] > 2.0 and losses[-1] < 0.1, k
        assert sorted(losses[::8], reverse=True) == losses[::8]


@pytest.mark.slow
def test_value_heads_reach_a_constant_reward(make: Make) -> None:
    trainer = make(data=scored([0.7] * 8), max_steps=80, head_learning_rate=2e-2, value_loss_coef=1.0)
    trainer.train()
    assert logged(trainer, "critic/value_mean")[-1] == pytest.approx(0.7, abs=0.05)
    assert logged(trainer, "critic/value_loss/head_2")[-1] < 0.01
    # The returns do not vary, so there is no variance to explain.
    assert not logged(trainer, "critic/explained_variance")


@pytest.mark.slow
@pytest.mark.parametrize("freeze_trunk", [False, True])
def test_value_heads_explain_a_reward_that_can_be_seen(make: Make, freeze_trunk: bool) -> None:
    signs = [i % 2 for i in range(8)]
    data = Dataset.from_dict(
        {
            "prompt": [f"{'+-'[s]}{i}=" for i, s in enumerate(signs)],
            "completion": [f"{i}{i}" for i in range(8)],
            "reward": [float(s) for s in signs],
        }
    )
    trainer = make(
        data=data,
        freeze_trunk=freeze_trunk,
        mtp_loss_coef=0.0 if freeze_trunk else 0.3,
        max_steps=120,
        head_learning_rate=2e-2,
        value_loss_coef=1.0,
    )
    before = trunk(trainer)
    trainer.train()
    for name in ("critic/explained_variance", "critic/explained_variance/head_2"):
        assert logged(trainer, name)[0] == pytest.approx(0.0, abs=1e-5) and logged(trainer, name)[-1] > 0.9, name
    assert bool(changed(before, trunk(trainer))) != freeze_trunk


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_trunk_stays_bit_identical_while_the_heads_move(make: Make, checkpointing: bool) -> None:
    trainer = make(freeze_trunk=True, gradient_checkpointing=checkpointing, weight_decay=0.1, max_steps=3)
    before = weights(trainer)
    trainer.train()
    moved = changed(before, weights(trainer))
    assert moved and all("mtp_heads" in name for name in moved)
    assert all(p.grad is None or "mtp_heads" in name for name, p in trainer.model.named_parameters())
    # The next trainer that gets this model may train all of it.
    assert all(p.requires_grad for p in trainer.model.parameters())


@pytest.mark.slow
def test_a_frozen_trunk_leaves_adapters_alone_too(make: Make) -> None:
    trainer = make(freeze_trunk=True, peft_config=LORA)
    trainable = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    before = weights(trainer)
    trainer.train()
    assert all("mtp_heads" in name for name in changed(before, weights(trainer)))
    assert trainable == {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert any("lora_" in name for name in trainable)


def test_a_frozen_trunk_needs_something_to_train(make: Make) -> None:
    with pytest.raises(ValueError, match="leaves nothing to train. Set mtp_loss_coef > 0, or add rewards"):
        make(freeze_trunk=True, mtp_loss_coef=0.0)


@pytest.mark.parametrize("rewards", [None, [math.nan] * 8])
@pytest.mark.parametrize("mtp_loss_coef", [0.0, 0.3])
def test_every_parameter_of_the_heads_is_in_the_graph(
    make: Make, rewards: list[float] | None, mtp_loss_coef: float
) -> None:
    trainer = make(data=None if rewards is None else scored(rewards), mtp_loss_coef=mtp_loss_coef)
    trainer.compute_loss(trainer.model, whole_batch(trainer)).backward()
    assert trainer.mtp_heads is not None
    # What has a gradient where there is no token loss: the whole path of the values.
    assert all(p.grad is not None for p in trainer.mtp_heads.parameters())


@pytest.mark.slow
def test_metrics(make: Make) -> None:
    trainer = make(data=scored([0.0, 1.0] * 4), max_steps=3)
    trainer.train()
    for name in (
        "mtp/token_loss",
        "mtp/token_loss/head_2",
        "critic/explained_variance",
        "critic/explained_variance/head_1",
        "critic/value_loss/head_1",
        "critic/value_mean",
        "critic/return_mean",
        "critic/td_error_abs",
        "critic/target_gap",
        "critic/grad_norm",
        "entropy",
    ):
        assert len(logged(trainer, name)) == 3 and all(map(math.isfinite, logged(trainer, name))), name
    assert logged(trainer, "critic/value_mean")[0] == 0.0
    trainer = make(max_steps=1)
    trainer.train()
    assert logged(trainer, "mtp/token_loss/head_1") and not logged(trainer, "critic/value_mean")


# Rows with several documents


@pytest.mark.parametrize(
    "options", [{"packing": True}, {"eval_packing": True}, {"padding_free": True, "max_length": None}]
)
def test_scored_examples_cannot_share_a_row(make: Make, options: dict[str, Any]) -> None:
    data = scored([1.0] * 8)
    with pytest.raises(ValueError, match="`reward` column, but packing and padding_free put several examples"):
        make(data=data, eval_dataset=data, **options)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"packing": True, "max_length": 24}, {"padding_free": True, "max_length": None}])
def test_labels_do_not_cross_documents(make: Make, tiny_model: Model, options: dict[str, Any]) -> None:
    def run(**more: Any) -> MTPSFTTrainer:
        trainer = make(model=with_random_heads(tiny_model(), 3), num_mtp_heads=3, **more, **STILL)
        trainer.train()
        return trainer

    apart, together = run(completion_only_loss=False), run(completion_only_loss=False, **options)
    batch = whole_batch(together)
    assert batch["input_ids"].shape[0] == 1 and (batch["position_ids"] == 0).sum() == 8
    for name in ("loss", "mtp/token_loss/head_1", "mtp/token_loss/head_2", "mtp/token_loss/head_3"):
        assert logged(together, name) == pytest.approx(logged(apart, name), abs=1e-5), name
    # The test can fail: without positions the heads' labels do cross.
    crossing = {**batch, "position_ids": torch.arange(batch["labels"].shape[1])[None]}
    assert together.compute_loss(together.model, crossing).item() > logged(together, "loss")[0] + 1e-3


@pytest.mark.slow
def test_wrapped_packing_trains(make: Make) -> None:
    trainer = make(packing=True, packing_strategy="wrapped", max_length=16, per_device_train_batch_size=2)
    trainer.train()
    assert all(map(math.isfinite, logged(trainer, "mtp/token_loss/head_2")))


# Batches, evaluation, streams


@pytest.mark.slow
@pytest.mark.parametrize("rewards", [None, [0.0, 1.0, 0.5, math.nan, 1.0, 0.0, 2.0, -1.0]])
def test_accumulation_changes_nothing(make: Make, rewards: list[float] | None) -> None:
    def run(size: int, accumulation: int) -> tuple[list[float], dict[str, Tensor]]:
        trainer = make(
            data=None if rewards is None else scored(rewards),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=3,
            value_grad_clip=0.5,
            mtp_detach_trunk=False,
            **PLAIN,
        )
        before = weights(trainer)
        trainer.train()
        assert max((p - before[name]).abs().max().item() for name, p in weights(trainer).items()) > 1e-3
        return logged(trainer, "loss"), weights(trainer)

    losses, whole = run(8, 1)
    for size, accumulation in ((1, 8), (4, 2)):
        split_losses, split = run(size, accumulation)
        assert split_losses == pytest.approx(losses, abs=1e-5)
        for name in whole:
            torch.testing.assert_close(split[name], whole[name], atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("completion_only", [True, False])
def test_evaluation_is_the_same_loss(make: Make, tiny_model: Model, completion_only: bool) -> None:
    data = scored([0.0, 1.0] * 4)
    options = {"completion_only_loss": completion_only, "per_device_eval_batch_size": 8, **STILL}
    trainer = make(model=with_random_heads(tiny_model()), data=data, eval_dataset=data, **options)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(logged(trainer, "loss")[0], abs=1e-5)
    for name in ("mtp/token_loss/head_1", "critic/value_loss/head_2", "critic/explained_variance"):
        assert logged(trainer, f"eval_{name}") == [pytest.approx(logged(trainer, name)[0], abs=1e-5)]
    trainer.evaluate(sums())  # not scored
    assert len(logged(trainer, "eval_mtp/token_loss/head_1")) == 2
    assert len(logged(trainer, "eval_critic/value_loss/head_2")) == 1


def test_outputs_go_with_the_loss(make: Make, tiny_model: Model) -> None:
    seen: list[Any] = []
    data = scored([0.0, 1.0] * 4)
    trainer = make(
        model=with_random_heads(tiny_model()),
        data=data,
        eval_dataset=data,
        compute_metrics=lambda prediction: seen.append(prediction) or {"seen": 1.0},
        per_device_eval_batch_size=8,
    )
    batch = whole_batch(trainer)
    trainer.model.eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)
        loss, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
        assert torch.equal(loss, trainer.compute_loss(trainer.model, dict(batch)))
        torch.testing.assert_close(outputs.logits, trainer.model.lm_head(states(trainer.model, batch)))
        metrics = trainer.evaluate()
    assert metrics["eval_seen"] == 1.0 and metrics["eval_loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert seen[0].predictions.shape == (*batch["labels"].shape, 16)


@pytest.mark.slow
def test_rewards_of_a_stream_are_seen(make: Make) -> None:
    stream = scored([0.0, 1.0] * 4).to_iterable_dataset()
    from_stream, from_table = make(data=stream.map(lambda row: row)), make(data=scored([0.0, 1.0] * 4))
    assert from_stream.train_dataset.column_names is None
    for trainer in (from_stream, from_table):
        trainer.train()
        assert len(logged(trainer, "critic/value_loss")) == 2
    with pytest.raises(ValueError, match="put several examples"):
        make(data=stream.map(lambda row: row), packing=True)


# Adapters, files, the next trainer


@pytest.mark.slow
def test_lora_trains_adapters_and_heads_and_saves_both(make: Make, tiny_model: Model, tmp_path: Path) -> None:
    trainer = make(data=scored([0.0, 1.0] * 4), peft_config=LORA, max_steps=4, head_learning_rate=1e-2)
    before = weights(trainer)
    trainer.train()
    moved = changed(before, weights(trainer))
    assert moved == {name for name in before if "lora_" in name or "mtp_heads" in name} and len(moved) == 8 + 12
    trainer.save_model(str(tmp_path / "saved"))
    assert not any("mtp_heads" in key for key in load_file(tmp_path / "saved" / "adapter_model.safetensors"))
    reloaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "saved")
    load_mtp_heads(reloaded, tmp_path / "saved")
    assert not changed(dict(reloaded.named_parameters()), weights(trainer))


@pytest.fixture
def critic(critic_args: Any, reward: Any, dataset: Dataset, tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    """Factory: the next trainer, on a given model."""

    def factory(model: Any, **options: Any) -> MTPCriticTrainer:
        args = critic_args(tmp_path / "critic", **options)
        return MTPCriticTrainer(model, reward, args, train_dataset=dataset, processing_class=tokenizer)

    return factory


@pytest.mark.slow
def test_the_critic_starts_from_the_saved_heads(make: Make, critic: Callable[..., Any], tmp_path: Path) -> None:
    trainer = make(data=scored([0.0, 1.0] * 4), head_learning_rate=1e-2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    following = critic(str(tmp_path / "saved"))
    assert not changed(weights(trainer), weights(following))
    target = dict(following.polyak_target.heads.named_parameters())
    assert all(torch.equal(p, weights(trainer)[f"mtp_heads.{name}"]) for name, p in target.items())
    following.train()
    assert logged(following, "critic/value_mean")[0] != 0.0
    with pytest.raises(ValueError, match="Ask for 2"):
        critic(str(tmp_path / "saved"), num_mtp_heads=3)


@pytest.mark.slow
@pytest.mark.parametrize("freeze_trunk", [False, True])
def test_the_critic_starts_from_the_same_model(make: Make, critic: Callable[..., Any], freeze_trunk: bool) -> None:
    trainer = make(data=scored([0.0, 1.0] * 4), freeze_trunk=freeze_trunk, head_learning_rate=1e-2)
    trainer.train()
    with pytest.raises(ValueError, match=r"comes with 2 MTP heads, but 3 are asked for. Set num_mtp_heads=2"):
        critic(trainer.model, num_mtp_heads=3)
    heads, before = MTPHeads.of(trainer.model), weights(trainer)
    following = critic(trainer.model, max_steps=3)
    assert isinstance(heads, MTPHeads) and following.mtp_heads is heads
    assert not changed(before, weights(following))
    following.train()
    assert changed(before, weights(following)) == set(before)
    assert logged(following, "critic/value_mean")[0] != 0.0


@pytest.mark.slow
def test_resuming_is_as_if_nothing_had_happened(make: Make, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "data": scored([0.0, 1.0] * 4),
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "advantage_estimator": "td",  # so that the targets matter
        "target_tau": 0.3,
        "head_learning_rate": 1e-2,
    }
    through = make(output_dir="through", **options)
    through.train()
    resumed = make(output_dir="resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "through" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    for name in ("loss", "critic/value_loss", "mtp/token_loss"):
        assert logged(resumed, name) == logged(through, name), name
    assert not changed(weights(through), weights(resumed))
    targets = dict(through.polyak_target.heads.named_parameters())
    assert not changed(targets, dict(resumed.polyak_target.heads.named_parameters()))


def test_wrong_arguments(make: Make, tiny_model: Model, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="args must be of type MTPSFTConfig, got GRPOConfig"):
        MTPSFTTrainer(tiny_model(), GRPOConfig(str(tmp_path), use_cpu=True, bf16=False))  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="No mtp_heads.safetensors in .*nowhere"):
        make(mtp_heads_path=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="num_mtp_heads must be at least 1"):
        make(num_mtp_heads=0)
