"""What both trainers do with their heads: create, optimise, save, load, average."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from trl.trainer.utils import get_config_model_id

from rl_plugins.nn import (
    GradientStats,
    HeadRun,
    MTPHeads,
    NativeMTP,
    PolyakTarget,
    logit_divisor,
)
from rl_plugins.nn.sharding import whole_module, whole_parameters
from rl_plugins.nn.sources import check_language_model
from rl_plugins.nn.target_heads import TARGET_NAME
from rl_plugins.trl.attachments import AttachmentTrainer, attach_heads
from rl_plugins.trl.callbacks import PolyakCallback


def complete_args(args: Any, config_class: type, model: Any, suffix: str) -> Any:
    """The trainer's `args`, or default ones that write beside the model's name, as TRL's trainers do.

    Raises:
        TypeError: If `args` is not of `config_class`, or `model` is none.
        FileNotFoundError: If there is no model of that name.
        ValueError: If the model cannot be trained as a causal language model.
    """
    init_kwargs = getattr(args, "model_init_kwargs", None)
    check_language_model(model, init_kwargs if isinstance(init_kwargs, dict) else None)
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        return config_class(f"{name.split('/')[-1]}-{suffix}")
    if not isinstance(args, config_class):
        raise TypeError(
            f"args must be of type {config_class.__name__}, got {type(args).__name__}. Give the options to "
            f"{config_class.__name__}(...), which takes those of its host, too."
        )
    return args


class MTPHeadsTrainer(AttachmentTrainer):
    """Life cycle of MTP value heads, or of native MTP layers in their place, in a TRL trainer; `MTPSFTTrainer` and
    `MTPCriticTrainer` build on it."""

    mtp_heads: MTPHeads | None = None
    native_mtp: NativeMTP | None = None
    polyak_target: PolyakTarget
    _gradient_stats: GradientStats | None = None

    @property
    def critic_module(self) -> MTPHeads | NativeMTP | None:
        """The heads, or the native layers; `None` without a critic."""
        return self.native_mtp or self.mtp_heads

    def _set_up_native(self) -> None:
        """Native layers instead of heads."""
        native = self.native_mtp = NativeMTP.prepare(self.model, self.args.num_mtp_heads, seed=self.args.seed)
        self._attach(native, self.args.head_learning_rate)
        self._logit_divisor = logit_divisor(self.model.config)

    def _set_up_heads(self, saved_heads: str | None) -> None:
        args = self.args
        heads = self.mtp_heads = attach_heads(self, saved_heads)
        self._logit_divisor = logit_divisor(self.model.config) if args.mtp_loss_coef else 1.0
        with whole_parameters(list(heads.parameters())), whole_module(heads):
            self.polyak_target = PolyakTarget(heads, tau=args.target_tau, period=args.target_update_every)
        self.polyak_target.to(self.accelerator.device)
        self.add_callback(PolyakCallback(self._update_target))

    def _update_target(self, step: int) -> None:
        assert self.mtp_heads is not None
        with whole_parameters(list(self.mtp_heads.parameters())) as params:
            self.polyak_target.update(params, step=step)

    # Losses

    @contextmanager
    def _running_heads(
        self,
        select: Callable[[Tensor], Tensor],
        labels: Tensor | None,
        num_items: Tensor,
        value_grad_scale: float,
        target: PolyakTarget | None = None,
        *,
        heads_only: bool = False,
    ) -> Iterator[HeadRun]:
        """Run the heads in the training forward inside the block.

        `num_items` sets the units of the gradient clamp; `heads_only` keeps all gradients out of the trunk.
        """
        assert self.mtp_heads is not None
        args = self.args
        with self.mtp_heads.running(
            select,
            lm_head=self._lm_head(),
            labels=labels,
            divisor=self._logit_divisor,
            detach_tokens=heads_only or args.mtp_detach_trunk,
            value_grad_scale=0.0 if heads_only else value_grad_scale,
            value_grad_norm=None
            if args.value_grad_clip is None
            else args.value_grad_clip * args.value_loss_coef / num_items,
            target=target,
        ) as run:
            self._gradient_stats = run.stats
            yield run

    def _running_native(self, inputs: dict[str, Any]) -> AbstractContextManager[HeadRun]:
        """Run the native layers in the training forward inside the block."""
        assert self.native_mtp is not None
        return self.native_mtp.running(
            self._lm_head(),
            inputs["input_ids"],
            inputs["labels"],
            inputs.get("attention_mask"),
            inputs.get("position_ids"),
            divisor=self._logit_divisor,
            detach_trunk=self.args.mtp_detach_trunk,
        )

    # Metrics

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the host's step, then log what the backward pass showed of the value gradient."""
        loss = super().training_step(*args, **kwargs)
        if self._gradient_stats is not None:
            norms, clamped, tokens = self._sum_over_ranks(self._gradient_stats.totals(self.accelerator.device))
            tokens = tokens.clamp(min=1.0)
            self._log_metrics({"critic/grad_norm": norms / tokens, "critic/grad_clamped": clamped / tokens})
            self._gradient_stats = None
        return loss

    # Saving and loading

    def _own_files(self) -> dict[str, bool]:
        return super()._own_files() | ({} if self.mtp_heads is None else {TARGET_NAME: True})

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        # Ours first: a checkpoint that has the host's files is then whole, even if the job dies in between.
        if self.mtp_heads is not None:
            directory = self._checkpoint_dir(trial)
            directory.mkdir(parents=True, exist_ok=True)
            if self.args.should_save:
                weights = {k: v.cpu() for k, v in self.polyak_target.state_dict().items()}
                save_file(weights, directory / TARGET_NAME)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # Called on every backend, while DeepSpeed skips _load_from_checkpoint.
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.mtp_heads is not None:
            self.polyak_target.load_state_dict(load_file(Path(checkpoint) / TARGET_NAME))
