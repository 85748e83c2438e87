"""Attached modules in the policy of a TRL trainer: trained by the trainer's engine, saved beside the policy."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin, is_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import StateDictType

from rl_plugins.nn.attachment import Attachment, base_model_of


class TrainedAttachments:
    """Life cycle of attached modules in a trainer.

    They are attached after the host's `__init__`, so that PEFT and the fused LM head are in place, and before
    `accelerator.prepare`, so that they are optimised and sharded with the rest.

    Args:
        trainer: The trainer, after the host's `__init__`.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.modules: list[tuple[Attachment, float | None]] = []

    def add(self, module: Attachment, learning_rate: float | None) -> None:
        """Add a module that is to be trained, saved and loaded.

        Args:
            module: Attached to the policy.
            learning_rate: Its learning rate; `None` for the policy's.

        Raises:
            ValueError: If the engine cannot train or save it.
        """
        trainer = self.trainer
        plugin = trainer.accelerator.state.deepspeed_plugin
        if plugin is not None and learning_rate is not None and "optimizer" in plugin.deepspeed_config:
            raise ValueError(
                f"The DeepSpeed config declares its own optimizer, which cannot give {module.name} a learning rate of "
                f"{learning_rate}. Remove the section `optimizer` from the DeepSpeed config, or set "
                "head_learning_rate (MTP heads) or value_learning_rate (a value model) to None."
            )
        if trainer.is_fsdp_enabled:
            check_fsdp(trainer.accelerator.state.fsdp_plugin, adapters=is_peft_model(trainer.model))
        if trainer.optimizer is not None:
            raise ValueError(
                f"The optimizer of optimizers=... was made before the policy had {module.name}, and would not train "
                f"{module.name}. Leave out optimizers=..., and set optim, optim_args and the learning rates."
            )
        self.modules.append((module, learning_rate))

    @property
    def names(self) -> set[str]:
        """Names of the modules in the policy."""
        return {module.name for module, _ in self.modules}

    @property
    def _is_sharded(self) -> bool:
        return self.trainer.is_deepspeed_enabled or self.trainer.is_fsdp_enabled

    def split_groups(self, optimizer: torch.optim.Optimizer) -> None:
        """Move the modules' parameters into groups with learning rates of their own."""
        for module, rate in self.modules:
            if rate is not None:
                _split_groups(optimizer, module, rate)

    def files(self) -> dict[str, bool]:
        """Return the files in a checkpoint by which the modules are recognised, and whether they have to be there.
        They need not with DeepSpeed and FSDP, which write all weights into files of their own."""
        return {module.mark: not self._is_sharded for module, _ in self.modules if module.mark is not None}

    def save(self, directory: str | None, state_dict: dict[str, Tensor] | None) -> None:
        """Write the modules beside the policy; `state_dict` holds whole weights, where an engine gathered them."""
        # The host passes an empty one when ZeRO-3 may not gather the weights: the engine's checkpoint has them.
        if self.trainer.args.should_save and state_dict != {}:
            for module, _ in self.modules:
                module.save(os.fspath(directory or self.trainer.args.output_dir), state_dict=state_dict)

    def load(self, directory: str) -> None:
        """Read what `save` wrote."""
        for module, _ in self.modules:
            module.load(Path(directory))

    def load_checkpoint(self, directory: str) -> None:
        """Read the modules of a checkpoint, unless FSDP has restored the whole model."""
        if not self.trainer.is_fsdp_enabled:
            self.load(directory)

    def load_best(self, directory: str) -> None:
        """Read the modules of the best checkpoint, unless an engine has restored the whole model."""
        if not self._is_sharded:
            self.load(directory)

    def forgive(self, missing_keys: list[str]) -> None:
        """Remove keys from the list of those that the host misses in its own file: the keys of the modules, and those
        of tied weights, which a checkpoint has under their other name."""
        tied = getattr(base_model_of(self.trainer.model), "all_tied_weights_keys", {})
        missing_keys[:] = [key for key in missing_keys if self.names.isdisjoint(key.split(".")) and key not in tied]


def parameters_without(model: nn.Module, names: Iterable[str]) -> list[nn.Parameter]:
    """List the trained parameters of a model that belong to none of the named submodules."""
    left_out = set(names)
    named = model.named_parameters()
    return [param for name, param in named if param.requires_grad and left_out.isdisjoint(name.split("."))]


def check_fsdp(plugin: FullyShardedDataParallelPlugin, *, adapters: bool) -> None:
    """Refuse FSDP where it cannot run or save attachments.

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
    ours = {id(p) for p in module.parameters()}
    for group in list(optimizer.param_groups):
        mine = [p for p in group["params"] if id(p) in ours]
        if mine:
            group["params"] = [p for p in group["params"] if id(p) not in ours]
            optimizer.add_param_group({**group, "params": mine, "lr": learning_rate})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
