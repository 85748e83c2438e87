"""Supervised fine-tuning with MTP value heads, in Lightning."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rl_plugins.functional.alignment import predicted_mask
from rl_plugins.lightning.language import LanguageCallback, LanguageTraining, log_metrics, window_counts
from rl_plugins.lightning.models import load_language_model, load_tokenizer
from rl_plugins.lightning.prompts import Row, rows_of
from rl_plugins.lightning.ranks import mean_over_ranks, sum_over_ranks
from rl_plugins.nn.attachment import base_model_of
from rl_plugins.nn.mtp_heads import MTPHeads
from rl_plugins.nn.sources import check_language_model
from rl_plugins.nn.target_heads import PolyakTarget
from rl_plugins.rollouts.reward_models import is_conversational
from rl_plugins.rollouts.rewards import prompt_tokens
from rl_plugins.signals.checks import check_at_least, check_head_reach
from rl_plugins.signals.head_critic import HeadCritic
from rl_plugins.signals.metrics import Metrics
from rl_plugins.signals.options import SFTHeadOptions, ValueOptions, split_options
from rl_plugins.signals.supervised import HeadsAlong, check_row_reward, row_rewards


class MTPSFTModule(LightningModule):
    r"""Supervised fine-tuning that trains multi-token-prediction value heads along the way.

    `L = L_token + lambda_1 L_MTP (+ lambda_2 L_TD)`. Where rows have a `reward` (a number, paid at
    the last token), the value heads learn to forecast it: value pretraining of the critic (VC-PPO, 2503.01491). With
    `mtp_head_type="sequential"` the heads are decoder layers (DeepSeek-V3, 2412.19437). If the model was released with
    such heads, like DeepSeek-V3 and GLM-4.5, these are trained further. After `save_pretrained`, transformers'
    `generate(use_mtp=True)` drafts with them.

    A batch is a list of rows with `prompt` and `completion` (text or messages), or with `text`. It may also be a
    dictionary of tensors `input_ids`, `attention_mask`, `labels` (B, L), and perhaps `reward` (B,), NaN for none.

    ```python
    from lightning.pytorch import Trainer
    from rl_plugins.lightning import MTPSFTModule, PromptDataModule

    module = MTPSFTModule("Qwen/Qwen3-0.6B")
    Trainer(max_epochs=1).fit(module, PromptDataModule(demonstrations, batch_size=16))
    ```

    Args:
        model: See [`RLModule`]. Heads attached to it, or saved beside its weights, are trained on.
        tokenizer: See [`RLModule`].
        heads: The heads.
        values: Value targets and value loss.
        max_length: Longest row in tokens; longer rows are cut.
        completion_only: Leave the tokens of prompts out of the loss.
        freeze_trunk: Train the heads only.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Of AdamW; biases and norms are left out.
        lr_scheduler_type: Name of a schedule, see [`RLModule`].
        warmup_steps: Optimizer steps of linear warm-up.
        gradient_checkpointing: Recompute activations in the backward pass.
        model_init_kwargs: For loading a model by its name.
        options: Fields of `heads` and `values`.

    Raises:
        TypeError: If the model is not a transformers model, or a setting does not exist.
        ValueError: If the model has no LM head, its heads do not match the options, or a setting is out of range.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        *,
        heads: SFTHeadOptions = SFTHeadOptions(),  # noqa: B008  # frozen
        values: ValueOptions = ValueOptions(),  # noqa: B008
        max_length: int = 1024,
        completion_only: bool = True,
        freeze_trunk: bool = False,
        learning_rate: float = 2e-5,
        weight_decay: float = 0.0,
        lr_scheduler_type: str = "linear",
        warmup_steps: int = 0,
        gradient_checkpointing: bool = False,
        model_init_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        made = split_options(options, heads=heads, values=values)
        heads, values = made["heads"], made["values"]
        if options:
            raise TypeError(f"{type(self).__name__} has no argument {', '.join(options)}.")
        self.language = LanguageTraining(
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            lr_scheduler_type=lr_scheduler_type,
            warmup_steps=warmup_steps,
        )
        check_at_least(2, max_length=max_length)
        check_head_reach(heads.num_mtp_heads, max_length - 1, "max_length - 1")
        self.max_length, self.completion_only = max_length, completion_only
        check_language_model(model, model_init_kwargs)  # before saved heads are looked for
        self.critic = HeadCritic(heads, values)
        self.critic.prepare(model, model_init_kwargs)
        self.along = HeadsAlong(self.critic)
        self.model = load_language_model(model, model_init_kwargs)
        self.tokenizer = load_tokenizer(tokenizer, model)
        if gradient_checkpointing:
            base_model_of(self.model).gradient_checkpointing_enable({"use_reentrant": False})
        if freeze_trunk:
            self.model.requires_grad_(False)
        self.language.attached.append((self.along.attach(self.model), heads.head_learning_rate))

    @property
    def mtp_heads(self) -> MTPHeads:
        """The heads, which are a submodule of the model."""
        return self.critic.training.heads

    @property
    def polyak_target(self) -> PolyakTarget | None:
        """The slow heads; `None` before a Trainer has set the module up."""
        return self.critic.polyak_target

    def configure_callbacks(self) -> list[Callback]:
        """Return the `LanguageCallback` that the module needs, which Lightning adds to the Trainer's callbacks."""
        return [LanguageCallback()]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Group the trainable parameters by learning rate and weight decay, for AdamW or an optimizer of your own."""
        return self.language.parameter_groups(self)

    def configure_optimizers(self) -> Any:
        """Make AdamW, and a schedule that changes the learning rate after each optimizer step. Override this method
        for an optimizer of your own."""
        return self.language.configure_optimizers(self)

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        """Sum a tensor over all ranks."""
        return sum_over_ranks(x)

    # Batches

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Make tokens, mask and labels (B, L) of rows, padded on the right; `reward` (B,) where every row has one."""
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
            batch["reward"] = row_rewards([row["reward"] for row in rows])
        return {name: column.to(self.device) for name, column in batch.items()}

    def _tokens(self, rows: Sequence[Row]) -> tuple[list[int], list[list[int]]]:
        """Return, for each row, the number of first tokens that the loss leaves out, and all tokens."""
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
        """Make tensors of a batch, in whichever form the loader gives it."""
        if isinstance(batch, Mapping) and "input_ids" in batch:
            return dict(batch)
        if isinstance(batch, Mapping):
            return self.collate(rows_of({"prompt": [""] * len(next(iter(batch.values()))), **batch}))
        return self.collate(batch)

    # Loss

    def _counts(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Count the tokens with a label, the real tokens, and the rows (3,)."""
        labelled, real = predicted_mask(inputs["labels"]).sum(), inputs["attention_mask"].sum()
        return torch.stack([labelled, real, real.new_tensor(len(inputs["labels"]))]).float().to(self.device)

    def _num_items(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Count the tokens that the losses are averaged over: those of the accumulation window, per rank and
        micro-batch."""
        own = self._counts(inputs)
        items, real, rows = window_counts(self, own, lambda batch: self._counts(self.tensors(batch)))
        self.language.router_weights = own[1] / real.clamp(min=1e-9), own[2] / rows
        return items.clamp(min=1e-9)

    def loss(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Metrics]:
        """Compute the loss on one batch of tensors, and its metrics (0-d, over all ranks)."""
        rewards, num_items = inputs.get("reward"), self._num_items(inputs)
        if rewards is not None and rewards.ndim != 1:
            check_row_reward(rewards[0].tolist())
        with self.along.learning(inputs, rewards, num_items) as run:
            loss, metrics = self._own_loss(inputs, num_items)
        term, learnt = self.along.loss(run, inputs, rewards, num_items, self)
        metrics.add(learnt)
        return loss + term, metrics

    def _own_loss(self, inputs: Mapping[str, Tensor], num_items: Tensor) -> tuple[Tensor, Metrics]:
        """Compute the model's own token loss, in the forward pass in which the heads run as well."""
        mask = predicted_mask(inputs["labels"])
        output = self.model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            labels=inputs["labels"],
            num_items_in_batch=num_items,
            use_cache=False,
        )
        accuracy = _accuracy(output.logits, inputs["labels"], mask)
        total, tokens = sum_over_ranks(torch.stack([output.loss.detach() * num_items, mask.sum()]).float())
        return output.loss, Metrics({"token_loss": total / tokens.clamp(min=1.0), "mean_token_accuracy": accuracy})

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Compute the loss on one batch, and log it."""
        inputs = self.tensors(batch)
        loss, metrics = self.loss(inputs)
        self.language.log_step(self, loss, metrics, sum_over_ranks(predicted_mask(inputs["labels"]).sum()))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss and the metrics of a batch, without learning from it."""
        loss, metrics = self.loss(self.tensors(batch))
        log_metrics(self, {"loss": mean_over_ranks(loss), **metrics}, prefix="eval_", shown=("loss",))

    # Checkpoints

    def draft_state(self) -> dict[str, Any]:
        """Return no state: fine-tuning drafts nothing."""
        return {}

    def load_draft_state(self, state: dict[str, Any]) -> None:
        """Ignore the state: fine-tuning drafts nothing."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the state of every rank, the state that they share, and the shapes of all parameters."""
        shared = self.critic.state_dict()
        self.language.save_checkpoint(self, checkpoint, {}, shared)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits, and keep the state of every rank until training continues.

        Raises:
            ValueError: If the checkpoint was written by another module or for another architecture.
        """
        shared = self.language.load_checkpoint(self, checkpoint)
        if self._trainer is not None and shared:
            self.critic.load_state_dict(shared)

    def on_train_start(self) -> None:
        """Restore the random state of a checkpoint."""
        self.language.take_resumed(self)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write model and tokenizer as transformers does, and the attached modules beside them. TRL and
        `AutoModelForCausalLM.from_pretrained` can read the folder. Call this method on all ranks; rank 0 writes."""
        self.language.save_pretrained(self, directory)


@torch.no_grad()
def _accuracy(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Return the share of the labels of all ranks that are the model's most probable token."""
    right = (logits[:, :-1].argmax(-1) == labels[:, 1:]) & mask
    counts = sum_over_ranks(torch.stack([right.sum(), mask.sum()]).float())
    return counts[0] / counts[1].clamp(min=1.0)
