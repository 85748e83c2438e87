"""What our LightningModules for language models share: model, optimizer, checkpoints, export."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from rl_plugins.lightning.accumulation import (
    WindowMeans,
    batches_ahead,
    check_windows_fit,
    ends_window,
    lookahead,
    micro_step,
    window_size,
)
from rl_plugins.lightning.models import (
    check_same_shapes,
    is_model_folder,
    load_language_model,
    load_tokenizer,
    parameter_shapes,
)
from rl_plugins.lightning.ranks import gather_objects, mean_over_ranks, rank, sum_over_ranks, world_size
from rl_plugins.nn.attachment import base_model_of
from rl_plugins.nn.sharding import whole_parameters
from rl_plugins.nn.sources import check_trainable_dtype
from rl_plugins.signals.checks import check_at_least

STATE = "rl_plugins"
"""Key of our own state in Lightning's checkpoints."""

# What transformers' Trainer leaves out of weight decay.
UNDECAYED = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


class CheckpointAdvice(Callback):
    """Notes on the error of a run that was given a model's folder as `ckpt_path` how to start from it.

    Lightning reads the checkpoint before any hook that knows its path.
    """

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Called for whatever stops a run."""
        path = trainer.ckpt_path
        if isinstance(exception, Exception) and path is not None and is_model_folder(path):
            exception.add_note(
                f"ckpt_path={str(path)!r} is no checkpoint of Lightning: it is a model, or was written by another "
                f"trainer. Start from it with {type(pl_module).__name__}(model={str(path)!r}) instead of ckpt_path."
            )


class LanguageModule(LightningModule):
    """A Hugging Face causal language model with an optimizer, exact checkpoints and export to `save_pretrained`.

    Args:
        model: The model, a PEFT model around one, or a folder or hub id.
        tokenizer: Its tokenizer; by default that of the model's folder or hub id.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Of AdamW; biases and norms are left out.
        lr_scheduler_type: Name of a schedule of transformers' `get_scheduler`: `linear`, `cosine`, `constant`, ...
        warmup_steps: Optimizer steps of linear warm-up.
        gradient_checkpointing: Recompute activations in the backward pass, to save memory.
        model_init_kwargs: For loading a model by its name, such as `{"dtype": "bfloat16"}`; float32 by default.
        unknown: Nothing; an argument that no module has is refused.

    Raises:
        TypeError: If `model` is no transformers model, a setting is no number, or there is no such setting.
        FileNotFoundError: If there is no model of that name.
        ValueError: If the model has no LM head or is an encoder-decoder, or a setting is out of range.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        *,
        learning_rate: float = 1e-6,
        weight_decay: float = 0.0,
        lr_scheduler_type: str = "linear",
        warmup_steps: int = 0,
        gradient_checkpointing: bool = False,
        model_init_kwargs: dict[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            presets = " Presets are TRL's hosts': GRPOVariantConfig and PPOConfig of rl_plugins.trl have them. Here, "
            presets += "name the advantage and the policy_loss."
            raise TypeError(
                f"{type(self).__name__} has no argument {', '.join(unknown)}.{presets if 'preset' in unknown else ''}"
            )
        check_at_least(0, learning_rate=learning_rate, weight_decay=weight_decay, warmup_steps=warmup_steps)
        self.model = load_language_model(model, model_init_kwargs)
        self.tokenizer = load_tokenizer(tokenizer, model)
        if gradient_checkpointing:
            base_model_of(self.model).gradient_checkpointing_enable({"use_reentrant": False})
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.lr_scheduler_type, self.warmup_steps = lr_scheduler_type, warmup_steps
        self._resumed: dict[str, Any] | None = None
        self._dice: dict[str, Any] = {}
        self.metric_weights: dict[str, Tensor] = {}
        self.router_weights: tuple[Tensor, Tensor] | None = None
        self._means = WindowMeans()
        self._share_of_loss: Tensor | float = 0.0

    def setup(self, stage: str) -> None:
        """See that strategy and precision can train the module.

        Raises:
            TypeError: Under Lightning's `FSDPStrategy`, or `ModelParallelStrategy` without a `configure_model`.
            ValueError: If weights are to be trained in float16 without a float32 copy.
        """
        strategy = self.trainer.strategy
        sharded = isinstance(strategy, ModelParallelStrategy) and not is_overridden("configure_model", self)
        if sharded or isinstance(strategy, FSDPStrategy):
            raise TypeError(
                f"{type(self).__name__} does not run under {type(strategy).__name__}: it generates, and reads heads "
                'and targets, outside the forward that Lightning shards. Use strategy="deepspeed_stage_3", or TRL\'s '
                "trainers with FSDP2."
            )
        if stage == "fit" and not isinstance(strategy, DeepSpeedStrategy):
            if self.trainer.precision == "16-true":
                raise ValueError(
                    "precision='16-true' trains float16 weights without a float32 copy, whose small updates vanish. "
                    "Use precision='bf16-mixed' or '16-mixed', or DeepSpeed."
                )
            check_trainable_dtype(self)

    # Optimizer

    def learning_rates(self) -> dict[str, float | None]:
        """Learning rates of submodules by the prefix of their parameters' names; `None` for `learning_rate`."""
        return {}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Trainable parameters, grouped by learning rate and weight decay."""
        decayed = set(get_parameter_names(self, [nn.LayerNorm, nn.RMSNorm], UNDECAYED))
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, param in self.named_parameters():
            if param.requires_grad:
                rates = [r for prefix, r in self.learning_rates().items() if f"{prefix}." in name and r is not None]
                key = (rates[0] if rates else self.learning_rate, self.weight_decay if name in decayed else 0.0)
                groups.setdefault(key, []).append(param)
        return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]

    def configure_optimizers(self) -> Any:
        """AdamW with a schedule per optimizer step. Override it for an optimizer of your own.

        Raises:
            ValueError: If the schedule needs to know how long training is, and the trainer does not.
        """
        optimizer = torch.optim.AdamW(self.parameter_groups(), lr=self.learning_rate)
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps) and not self.lr_scheduler_type.startswith("constant"):
            raise ValueError(
                f"lr_scheduler_type={self.lr_scheduler_type!r} needs the number of steps: set max_steps or max_epochs "
                "of the Trainer, or lr_scheduler_type='constant'."
            )
        scheduler = get_scheduler(
            self.lr_scheduler_type,
            optimizer,
            num_warmup_steps=self.warmup_steps,
            num_training_steps=int(steps) if math.isfinite(steps) else None,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # Accumulation

    def window_counts(self, own: Tensor, count: Callable[[Any], Tensor]) -> Tensor:
        """Counts of the whole accumulation window, over all ranks, before its first micro-batch is learnt from.

        Lightning divides the loss of every micro-batch by `accumulate_grad_batches`, and the strategy averages
        gradients over ranks. So a loss that is divided by these counts is divided by those of the window in the end,
        however many micro-batches it has.

        Args:
            own: Counts of the micro-batch at hand (N,).
            count: Gives the same of a batch as the loader gives it.

        Returns:
            Sums over window and ranks, divided by the number of ranks and by `accumulate_grad_batches` (N,).

        Raises:
            ValueError: If the micro-batch has other counts than the loader's batch had when the window began.
        """
        size = window_size(self)
        if size == 1:
            return sum_over_ranks(own) / world_size()
        ahead, (window, place) = lookahead(self), divmod(micro_step(self), size)
        if ahead.counts is None or ahead.counts[0] != window:
            every = [own, *(count(batch).to(own) for batch in batches_ahead(self))]
            ahead.counts = (window, place, every, sum_over_ranks(torch.stack(every).sum(0)))
        _, first, every, total = ahead.counts
        counted = every[place - first]
        if not torch.equal(own, counted):
            raise ValueError(
                f"This micro-batch has counts {own.tolist()}, but the loader's batch had {counted.tolist()} when "
                "the accumulation window began. Change batches in the loader, in `tensors` or in a transfer hook "
                "of the module, always in the same way, or set accumulate_grad_batches=1."
            )
        return total / (world_size() * size)

    def on_before_backward(self, loss: Tensor) -> None:
        """Divide the loss by the number of micro-batches once: DeepSpeed divides what Lightning has divided."""
        size = window_size(self)
        if size > 1 and self.trainer.strategy.handles_gradient_accumulation and loss.requires_grad:
            loss.register_hook(lambda grad: grad * size)

    # Logging

    def log_step(
        self, loss: Tensor, metrics: Mapping[str, Tensor], tokens: Tensor, *, shown: Sequence[str] = ("loss",)
    ) -> None:
        """Log a training step: where it shares its optimizer step with others, all of them together, at the last.

        Args:
            loss: What `training_step` returns.
            metrics: Means over the micro-batch, of all ranks.
            tokens: How many tokens those are means over, if `metric_weights` does not say; of all ranks.
            shown: What the progress bar shows.
        """
        self._share_of_loss = self._share_of_loss + mean_over_ranks(loss) / window_size(self)
        weights, self.metric_weights = self.metric_weights, {}
        self._means.add(metrics, weights, tokens)
        if ends_window(self):
            total, self._share_of_loss = self._share_of_loss, 0.0
            assert isinstance(total, Tensor)
            self.log_metrics({"loss": total, **self._means.flush()}, shown=shown)

    def log_metrics(
        self, metrics: Mapping[str, Tensor], *, prefix: str = "", shown: Sequence[str] = (), rows: int = 1
    ) -> None:
        """Log numbers that are of all ranks already, those of `shown` in the progress bar too; undefined ones (NaN)
        are left out. `rows` weighs them in the mean over the batches of a validation."""
        if not metrics:
            return
        evaluating = (
            prefix != ""
        )  # Lightning warns there unless told to average over ranks, of which all have the same
        undefined = torch.stack([value.detach().float() for value in metrics.values()]).isnan().tolist()
        for (name, value), skip in zip(metrics.items(), undefined, strict=True):
            if not skip:
                self.log(f"{prefix}{name}", value, prog_bar=name in shown, batch_size=rows, sync_dist=evaluating)

    # Checkpoints

    def configure_callbacks(self) -> list[Callback]:
        """What says how to start from a model that was given as a checkpoint."""
        return [CheckpointAdvice()]

    def rank_state(self) -> dict[str, Any]:
        """What this rank needs for going on exactly where it was; extend it together with `load_rank_state`."""
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return {"cpu_rng": torch.get_rng_state(), "cuda_rng": cuda}

    def load_rank_state(self, state: dict[str, Any]) -> None:
        """Go on from what `rank_state` gave."""
        torch.set_rng_state(state["cpu_rng"].cpu())
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"].cpu(), self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the state of every rank, and what tells one architecture from another."""
        checkpoint[STATE] = {"shapes": parameter_shapes(self), "ranks": gather_objects(self.rank_state())}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits, and keep the ranks' state until training goes on; `validate`, and
        `load_from_checkpoint` for a new run, take the weights only.

        Raises:
            ValueError: If it was written by another module or architecture.
        """
        state = checkpoint.get(STATE)
        if state is None:
            raise ValueError(
                "The checkpoint was written by another module than those of rl_plugins.lightning. Export its model "
                f"with save_pretrained(path), and start from it with {type(self).__name__}(model=path)."
            )
        check_same_shapes(state["shapes"], parameter_shapes(self), type(self).__name__)
        fitting = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        self._resumed = state if fitting else None

    def on_train_start(self) -> None:
        """Take over the state of a checkpoint.

        Raises:
            ValueError: If it was written by another number of ranks, or micro-batches would be left over at the end
                of an epoch that DeepSpeed carries into the next one.
        """
        self._means, self._share_of_loss = WindowMeans(), 0.0
        if self._trainer is not None:
            check_windows_fit(self.trainer)
        if self._resumed is None:
            return
        states, self._resumed = self._resumed["ranks"], None
        if len(states) != self.trainer.world_size:
            raise ValueError(
                f"The checkpoint was written by {len(states)} processes, and this run has {self.trainer.world_size}. "
                "Resume with as many, or start a new run from its weights."
            )
        self.load_rank_state(states[rank()])

    def restore_hooks(self) -> None:
        """Put hooks on the model that a strategy has taken off; a subclass with hooks does."""

    def on_fit_start(self) -> None:
        """See that the hooks are there: Lightning's DeepSpeed strategy takes them off before it evaluates."""
        self.restore_hooks()

    def on_validation_start(self) -> None:
        """The same; and keep the dice of training: a resumed run does not repeat a validation that came after its
        checkpoint."""
        self.restore_hooks()
        self._dice = LanguageModule.rank_state(self)

    def on_validation_end(self) -> None:
        """Go on as if there had been no validation."""
        LanguageModule.load_rank_state(self, self._dice)

    # Export

    def save_pretrained(self, directory: str | Path) -> None:
        """Write model and tokenizer as transformers does, with everything of ours beside them: TRL and
        `AutoModelForCausalLM.from_pretrained` read the folder. Call it on all ranks; rank 0 writes."""
        with whole_parameters(list(self.model.parameters())):
            if rank() == 0:
                self.model.save_pretrained(directory)  # type: ignore[operator]
                self.tokenizer.save_pretrained(directory)
                self._save_extras(Path(directory))

    def _save_extras(self, directory: Path) -> None:
        """Write what a subclass keeps beside the model, on rank 0, while all parameters are whole."""
