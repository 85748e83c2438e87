"""Native MTP layers trained by both hosts: losses by hand, what learns, resume, and drafting by stock transformers."""

import os
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, distributed
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from rl_plugins.lightning import MTPSFTModule, PromptDataModule
from rl_plugins.nn import MTPHeads, NativeMTP, attach_mtp_heads, attach_native_mtp
from rl_plugins.trl import MTPSFTConfig, MTPSFTTrainer

from .helpers.lightning_runs import Numbers, assert_equal_states, every_step, fit, state_of
from .helpers.moe_models import make_moe_model
from .helpers.native_mtp import FAMILIES, doubled, slow_losses
from .helpers.tiny import CHARACTERS, ON_CPU

COEF, K = 0.3, 2
VOCABULARY = 2 + len(CHARACTERS)
DIGITS = "0123456789"
# Plain descent without clipping of the whole gradient: what reaches one weight does not depend on the others.
PLAIN: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1, "head_learning_rate": 0.1, "max_grad_norm": 0.0}
LORA = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")


def sums(size: int = 8) -> list[dict[str, str]]:
    """Prompts and completions of different lengths."""
    return [{"prompt": f"{i}+{i}=", "completion": str(i * i % 997)} for i in range(7, 7 + size)]


def runs_of_digits() -> list[dict[str, str]]:
    """Digits in steps that the first two tell, so that all that follows can be foreseen."""
    return [
        {"text": "".join(DIGITS[(start + i * step) % 10] for i in range(24))}
        for start in range(10)
        for step in (1, 2, 3, 7)
    ]


def make_model(family: str = "glm4_moe", **options: Any) -> Any:
    return make_moe_model(family, vocab_size=VOCABULARY, num_hidden_layers=2, **options)


@pytest.fixture
def make(tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    """Factory: a trainer; other keywords go to the config."""

    def factory(
        model: Any = None,
        data: Any = None,
        output_dir: str = "run",
        trainer_class: Any = MTPSFTTrainer,
        config_class: Any = MTPSFTConfig,
        **options: Any,
    ) -> Any:
        native = {"native_mtp": True, "num_mtp_heads": K} if config_class is MTPSFTConfig else {}
        args = config_class(
            **{
                "output_dir": str(tmp_path / output_dir),
                **ON_CPU,
                "per_device_train_batch_size": 8,
                "max_steps": 2,
                "logging_steps": 1,
                "learning_rate": 1e-2,
                "router_aux_loss_coef": 0.0,
                **native,
                **options,
            }
        )
        return trainer_class(
            make_model() if model is None else model,
            args,
            train_dataset=Dataset.from_list(sums() if data is None else data),
            processing_class=tokenizer,
        )

    return factory


@pytest.fixture
def make_module(tokenizer: Any) -> Callable[..., MTPSFTModule]:
    """Factory: a Lightning module; keywords are its options."""

    def factory(model: Any = None, **options: Any) -> MTPSFTModule:
        options = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "num_mtp_heads": K, **options}
        return MTPSFTModule(make_model() if model is None else model, tokenizer, native_mtp=True, **options)

    return factory


def layers_of(model: Any) -> dict[str, Tensor]:
    native = NativeMTP.of(model)
    assert native is not None
    return {name: p.detach().clone() for name, p in native.named_parameters()}


def trunk_of(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "native_mtp" not in name}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def logged(trainer: Any, name: str) -> list[float]:
    return [float(entry[name]) for entry in trainer.state.log_history if name in entry]


def by_hand(model: Any, batch: dict[str, Tensor]) -> tuple[float, list[float]]:
    """Loss of SFT, and the mean loss of every depth over its labels, row after row without padding."""
    native = NativeMTP.of(model)
    assert native is not None
    lengths = batch["attention_mask"].sum(1).tolist()
    own, items, depths, counts = 0.0, 0, torch.zeros(native.num_layers), torch.zeros(native.num_layers)
    with torch.no_grad():
        for ids, labels, length in zip(batch["input_ids"], batch["labels"], lengths, strict=True):
            ids, labels = ids[None, :length], labels[None, :length]
            logits = model(input_ids=ids).logits
            own += float(F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum"))
            items += int((labels[:, 1:] != -100).sum())
            depths += torch.tensor(slow_losses(model, native, ids, labels))
            counts += torch.tensor(
                [float((labels[:, 1 + k :] != -100).sum()) for k in range(1, native.num_layers + 1)]
            )
    loss = (own + COEF * float(depths.mean())) / items
    return loss, (depths / counts).tolist()


# Losses


@pytest.mark.parametrize("family", FAMILIES)
def test_trl_loss_by_hand(make: Callable[..., Any], family: str) -> None:
    trainer = make(doubled(make_model(family)), mtp_loss_coef=COEF)
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert not batch["attention_mask"].all()
    expected, depths = by_hand(trainer.model, batch)
    loss = trainer.compute_loss(trainer.model, dict(batch))
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    metrics = trainer._metrics["eval"]
    assert [metrics[f"mtp/token_loss/head_{k}"][0] for k in (1, 2)] == pytest.approx(depths, rel=1e-6)
    assert trainer.mtp_heads is None and MTPHeads.of(trainer.model) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_lightning_loss_by_hand(make_module: Callable[..., MTPSFTModule], family: str) -> None:
    module = make_module(doubled(make_model(family)), mtp_loss_coef=COEF)
    batch = module.tensors(sums())
    expected, depths = by_hand(module.model, batch)
    loss, metrics = module.loss(batch)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert [float(metrics[f"mtp/token_loss/head_{k}"]) for k in (1, 2)] == pytest.approx(depths, rel=1e-6)


def test_packed_rows_are_those_alone(make: Callable[..., Any]) -> None:
    """One row of several documents, which TRL tells apart by their positions."""
    losses = []
    for padding_free in (False, True):
        trainer = make(doubled(make_model()), padding_free=padding_free, max_length=None)
        batch = trainer.data_collator(list(trainer.train_dataset))
        assert ("attention_mask" not in batch and len(batch["input_ids"]) == 1) == padding_free
        trainer.compute_loss(trainer.model, dict(batch))
        losses.append([trainer._metrics["eval"][f"mtp/token_loss/head_{k}"][0] for k in (1, 2)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


# What learns


@pytest.mark.slow
def test_every_layer_learns_and_the_trunk_as_without_them(make: Callable[..., Any]) -> None:
    trainer, stock = make(**PLAIN), make(
        trainer_class=SFTTrainer,
        config_class=SFTConfig,
        **{name: value for name, value in PLAIN.items() if name != "head_learning_rate"},
    )  # fmt: skip
    before, start = layers_of(trainer.model), trunk_of(trainer.model)
    trainer.train()
    stock.train()
    assert changed(before, layers_of(trainer.model)) == before.keys()
    assert not changed(trunk_of(stock.model), trunk_of(trainer.model))
    assert changed(start, trunk_of(trainer.model))
    assert logged(trainer, "mtp/token_loss")[1] < logged(trainer, "mtp/token_loss")[0]


@pytest.mark.slow
def test_trunk_learns_from_the_layers_where_asked(make: Callable[..., Any]) -> None:
    trainers = [make(**PLAIN, mtp_detach_trunk=detach) for detach in (True, False)]
    for trainer in trainers:
        trainer.train()
    moved = changed(*(trunk_of(trainer.model) for trainer in trainers))
    # The LM head, too, from the second step on: through the states that it reads.
    assert moved >= {name for name in trunk_of(trainers[0].model) if name.startswith("model.")}


@pytest.mark.slow
def test_trl_frozen_trunk_and_learning_rate(make: Callable[..., Any]) -> None:
    frozen = make(**PLAIN, freeze_trunk=True)
    before, layers = trunk_of(frozen.model), layers_of(frozen.model)
    frozen.train()
    assert not changed(before, trunk_of(frozen.model))
    assert changed(layers, layers_of(frozen.model)) == layers.keys()
    assert all(p.requires_grad for p in frozen.model.parameters())
    still = make(**{**PLAIN, "head_learning_rate": 0.0})
    layers = layers_of(still.model)
    still.train()
    assert not changed(layers, layers_of(still.model))


def test_lightning_frozen_trunk_and_learning_rate(make_module: Callable[..., Any]) -> None:
    module = make_module(freeze_trunk=True, head_learning_rate=3e-3)
    before, layers = trunk_of(module.model), layers_of(module.model)
    assert {group["lr"] for group in module.parameter_groups()} == {3e-3}
    numbers = Numbers()
    fit(module, PromptDataModule(sums(), batch_size=8), numbers, max_steps=2)
    assert not changed(before, trunk_of(module.model))
    assert changed(layers, layers_of(module.model)) == layers.keys()
    assert numbers.rows[1]["mtp/token_loss"] < numbers.rows[0]["mtp/token_loss"]


# Settings


@pytest.mark.slow
def test_trl_refuses_what_does_not_fit(make: Callable[..., Any], tiny_model: Any) -> None:
    with pytest.raises(ValueError, match="mtp_loss_coef=0 trains nothing"):
        make(mtp_loss_coef=0.0)
    with pytest.raises(ValueError, match="mtp_heads_path is for parallel heads"):
        make(mtp_heads_path="somewhere")
    with pytest.raises(ValueError, match="`reward` column.*no values"):
        make(data=[{**row, "reward": 1.0} for row in sums()])
    with pytest.raises(ValueError, match="not for qwen3"):
        make(tiny_model())
    model = make_model()
    attach_native_mtp(model, 1)
    with pytest.raises(ValueError, match="comes with 1 native MTP layers, not 2. Ask for 1"):
        make(model)
    with pytest.raises(ValueError, match="merge_and_unload"):
        make(get_peft_model(make_model(), LORA))


def test_lightning_refuses_what_does_not_fit(make_module: Callable[..., Any], tiny_model: Any) -> None:
    with pytest.raises(ValueError, match="mtp_loss_coef=0 trains nothing"):
        make_module(mtp_loss_coef=0.0)
    with pytest.raises(ValueError, match="num_mtp_heads must be at least 1"):
        make_module(num_mtp_heads=0)
    with pytest.raises(ValueError, match="not for qwen3"):
        make_module(tiny_model())
    with pytest.raises(ValueError, match="merge_and_unload"):
        make_module(get_peft_model(make_model(), LORA))
    module = make_module()
    with pytest.raises(ValueError, match="`reward` column.*no values"):
        module.loss(module.tensors([{**row, "reward": 1.0} for row in sums()]))


# Checkpoints


@pytest.mark.slow
def test_trl_resumes_where_it_stopped(make: Callable[..., Any], tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "num_train_epochs": 4}
    options["per_device_train_batch_size"] = 4
    through = make(output_dir="through", **options)
    through.train()
    resumed = make(output_dir="resumed", **options)
    with torch.no_grad():
        for p in resumed.model.parameters():
            p.add_(1.0)
    resumed.train(resume_from_checkpoint=str(tmp_path / "through" / "checkpoint-2"))
    for name in ("loss", "mtp/token_loss"):
        assert logged(resumed, name) == logged(through, name) and len(logged(through, name)) == 4
    assert not changed(layers_of(through.model), layers_of(resumed.model))
    assert not changed(trunk_of(through.model), trunk_of(resumed.model))


@pytest.mark.slow
def test_trl_goes_back_to_the_best_model(make: Callable[..., Any], tmp_path: Path) -> None:
    trainer = make(max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    last = layers_of(trainer.model) | trunk_of(trainer.model)
    trainer.state.best_model_checkpoint = str(tmp_path / "run" / "checkpoint-1")
    trainer._load_best_model()
    assert changed(last, layers_of(trainer.model) | trunk_of(trainer.model))
    trainer.state.best_model_checkpoint = str(tmp_path / "run" / "checkpoint-2")
    trainer._load_best_model()
    assert not changed(last, layers_of(trainer.model) | trunk_of(trainer.model))


@pytest.mark.slow
def test_lightning_resumes_where_it_stopped(make_module: Callable[..., Any], tmp_path: Path) -> None:
    def data() -> PromptDataModule:
        return PromptDataModule(sums(), batch_size=2)

    through = fit(make_module(), data(), every_step(tmp_path), max_steps=4)
    fresh = make_module()
    with torch.no_grad():
        for p in fresh.parameters():
            p.add_(1.0)
    resumed = fit(fresh, data(), every_step(tmp_path / "more"), max_steps=4, ckpt_path=tmp_path / "step=2.ckpt")
    assert_equal_states(state_of(resumed), state_of(through))
    assert any("native_mtp.layers" in name for name in state_of(through))


@pytest.mark.slow
def test_saved_layers_are_trained_on_by_either_host(
    make: Callable[..., Any], make_module: Callable[..., Any], tmp_path: Path
) -> None:
    module = make_module()
    module.save_pretrained(tmp_path / "lightning")
    trainer = make(str(tmp_path / "lightning"), model_init_kwargs={"dtype": "float32"})
    assert not changed(layers_of(module.model), layers_of(trainer.model))
    trainer.train()
    trainer.save_model(str(tmp_path / "trl"))
    again = make_module(str(tmp_path / "trl"))
    assert not changed(layers_of(trainer.model), layers_of(again.model))
    assert not changed(trunk_of(trainer.model), trunk_of(again.model))
    with pytest.raises(ValueError, match="comes with 2 native MTP layers, not 1"):
        make_module(str(tmp_path / "trl"), num_mtp_heads=1)


@pytest.mark.slow
def test_parallel_heads_stay_out_of_it(make: Callable[..., Any], tmp_path: Path) -> None:
    """A model may carry both; the checkpoint then has native layers alone."""
    model = make_model()
    heads = attach_mtp_heads(model, 1)
    before = [p.detach().clone() for p in heads.parameters()]
    trainer = make(model)
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    assert all(torch.equal(a, b) for a, b in zip(before, heads.parameters(), strict=True))
    assert not list((tmp_path / "out").glob("mtp_heads*"))


# Drafting


def generate(folder: Path, tokenizer: Any, **options: Any) -> tuple[list[list[int]], int]:
    """Greedy continuations by stock transformers, and the forwards of the model that they took."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    NativeMTP.expect_keys(model)  # tiny models end at another layer than the released ones
    model.generation_config.eos_token_id = None
    forwards: list[int] = []
    model.model.register_forward_hook(lambda *args: forwards.append(1))
    prompts = [tokenizer(text, return_tensors="pt").input_ids for text in ("012", "369", "741")]
    found = [model.generate(ids, max_new_tokens=18, do_sample=False, **options)[0].tolist() for ids in prompts]
    return found, len(forwards)


def check_drafts(trained: Path, new: Path, tokenizer: Any) -> None:
    """Drafting changes no token, and saves forwards once the layers are trained."""
    plain, forwards = generate(trained, tokenizer)
    drafted, fewer = generate(trained, tokenizer, use_mtp=True)
    assert drafted == plain and forwards == 3 * 18
    model = AutoModelForCausalLM.from_pretrained(trained)
    attach_native_mtp(model)
    model.save_pretrained(new)
    NativeMTP.of(model).save(new)
    same, untrained = generate(new, tokenizer, use_mtp=True)
    assert same == plain
    assert fewer < 0.75 * forwards and fewer < 0.8 * untrained


@pytest.mark.slow
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_generate_drafts_with_layers_trained_in_trl(
    make: Callable[..., Any], tokenizer: Any, tmp_path: Path, family: str, num_layers: int
) -> None:
    trainer = make(
        make_model(family),
        runs_of_digits(),
        max_steps=80,
        head_learning_rate=1e-2,
        num_mtp_heads=num_layers,
        logging_steps=20,
    )
    trainer.train()
    losses = logged(trainer, "mtp/token_loss")
    assert losses[-1] < 0.3 * losses[0]
    trainer.save_model(str(tmp_path / "trained"))
    check_drafts(tmp_path / "trained", tmp_path / "new", tokenizer)


@pytest.mark.slow
def test_stock_generate_drafts_with_layers_trained_in_lightning(
    make_module: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    module = make_module(head_learning_rate=1e-2, num_mtp_heads=1, lr_scheduler_type="linear")
    torch.manual_seed(0)
    fit(module, PromptDataModule(runs_of_digits(), batch_size=8), max_steps=80)
    module.save_pretrained(tmp_path / "trained")
    check_drafts(tmp_path / "trained", tmp_path / "new", tokenizer)


# Two ranks


class Step(torch.nn.Module):
    """What DDP wraps: the loss of a module on a batch, and its metrics."""

    def __init__(self, module: MTPSFTModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, rows: list[dict[str, str]]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.module.loss(self.module.tensors(rows))


def train_step(step: torch.nn.Module, module: MTPSFTModule, rows: list[dict[str, str]]) -> dict[str, Tensor]:
    """Loss, metrics and gradients of one backward pass."""
    loss, metrics = step(rows)
    loss.backward()
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **metrics, **grads}


def on_rank(rank: int, folder: Path, module: MTPSFTModule, rows: list[dict[str, str]]) -> None:
    """One of two gloo ranks, each with half of the rows; leaves what it found in a file."""
    store = distributed.FileStore(str(folder / "store"), 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=30))
    torch.save(train_step(DistributedDataParallel(Step(module)), module, rows[rank::2]), folder / f"{rank}.pt")


@pytest.mark.slow
def test_two_ranks_equal_one_process(make_module: Callable[..., Any], tmp_path: Path) -> None:
    """Under DDP, which waits for every parameter; rank 1 has no label that a depth could learn from."""
    rows = [{"text": text} for text in ("12+34", "1", "9-8=1", "2", "77", "3")]
    children = []
    for rank in (0, 1):
        children.append(os.fork())
        if not children[-1]:
            signal.alarm(60)  # a rank that waits for ever would keep the test from failing
            try:
                on_rank(rank, tmp_path, make_module(), rows)
            finally:
                os._exit(0)
    for child in children:
        os.waitpid(child, 0)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    module = make_module()
    one = train_step(Step(module), module, rows)
    grads = {name for name, _ in module.named_parameters()}
    assert grads <= first.keys() == second.keys() == one.keys()
    torch.testing.assert_close((first.pop("loss") + second.pop("loss")) / 2, one.pop("loss"), rtol=0, atol=1e-6)
    for name, value in one.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-6, msg=name)
