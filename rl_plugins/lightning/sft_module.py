"""Supervised fine-tuning with MTP value heads, in Lightning."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rl_plugins.functional.alignment import completion_states, mtp_labels, predicted_mask
from rl_plugins.functional.rewards import terminal_rewards
from rl_plugins.lightning.heads import HeadsModule, head_means
from rl_plugins.lightning.prompts import Row, rows_of
from rl_plugins.lightning.ranks import mean_over_ranks, sum_over_ranks
from rl_plugins.nn.head_run import HeadRun
from rl_plugins.nn.target_heads import PolyakTarget
from rl_plugins.rollouts.rewards import is_conversational, prompt_tokens
from rl_plugins.signals.checks import check_at_least, check_choice, check_head_reach, check_unit_interval
from rl_plugins.signals.critic_targets import (
    ESTIMATORS,
    critic_targets,
    rollout_metrics,
    value_loss,
    value_losses,
)
from rl_plugins.signals.native_checks import check_native_settings, check_no_rewards

Metrics = dict[str, Tensor]


class MTPSFTModule(HeadsModule):
    r"""Supervised fine-tuning that trains multi-token-prediction value heads along the way.

    `L = L_token + lambda_1 L_MTP (+ lambda_2 L_TD)`. Where rows have a `reward` (a number, paid at
    the last token), the value heads learn to forecast it: value pretraining of the critic (VC-PPO, 2503.01491). With
    `native_mtp=True`, L_MTP is the loss of the architecture's own MTP layers (DeepSeek-V3, 2412.19437), which
    `generate(use_mtp=True)` of transformers drafts with after `save_pretrained`.

    A batch is a list of rows with `prompt` and `completion` (text or messages), or with `text`; or a dictionary of
    tensors `input_ids`, `attention_mask`, `labels` (B, L), and perhaps `reward` (B,), NaN for none.

    ```python
    from lightning.pytorch import Trainer
    from rl_plugins.lightning import MTPSFTModule, PromptDataModule

    module = MTPSFTModule("Qwen/Qwen3-0.6B")
    Trainer(max_epochs=1).fit(module, PromptDataModule(demonstrations, batch_size=16))
    ```

    Args:
        model: See [`LanguageModule`]. Heads attached to it, or saved beside its weights, are trained on.
        tokenizer: See [`LanguageModule`].
        max_length: Longest row in tokens; what is beyond is cut off.
        completion_only: Leave the tokens of prompts out of the loss.
        num_mtp_heads: See [`MTPCriticModule`], as for the next ones.
        mtp_inner_size: Width of each head's residual block.
        mtp_heads_path: Folder of heads saved by an earlier run.
        head_learning_rate: Learning rate of the heads; `None` for `learning_rate`.
        mtp_loss_coef: lambda_1, weight of the heads' token loss.
        mtp_detach_trunk: Keep the token loss out of the trunk.
        freeze_trunk: Train the heads only.
        native_mtp: Train the architecture's own MTP layers (deepseek_v3, glm4_moe) instead of parallel heads: those
            attached, those of the model's checkpoint, or `num_mtp_heads` new ones. They have no values.
        value_loss_coef: lambda_2, weight of the value loss.
        value_loss_type: `squared`, `clipped` or `huber`.
        value_grad_scale: Factor on the value gradient that enters the trunk.
        value_grad_clip: Largest norm of one token's value gradient into the trunk.
        gamma: Discount factor.
        advantage_estimator: `gae`, `td` or `mc`: how value targets bootstrap.
        lam_value: Lambda of the value targets.
        target_tau: Step of the target heads towards the online heads.
        target_update_every: Copy the online heads every this many optimizer steps instead.
        bootstrap_lookahead: Bootstrap from the mean of all heads' forecasts of the next state.
        kwargs: For [`LanguageModule`].

    Raises:
        TypeError: If the model is no transformers model.
        ValueError: If the model has no LM head, its heads are others than the settings say, or a setting is out of
            range.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        *,
        learning_rate: float = 2e-5,
        max_length: int = 1024,
        completion_only: bool = True,
        num_mtp_heads: int = 2,
        mtp_inner_size: int | None = None,
        mtp_heads_path: str | None = None,
        head_learning_rate: float | None = 1e-4,
        mtp_loss_coef: float = 0.3,
        mtp_detach_trunk: bool = True,
        freeze_trunk: bool = False,
        native_mtp: bool = False,
        value_loss_coef: float = 0.1,
        value_loss_type: str = "squared",
        value_grad_scale: float = 1.0,
        value_grad_clip: float | None = 1.0,
        gamma: float = 1.0,
        advantage_estimator: str = "gae",
        lam_value: float = 1.0,
        target_tau: float = 0.05,
        target_update_every: int | None = None,
        bootstrap_lookahead: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, tokenizer, learning_rate=learning_rate, **kwargs)
        check_at_least(2, max_length=max_length)
        check_head_reach(num_mtp_heads, max_length - 1, "max_length - 1")
        check_choice("advantage_estimator", advantage_estimator, ESTIMATORS)
        check_choice("value_loss_type", value_loss_type, tuple(value_losses()))
        check_unit_interval(gamma=gamma, lam_value=lam_value)
        self.max_length, self.completion_only = max_length, completion_only
        self.value_loss_coef = value_loss_coef
        self.value_loss = value_losses()[value_loss_type]
        self.signal: dict[str, Any] = {
            "estimator": advantage_estimator,
            "gamma": gamma,
            "lam_value": lam_value,
            "lookahead": bootstrap_lookahead,
        }
        if freeze_trunk:
            self.model.requires_grad_(False)
        if native_mtp:
            check_native_settings(mtp_loss_coef, mtp_heads_path)
            self.train_native(
                head_learning_rate=head_learning_rate,
                num_layers=num_mtp_heads,
                token_loss_coef=mtp_loss_coef,
                detach_trunk=mtp_detach_trunk,
            )
            return
        self.train_heads(
            model,
            head_learning_rate=head_learning_rate,
            target_tau=target_tau,
            target_update_every=target_update_every,
            num_heads=num_mtp_heads,
            inner_size=mtp_inner_size,
            heads_path=mtp_heads_path,
            token_loss_coef=mtp_loss_coef,
            detach_trunk=mtp_detach_trunk,
            value_loss_coef=value_loss_coef,
            value_grad_scale=value_grad_scale,
            value_grad_clip=value_grad_clip,
        )

    # Batches

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Tokens, mask and labels (B, L) of rows, padded on the right; `reward` (B,) where every row has one."""
        hidden, tokens = self._tokens(rows)
        width = min(max(map(len, tokens)), self.max_length)
        ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for i, (start, row) in enumerate(zip(hidden, tokens, strict=True)):
            length = min(len(row), width)
            ids[i, :length], mask[i, :length] = torch.tensor(row[:length]), 1
            labels[i, start:length] = ids[i, start:length]
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if all("reward" in row for row in rows):
            rewards = [math.nan if row["reward"] is None else float(row["reward"]) for row in rows]
            batch["reward"] = torch.tensor(rewards)
        return {name: column.to(self.device) for name, column in batch.items()}

    def _tokens(self, rows: Sequence[Row]) -> tuple[list[int], list[list[int]]]:
        """How many tokens of each row are hidden from the loss, and all of its tokens."""
        missing = [row for row in rows if "completion" not in row and "text" not in row]
        if missing:
            raise ValueError(f"A row needs `prompt` and `completion`, or `text`; one has {', '.join(missing[0])}.")
        prompts = [row.get("prompt") or "" for row in rows]
        completions = [row["completion"] if "completion" in row else row["text"] for row in rows]
        if is_conversational(completions[0]):
            chats = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
            tokens = self.tokenizer.apply_chat_template(chats, tokenize=True, return_dict=True)["input_ids"]
        else:
            end = self.tokenizer.eos_token
            texts = [p + c.removesuffix(end) + end for p, c in zip(prompts, completions, strict=True)]
            tokens = self.tokenizer(text=texts)["input_ids"]
        if not self.completion_only or not any(prompts):
            return [0] * len(rows), tokens
        starts = prompt_tokens(self.tokenizer, prompts)
        return [len(start) if prompt else 0 for start, prompt in zip(starts, prompts, strict=True)], tokens

    def tensors(self, batch: Any) -> dict[str, Tensor]:
        """A batch as tensors, whichever way the loader gives it."""
        if isinstance(batch, Mapping) and "input_ids" in batch:
            return dict(batch)
        if isinstance(batch, Mapping):
            return self.collate(rows_of({"prompt": [""] * len(next(iter(batch.values()))), **batch}))
        return self.collate(batch)

    # Loss

    def _counts(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Tokens with a label, real tokens, and rows (3,)."""
        labelled, real = predicted_mask(inputs["labels"]).sum(), inputs["attention_mask"].sum()
        return torch.stack([labelled, real, real.new_tensor(len(inputs["labels"]))]).float().to(self.device)

    def _num_items(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Tokens that the losses are averaged over: those of the accumulation window, per rank and micro-batch."""
        own = self._counts(inputs)
        items, real, rows = self.window_counts(own, lambda batch: self._counts(self.tensors(batch)))
        self.router_weights = own[1] / real.clamp(min=1e-9), own[2] / rows
        return items.clamp(min=1e-9)

    def loss(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Metrics]:
        """The objective on one batch of tensors, and its metrics (0-d, of all ranks)."""
        labels, rewards = inputs["labels"], inputs.get("reward")
        mask = predicted_mask(labels)
        num_items = self._num_items(inputs)
        if self.native_training is not None:
            check_no_rewards(rewards is not None)
            with self.native_training.running(inputs) as run:
                loss, metrics = self._own_loss(inputs, mask, num_items)
            token_term, token_metrics, weights = self.native_training.token_term(run, num_items)
            self.metric_weights |= weights
            return loss + token_term, {**metrics, **token_metrics}
        with self._running(labels, num_items, None if rewards is None else self.polyak_target) as run:
            loss, metrics = self._own_loss(inputs, mask, num_items)
        token_term, token_metrics, weights = self.head_training.token_term(run, num_items)
        self.metric_weights |= weights
        value_term, value_metrics = self._value_term(run, mask, rewards, num_items)
        self.head_training.keep_units(value_term)
        return loss + token_term + value_term, {**metrics, **token_metrics, **value_metrics}

    def _own_loss(self, inputs: Mapping[str, Tensor], mask: Tensor, num_items: Tensor) -> tuple[Tensor, Metrics]:
        """The model's own token loss, in the one forward pass that the heads run in as well."""
        output = self.model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            labels=inputs["labels"],
            num_items_in_batch=num_items,
            use_cache=False,
        )
        accuracy = _accuracy(output.logits, inputs["labels"], mask)
        total, tokens = sum_over_ranks(torch.stack([output.loss.detach() * num_items, mask.sum()]).float())
        return output.loss, {"token_loss": total / tokens.clamp(min=1.0), "mean_token_accuracy": accuracy}

    def _running(
        self, labels: Tensor, num_items: Tensor, target: PolyakTarget | None
    ) -> AbstractContextManager[HeadRun]:
        # The whole row is one completion of its first token.
        select = partial(completion_states, num_tokens=labels.shape[1] - 1)
        tokens = select(mtp_labels(labels, self.mtp_heads.config.num_heads))
        return self.head_training.running(select, tokens, num_items, target=target)

    def _value_term(
        self, run: HeadRun, mask: Tensor, rewards: Tensor | None, num_items: Tensor
    ) -> tuple[Tensor, Metrics]:
        """lambda_2 L_TD on rows with a reward; the state that predicts token p+1 acts where that token has a label."""
        values = run.values
        assert values is not None
        if rewards is None:
            return 0.0 * values.sum(), {}  # keeps the value weights in the graph, which DDP counts on
        old_values = values.detach()
        target_values = old_values if run.target_values is None else run.target_values
        mask = mask & rewards.isfinite().unsqueeze(1)
        terminal = terminal_rewards(rewards.nan_to_num(0.0, 0.0, 0.0), mask)
        targets = critic_targets(terminal, old_values, target_values, mask, **self.signal)
        metrics = rollout_metrics(targets, old_values, target_values, mask, reduce=sum_over_ranks)
        loss, sums, counts = value_loss(
            values, targets.returns, mask, num_items=num_items, loss=self.value_loss, old_values=old_values
        )
        value_metrics, weights = head_means("critic/value_loss", sums, counts)
        scored = dict.fromkeys(metrics, sum_over_ranks(mask.sum().float()))
        self.metric_weights |= {**scored, **weights}
        return self.value_loss_coef * loss, {**metrics, **value_metrics}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One objective on one batch."""
        inputs = self.tensors(batch)
        loss, metrics = self.loss(inputs)
        self.log_step(loss, metrics, sum_over_ranks(predicted_mask(inputs["labels"]).sum()))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """The same without learning."""
        loss, metrics = self.loss(self.tensors(batch))
        self.metric_weights = {}
        self.log_metrics({"loss": mean_over_ranks(loss), **metrics}, prefix="eval_", shown=("loss",))


@torch.no_grad()
def _accuracy(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Share of the tokens of all ranks that the model would have chosen."""
    right = (logits[:, :-1].argmax(-1) == labels[:, 1:]) & mask
    counts = sum_over_ranks(torch.stack([right.sum(), mask.sum()]).float())
    return counts[0] / counts[1].clamp(min=1.0)
