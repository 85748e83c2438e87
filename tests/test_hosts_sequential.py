"""Sequential heads in both hosts: losses by hand, what learns, adapters, resume, values of rollouts, drafts, experts,
and drafting by stock transformers."""

import copy
import dataclasses
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from rl_plugins.functional import selection_bias_update
from rl_plugins.lightning import GRPOModule, MTPCriticModule, MTPSFTModule, PPOModule, PromptDataModule
from rl_plugins.lightning import MoEBalancingCallback as LightningBalancing
from rl_plugins.moe import find_routers
from rl_plugins.moe.load_log import LOAD_FILE_NAME, ExpertLoadHistory, read_expert_load
from rl_plugins.nn import MTPHeads, SequentialHeads, attach_mtp_heads, expect_mtp_keys, load_mtp_heads
from rl_plugins.nn.attachment import base_model_of
from rl_plugins.nn.released_layers import count_released_layers
from rl_plugins.nn.seeding import draw_beside
from rl_plugins.trl import (
    GRPOVariantConfig,
    GRPOVariantTrainer,
    MoEBalancingCallback,
    MTPCriticConfig,
    MTPCriticTrainer,
    MTPSFTConfig,
    MTPSFTTrainer,
    PPOConfig,
    PPOTrainer,
)

from .helpers.host_pairs import attach_trainer
from .helpers.lightning_runs import Numbers, assert_equal_states, every_step, fit, perturb, prompts, state_of
from .helpers.moe_models import make_moe_model
from .helpers.sequential_heads import RELEASED, doubled, slow_features, slow_losses, trunk_states
from .helpers.speculative_cases import spread
from .helpers.speculative_models import randomise_heads
from .helpers.tiny import CHARACTERS, EOS, ON_CPU, make_dataset, make_tiny_model

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:::lightning\.pytorch.*"),
    pytest.mark.filterwarnings("ignore:You are using 'rollout_func'"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

COEF, K = 0.3, 2
VOCABULARY = 2 + len(CHARACTERS)
DIGITS = "0123456789"
SEQUENTIAL: dict[str, Any] = {"mtp_head_type": "sequential", "num_mtp_heads": K}
# Plain descent without clipping of the whole gradient: what reaches one weight does not depend on the others.
PLAIN: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1, "head_learning_rate": 0.1, "max_grad_norm": 0.0}
LORA = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", lora_dropout=0.0)
HOSTS = ("trl", "lightning")
TRL: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "critic": (MTPCriticTrainer, MTPCriticConfig, {}),
    "grpo": (GRPOVariantTrainer, GRPOVariantConfig, {"num_generations": 4}),
    "ppo": (PPOTrainer, PPOConfig, {"value_learning_rate": 1e-2, "beta": 0.0, "num_iterations": 1}),
}
LIGHTNING: dict[str, tuple[Any, dict[str, Any]]] = {
    "critic": (MTPCriticModule, {}),
    "grpo": (GRPOModule, {"num_generations": 4}),
    "ppo": (PPOModule, {"num_iterations": 1, "value_learning_rate": 1e-2}),
}


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
    """A dense Qwen3, or a tiny model of a family with experts."""
    if family == "qwen3":
        return make_tiny_model(initializer_range=0.2)
    return make_moe_model(family, vocab_size=VOCABULARY, num_hidden_layers=2, **options)


def talkative(seed: int = 0) -> Any:
    """A model whose completions end at different places, with heads of whose drafts some are accepted."""
    model = make_tiny_model(seed, initializer_range=0.3)
    randomise_heads(attach_mtp_heads(model, K, head_type="sequential"), 0.05)
    return model


def assert_recomputed_alike(
    kept: tuple[Tensor, dict[str, Tensor]], recomputed: tuple[Tensor, dict[str, Tensor]]
) -> None:
    """Loss and gradients are those of a run that keeps its activations, and every weight gets one."""
    assert torch.equal(kept[0], recomputed[0])
    for name, gradient in kept[1].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(recomputed[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@pytest.fixture
def make(tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    """Factory: a trainer of supervised fine-tuning; other keywords go to the config."""

    def factory(
        model: Any = None,
        data: Any = None,
        output_dir: str = "run",
        trainer_class: Any = MTPSFTTrainer,
        config_class: Any = MTPSFTConfig,
        **options: Any,
    ) -> Any:
        given = {name: options.pop(name) for name in ("peft_config", "callbacks") if name in options}
        args = config_class(
            **{
                "output_dir": str(tmp_path / output_dir),
                **ON_CPU,
                "per_device_train_batch_size": 8,
                "max_steps": 2,
                "logging_steps": 1,
                "learning_rate": 1e-2,
                "router_aux_loss_coef": 0.0,
                **(SEQUENTIAL if config_class is MTPSFTConfig else {}),
                **options,
            }
        )
        return trainer_class(
            make_model() if model is None else model,
            args,
            train_dataset=Dataset.from_list(sums() if data is None else data),
            processing_class=tokenizer,
            **given,
        )

    return factory


@pytest.fixture
def make_module(tokenizer: Any) -> Callable[..., MTPSFTModule]:
    """Factory: a Lightning module of supervised fine-tuning; keywords are its options."""

    def factory(model: Any = None, **options: Any) -> MTPSFTModule:
        options = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", **SEQUENTIAL, **options}
        return MTPSFTModule(make_model() if model is None else model, tokenizer, **options)

    return factory


@pytest.fixture
def online(tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    """Factory: a trainer or module that learns from its own completions, as a run of its host has it."""

    def factory(host: str, kind: str, model: Any = None, output_dir: str = "run", **options: Any) -> Any:
        model = talkative() if model is None else model
        heads = {} if options.get("speculative") is False and kind != "critic" else SEQUENTIAL
        options = {"max_completion_length": 8, "learning_rate": 1e-3, **heads, **options}
        if host == "lightning":
            cls, own = LIGHTNING[kind]
            module = cls(model, tokenizer, spread, **{"beta": 0.0, "lr_scheduler_type": "constant", **own, **options})
            attach_trainer(module)
            return module
        trainer_class, config_class, own = TRL[kind]
        callbacks = options.pop("callbacks", None)
        args = config_class(
            **{
                "output_dir": str(tmp_path / output_dir),
                **ON_CPU,
                "per_device_train_batch_size": 8,
                "max_steps": 2,
                "logging_steps": 1,
                # TRL takes a sampled padding token for an end.
                "generation_kwargs": {"suppress_tokens": [0]},
                **own,
                **options,
            }
        )
        trainer = trainer_class(model, spread, args, make_dataset(), processing_class=tokenizer, callbacks=callbacks)
        trainer.current_gradient_accumulation_steps = 1
        return trainer

    return factory


def heads_of(model: Any) -> SequentialHeads:
    heads = MTPHeads.of(model)
    assert isinstance(heads, SequentialHeads)
    return heads


def layers_of(model: Any) -> dict[str, Tensor]:
    """What the token loss teaches."""
    return {name: p.detach().clone() for name, p in heads_of(model).layers.named_parameters()}


def trunk_of(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "mtp_heads" not in name}


def weights_of(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def learning(weights: dict[str, Tensor]) -> set[str]:
    """All but the selection biases of experts, which no gradient reaches."""
    return {name for name in weights if not name.endswith("e_score_correction_bias")}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def logged(trainer: Any, name: str) -> list[float]:
    return [float(entry[name]) for entry in trainer.state.log_history if name in entry]


def change_heads(host: Any, **changes: Any) -> None:
    """Have a trainer or module go on with other options of the heads."""
    training = host.critic.training
    training.options = dataclasses.replace(training.options, **changes)


# By hand


@torch.no_grad()
def rows_by_hand(model: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features (B, L, K, D), trunk states (B, L, D) and ranks (B, L) of padded rows, each row alone and every feature
    from a prefix that ends there, so that none can have seen what follows."""
    model, heads = base_model_of(model), heads_of(model)
    features = torch.zeros(*ids.shape, heads.config.num_heads, heads.config.hidden_size, dtype=model.dtype)
    states = features[:, :, 0].clone()
    ranks = torch.full(ids.shape, -1)
    for i, real in enumerate(mask.bool()):
        row = ids[i, real][None]
        features[i, real] = slow_features(model, heads, row)[0]
        states[i, real] = trunk_states(model, row)[0]
        ranks[i, real] = torch.arange(row.shape[1])
    return features, states, ranks


def losses_by_hand(
    lm_head: Any, features: Tensor, states: Tensor, labels: Tensor, share: float, loss_type: str
) -> tuple[list[float], list[int]]:
    """Token loss of every head, and its labels (B, T, K): tokens or the model's own distribution of them, of all
    labels or `n / m` times the sum over `m = ceil(share n)` of them, drawn beside the global random numbers."""
    generator, sums, counts = draw_beside(labels) if share < 1.0 else None, [], []
    for k in range(labels.shape[-1]):
        rows, columns = torch.nonzero(labels[..., k] != -100, as_tuple=True)
        n = len(rows)
        m = math.ceil(share * n)
        drawn = torch.randperm(n, generator=generator)[:m] if share < 1.0 else torch.arange(n)
        rows, columns = rows[drawn], columns[drawn]
        log_probs = lm_head(features[rows, columns, k]).log_softmax(-1)
        if loss_type == "tokens":
            each = -log_probs[torch.arange(m), labels[rows, columns, k]]
        else:
            each = -(lm_head(states[rows, columns]).softmax(-1) * log_probs).sum(-1)
        sums.append(n / m * float(each.sum()))
        counts.append(n)
    return sums, counts


def full_rows(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens and mask of prompts and completions."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    return ids, torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)


def values_by_hand(model: Any, batch: dict[str, Tensor], value_path: Any = None) -> Tensor:
    """`V(s_t)` (B, T, K): what the heads say at the last token before `y_t`."""
    features, first = rows_by_hand(model, *full_rows(batch))[0], batch["prompt_ids"].shape[1]
    with torch.no_grad():
        return (value_path or heads_of(model).value_path)(features[:, first - 1 : -1])


def sft_by_hand(
    model: Any, batch: dict[str, Tensor], share: float = 1.0, loss_type: str = "tokens"
) -> tuple[float, list[float]]:
    """Loss of SFT, and the mean loss of every depth over its labels."""
    heads = heads_of(model)
    features, states, ranks = rows_by_hand(model, batch["input_ids"], batch["attention_mask"])
    depths = torch.arange(1, K + 1)
    labels = batch["labels"][:, 1:, None].masked_fill(ranks[:, :-1, None] < depths, -100)
    with torch.no_grad():
        losses, counts = losses_by_hand(model.lm_head, features, states, labels, share, loss_type)
        logits = model.lm_head(states)[:, :-1].flatten(0, 1)
    own = float(F.cross_entropy(logits, batch["labels"][:, 1:].flatten(), reduction="sum"))
    items = int((batch["labels"][:, 1:] != -100).sum())
    means = [loss / count for loss, count in zip(losses, counts, strict=True)]
    return (own + COEF * sum(losses) / heads.config.num_heads) / items, means


# Supervised fine-tuning: losses


@pytest.mark.parametrize("family", [*RELEASED, "qwen3"])
@pytest.mark.parametrize("host", HOSTS)
def test_loss_of_fine_tuning_by_hand(
    make: Callable[..., Any], make_module: Callable[..., Any], host: str, family: str
) -> None:
    model = make_model(family)
    model = model.double().eval() if family == "qwen3" else doubled(model)
    if host == "trl":
        trainer = make(model, mtp_loss_coef=COEF)
        batch = trainer.data_collator(list(trainer.train_dataset))
        loss = trainer.compute_loss(trainer.model, dict(batch))
        metrics = {name: values[0] for name, values in trainer._metrics["eval"].items()}
    else:
        module = make_module(model, mtp_loss_coef=COEF)
        batch = module.tensors(sums())
        loss, metrics = module.loss(batch)
    assert not batch["attention_mask"].all()
    expected, depths = sft_by_hand(model, batch)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert [float(metrics[f"mtp/token_loss/head_{k}"]) for k in (1, 2)] == pytest.approx(depths, rel=1e-6)
    if family in RELEASED:  # and transformers' own layers agree
        lengths, labels = batch["attention_mask"].sum(1).tolist(), batch["labels"]
        rows = [
            slow_losses(model, heads_of(model), ids[None, :n], row[None, :n])
            for ids, row, n in zip(batch["input_ids"], labels, lengths, strict=True)
        ]
        theirs = [sum(row[k - 1] for row in rows) / int((labels[:, 1 + k :] != -100).sum()) for k in (1, 2)]
        assert theirs == pytest.approx(depths, rel=1e-6)


DRAWS = [(1.0, "distribution"), (0.4, "tokens"), (0.4, "distribution")]


@pytest.mark.slow
@pytest.mark.parametrize(("share", "loss_type"), DRAWS)
@pytest.mark.parametrize("host", HOSTS)
def test_share_and_type_of_the_token_loss_in_fine_tuning(
    make: Callable[..., Any], make_module: Callable[..., Any], host: str, share: float, loss_type: str
) -> None:
    model = make_model("qwen3").double().eval()
    options = {"mtp_loss_coef": COEF, "mtp_loss_share": share, "mtp_loss_type": loss_type}
    if host == "trl":
        trainer = make(model, **options)
        batch = trainer.data_collator(list(trainer.train_dataset))
        torch.manual_seed(3)
        loss = trainer.compute_loss(trainer.model, dict(batch))
    else:
        module = make_module(model, **options)
        batch = module.tensors(sums())
        torch.manual_seed(3)
        loss = module.loss(batch)[0]
    torch.manual_seed(3)
    expected = sft_by_hand(model, batch, share, loss_type)[0]
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    whole = sft_by_hand(model, batch)[0]
    assert abs(expected - whole) > 1e-3


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


@pytest.mark.parametrize("host", HOSTS)
def test_gradient_checkpointing_changes_nothing(
    make: Callable[..., Any], make_module: Callable[..., Any], host: str
) -> None:
    """Loss and gradients, with the heads' gradient into the trunk; the blocks of the heads are recomputed."""
    found = []
    rows = [{**row, "reward": i % 3 / 2} for i, row in enumerate(sums())]
    for checkpointing in (False, True):
        model = make_model("qwen3")
        options = {"mtp_detach_trunk": False, "gradient_checkpointing": checkpointing}
        if host == "trl":
            trainer = make(model, rows, **options)
            batch = trainer.data_collator(list(trainer.train_dataset))
            if checkpointing:  # `train` does it
                model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            module = make_module(model, **options)
            attach_trainer(module)
            batch = module.tensors(rows)
        perturb(heads_of(model), 0.05)
        model.train()
        calls: list[int] = []
        block: Any = heads_of(model).layers[0].mtp_block
        block.mlp.register_forward_pre_hook(lambda *args, calls=calls: calls.append(1))
        loss = trainer.compute_loss(model, dict(batch)) if host == "trl" else module.loss(batch)[0]
        forwards = len(calls)
        loss.backward()
        assert len(calls) == forwards * (1 + checkpointing)
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    assert_recomputed_alike(*found)


# Supervised fine-tuning: what learns


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
    assert changed(before, layers_of(trainer.model)) == learning(before)
    assert not changed(trunk_of(stock.model), trunk_of(trainer.model))
    assert changed(start, trunk_of(trainer.model))
    assert logged(trainer, "mtp/token_loss")[1] < logged(trainer, "mtp/token_loss")[0]


def test_the_trunk_learns_as_without_them_in_lightning(make_module: Callable[..., Any]) -> None:
    """To the last bit, for a token loss of any weight."""
    gradients = []
    for coef in (0.0, 3.0):
        module = make_module(make_model("qwen3"), mtp_loss_coef=coef)
        module.model.train()
        calls: list[int] = []
        heads_of(module.model).layers[1].register_forward_hook(lambda *args, calls=calls: calls.append(1))
        module.loss(module.tensors(sums()))[0].backward()
        assert len(calls) == 1  # for the tokens and, without rewards, for the values
        gradients.append({n: p.grad for n, p in module.model.named_parameters() if "mtp_heads" not in n})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert all(p.grad.any() for p in heads_of(module.model).layers.parameters())


@pytest.mark.slow
def test_trunk_learns_from_the_layers_where_asked(make: Callable[..., Any]) -> None:
    trainers = [make(**PLAIN, mtp_detach_trunk=detach) for detach in (True, False)]
    for trainer in trainers:
        trainer.train()
    moved = changed(*(trunk_of(trainer.model) for trainer in trainers))
    # The LM head, too, from the second step on: through the states that it reads.
    names = learning(trunk_of(trainers[0].model))
    assert moved >= {name for name in names if name.startswith("model.")}


@pytest.mark.slow
def test_trl_frozen_trunk_and_learning_rate(make: Callable[..., Any]) -> None:
    frozen = make(**PLAIN, freeze_trunk=True)
    before, layers = trunk_of(frozen.model), layers_of(frozen.model)
    frozen.train()
    assert not changed(before, trunk_of(frozen.model))
    assert changed(layers, layers_of(frozen.model)) == learning(layers)
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
    assert changed(layers, layers_of(module.model)) == learning(layers)
    assert numbers.rows[1]["mtp/token_loss"] < numbers.rows[0]["mtp/token_loss"]


# Adapters


def adapted(attach_first: bool) -> tuple[Any, set[str]]:
    """A PEFT model, with heads that were there before PEFT came or not, and the names of weights of whole heads."""
    model = make_model("qwen3")
    whole = set(attach_mtp_heads(copy.deepcopy(model), K, head_type="sequential").state_dict())
    if attach_first:
        attach_mtp_heads(model, K, head_type="sequential")
    return get_peft_model(model, LORA), whole


@pytest.mark.slow
@pytest.mark.parametrize("attach_first", [False, True])
@pytest.mark.parametrize("host", HOSTS)
def test_heads_stay_whole_beside_adapters(
    make: Callable[..., Any], make_module: Callable[..., Any], tmp_path: Path, host: str, attach_first: bool
) -> None:
    model, whole = adapted(attach_first)
    if host == "trl":
        trainer = make(model)
        model, train, save = trainer.model, trainer.train, lambda: trainer.save_model(str(tmp_path / "saved"))
    else:
        module = make_module(model)
        model, save = module.model, lambda: module.save_pretrained(tmp_path / "saved")
        train = lambda: fit(module, PromptDataModule(sums(), batch_size=8), max_steps=2)  # noqa: E731
    before = weights_of(model)
    train()
    moved = changed(before, weights_of(model))
    assert {name.split("mtp_heads.")[1] for name in before if "mtp_heads" in name} == whole
    heads = {name for name in before if "mtp_heads.layers" in name}
    assert moved == heads | {name for name in before if "lora_" in name} and heads.isdisjoint(moved - heads)
    save()
    assert load_file(tmp_path / "saved" / MTPHeads.mark).keys() == whole
    adapter = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert len(adapter) == 2 * 2 * 2 and not any("mtp_heads" in key for key in adapter)
    again = make_model("qwen3")
    load_mtp_heads(again, tmp_path / "saved")
    assert not changed(dict(heads_of(model).named_parameters()), dict(heads_of(again).named_parameters()))


# Bad input


@pytest.mark.slow
def test_trl_refuses_what_does_not_fit(make: Callable[..., Any], online: Callable[..., Any], tmp_path: Path) -> None:
    model = make_model("qwen3")
    attach_mtp_heads(model, 1, head_type="sequential").save(tmp_path / "one")
    attach_mtp_heads(make_model("qwen3"), 2).save(tmp_path / "parallel")
    with pytest.raises(ValueError, match="comes with 1 MTP heads, but 2 are asked for. Set num_mtp_heads=1"):
        make(model)
    with pytest.raises(ValueError, match="comes with sequential MTP heads.*Set mtp_head_type='sequential'"):
        make(model, mtp_head_type="parallel", num_mtp_heads=1)
    for trainer in (make, lambda *args, **options: online("trl", "critic", *args, **options)):
        fresh = make_model("qwen3")
        with pytest.raises(ValueError, match="are parallel, but sequential ones.*mtp_head_type='parallel'"):
            trainer(fresh, mtp_heads_path=str(tmp_path / "parallel"))
        with pytest.raises(ValueError, match="Ask for 1 heads"):
            trainer(fresh, mtp_heads_path=str(tmp_path / "one"))
        assert MTPHeads.of(fresh) is None  # a refusal leaves the model as it was
    with pytest.raises(ValueError, match="mtp_inner_size=8 is the width of a parallel head"):
        make(mtp_inner_size=8)
    with pytest.raises(ValueError, match="mtp_head_type"):
        make(mtp_head_type="serial")


def test_lightning_refuses_what_does_not_fit(make_module: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> None:
    model = make_model("qwen3")
    attach_mtp_heads(model, 1, head_type="sequential").save(tmp_path / "one")
    attach_mtp_heads(make_model("qwen3"), 2).save(tmp_path / "parallel")

    def critic(model: Any, **options: Any) -> MTPCriticModule:
        return MTPCriticModule(model, tokenizer, spread, **SEQUENTIAL, **options)

    for module in (make_module, critic):
        with pytest.raises(ValueError, match="comes with 1 MTP heads, but 2 are asked for. Set num_mtp_heads=1"):
            module(model)
        with pytest.raises(ValueError, match="are parallel, but sequential ones.*mtp_head_type='parallel'"):
            module(make_model("qwen3"), mtp_heads_path=str(tmp_path / "parallel"))
        with pytest.raises(ValueError, match="Ask for 1 heads"):
            module(make_model("qwen3"), mtp_heads_path=str(tmp_path / "one"))
    with pytest.raises(ValueError, match="mtp_inner_size=8 is the width of a parallel head"):
        make_module(mtp_inner_size=8)
    with pytest.raises(ValueError, match="mtp_head_type"):
        make_module(mtp_head_type="serial")


# Checkpoints


class Stop(TrainerCallback):
    """Fails as a preempted job does, a step after its last checkpoint."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise InterruptedError


RESUMABLE: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "critic", "grpo"])
def test_trl_resumes_where_it_stopped(
    make: Callable[..., Any], online: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    def trainer(output_dir: str, model: Any = None, **options: Any) -> Any:
        if kind == "sft":
            return make(model, output_dir=output_dir, per_device_train_batch_size=4, **RESUMABLE, **options)
        drafts = {"speculative": kind == "grpo", "head_learning_rate": 1e-2}
        return online("trl", kind, model, output_dir, **drafts, **RESUMABLE, **options)

    through = trainer("through")
    through.train()
    with pytest.raises(InterruptedError):
        trainer("killed", callbacks=[Stop()]).train()
    resumed = trainer("resumed")
    with torch.no_grad():
        for p in resumed.model.parameters():
            p.add_(1.0)
    resumed.train(resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-2"))
    for name in ("loss", "mtp/token_loss", *(("critic/value_loss",) if kind == "critic" else ())):
        assert logged(resumed, name) == logged(through, name) and len(logged(through, name)) == 4
    assert not changed(weights_of(through.model), weights_of(resumed.model))
    if kind == "critic":
        target = weights_of(through.polyak_target)
        assert not changed(target, weights_of(resumed.polyak_target))
        values = {f"heads.{name}": p for name, p in heads_of(through.model).value_heads.named_parameters()}
        assert changed(target, values)  # the copies are slow


class Interrupt(Numbers):
    """Fails in the middle of a run."""

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 3:
            raise InterruptedError


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "critic"])
def test_lightning_resumes_where_it_stopped(
    make_module: Callable[..., Any], tokenizer: Any, tmp_path: Path, kind: str
) -> None:
    def module() -> Any:
        if kind == "sft":
            return make_module()
        options = {"max_completion_length": 6, "beta": 0.0, "learning_rate": 1e-3, "speculative": True}
        return MTPCriticModule(talkative(), tokenizer, spread, **SEQUENTIAL, **options)

    def data() -> PromptDataModule:
        return PromptDataModule(sums() if kind == "sft" else prompts(), batch_size=2)

    torch.manual_seed(0)
    through = fit(module(), data(), every_step(tmp_path / "through"), max_steps=4)
    torch.manual_seed(0)
    with pytest.raises(InterruptedError):
        fit(module(), data(), every_step(tmp_path), Interrupt(), max_steps=4)
    fresh = module()
    with torch.no_grad():
        for p in fresh.parameters():
            p.add_(1.0)
    resumed = fit(fresh, data(), every_step(tmp_path / "more"), max_steps=4, ckpt_path=tmp_path / "step=2.ckpt")
    assert_equal_states(state_of(resumed), state_of(through))
    assert any("mtp_heads.layers" in name for name in state_of(through))
    assert any(name.startswith("target/") for name in state_of(through))


@pytest.mark.slow
def test_trl_goes_back_to_the_best_model(make: Callable[..., Any], tmp_path: Path) -> None:
    trainer = make(max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    last = weights_of(trainer.model)
    trainer.state.best_model_checkpoint = str(tmp_path / "run" / "checkpoint-1")
    trainer._load_best_model()
    assert changed(last, weights_of(trainer.model))
    trainer.state.best_model_checkpoint = str(tmp_path / "run" / "checkpoint-2")
    trainer._load_best_model()
    assert not changed(last, weights_of(trainer.model))


@pytest.mark.slow
def test_saved_layers_are_trained_on_by_either_host(
    make: Callable[..., Any], make_module: Callable[..., Any], tmp_path: Path
) -> None:
    module = make_module()
    module.save_pretrained(tmp_path / "lightning")
    trainer = make(str(tmp_path / "lightning"), model_init_kwargs={"dtype": "float32"})
    assert not changed(weights_of(module.model), weights_of(trainer.model))
    trainer.train()
    trainer.save_model(str(tmp_path / "trl"))
    assert not changed(weights_of(trainer.model), weights_of(make_module(str(tmp_path / "trl")).model))
    # As a released checkpoint, which has the layers, and no values.
    for name in ("mtp_heads.safetensors", "mtp_heads_config.json"):
        (tmp_path / "trl" / name).unlink()
    released = make_module(str(tmp_path / "trl"))
    assert count_released_layers(released.model) == K
    assert not changed(layers_of(trainer.model), layers_of(released.model))
    assert not changed(trunk_of(trainer.model), trunk_of(released.model))
    again = make(str(tmp_path / "trl"), model_init_kwargs={"dtype": "float32"})
    assert not changed(layers_of(trainer.model), layers_of(again.model))
    with pytest.raises(ValueError, match="has 2 MTP layers after layer 1, but 1 sequential heads.*num_mtp_heads=2"):
        make_module(str(tmp_path / "trl"), num_mtp_heads=1)


# Drafting by stock transformers


def generate(folder: Path, tokenizer: Any, **options: Any) -> tuple[list[list[int]], int]:
    """Greedy continuations by stock transformers, and the forwards of the model that they took."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    expect_mtp_keys(model)  # tiny models end at another layer than the released ones
    model.generation_config.eos_token_id = None
    forwards: list[int] = []
    model.model.register_forward_hook(lambda *args: forwards.append(1))
    prompts = [tokenizer(text, return_tensors="pt").input_ids for text in ("012", "369", "741")]
    found = [model.generate(ids, max_new_tokens=18, do_sample=False, **options)[0].tolist() for ids in prompts]
    return found, len(forwards)


def check_drafts(trained: Path, new: Path, tokenizer: Any, num_heads: int) -> None:
    """Drafting changes no token, and saves forwards once the layers are trained."""
    plain, forwards = generate(trained, tokenizer)
    drafted, fewer = generate(trained, tokenizer, use_mtp=True)
    assert drafted == plain and forwards == 3 * 18
    model = AutoModelForCausalLM.from_pretrained(trained)
    heads = attach_mtp_heads(model, num_heads, head_type="sequential")
    model.save_pretrained(new)
    heads.save(new)
    same, untrained = generate(new, tokenizer, use_mtp=True)
    print("FORWARDS", forwards, fewer, untrained)
    assert same == plain
    assert fewer < 0.75 * forwards and fewer < 0.8 * untrained


@pytest.mark.slow
@pytest.mark.parametrize(("family", "num_heads"), [("deepseek_v3", 1), ("glm4_moe", 2)])
def test_stock_generate_drafts_with_layers_trained_in_trl(
    make: Callable[..., Any], tokenizer: Any, tmp_path: Path, family: str, num_heads: int
) -> None:
    trainer = make(
        make_model(family),
        runs_of_digits(),
        max_steps=80,
        head_learning_rate=1e-2,
        num_mtp_heads=num_heads,
        logging_steps=20,
    )
    trainer.train()
    losses = logged(trainer, "mtp/token_loss")
    assert losses[-1] < 0.3 * losses[0]
    trainer.save_model(str(tmp_path / "trained"))
    check_drafts(tmp_path / "trained", tmp_path / "new", tokenizer, num_heads)


@pytest.mark.slow
def test_stock_generate_drafts_with_layers_trained_in_lightning(
    make_module: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    module = make_module(head_learning_rate=1e-2, num_mtp_heads=1, lr_scheduler_type="linear")
    torch.manual_seed(0)
    fit(module, PromptDataModule(runs_of_digits(), batch_size=8), max_steps=80)
    module.save_pretrained(tmp_path / "trained")
    check_drafts(tmp_path / "trained", tmp_path / "new", tokenizer, 1)


# Online: values


def rollout(host: Any, rows: int = 8, seed: int = 0, first: int = 8) -> dict[str, Any]:
    """One batch of completions of `8+8=` and so on: some prompts are shorter than others."""
    numbers = [first + i // host.num_generations for i in range(rows)]
    torch.manual_seed(seed)
    host.model.train()
    if hasattr(host, "accelerator"):
        return host._generate_and_score_completions([{"prompt": f"{n}+{n}="} for n in numbers])
    return host.rollout([{"prompt": f"{n}+{n}="} for n in numbers[:: host.num_generations]])[0]


def loss_of(host: Any, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
    """Loss of one micro-batch, and its metrics."""
    if hasattr(host, "accelerator"):
        host._metrics["train"].clear()
        loss = host._compute_loss(host.model, dict(batch))
        return loss, {name: values[-1] for name, values in host._metrics["train"].items()}
    loss, metrics = host.loss(batch)
    return loss, {name: float(value) for name, value in metrics.items()}


def assert_values_are_those_of_the_finished_rows(host: Any, batch: dict[str, Any]) -> None:
    mask = batch["completion_mask"].bool()
    assert mask.sum(1).unique().numel() > 1 and not mask.all()
    expected = values_by_hand(host.model, batch)
    assert expected[mask].std() > 0.1
    torch.testing.assert_close(batch["old_values"][mask], expected[mask], atol=1e-5, rtol=0)


GENERATION: dict[str, tuple[dict[str, Any], int]] = {
    "plain": ({}, 0),
    "no_cache": ({"use_cache": False}, 0),
    "chunks": ({"prefill_chunk_size": 2}, 0),
    "static_cache": ({"cache_implementation": "static"}, 1),  # whose masks the heads cannot read
    "beams": ({"num_beams": 2}, 1),  # which are no account of single rows
}


@pytest.mark.slow
@pytest.mark.parametrize("name", GENERATION)
@pytest.mark.parametrize("host", HOSTS)
def test_values_belong_to_their_tokens_however_they_are_generated(
    online: Callable[..., Any], host: str, name: str
) -> None:
    """Equal to those of every prefix alone, so that no baseline has seen the token that it judges."""
    options, passes = GENERATION[name]
    critic = online(host, "critic", generation_kwargs={"suppress_tokens": [0], **options})
    calls: list[Any] = []
    own_pass = critic.log_probs
    critic.log_probs = lambda *args: calls.append(args) or own_pass(*args)
    for first in (8, 32):  # without padding, too
        assert_values_are_those_of_the_finished_rows(critic, rollout(critic, first=first))
    assert len(calls) == 2 * passes


@pytest.mark.slow
@pytest.mark.parametrize("host", HOSTS)
def test_rejected_drafts_leave_no_values(online: Callable[..., Any], host: str) -> None:
    """Of heads and of their slow copies, in rows that end at different steps."""
    critic = online(host, "critic", speculative=True, draft_cost=0.0)
    with torch.no_grad():
        for p in critic.polyak_target.parameters():
            p.mul_(0.7)
    kept, recorded = [], critic.critic.recorded
    critic.critic.recorded = lambda *args: (kept.append(recorded(*args)), kept[-1])[1]
    critic.log_probs = None  # no pass is needed
    batch = rollout(critic, 16)
    assert_values_are_those_of_the_finished_rows(critic, batch)
    statistics = critic.decoder.last.statistics
    assert all(
        0 < accepted < reached for accepted, reached in zip(statistics.accepted, statistics.reached, strict=True)
    )
    mask, expected = batch["completion_mask"].bool(), values_by_hand(critic.model, batch, critic.polyak_target)
    torch.testing.assert_close(kept[0].target[mask], expected[mask], atol=1e-5, rtol=0)
    assert (kept[0].target - kept[0].online)[mask].abs().max() > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("host", HOSTS)
def test_episodes_that_go_on_are_worth_the_state_after_them(online: Callable[..., Any], host: str) -> None:
    critic = online(host, "critic", bootstrap_truncated=True)
    kept, recorded = [], critic.critic.recorded
    critic.critic.recorded = lambda *args: (kept.append(recorded(*args)), kept[-1])[1]
    batch = rollout(critic)
    assert_values_are_those_of_the_finished_rows(critic, batch)
    features = rows_by_hand(critic.model, *full_rows(batch))[0]
    first, lengths = batch["prompt_ids"].shape[1], batch["completion_mask"].sum(1)
    cut = batch["completion_ids"][torch.arange(8), lengths - 1] != EOS
    assert 0 < cut.sum() < 8
    ends = features[torch.arange(8), first + lengths - 1]
    expected = critic.polyak_target(ends[:, None])[:, 0, 0]
    torch.testing.assert_close(kept[0].after[cut], expected[cut], atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"speculative": True}, {"generation_kwargs": {"num_beams": 2}}], ids=str)
@pytest.mark.parametrize("host", HOSTS)
def test_values_of_a_policy_with_adapters(online: Callable[..., Any], host: str, options: dict[str, Any]) -> None:
    """The reference, which is the policy without its adapters, leaves none."""
    model = get_peft_model(talkative(), LORA)
    perturb(model, 0.05)
    critic = online(host, "critic", model, beta=0.2, **options)
    batch = rollout(critic)
    assert_values_are_those_of_the_finished_rows(critic, batch)
    values = values_by_hand(critic.model, batch)
    with critic.model.disable_adapter():
        assert (values_by_hand(critic.model, batch) - values).abs().max() > 1e-2
    layer: Any = heads_of(critic.model).layers[0].mtp_block
    assert type(layer.self_attn.q_proj) is torch.nn.Linear


# Online: losses


def online_by_hand(
    model: Any, batch: dict[str, Any], share: float, loss_type: str
) -> tuple[list[float], list[int], Tensor]:
    """Token losses of the heads and their labels, and values (B, T, K), for the completions of a batch."""
    features, states, _ = rows_by_hand(model, *full_rows(batch))
    first, mask = batch["prompt_ids"].shape[1], batch["completion_mask"].bool()
    labels = batch["completion_ids"].masked_fill(~mask, -100)[..., None].expand(-1, -1, K)
    with torch.no_grad():
        features, states = features[:, first - 1 : -1], states[:, first - 1 : -1]
        losses, counts = losses_by_hand(base_model_of(model).lm_head, features, states, labels, share, loss_type)
        return losses, counts, heads_of(model).value_path(features)


@pytest.mark.parametrize("host", HOSTS)
def test_losses_of_the_critic_by_hand(online: Callable[..., Any], host: str) -> None:
    """Every head regresses on the target of its own state, and learns the token that is chosen there."""
    critic = online(host, "critic", value_loss_coef=0.7, mtp_loss_coef=COEF, mtp_loss_share=1.0)
    batch = rollout(critic)
    perturb(heads_of(critic.model), 0.02)
    items, mask = int(batch["completion_mask"].sum()), batch["completion_mask"].bool()
    loss, metrics = loss_of(critic, batch)
    tokens, counts, values = online_by_hand(critic.model, batch, 1.0, "tokens")
    assert counts == [items, items]
    errors = (values - batch["returns"][..., None]).square()[mask].sum(0)
    for k in range(K):
        assert metrics[f"mtp/token_loss/head_{k + 1}"] == pytest.approx(tokens[k] / items, rel=1e-5)
        assert metrics[f"critic/value_loss/head_{k + 1}"] == pytest.approx(float(errors[k]) / items, rel=1e-5)
    change_heads(critic, mtp_loss_coef=0.0)
    without, _ = loss_of(critic, batch)
    assert (loss - without).item() == pytest.approx(COEF * sum(tokens) / (K * items), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("share", "loss_type"), [(0.25, "tokens"), *DRAWS])
@pytest.mark.parametrize("host", HOSTS)
def test_share_and_type_of_the_token_loss_online(
    online: Callable[..., Any], host: str, share: float, loss_type: str
) -> None:
    options = {} if share == 0.25 else {"mtp_loss_share": share}  # which is the default
    critic = online(host, "critic", mtp_loss_type=loss_type, mtp_loss_coef=COEF, **options)
    batch = rollout(critic)
    items = int(batch["completion_mask"].sum())
    torch.manual_seed(5)
    before = torch.get_rng_state()
    loss, metrics = loss_of(critic, batch)
    assert torch.equal(torch.get_rng_state(), before)  # drawn beside
    torch.manual_seed(5)
    tokens, _, _ = online_by_hand(critic.model, batch, share, loss_type)
    for k in range(K):
        assert metrics[f"mtp/token_loss/head_{k + 1}"] == pytest.approx(tokens[k] / items, rel=1e-5)
    change_heads(critic, mtp_loss_coef=0.0)
    without, _ = loss_of(critic, batch)
    assert (loss - without).item() == pytest.approx(COEF * sum(tokens) / (K * items), rel=1e-4)
    if share < 1.0:  # another seed draws others
        change_heads(critic, mtp_loss_coef=COEF)
        torch.manual_seed(6)
        assert abs(loss_of(critic, batch)[0].item() - loss.item()) > 1e-4


# Online: heads that only draft


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
@pytest.mark.parametrize("host", HOSTS)
def test_drafting_heads_give_the_policy_nothing_back(online: Callable[..., Any], host: str, kind: str) -> None:
    """Bit by bit, while they learn the tokens; their values stay as they are."""
    ours = online(host, kind, speculative=True, mtp_loss_share=1.0, draft_cost=0.0)
    plain = online(host, kind, make_tiny_model(initializer_range=0.3), "plain", speculative=False)
    batch = rollout(ours)
    statistics = ours.decoder.last.statistics
    assert 0 < sum(statistics.accepted) < sum(statistics.reached)
    found = []
    for trained in (plain, ours):
        trained.model.zero_grad()
        trained.model.train()
        loss, metrics = loss_of(trained, batch)
        loss.backward()
        grads = {name: p.grad for name, p in trained.model.named_parameters() if p.grad is not None}
        found.append((loss.item(), metrics, grads))
    (loss, metrics, expected), (our_loss, our_metrics, gradients) = found
    assert max(g.abs().max() for g in expected.values()) > 1e-3
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())
    extra = {name for name in gradients.keys() - expected.keys() if gradients[name].any()}
    layers = {name for name, _ in ours.model.named_parameters() if "mtp_heads.layers" in name}
    assert extra == layers
    assert {name: our_metrics[name] for name in metrics} == pytest.approx(metrics, nan_ok=True)
    tokens, counts, _ = online_by_hand(ours.model, batch, 1.0, "tokens")
    means = [our_metrics[f"mtp/token_loss/head_{k + 1}"] for k in range(K)]
    assert means == pytest.approx([t / n for t, n in zip(tokens, counts, strict=True)], rel=1e-5)
    assert our_loss - loss == pytest.approx(0.1 * sum(tokens) / (K * counts[0]), rel=1e-4)


@pytest.mark.parametrize("host", HOSTS)
def test_gradient_checkpointing_changes_nothing_online(online: Callable[..., Any], host: str) -> None:
    found = []
    batch: dict[str, Any] = {}
    for checkpointing in (False, True):
        critic = online(host, "critic", gradient_checkpointing=checkpointing, mtp_detach_trunk=False)
        batch = batch or rollout(critic)
        model, calls = critic.model, []
        model.train()
        if checkpointing and host == "trl":  # `train` does it
            model.gradient_checkpointing_enable({"use_reentrant": False})
        block: Any = heads_of(model).layers[1].mtp_block
        block.mlp.register_forward_pre_hook(lambda *args, calls=calls: calls.append(1))
        torch.manual_seed(4)
        loss = loss_of(critic, batch)[0]
        loss.backward()
        assert len(calls) == 2 * (1 + checkpointing)  # values and tokens send different gradients into the trunk
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    assert_recomputed_alike(*found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["critic", "grpo", "ppo"])
def test_a_greedy_run_is_the_same_with_drafts(online: Callable[..., Any], kind: str) -> None:
    """Greedy completions are the same tokens, so all that is logged is the same, step by step."""
    options: dict[str, Any] = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.1, "draft_cost": 0.0}
    options["generation_kwargs"] = {"do_sample": False, "suppress_tokens": [0]}
    runs = []
    for speculative in (False, True):
        model = talkative() if kind == "critic" or speculative else make_tiny_model(initializer_range=0.3)
        trainer = online("trl", kind, model, str(speculative), speculative=speculative, mtp_loss_share=1.0, **options)
        trainer.train()
        runs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    plain, ours = runs
    assert len(plain) == 3 and plain[0]["reward"] != plain[-1]["reward"]
    drafting = {"loss", "grad_norm"} if kind != "critic" else set()  # which have the heads' token loss in them
    for before, entry in zip(plain, ours, strict=True):
        assert {name.partition("/")[0] for name in entry.keys() - before.keys()} == {"mtp"}
        for name in before.keys() - drafting - {"step_time"}:
            assert entry[name] == pytest.approx(before[name], abs=1e-4, nan_ok=True), name


# Experts


RATE = 0.01


def biases_of(model: Any) -> dict[str, Tensor]:
    return {router.name: router.bias.detach().flatten().clone() for router in find_routers(model)}


def replayed(history: ExpertLoadHistory) -> dict[str, Tensor]:
    """Biases that the load of every step asks for."""
    moved = {name: torch.zeros(8) for name in history.layers}
    for step in history.counts:
        for name, counts in zip(history.layers, step, strict=True):
            moved[name] = selection_bias_update(moved[name], torch.tensor(counts), rate=RATE)
    return moved


@pytest.mark.slow
@pytest.mark.parametrize(("host", "kind"), [("trl", "sft"), ("lightning", "sft"), ("trl", "critic")])
def test_experts_of_the_heads_are_balanced(
    make: Callable[..., Any],
    make_module: Callable[..., Any],
    online: Callable[..., Any],
    tmp_path: Path,
    host: str,
    kind: str,
) -> None:
    """Of Qwen3-MoE, whose routers have no selection bias of their own."""
    model = make_model("qwen3_moe")
    heads = {f"mtp_heads.layers.{k}.mtp_block.mlp.gate" for k in range(K)}
    if host == "lightning":
        module = make_module(model)
        numbers = Numbers()
        callbacks = [LightningBalancing(rate=RATE), numbers]
        trainer = fit(
            module,
            PromptDataModule(sums(), batch_size=8),
            *callbacks,
            max_steps=3,
            log_every_n_steps=1,
            default_root_dir=tmp_path,
        )
        folder, violations = trainer.default_root_dir, [row["moe/max_violation"] for row in numbers.rows]
    else:
        options: dict[str, Any] = {"callbacks": [MoEBalancingCallback(rate=RATE)], "max_steps": 3}
        options["router_aux_loss_coef"] = 0.0
        run = make(model, **options) if kind == "sft" else online("trl", "critic", model, **options)
        run.train()
        folder, violations = run.args.output_dir, logged(run, "moe/max_violation")
    history = read_expert_load(Path(folder) / LOAD_FILE_NAME)
    assert len(history.steps) == 3 == len(violations)
    assert heads < set(history.layers) == biases_of(model).keys()
    expected = replayed(history)
    for name, bias in biases_of(model).items():
        assert torch.equal(bias, expected[name]) and bias.abs().max() >= RATE, name
    assert all(sum(counts) > 0 for step in history.counts for counts in step)
