"""SFT's trainer with MTP value heads."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.data_utils import get_dataset_column_names

from rl_plugins.functional.alignment import predicted_mask
from rl_plugins.nn.mtp_heads import MTPHeads
from rl_plugins.nn.sharding import announce_loss
from rl_plugins.nn.sources import check_trainable_dtype
from rl_plugins.nn.target_heads import PolyakTarget
from rl_plugins.signals.head_critic import HeadCritic
from rl_plugins.signals.metrics import gradient_metrics
from rl_plugins.signals.options import SFTHeadOptions, ValueOptions
from rl_plugins.signals.supervised import HeadsAlong, check_row_reward, row_rewards
from rl_plugins.trl.attachments import TrainedAttachments, parameters_without
from rl_plugins.trl.callbacks import AfterStep
from rl_plugins.trl.card_text import Method, head_papers, heads_loading
from rl_plugins.trl.checkpoints import STATE_NAME, RenamedWeights, check_start, checkpoint_folder
from rl_plugins.trl.configs import MTPSFTConfig
from rl_plugins.trl.host import log_metrics
from rl_plugins.trl.inputs import check_callback, check_inputs, complete_args
from rl_plugins.trl.model_card import write_model_card
from rl_plugins.trl.router_loss import connect_balancing

REWARD_COLUMN = "reward"


class RewardCollator:
    """Adds the rewards of scored examples to the batch of another collator.

    Args:
        collator: Makes the batch of tokens.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate, and stack the `reward` column (B,) where every example has one; `None` becomes NaN."""
        batch = self.collator(examples)
        if all(REWARD_COLUMN in example for example in examples):
            batch[REWARD_COLUMN] = row_rewards([example[REWARD_COLUMN] for example in examples])
        return batch


def with_head_options(args: Any) -> Any:
    """Complete `TrainingArguments` or an `SFTConfig` to an `MTPSFTConfig`, as TRL's trainer completes
    `TrainingArguments`; anything else is returned unchanged."""
    if not isinstance(args, TrainingArguments) or isinstance(args, MTPSFTConfig):
        return args
    options = args.to_dict()
    options |= {name: getattr(args, name) for name in options if name.endswith("_token")}  # which to_dict hides
    known = {field.name for field in fields(MTPSFTConfig) if field.init}
    return MTPSFTConfig(**options) if known >= options.keys() else args


class MTPSFTTrainer(SFTTrainer):
    r"""
    Trainer for supervised fine-tuning that also trains multi-token-prediction value heads.

    `L = L_token + lambda_1 L_MTP (+ lambda_2 L_TD)`. A model without heads gets new ones; the trunk is trained or
    frozen. If the dataset has a column `reward` (a number per example, paid at its last token), the value heads learn
    to forecast it, which pretrains the critic (VC-PPO, 2503.01491). Examples whose reward is `None`, NaN or infinite
    teach no values.

    With `mtp_head_type="sequential"` the heads are decoder layers (DeepSeek-V3, 2412.19437). The heads with which
    DeepSeek-V3 and GLM-4.5 were released are trained further. After `save_model`, `generate(use_mtp=True)` of
    transformers drafts with such heads.

    Takes the arguments of [`~trl.SFTTrainer`], with an [`MTPSFTConfig`] for `args`; an [`~trl.SFTConfig`] or
    [`~transformers.TrainingArguments`] is completed with the defaults of the heads.

    Raises:
        TypeError: If `args` is none of these.
        ValueError: If the model has no LM head, its heads do not fit the config, scored examples are packed, or a
            frozen trunk leaves nothing to train.
    """

    _tag_names = ["trl", "mtp-sft"]
    _name = "MTPSFT"

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        args: MTPSFTConfig | SFTConfig | TrainingArguments | None = None,
        *host_args: Any,
        **host_kwargs: Any,
    ) -> None:
        args = complete_args(with_head_options(args), MTPSFTConfig, model)
        self.critic = HeadCritic(SFTHeadOptions.of(args), ValueOptions.of(args))
        self.critic.prepare(model, args.model_init_kwargs)
        self._along = HeadsAlong(self.critic)
        given = inspect.signature(super().__init__).bind(model, args, *host_args, **host_kwargs)
        check_inputs(given.arguments, args)
        super().__init__(model, args, *host_args, **host_kwargs)
        if not self.is_deepspeed_enabled:  # DeepSpeed's engine keeps float32 copies
            check_trainable_dtype(self.model)
        self._attached, self._renamed = TrainedAttachments(self), RenamedWeights(self)
        self._attached.add(self._along.attach(self.model, seed=args.seed), args.head_learning_rate)
        connect_balancing(self)
        self.critic.copy()
        self.critic.place(self.accelerator.device)
        self.add_callback(AfterStep(self.critic.follow))
        if REWARD_COLUMN in get_dataset_column_names(self.train_dataset):
            self.data_collator: Any = RewardCollator(self.data_collator)
        elif args.freeze_trunk and not args.mtp_loss_coef:
            raise ValueError(
                "freeze_trunk=True with mtp_loss_coef=0 and no `reward` column leaves nothing to train. Set "
                "mtp_loss_coef > 0, or add rewards to the dataset."
            )

    def describe_method(self) -> Method:
        """Say which heads were trained, for the card of the model."""
        scored = isinstance(self.data_collator, RewardCollator)
        parts = [head_papers(self.mtp_heads)]
        if scored:
            parts.append(("The heads learnt the values of scored examples.", ("vc_ppo",)))
        name = "heads on a frozen trunk" if self.args.freeze_trunk else "supervised fine-tuning with heads"
        return Method(name, parts=tuple(parts), code=(heads_loading(with_values=scored),))

    def create_model_card(self, model_name: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Write the card of the model, with method, papers and the code that loads it, see [`write_model_card`]."""
        write_model_card(self, self.describe_method(), super().create_model_card, model_name, *args, **kwargs)

    @property
    def mtp_heads(self) -> MTPHeads:
        """The heads, which are a submodule of the model."""
        return self.critic.training.heads

    @property
    def polyak_target(self) -> PolyakTarget | None:
        """The slow heads."""
        return self.critic.polyak_target

    def add_callback(self, callback: Any) -> None:
        """Add a callback, if it is one of transformers' `Trainer`.

        Raises:
            TypeError: If it is a callback of another host, such as Lightning.
        """
        check_callback(callback)
        super().add_callback(callback)

    # Methods of the protocol `rl_plugins.signals.host.Ranks`

    @property
    def device(self) -> torch.device:
        """Device of this rank."""
        return self.accelerator.device

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        """Sum a tensor over all ranks."""
        return self.accelerator.reduce(x, reduction="sum")

    # Data

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if REWARD_COLUMN not in self._signature_columns:
            self._signature_columns.append(REWARD_COLUMN)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: MTPSFTConfig, packing: bool, *rest: Any, **kwargs: Any
    ) -> Any:
        has_rewards = REWARD_COLUMN in get_dataset_column_names(dataset)
        if has_rewards:  # before rows are packed, tokenized or trained on
            first = next(iter(dataset), None)
            check_row_reward(None if first is None else first[REWARD_COLUMN])
        if (packing or self.padding_free) and has_rewards:
            raise ValueError(
                "The dataset has a `reward` column, but packing and padding_free put several examples into one row, "
                "so a reward would lose its example. Set packing=False and padding_free=False, or drop the column."
            )
        return super()._prepare_dataset(dataset, processing_class, args, packing, *rest, **kwargs)

    # Training

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train the model, or with `freeze_trunk` the heads only, after a check of launcher and checkpoint.

        Raises:
            FileNotFoundError: If the checkpoint is not there, or was written by another trainer.
            ValueError: If DeepSpeed is asked for in a process that no launcher has started.
        """
        check_start(self, resume_from_checkpoint, self._own_files())
        with self._frozen_trunk() if self.args.freeze_trunk else nullcontext():
            return super().train(resume_from_checkpoint, *args, **kwargs)

    @contextmanager
    def _frozen_trunk(self) -> Iterator[None]:
        """Freeze the trunk inside the block only: the next trainer of this model would not train a frozen trunk."""
        frozen = parameters_without(self.model, self._attached.names)
        for param in frozen:
            param.requires_grad_(False)
        try:
            yield
        finally:
            for param in frozen:
                param.requires_grad_(True)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the host's loss plus the heads' losses, from one forward pass."""
        rewards = inputs.pop(REWARD_COLUMN, None)
        num_items = self._num_items(inputs, num_items_in_batch)
        with self._along.learning(inputs, rewards, num_items) as run:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = result if return_outputs else (result, None)
        term, metrics = self._along.loss(run, inputs, rewards, num_items, self)
        announce_loss(self.model, term)
        log_metrics(self, metrics)
        return (loss + term, outputs) if return_outputs else loss + term

    def _num_items(self, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        """Count the tokens that the losses are averaged over, as the host does for its own loss."""
        if num_items_in_batch is None:
            return predicted_mask(inputs["labels"]).sum().clamp(min=1)
        items = torch.as_tensor(num_items_in_batch, device=inputs["labels"].device).clamp(min=1)
        return items / self.accelerator.num_processes if self.args.average_tokens_across_devices else items

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the host's step, then log how large the value gradient was in the backward pass."""
        loss = super().training_step(*args, **kwargs)
        totals = self.critic.gradient_totals(self)
        if totals is not None:
            log_metrics(self, gradient_metrics(totals))
        return loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the host's optimizer, then move attached modules into groups with learning rates of their own."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if fresh:
            self._attached.split_groups(optimizer)
        return optimizer

    # Checkpoints

    def _own_files(self) -> dict[str, bool]:
        """Return the files that this trainer writes into a checkpoint, and whether they have to be there."""
        return {**self._attached.files(), STATE_NAME: True}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:
            torch.save(self.critic.state_dict(), checkpoint_folder(self, trial) / STATE_NAME)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # Called on every backend, while DeepSpeed skips _load_from_checkpoint.
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            path = Path(checkpoint) / STATE_NAME
            self.critic.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        # A copy, since save_pretrained deletes our keys from the dictionary that it is given.
        super()._save(output_dir, state_dict=None if state_dict is None else dict(state_dict))
        self._attached.save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._renamed.load(resume_from_checkpoint)
        self._attached.load_checkpoint(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._renamed.load(str(self.state.best_model_checkpoint))
        self._attached.load_best(str(self.state.best_model_checkpoint))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        self._attached.forgive(load_result.missing_keys)
        if not self._renamed.found(load_result):
            super()._issue_warnings_after_load(load_result)
