"""A critic's module: attached to the policy, trained by the same engine, saved beside it."""

import os
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rl_plugins.objectives.critic import value_loss, value_losses
from rl_plugins.trl.base import PluginTrainer


class CriticModuleTrainer(PluginTrainer):
    """Life cycle of a critic that is a submodule of the policy, trained with it and kept out of its checkpoint: MTP
    heads, or a whole value model.

    It is attached after the host's `__init__`, so that PEFT and the fused LM head are in place, and before
    `accelerator.prepare`, so that it is optimised and sharded with the rest.

    Subclasses name the submodule and say how it is written and read.
    """

    critic_attribute: str
    """Name of the submodule in the policy."""

    @property
    @abstractmethod
    def critic_module(self) -> nn.Module | None:
        """The submodule; `None` while there is none."""

    @property
    @abstractmethod
    def critic_learning_rate(self) -> float | None:
        """Its learning rate; `None` for the policy's."""

    @abstractmethod
    def _save_critic(self, directory: str, state_dict: dict[str, Tensor] | None) -> None:
        """Write it into `directory`, from the whole model's `state_dict` where the host gathered one."""

    @abstractmethod
    def _load_critic(self, directory: str) -> None:
        """Read what `_save_critic` wrote."""

    # Loss

    def _value_term(
        self, values: Tensor, returns: Tensor, mask: Tensor, num_items: Tensor, old_values: Tensor
    ) -> Tensor:
        """lambda_2 L_TD of values (B, T, K) with gradient."""
        loss, sums, counts = value_loss(
            values,
            returns,
            mask,
            num_items=num_items,
            loss=value_losses(self.args.value_clip_range)[self.args.value_loss_type],
            old_values=old_values,
        )
        self._log_per_head("critic/value_loss", sums, counts)
        return self.args.value_loss_coef * loss

    # Optimizer

    def _check_optimizer_can_split(self) -> None:
        plugin = self.accelerator.state.deepspeed_plugin
        if plugin is None or self.critic_learning_rate is None:
            return
        if "optimizer" in plugin.deepspeed_config:
            raise ValueError(
                "The DeepSpeed config declares its own optimizer, which cannot give the critic a learning rate of "
                "its own. Remove its `optimizer` section, or set head_learning_rate (MTP heads) or "
                "value_learning_rate (a value model) to None."
            )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the host's optimizer, then move the submodule into groups with its own learning rate."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        module = self.critic_module
        rate = self.critic_learning_rate if module is not None else None
        if fresh and rate is not None:
            assert module is not None
            ours = {id(p) for p in module.parameters()}
            for group in list(optimizer.param_groups):
                mine = [p for p in group["params"] if id(p) in ours]
                if mine:
                    group["params"] = [p for p in group["params"] if id(p) not in ours]
                    optimizer.add_param_group({**group, "params": mine, "lr": rate})
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    # Saving and loading

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        # A copy, since save_pretrained deletes our keys from the dictionary that it is given.
        super()._save(output_dir, state_dict=None if state_dict is None else dict(state_dict))
        # An empty state dict is what the host passes when ZeRO-3 may not gather: the engine's checkpoint has them.
        if self.critic_module is not None and self.args.should_save and state_dict != {}:
            self._save_critic(os.fspath(output_dir or self.args.output_dir), state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: PreTrainedModel | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.critic_module is not None and not self.is_fsdp_enabled:
            self._load_critic(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        # DeepSpeed and FSDP restore the whole model; elsewhere the host reads its own file only.
        if self.critic_module is not None and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            self._load_critic(str(self.state.best_model_checkpoint))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # It lives in its own file; the host would report it as missing from its own.
        missing = load_result.missing_keys
        missing[:] = [key for key in missing if self.critic_attribute not in key.split(".")]
        super()._issue_warnings_after_load(load_result)
