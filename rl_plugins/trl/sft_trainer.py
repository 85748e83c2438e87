"""SFT's trainer with MTP value heads."""

import math
import textwrap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.data_utils import get_dataset_column_names

from rl_plugins.functional.alignment import completion_states, mtp_labels, predicted_mask
from rl_plugins.functional.rewards import terminal_rewards
from rl_plugins.nn.head_run import HeadRun
from rl_plugins.nn.target_heads import PolyakTarget
from rl_plugins.signals.critic_targets import critic_targets, rollout_metrics
from rl_plugins.signals.native_checks import check_no_rewards
from rl_plugins.trl.attachments import find_saved_heads
from rl_plugins.trl.heads_trainer import MTPHeadsTrainer, complete_args
from rl_plugins.trl.sft_config import MTPSFTConfig

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
            rewards = [example[REWARD_COLUMN] for example in examples]
            batch[REWARD_COLUMN] = torch.tensor([math.nan if r is None else r for r in rewards], dtype=torch.float32)
        return batch


def with_head_options(args: Any) -> Any:
    """`TrainingArguments` or an `SFTConfig` as an `MTPSFTConfig`, as the host's trainer converts the former; anything
    else as it is."""
    if not isinstance(args, TrainingArguments) or isinstance(args, MTPSFTConfig):
        return args
    options = args.to_dict()
    options |= {name: getattr(args, name) for name in options if name.endswith("_token")}  # which to_dict hides
    known = {field.name for field in fields(MTPSFTConfig) if field.init}
    return MTPSFTConfig(**options) if known >= options.keys() else args


class MTPSFTTrainer(MTPHeadsTrainer, SFTTrainer):
    r"""
    Supervised fine-tuning that trains multi-token-prediction value heads along the way.

    `L = L_token + lambda_1 L_MTP (+ lambda_2 L_TD)`. Gives heads to a model that has none, with
    the trunk trained or frozen. Where the dataset has a column `reward` (a number per example, paid at its last
    token), the value heads learn to forecast it: value pretraining of the critic (VC-PPO, 2503.01491). Examples whose
    reward is `None`, NaN or infinite teach no values.

    With `native_mtp=True`, L_MTP is the loss of the architecture's own MTP layers (DeepSeek-V3, 2412.19437), which
    `generate(use_mtp=True)` of transformers drafts with after `save_model`.

    Takes the arguments of [`~trl.SFTTrainer`], with an [`MTPSFTConfig`] for `args`; an [`~trl.SFTConfig`] or
    [`~transformers.TrainingArguments`] is completed with the defaults of the heads.

    Raises:
        TypeError: If `args` is none of these.
        ValueError: If the model has no LM head, its heads do not fit the config, scored examples are packed or meet
            native layers, or a frozen trunk leaves nothing to train.
    """

    _tag_names = ["trl", "mtp-sft"]
    _name = "MTPSFT"
    _paper = {
        "title": "Better & Faster Large Language Models via Multi-token Prediction",
        "id": "2404.19737",
        "citation": textwrap.dedent("""\
            @inproceedings{gloeckle2024better,
                title     = {{Better \\& Faster Large Language Models via Multi-token Prediction}},
                author    = {Fabian Gloeckle and Badr Youbi Idrissi and Baptiste Rozi{\\`e}re and others},
                year      = 2024,
                booktitle = {International Conference on Machine Learning},
                eprint    = {arXiv:2404.19737},
            }"""),
    }

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        args: MTPSFTConfig | SFTConfig | TrainingArguments | None = None,
        *host_args: Any,
        **host_kwargs: Any,
    ) -> None:
        args = complete_args(with_head_options(args), MTPSFTConfig, model, "MTPSFT")
        saved_heads = None if args.native_mtp else find_saved_heads(model, args)
        super().__init__(model, args, *host_args, **host_kwargs)
        if args.native_mtp:
            self._set_up_native()
        else:
            self._set_up_heads(saved_heads)
        if REWARD_COLUMN in get_dataset_column_names(self.train_dataset):
            self.data_collator: Any = RewardCollator(self.data_collator)
        elif args.freeze_trunk and not args.mtp_loss_coef:
            raise ValueError(
                "freeze_trunk=True with mtp_loss_coef=0 and no `reward` column leaves nothing to train. Set "
                "mtp_loss_coef > 0, or add rewards to the dataset."
            )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, the heads only where `freeze_trunk` says so."""
        with self._frozen_trunk() if self.args.freeze_trunk else nullcontext():
            return super().train(*args, **kwargs)

    @contextmanager
    def _frozen_trunk(self) -> Iterator[None]:
        """Thawed again afterwards: the next trainer that is handed this model would not learn with it, nor say so."""
        names = {attachment.module.name for attachment in self._attachments}
        frozen = [
            param
            for name, param in self.model.named_parameters()
            if param.requires_grad and names.isdisjoint(name.split("."))
        ]
        for param in frozen:
            param.requires_grad_(False)
        try:
            yield
        finally:
            for param in frozen:
                param.requires_grad_(True)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if REWARD_COLUMN not in self._signature_columns:
            self._signature_columns.append(REWARD_COLUMN)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: MTPSFTConfig, packing: bool, *rest: Any, **kwargs: Any
    ) -> Any:
        has_rewards = REWARD_COLUMN in get_dataset_column_names(dataset)
        if args.native_mtp:
            check_no_rewards(has_rewards)
        if (packing or self.padding_free) and has_rewards:
            raise ValueError(
                "The dataset has a `reward` column, but packing and padding_free put several examples into one row, "
                "so a reward would lose its example. Set packing=False and padding_free=False, or drop the column."
            )
        return super()._prepare_dataset(dataset, processing_class, args, packing, *rest, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Host loss plus the heads' losses on the same forward pass."""
        rewards = inputs.pop(REWARD_COLUMN, None)
        num_items = self._num_items(inputs, num_items_in_batch)
        if self.native_mtp is not None:
            running = self._running_native(inputs)
        else:
            running = self._running(inputs, num_items, None if rewards is None else self.polyak_target)
        with running as run:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = result if return_outputs else (result, None)
        loss = loss + self._token_term(run, num_items)
        if run.values is not None:
            loss = loss + self._scored_term(run, inputs, rewards, num_items)
        return (loss, outputs) if return_outputs else loss

    def _num_items(self, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        """Tokens that the losses are averaged over, as the host counts them for its own."""
        if num_items_in_batch is None:
            return predicted_mask(inputs["labels"]).sum().clamp(min=1)
        items = torch.as_tensor(num_items_in_batch, device=inputs["labels"].device).clamp(min=1)
        return items / self.accelerator.num_processes if self.args.average_tokens_across_devices else items

    def _running(
        self, inputs: dict[str, Any], num_items: Tensor, target: PolyakTarget | None
    ) -> AbstractContextManager[HeadRun]:
        # The whole row is one completion of its first token.
        select = partial(completion_states, num_tokens=inputs["labels"].shape[1] - 1)
        labels = None
        if self.args.mtp_loss_coef:
            labels = select(mtp_labels(inputs["labels"], self.args.num_mtp_heads, inputs.get("position_ids")))
        return self._running_heads(select, labels, num_items, self.args.value_grad_scale, target)

    def _scored_term(self, run: HeadRun, inputs: dict[str, Any], rewards: Tensor | None, num_items: Tensor) -> Tensor:
        """lambda_2 L_TD on scored examples; the state that predicts token p+1 acts where that token has a label."""
        values, target_values = run.values, run.target_values
        assert values is not None
        if rewards is None or target_values is None:
            return 0.0 * values.sum()  # keeps the value weights in the graph, which DDP counts on
        mask = predicted_mask(inputs["labels"]) & rewards.isfinite().unsqueeze(1)
        old_values = values.detach()
        targets = critic_targets(
            terminal_rewards(rewards.nan_to_num(0.0, 0.0, 0.0), mask),
            old_values,
            target_values,
            mask,
            estimator=self.args.advantage_estimator,
            gamma=self.args.gamma,
            lam_value=self.args.lam_value,
            lookahead=self.args.bootstrap_lookahead,
        )
        self._log_metrics(rollout_metrics(targets, old_values, target_values, mask, reduce=self._sum_over_ranks))
        return self._value_term(values, targets.returns, mask, num_items, old_values)
