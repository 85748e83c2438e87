"""A critic of one's own: a linear probe on the trunk's detached hidden state, trained in both hosts as it is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rl_plugins.lightning import RLModule
from rl_plugins.nn import Attachment, base_model_of
from rl_plugins.signals import CriticSignal, OnlineValueOptions, TrunkCritic
from rl_plugins.trl import RLConfig, RLTrainer

# The critic: all of it, from here ...


class Probe(Attachment):
    """`v(s_t) = w . h_t + b` on hidden states that it cannot change (POISE reads a value off the policy's own states).

    The weights are the model's; the gradient stops at the hidden state.
    """

    name = "probe"
    mark = "probe.safetensors"

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.line = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.line.weight), nn.init.zeros_(self.line.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Values (B, T, 1) of hidden states (B, T, D)."""
        return self.line(hidden.detach()).float()


class ProbeCritic(TrunkCritic):
    """A critic whose values are read off the policy by a line."""

    learning_rate = 1e-2

    def attach(self, model: nn.Module, *, seed: int = 0) -> Attachment:
        """Put the probe into the policy."""
        self.module = Probe(base_model_of(model).config.hidden_size).attach(model)
        return self.module


# ... to here.

OPTIONS = OnlineValueOptions(value_loss_coef=1.0, lam_policy=1.0, calibrate_values=False, advantage_scaling="none")


def even(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(sum(ids) % 2 == 0) for ids in completion_ids]


def by_hand(model: nn.Module, batch: Any) -> Tensor:
    """Values of a batch, from a plain forward pass."""
    probe = Probe.of(model)
    assert probe is not None
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        output = base_model_of(model)(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        states = output.hidden_states[-1][:, batch["prompt_ids"].shape[1] - 1 : -1]
        return probe.line(states)


def check_rollout(model: nn.Module, batch: Any) -> None:
    real = batch["completion_mask"].bool()
    torch.testing.assert_close(batch["old_values"][real], by_hand(model, batch)[real], rtol=1e-4, atol=1e-5)
    # With lambda and gamma 1: what was paid in the end, less the value.
    expected = (batch["scores"][:, None] - batch["old_values"][..., 0])[real]
    torch.testing.assert_close(batch["advantages"][real], expected, rtol=1e-5, atol=1e-5)


def test_in_trl(tiny_model: Callable[..., Any], tokenizer: Any, dataset: Any, tmp_path: Path) -> None:
    args = RLConfig(
        str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, per_device_train_batch_size=8,
        num_generations=1, max_completion_length=6, max_steps=3, learning_rate=0.0, save_strategy="steps",
        save_steps=3, save_only_model=False, report_to="none", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    signal = CriticSignal(ProbeCritic(OPTIONS))
    trainer = RLTrainer(tiny_model(), even, args, dataset, processing_class=tokenizer, signal=signal)
    trainer._generate_and_score_completions([dict(dataset[i]) for i in range(8)])
    check_rollout(trainer.model, trainer.last_rollout)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"probe.line.weight", "probe.line.bias"}  # the policy's rate is 0, the probe's own is not
    assert [entry["critic/value_loss"] for entry in trainer.state.log_history if "critic/value_loss" in entry]
    assert (tmp_path / "checkpoint-3" / "probe.safetensors").is_file()
    other = Probe(trainer.model.config.hidden_size)
    other.load(tmp_path / "checkpoint-3")
    assert torch.equal(other.line.weight, Probe.of(trainer.model).line.weight)  # type: ignore[union-attr]


def test_in_lightning(tiny_model: Callable[..., Any], tokenizer: Any, dataset: Any, tmp_path: Path) -> None:
    module = RLModule(
        tiny_model(), tokenizer, even, signal=CriticSignal(ProbeCritic(OPTIONS)), num_generations=1,
        max_completion_length=6, learning_rate=0.0,
    )  # fmt: skip
    module.rollout([dict(dataset[i]) for i in range(8)])
    check_rollout(module.model, module.last_rollout)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainer = Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, DataLoader([dict(row) for row in dataset], batch_size=8, collate_fn=list))
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"model.probe.line.weight", "model.probe.line.bias"}
    assert trainer.callback_metrics["critic/value_loss"] > 0
    module.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "probe.safetensors").is_file()


def test_it_is_short() -> None:
    text = Path(__file__).read_text()
    own = text[text.index("class Probe(") : text.index("# ... to here.")]
    assert len(own.splitlines()) <= 60
