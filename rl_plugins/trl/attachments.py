"""Modules of ours in the policy: trained by its engine, saved beside it."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin, is_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import StateDictType
from transformers import PreTrainedModel

from rl_plugins.nn.attachment import Attachment
from rl_plugins.nn.mtp_heads import MTPHeads
from rl_plugins.trl.base import PluginTrainer


@dataclass(frozen=True)
class Attached:
    """A module of ours in the policy, and how it is trained.

    Args:
        module: The module.
        learning_rate: Its learning rate; `None` for the policy's.
    """

    module: Attachment
    learning_rate: float | None


class AttachmentTrainer(PluginTrainer):
    """Life cycle of attachments in a TRL trainer.

    They are attached after the host's `__init__`, so that PEFT and the fused LM head are in place, and before
    `accelerator.prepare`, so that they are optimised and sharded with the rest.
    """

    _attachments: tuple[Attached, ...] = ()

    def _attach(self, module: Attachment, learning_rate: float | None) -> None:
        """Take care of a submodule from now on."""
        plugin = self.accelerator.state.deepspeed_plugin
        if plugin is not None and learning_rate is not None and "optimizer" in plugin.deepspeed_config:
            raise ValueError(
                "The DeepSpeed config declares its own optimizer, which cannot give the critic a learning rate of "
                "its own. Remove its `optimizer` section, or set head_learning_rate (MTP heads) or "
                "value_learning_rate (a value model) to None."
            )
        if self.is_fsdp_enabled:
            check_fsdp(self.accelerator.state.fsdp_plugin, adapters=is_peft_model(self.model))
        if self.optimizer is not None:
            raise ValueError(
                f"The optimizer that was given (optimizers=...) was made before the policy had its {module.name}, "
                "which it would never train. Leave it out, and set `optim`, `optim_args` and the learning rates."
            )
        self._attachments = (*self._attachments, Attached(module, learning_rate))

    # Optimizer

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the host's optimizer, then move the submodules into groups with their own learning rates."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        for attachment in self._attachments if fresh else ():
            if attachment.learning_rate is not None:
                _split_groups(optimizer, attachment.module, attachment.learning_rate)
        return optimizer

    # Saving and loading

    def _own_files(self) -> dict[str, bool]:
        # DeepSpeed and FSDP have everything in the engine's own files.
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        files = [attachment.module.mark for attachment in self._attachments]
        return super()._own_files() | {file: not sharded for file in files if file is not None}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        # A copy, since save_pretrained deletes our keys from the dictionary that it is given.
        super()._save(output_dir, state_dict=None if state_dict is None else dict(state_dict))
        # An empty state dict is what the host passes when ZeRO-3 may not gather: the engine's checkpoint has them.
        if self._attachments and self.args.should_save and state_dict != {}:
            for attachment in self._attachments:
                attachment.module.save(os.fspath(output_dir or self.args.output_dir), state_dict)

    def _load_attachments(self, directory: str) -> None:
        for attachment in self._attachments:
            attachment.module.load(directory)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: PreTrainedModel | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self.is_fsdp_enabled:
            self._load_attachments(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        # DeepSpeed and FSDP restore the whole model; elsewhere the host reads its own file only.
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            self._load_attachments(str(self.state.best_model_checkpoint))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # They live in files of their own; the host would report them as missing from its own.
        names, missing = {attachment.module.name for attachment in self._attachments}, load_result.missing_keys
        missing[:] = [key for key in missing if names.isdisjoint(key.split("."))]
        super()._issue_warnings_after_load(load_result)


def check_fsdp(plugin: FullyShardedDataParallelPlugin, *, adapters: bool) -> None:
    """See that FSDP can run and save attachments.

    Args:
        plugin: accelerate's settings.
        adapters: Whether PEFT adapters are trained.

    Raises:
        ValueError: For FSDP1, and for sharded checkpoints of adapters.
    """
    if plugin.fsdp_version != 2:
        raise ValueError(
            "FSDP1 flattens parameters, so that heads and value models cannot run or be averaged outside the model's "
            "forward. Use FSDP2: fsdp_config={'version': 2} (transformers' default), fsdp_version: 2 in a config of "
            "accelerate."
        )
    if adapters and plugin.state_dict_type != StateDictType.FULL_STATE_DICT:
        raise ValueError(
            f"With adapters, accelerate writes nothing else into a checkpoint of type {plugin.state_dict_type.name}, "
            "so heads or value model would be lost. Set state_dict_type to FULL_STATE_DICT in fsdp_config."
        )


def _split_groups(optimizer: torch.optim.Optimizer, module: nn.Module, learning_rate: float) -> None:
    """Move the parameters of a module into groups with a learning rate of their own."""
    ours = {id(p) for p in module.parameters()}
    for group in list(optimizer.param_groups):
        mine = [p for p in group["params"] if id(p) in ours]
        if mine:
            group["params"] = [p for p in group["params"] if id(p) not in ours]
            optimizer.add_param_group({**group, "params": mine, "lr": learning_rate})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def find_saved_heads(model: Any, args: Any) -> str | None:
    """Directory of saved heads that a run should start from: the one given, or the model's own."""
    if args.mtp_heads_path is not None:
        MTPHeads.check_saved(args.mtp_heads_path)
        return args.mtp_heads_path
    if not isinstance(model, str):
        return None
    return MTPHeads.find(model, revision=(args.model_init_kwargs or {}).get("revision"))


def attach_heads(trainer: AttachmentTrainer, saved_heads: str | None) -> MTPHeads:
    """Give a trainer's model the MTP heads that its options describe: those it has, saved ones, or new ones.

    Raises:
        ValueError: If those that there are do not fit the options.
    """
    args = trainer.args
    heads = MTPHeads.prepare(
        trainer.model, args.num_mtp_heads, inner_size=args.mtp_inner_size, path=saved_heads, seed=args.seed
    )
    trainer._attach(heads, args.head_learning_rate)
    return heads
