"""What the tests of Lightning's language-model modules share: tiny runs, and what they were like."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig
from torch import Tensor

from rl_plugins.lightning import GRPOModule, MTPCriticModule, MTPSFTModule, PPOModule

ONLINE: dict[str, Any] = {"critic": MTPCriticModule, "grpo": GRPOModule, "ppo": PPOModule}
KINDS: dict[str, Any] = {**ONLINE, "sft": MTPSFTModule}
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=0.0)


def module_factory(tiny_model: Callable[..., Any], tokenizer: Any, reward: Any) -> Callable[..., Any]:
    """Makes a module on a tiny model; keywords go to the module."""

    def factory(kind: str, model: Any = None, reward_funcs: Any = reward, cls: Any = None, **options: Any) -> Any:
        model = tiny_model(initializer_range=0.2) if model is None else model
        heads = {"num_mtp_heads": 2} if kind in ("critic", "sft") and "heads" not in options else {}
        options = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", **heads, **options}
        cls = cls or KINDS[kind]
        if kind == "sft":
            return cls(model, tokenizer, **options)
        options = {
            "max_completion_length": 5,
            "beta": 0.0,
            **({"num_generations": 2} if kind == "grpo" else {}),
            **options,
        }
        return cls(model, tokenizer, reward_funcs, **options)

    return factory


class Numbers(Callback):
    """What is logged after every training step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def prompts(size: int = 8) -> list[dict[str, Any]]:
    """Sums of different lengths, from 7 on."""
    return [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(7, 7 + size)]


def perturb(module: torch.nn.Module, scale: float = 0.1, seed: int = 3) -> None:
    """Move every weight, so that policy and reference differ and no head stands at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in sorted(module.named_parameters(), key=lambda item: item[0]):
            p.add_(scale * torch.randn(p.shape, generator=generator))


def fit(module: Any, data: Any, *callbacks: Callback, ckpt_path: Any = None, **options: Any) -> Trainer:
    """Train on a CPU, quietly; other options are the Trainer's."""
    trainer = Trainer(
        **{
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": list(callbacks),
            **options,
        }
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


def every_step(directory: Path) -> ModelCheckpoint:
    """A checkpoint `step=<n>.ckpt` after every optimizer step."""
    return ModelCheckpoint(directory, filename="{step}", every_n_train_steps=1, save_top_k=-1)


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def state_of(trainer: Trainer) -> dict[str, Any]:
    """Everything that a run carries along, flat: weights, optimizer, schedule, target heads."""
    (optimizer,) = trainer.optimizers
    state: dict[str, Any] = {f"weight/{name}": w for name, w in trainer.lightning_module.state_dict().items()}
    for i, slots in optimizer.state_dict()["state"].items():
        state |= {f"optimizer/{i}/{name}": value for name, value in slots.items()}
    for i, group in enumerate(optimizer.param_groups):
        state |= {f"group/{i}/{name}": value for name, value in group.items() if name != "params"}
    target = getattr(trainer.lightning_module, "polyak_target", None)
    if target is not None:
        state |= {f"target/{name}": w for name, w in target.state_dict().items()}
    return {**state, "step": trainer.global_step, "epoch": trainer.current_epoch, "dice": torch.get_rng_state()}


def assert_equal_states(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        equal = torch.equal(ours[name], value) if isinstance(value, Tensor) else ours[name] == value
        assert equal, f"{name}: {ours[name]} is not {value}"
