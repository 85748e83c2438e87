"""`MoEBalancingCallback` for Lightning: against replays worked out by hand, and against transformers' `Trainer`."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer as HFTrainer
from transformers import TrainingArguments

from rl_plugins.functional import selection_bias_update
from rl_plugins.lightning import MoEBalancingCallback
from rl_plugins.moe import find_routers
from rl_plugins.moe.load_log import LOAD_FILE_NAME, ExpertLoadHistory, read_expert_load
from rl_plugins.trl import MoEBalancingCallback as HFCallback

from .helpers.moe_models import make_moe_model, mean_switch_loss

pytestmark = pytest.mark.filterwarnings(r"ignore:::lightning\.pytorch.*")
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

Batch = dict[str, Tensor]
Fit = Callable[..., tuple[Trainer, Any]]


def token_rows(size: int = 24, length: int = 10, ragged: bool = True, seed: int = 3) -> list[Batch]:
    """Random tokens, padded on the right to `length`."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(size):
        real = int(torch.randint(4, length + 1, (), generator=generator)) if ragged else length
        ids = torch.randint(2, 40, (length,), generator=generator)
        mask = (torch.arange(length) < real).long()
        rows.append({"input_ids": ids * mask, "attention_mask": mask, "labels": torch.where(mask == 1, ids, -100)})
    return rows


class Module(LightningModule):
    """A language model, its loss and an optimizer."""

    def __init__(self, model: nn.Module, optimizer: str = "adamw", lr: float = 1e-2) -> None:
        super().__init__()
        self.model, self.optimizer, self.lr = model, optimizer, lr
        self.losses: list[float] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self) -> Any:
        kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[self.optimizer]
        return kind([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class Manual(Module):
    """Steps by hand, every second batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self.manual_backward(super().training_step(batch, batch_idx) / 2)
        if batch_idx % 2:
            optimizer = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()


class StandIn:
    """The part of Lightning's trainer that the callback reads when training starts."""

    estimated_stepping_batches = 3
    log_dir = None
    default_root_dir = "never written"
    is_global_zero = True

    def __init__(self, precision: str = "32-true") -> None:
        self.precision = precision


@pytest.fixture
def fit(tmp_path: Path) -> Fit:
    """Factory: train a module (or a family's tiny model); other keywords go to Lightning's trainer."""

    def factory(
        module: Any = "mixtral",
        callbacks: Any = (),
        rows: Any = None,
        output_dir: str = "run",
        batch_size: int = 8,
        val_rows: Any = None,
        ckpt_path: Any = None,
        logger: Any = False,
        **options: Any,
    ) -> tuple[Trainer, Any]:
        module = Module(make_moe_model(module)) if isinstance(module, str) else module
        trainer = Trainer(
            **{
                "accelerator": "cpu",
                "default_root_dir": tmp_path / output_dir,
                "max_steps": 3,
                "log_every_n_steps": 1,
                "logger": logger,
                "callbacks": list(callbacks),
                "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
                "enable_progress_bar": False,
                "enable_model_summary": False,
                **options,
            }
        )
        data = DataLoader(token_rows() if rows is None else rows, batch_size=batch_size)
        validation = None if val_rows is None else DataLoader(val_rows, batch_size=batch_size)
        trainer.fit(module, data, validation, ckpt_path=ckpt_path)
        return trainer, module

    return factory


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def biases(module: nn.Module) -> list[Tensor]:
    """The live ones."""
    model = module.model if isinstance(module, Module) else module
    return [router.bias.detach().reshape(-1).float().clone() for router in find_routers(model)]


def assert_equal(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y), (x, y)


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    mine, other = weights(a), weights(b)
    assert list(mine) == list(other)
    assert not [name for name in mine if not torch.equal(mine[name], other[name])]


def assert_close_weights(a: nn.Module, b: nn.Module) -> None:
    mine = weights(a)
    for name, weight in weights(b).items():
        torch.testing.assert_close(mine[name], weight, rtol=1e-5, atol=2e-6, msg=name)


def loads(trainer: Trainer) -> ExpertLoadHistory:
    return read_expert_load(Path(trainer.log_dir or trainer.default_root_dir) / LOAD_FILE_NAME)


def replay(history: ExpertLoadHistory, rate: float, start: list[Tensor] | None = None) -> list[Tensor]:
    """Biases from the counts of each step."""
    moved = [torch.zeros(len(counts)) for counts in history.counts[0]] if start is None else start
    for step in history.counts:
        moved = [selection_bias_update(b, torch.tensor(c), rate=rate) for b, c in zip(moved, step, strict=True)]
    return moved


def test_rate_zero_leaves_the_run_as_it_was(fit: Fit) -> None:
    options = {"accumulate_grad_batches": 2, "batch_size": 4, "gradient_clip_val": 1.0}
    _, without = fit(output_dir="without", **options)
    trainer, balanced = fit(callbacks=[MoEBalancingCallback(rate=0.0, count_only=True)], **options)
    assert balanced.losses == without.losses and len(set(without.losses)) == 6
    assert_same_weights(balanced, without)
    assert len(loads(trainer).steps) == 3


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "afmoe", "ernie4_5_moe"])
def test_biases_are_those_that_the_counts_ask_for(fit: Fit, family: str) -> None:
    rows = token_rows()
    trainer, module = fit(family, [MoEBalancingCallback(rate=0.01)], rows)
    history = loads(trainer)
    assert history.steps == [1, 2, 3]
    assert_equal(biases(module), replay(history, 0.01))
    assert all(bias.abs().max() > 0.01 for bias in biases(module))
    layers = len(find_routers(module.model))
    tokens = [sum(int(row["attention_mask"].sum()) for row in rows[i : i + 8]) for i in (0, 8, 16)]
    assert [[sum(layer) for layer in step] for step in history.counts] == [[2 * n] * layers for n in tokens]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_accumulation_equals_one_batch(fit: Fit, family: str) -> None:
    # Losses that are means over rows; Switch's is one over the batch.
    settings = {"rate": 0.01, "aux_loss_coef": 0.5, "aux_loss_type": "sequence", "z_loss_coef": 0.01}
    rows = token_rows(ragged=False)

    def train(**options: Any) -> tuple[Trainer, Any]:
        module = Module(make_moe_model(family), "sgd", 0.1)
        return fit(module, [MoEBalancingCallback(**settings)], rows, **options)

    trainer, whole = train(output_dir="whole")
    again, parts = train(batch_size=1, accumulate_grad_batches=8)
    assert loads(again).counts == loads(trainer).counts and loads(again).steps == [1, 2, 3]
    assert_equal(biases(parts), biases(whole))
    assert_close_weights(parts, whole)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_gradient_of_the_auxiliary_loss(fit: Fit, family: str) -> None:
    rows, coef = token_rows(8), 0.5
    callback = MoEBalancingCallback(rate=0.0, aux_loss_coef=coef)
    trainer, module = fit(Module(make_moe_model(family), "sgd", 0.1), [callback], rows, max_steps=1)
    model = make_moe_model(family).train()
    seen: list[tuple[Tensor, Tensor]] = []
    for router in find_routers(model):
        router.module.register_forward_hook(lambda m, a, output: seen.append((output[0], output[2])))
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    loss = model(**batch).loss
    logits, indices = zip(*seen, strict=True)
    scoring = "sigmoid" if family == "deepseek_v3" else "softmax"
    auxiliary = mean_switch_loss(logits, indices, batch["attention_mask"].flatten(), scoring=scoring)
    (loss + coef * auxiliary).backward()
    assert module.losses == [pytest.approx(loss.item(), rel=1e-6)]
    assert trainer.callback_metrics["moe/aux_loss"].item() == pytest.approx(auxiliary.item(), rel=1e-5)
    moved = weights(module.model)
    for name, p in model.named_parameters():
        expected = p if p.grad is None else p - 0.1 * p.grad
        torch.testing.assert_close(moved[name], expected.detach(), rtol=1e-5, atol=1e-6, msg=name)
    _, stock = fit(Module(make_moe_model(family), "sgd", 0.1), rows=rows, max_steps=1)
    router = "model." + find_routers(model)[0].name + ".weight"
    assert (weights(module)[router] - weights(stock)[router]).abs().max() > 5e-4


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_resumed_run_equals_one_in_one_go(fit: Fit, tmp_path: Path, family: str, accumulate: int) -> None:
    # The checkpoint is written at the end of an epoch, since Lightning does not skip batches.
    options = {"batch_size": 4, "max_steps": 4, "accumulate_grad_batches": accumulate}
    options["rows"] = token_rows(8 * accumulate)

    def callbacks() -> list[Callback]:
        settings = {"rate": 0.01, "aux_loss_coef": 0.01, "start": 0.25}
        saving = ModelCheckpoint(every_n_train_steps=2, save_top_k=-1, filename="{step}")
        return [MoEBalancingCallback(**settings), saving]

    trainer, whole = fit(Module(make_moe_model(family)), callbacks(), output_dir="whole", **options)
    (checkpoint,) = tmp_path.rglob("*step=2.ckpt")
    model = make_moe_model(family, seed=1)
    again, resumed = fit(Module(model), callbacks(), output_dir="resumed", ckpt_path=checkpoint, **options)
    assert again.global_step == 4 and len(resumed.losses) == 2 * accumulate
    assert resumed.losses == whole.losses[2 * accumulate :]
    assert loads(again).steps == [3, 4]
    assert loads(again).counts == loads(trainer).counts[2:]
    assert_equal(biases(resumed), biases(whole))
    assert_same_weights(resumed, whole)
    saved = torch.load(checkpoint, weights_only=True)["callbacks"]["MoEBalancingCallback"]["biases"]
    first = loads(trainer)
    start = ExpertLoadHistory([2], first.layers, first.counts[1:2])
    assert_equal(list(saved.values()), replay(start, 0.01))


def test_a_checkpoint_that_comes_after_the_model() -> None:
    # As with DeepSpeed and FSDP, which restore when the model is set up.
    callback = MoEBalancingCallback(rate=0.01)
    module = Module(make_moe_model("deepseek_v3"))
    saved = {router.name: torch.linspace(-0.1, 0.1, 8) for router in find_routers(module.model)}
    callback.on_fit_start(StandIn(), module)
    callback.load_state_dict({"biases": saved})
    assert_equal(biases(module), list(saved.values()))


def test_a_checkpoint_of_other_experts(fit: Fit, tmp_path: Path) -> None:
    saving = ModelCheckpoint(every_n_train_steps=3, filename="last")
    fit(callbacks=[MoEBalancingCallback(rate=0.01), saving])
    (path,) = tmp_path.rglob("last.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    saved = checkpoint["callbacks"]["MoEBalancingCallback"]["biases"]
    name = next(iter(saved))
    saved[name] = saved[name][:-1]
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="do not fit this model.*7 instead of 8"):
        fit(callbacks=[MoEBalancingCallback(rate=0.01)], ckpt_path=path, max_steps=6)


def test_metrics_reach_the_logger(fit: Fit, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="csv")
    callback = MoEBalancingCallback(rate=0.01, aux_loss_coef=0.01, z_loss_coef=0.001)
    trainer, module = fit(callbacks=[callback], logger=logger)
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    table = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    assert [int(row["step"]) for row in table] == [0, 1, 2]
    history = read_expert_load(Path(logger.log_dir) / LOAD_FILE_NAME)
    for row, counts in zip(table, history.counts, strict=True):
        violations = [8 * max(layer) / sum(layer) - 1 for layer in counts]
        entropies = [-sum(c / sum(x) * math.log(c / sum(x)) for c in x if c) / math.log(8) for x in counts]
        assert float(row["moe/max_violation"]) == pytest.approx(sum(violations) / 3, rel=1e-5)
        assert float(row["moe/max_violation_worst"]) == pytest.approx(max(violations), rel=1e-5)
        assert float(row["moe/load_entropy"]) == pytest.approx(sum(entropies) / 3, rel=1e-5)
        assert float(row["moe/unused_experts"]) == pytest.approx(sum(x.count(0) for x in counts) / 24, abs=1e-6)
        assert float(row["moe/aux_loss"]) >= 2.0 and float(row["moe/z_loss"]) > 0.0
    span = max(bias.max() - bias.min() for bias in biases(module)).item()
    assert float(table[-1]["moe/bias_range"]) == pytest.approx(span, rel=1e-5)
    assert trainer.logged_metrics["moe/bias_range"].item() == pytest.approx(span)


@pytest.mark.slow
def test_load_file_follows_the_logging_steps(fit: Fit) -> None:
    each, _ = fit(callbacks=[MoEBalancingCallback(rate=0.01)], max_steps=5, output_dir="each")
    pairs, _ = fit(callbacks=[MoEBalancingCallback(rate=0.01)], max_steps=5, log_every_n_steps=2)
    assert loads(pairs).steps == [2, 4, 5]
    counts = torch.tensor(loads(each).counts)
    assert loads(pairs).counts == [counts[i : i + 2].sum(0).tolist() for i in (0, 2, 4)]
    trainer, _ = fit(callbacks=[MoEBalancingCallback(rate=0.01, record_load=False)], output_dir="none")
    assert not (Path(trainer.default_root_dir) / LOAD_FILE_NAME).exists()


def test_validation_does_not_count(fit: Fit) -> None:
    without, plain = fit(callbacks=[MoEBalancingCallback(rate=0.01)], output_dir="without")
    trainer, module = fit(
        callbacks=[MoEBalancingCallback(rate=0.01)],
        val_rows=token_rows(8, seed=5),
        val_check_interval=1,
        num_sanity_val_steps=1,
    )
    assert trainer.callback_metrics["val_loss"] > 0
    assert loads(trainer).counts == loads(without).counts
    assert_equal(biases(module), biases(plain))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_both_hosts_train_the_same_model(fit: Fit, tmp_path: Path, family: str) -> None:
    # Rows of equal length: Lightning weighs micro-batches equally, transformers their tokens.
    rows = token_rows(ragged=False)
    settings = {"rate": 0.01, "aux_loss_coef": 0.1, "z_loss_coef": 0.01}
    callback = MoEBalancingCallback(**settings)
    trainer, module = fit(
        Module(make_moe_model(family), "sgd", 0.1), [callback], rows, batch_size=4, accumulate_grad_batches=2
    )
    args = TrainingArguments(
        output_dir=str(tmp_path / "hf"),
        use_cpu=True,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=3,
        logging_steps=1,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    data = Dataset.from_list([{name: x.tolist() for name, x in row.items()} for row in rows])
    other = HFTrainer(make_moe_model(family), args, train_dataset=data, callbacks=[HFCallback(**settings)])
    other.train()
    assert read_expert_load(tmp_path / "hf" / LOAD_FILE_NAME) == loads(trainer)
    assert_equal(biases(module), biases(other.model))
    assert_close_weights(module.model, other.model)
    last = [entry for entry in other.state.log_history if "loss" in entry][-1]
    for name in ("max_violation", "load_entropy", "bias_range", "aux_loss", "z_loss"):
        assert trainer.callback_metrics[f"moe/{name}"].item() == pytest.approx(last[f"moe/{name}"], rel=1e-5)


@pytest.mark.slow
def test_manual_optimization(fit: Fit) -> None:
    # It moves after the optimizer's steps; an auxiliary loss has the weight of a backward that is not scaled.
    trainer, module = fit(Manual(make_moe_model("mixtral")), [MoEBalancingCallback(rate=0.01)], batch_size=4)
    assert len(module.losses) == 6 and loads(trainer).steps == [1, 2, 3]
    _, automatic = fit(
        callbacks=[MoEBalancingCallback(rate=0.01)], batch_size=4, accumulate_grad_batches=2, output_dir="automatic"
    )
    assert_equal(biases(module), replay(loads(trainer), 0.01))
    assert_equal(biases(module), biases(automatic))
    assert_close_weights(module, automatic)


def test_lora(fit: Fit) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    module = Module(get_peft_model(make_moe_model("mixtral"), lora))
    before = weights(module)
    trainer, _ = fit(module, [MoEBalancingCallback(rate=0.01, aux_loss_coef=0.1)])
    after = weights(module)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(".lora_" in name for name in moved)
    assert_equal(biases(module), replay(loads(trainer), 0.01))


@pytest.mark.slow
def test_fit_twice_goes_on(fit: Fit) -> None:
    callback, module = MoEBalancingCallback(rate=0.01), Module(make_moe_model("mixtral"))
    first, _ = fit(module, [callback], output_dir="first")
    reached = replay(loads(first), 0.01)
    assert_equal(biases(module), reached)
    second, _ = fit(module, [callback], output_dir="second")
    assert_equal(biases(module), replay(loads(second), 0.01, reached))
    # Another callback on the same model starts from where it is.
    third, _ = fit(module, [MoEBalancingCallback(rate=0.02)], output_dir="third")
    assert_equal(biases(module), replay(loads(third), 0.02, replay(loads(second), 0.01, reached)))


class Failing(Module):
    """Fails in its second step."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if batch_idx == 1:
            raise RuntimeError("out of memory")
        return super().training_step(batch, batch_idx)


def test_fit_after_a_failure(fit: Fit) -> None:
    module = Failing(make_moe_model("mixtral"))
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(module, [MoEBalancingCallback(rate=0.01)], output_dir="failed")
    reached = biases(module)
    again = Module(module.model)
    trainer, _ = fit(again, [MoEBalancingCallback(rate=0.01)])
    assert_equal(biases(again), replay(loads(trainer), 0.01, reached))


# Bad input


class Plain(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(10, 1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.layer(batch["input_ids"].float()).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_module_without_a_language_model(fit: Fit, tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="Plain holds no Hugging Face model"):
        fit(Plain(), [MoEBalancingCallback()])
    with pytest.raises(TypeError, match="Qwen3ForCausalLM has no routers: it is a dense model"):
        fit(Module(tiny_model()), [MoEBalancingCallback()])


def test_a_model_in_evaluation_mode(fit: Fit) -> None:
    # As `from_pretrained` returns it; Lightning keeps the mode.
    with pytest.raises(RuntimeError, match=r"in evaluation mode.* Call model.train\(\)"):
        fit(Module(make_moe_model("mixtral").eval()), [MoEBalancingCallback(rate=0.01)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": 0.99}, "start=0.99, stop=1.0: in 3 optimizer steps the selection bias never moves"),
        ({"start": 0.4, "stop": 0.6}, "in 3 optimizer steps the selection bias never moves"),
    ],
)
def test_a_schedule_that_never_starts(fit: Fit, settings: dict[str, Any], message: str) -> None:
    module = Module(make_moe_model("mixtral"))
    with pytest.raises(ValueError, match=message):
        fit(module, [MoEBalancingCallback(**settings)])
    assert not module.losses


def test_a_schedule_over_an_open_end(fit: Fit) -> None:
    trainer, module = fit(callbacks=[MoEBalancingCallback(rate=0.01), StopAt(4)], max_steps=-1, max_epochs=-1)
    assert loads(trainer).steps == [1, 2, 3, 4]
    assert_equal(biases(module), replay(loads(trainer), 0.01))


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


@pytest.mark.parametrize("settings", [{"aux_loss_coef": 0.01}, {"z_loss_coef": 0.01}])
@pytest.mark.parametrize("precision", ["16-mixed", "16-true"])
def test_float16(settings: dict[str, Any], precision: str) -> None:
    # On a CPU Lightning itself turns 16-mixed into bf16-mixed.
    trainer = StandIn(precision)
    with pytest.raises(ValueError, match="do not know float16's loss scale"):
        MoEBalancingCallback(**settings).on_fit_start(trainer, Module(make_moe_model("mixtral")))
    module = Module(make_moe_model("mixtral"))
    MoEBalancingCallback(rate=0.01).on_fit_start(trainer, module)
    assert len(biases(module)) == 3


def test_settings_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"rate=-0.1: give 0 \(off\) or more"):
        MoEBalancingCallback(rate=-0.1)
    with pytest.raises(TypeError, match="coef"):
        MoEBalancingCallback(coef=0.1)
