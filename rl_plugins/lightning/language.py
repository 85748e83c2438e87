"""Parts of every LightningModule that trains a language model: optimizer, hooks, logs over windows, exact checkpoints.

A module holds a [`LanguageTraining`] and adds a [`LanguageCallback`] to the Trainer, instead of inheriting from a base
class.
"""

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
from transformers import get_scheduler
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
from rl_plugins.lightning.models import check_same_shapes, is_model_folder, parameter_shapes
from rl_plugins.lightning.ranks import gather_objects, mean_over_ranks, rank, sum_over_ranks, world_size
from rl_plugins.nn.attachment import Attachment
from rl_plugins.nn.sharding import whole_parameters
from rl_plugins.nn.sources import check_trainable_dtype
from rl_plugins.signals.checks import check_at_least
from rl_plugins.signals.metrics import Metrics, gradient_metrics

STATE = "rl_plugins"
"""Key of our own state in Lightning's checkpoints."""

# Parameters that transformers' Trainer leaves out of weight decay.
UNDECAYED = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


class LanguageTraining:
    """Optimizer, logging and checkpoints of a module that trains a language model.

    Args:
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Of AdamW; biases and norms are left out.
        lr_scheduler_type: Name of a schedule of transformers' `get_scheduler`: `linear`, `cosine`, `constant`, ...
        warmup_steps: Optimizer steps of linear warm-up.

    Attributes:
        attached: Modules attached to the model, and their learning rates; `None` for `learning_rate`.
        router_weights: Weights of the newest micro-batch in the losses of routers: its tokens, and its rows, relative
            to the mean over the micro-batches of its accumulation window and over the ranks.

    Raises:
        TypeError: If a setting is not a number.
        ValueError: If a setting is out of range.
    """

    def __init__(
        self, *, learning_rate: float, weight_decay: float, lr_scheduler_type: str, warmup_steps: int
    ) -> None:
        check_at_least(0, learning_rate=learning_rate, weight_decay=weight_decay, warmup_steps=warmup_steps)
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.lr_scheduler_type, self.warmup_steps = lr_scheduler_type, warmup_steps
        self.attached: list[tuple[Attachment, float | None]] = []
        self.router_weights: tuple[Tensor, Tensor] | None = None
        self.resumed: dict[str, Any] | None = None
        self.means = WindowMeans()
        self.share_of_loss: Tensor | float = 0.0

    # Optimizer

    def parameter_groups(self, module: nn.Module) -> list[dict[str, Any]]:
        """Group the trainable parameters by learning rate and weight decay."""
        decayed = set(get_parameter_names(module, [nn.LayerNorm, nn.RMSNorm], UNDECAYED))
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, param in module.named_parameters():
            if param.requires_grad:
                parts = name.split(".")
                rates = [rate for owner, rate in self.attached if owner.name in parts and rate is not None]
                key = (rates[0] if rates else self.learning_rate, self.weight_decay if name in decayed else 0.0)
                groups.setdefault(key, []).append(param)
        return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]

    def configure_optimizers(self, module: Any) -> Any:
        """Make AdamW, and a schedule that changes the learning rate after each optimizer step.

        Raises:
            ValueError: If the schedule needs the number of steps, and the trainer does not know it.
        """
        optimizer = torch.optim.AdamW(module.parameter_groups(), lr=self.learning_rate)
        steps = module.trainer.estimated_stepping_batches
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

    # Logging

    def log_step(
        self,
        module: LightningModule,
        loss: Tensor,
        metrics: Metrics,
        tokens: Tensor,
        *,
        shown: Sequence[str] = ("loss",),
    ) -> None:
        """Log a training step. If several micro-batches make one optimizer step, log them together at the last one.

        Args:
            module: The module.
            loss: The loss that `training_step` returns.
            metrics: Means over the micro-batch on all ranks.
            tokens: Number of tokens, on all ranks, that a metric is a mean over; `metrics` may give another number.
            shown: Names in the progress bar.
        """
        self.share_of_loss = self.share_of_loss + mean_over_ranks(loss) / window_size(module)
        self.means.add(metrics, metrics.counts, tokens)
        if ends_window(module):
            total, self.share_of_loss = self.share_of_loss, 0.0
            assert isinstance(total, Tensor)
            log_metrics(module, {"loss": total, **self.means.flush()}, shown=shown)

    # Checkpoints

    def save_checkpoint(
        self, module: LightningModule, checkpoint: dict[str, Any], rank_state: dict[str, Any], shared: dict[str, Any]
    ) -> None:
        """Add to a checkpoint the shapes of all parameters, the state of every rank, and the state they share."""
        ranks = gather_objects({**random_state(module.device), **rank_state})
        checkpoint[STATE] = {"shapes": parameter_shapes(module), "ranks": ranks, "shared": shared}

    def load_checkpoint(self, module: LightningModule, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Check that a checkpoint fits, and keep the state of every rank until training continues.

        `validate`, and `load_from_checkpoint` for a new run, do not use the state of the ranks.

        Returns:
            The state that the ranks share.

        Raises:
            ValueError: If the checkpoint was written by another module or for another architecture.
        """
        state = checkpoint.get(STATE)
        if state is None:
            raise ValueError(
                "The checkpoint was written by another module than those of rl_plugins.lightning. Export its model "
                f"with save_pretrained(path), and start from it with {type(module).__name__}(model=path)."
            )
        check_same_shapes(state["shapes"], parameter_shapes(module), type(module).__name__)
        fitting = module._trainer is not None and module.trainer.state.fn == TrainerFn.FITTING
        self.resumed = state if fitting else None
        return state["shared"]

    def take_resumed(self, module: LightningModule) -> dict[str, Any] | None:
        """Restore the random state of a checkpoint, and return the state of this rank; `None` without a checkpoint.

        Raises:
            ValueError: If the checkpoint was written by another number of ranks.
        """
        if self.resumed is None:
            return None
        states, self.resumed = self.resumed["ranks"], None
        if len(states) != module.trainer.world_size:
            raise ValueError(
                f"The checkpoint was written by {len(states)} processes, and this run has "
                f"{module.trainer.world_size}. Resume with as many, or start a new run from its weights."
            )
        load_random_state(states[rank()], module.device)
        return states[rank()]

    # Export

    def save_pretrained(self, module: Any, directory: str | Path) -> None:
        """Write model and tokenizer as transformers does, and the attached modules beside them; a collective call."""
        with whole_parameters(list(module.model.parameters())):
            if rank() == 0:
                module.model.save_pretrained(directory)
                module.tokenizer.save_pretrained(directory)
                for attached, _ in self.attached:
                    attached.save(directory)


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the random state of this rank."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu_rng": torch.get_rng_state(), "cuda_rng": cuda}


def load_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Restore a random state that [`random_state`] has returned."""
    torch.set_rng_state(state["cpu_rng"].cpu())
    if state["cuda_rng"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda_rng"].cpu(), device)


def log_metrics(
    module: LightningModule,
    metrics: Mapping[str, Tensor],
    *,
    prefix: str = "",
    shown: Sequence[str] = (),
    rows: int = 1,
) -> None:
    """Log numbers that are already reduced over all ranks; undefined ones (NaN) are left out.

    Args:
        module: The module that logs.
        metrics: 0-d tensors by name.
        prefix: Prefix of the names; `eval_` in a validation.
        shown: Names in the progress bar.
        rows: Weight in the mean over the batches of a validation.
    """
    if not metrics:
        return
    evaluating = prefix != ""  # then Lightning warns unless it averages over ranks, all of which have the same numbers
    undefined = torch.stack([value.detach().float() for value in metrics.values()]).isnan().tolist()
    for (name, value), skip in zip(metrics.items(), undefined, strict=True):
        if not skip:
            module.log(f"{prefix}{name}", value, prog_bar=name in shown, batch_size=rows, sync_dist=evaluating)


def router_weights(module: LightningModule) -> tuple[Tensor, Tensor] | None:
    """Return the `router_weights` of the module's [`LanguageTraining`]; `None` if the module has none."""
    language = getattr(module, "language", None)
    return language.router_weights if isinstance(language, LanguageTraining) else None


def window_counts(module: LightningModule, own: Tensor, count: Callable[[Any], Tensor]) -> Tensor:
    """Count the items of the whole accumulation window, over all ranks, before its first loss is computed.

    Lightning divides the loss of every micro-batch by `accumulate_grad_batches`, and the strategy averages
    gradients over ranks. If a module divides the losses by the counts returned here, the result is the sum of the
    losses over the window, divided by the counts of the whole window, however many micro-batches it has.

    Args:
        module: The module.
        own: Counts of the current micro-batch (N,).
        count: Returns the counts of a batch as the loader gives it.

    Returns:
        Sums over window and ranks, divided by the number of ranks and by `accumulate_grad_batches` (N,).

    Raises:
        ValueError: If the micro-batch has other counts than the loader's batch had when the window began.
    """
    size = window_size(module)
    if size == 1:
        return sum_over_ranks(own) / world_size()
    ahead, (window, place) = lookahead(module), divmod(micro_step(module), size)
    if ahead.counts is None or ahead.counts[0] != window:
        every = [own, *(count(batch).to(own) for batch in batches_ahead(module))]
        ahead.counts = (window, place, every, sum_over_ranks(torch.stack(every).sum(0)))
    _, first, every, total = ahead.counts
    counted = every[place - first]
    if not torch.equal(own, counted):
        raise ValueError(
            f"This micro-batch has {own.tolist()} tokens and rows, but had {counted.tolist()} when gradient "
            "accumulation began. The loader, `tensors` or a transfer hook of the module changes the batch differently "
            "each time. Make this change deterministic, or set accumulate_grad_batches=1."
        )
    return total / (world_size() * size)


class LanguageCallback(Callback):
    """Callback that a module with a [`LanguageTraining`] adds to Lightning's Trainer.

    It checks the strategy, restores hooks that DeepSpeed's strategy removes, keeps the scale of the loss, updates the
    critic's slow copies, logs the value gradient, and keeps validation from changing the random numbers of training.
    """

    def __init__(self) -> None:
        self._step = 0
        self._gradients: Tensor | None = None
        self._dice: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse strategies and precisions that cannot train the module, and make the critic's slow copies.

        Raises:
            TypeError: Under Lightning's `FSDPStrategy`, or `ModelParallelStrategy` without a `configure_model`.
            ValueError: If weights are to be trained in float16 without a float32 copy.
        """
        strategy = trainer.strategy
        sharded = isinstance(strategy, ModelParallelStrategy) and not is_overridden("configure_model", pl_module)
        if sharded or isinstance(strategy, FSDPStrategy):
            raise TypeError(
                f"{type(pl_module).__name__} does not run under {type(strategy).__name__}: it generates, and reads "
                'heads and targets, outside the forward that Lightning shards. Use strategy="deepspeed_stage_3", or '
                "TRL's trainers with FSDP2."
            )
        if stage == "fit" and not isinstance(strategy, DeepSpeedStrategy):
            if trainer.precision == "16-true":
                raise ValueError(
                    "precision='16-true' trains float16 weights without a float32 copy, so that small updates are "
                    "rounded to 0. Use precision='bf16-mixed' or '16-mixed', or DeepSpeed."
                )
            check_trainable_dtype(pl_module)
        critic = getattr(pl_module, "critic", None)
        # A validation after training uses the copies that the training has left.
        if critic is not None and (stage == "fit" or critic.target is None):
            critic.copy()  # before DDP or DeepSpeed wrap the model

    def _restore_hooks(self, pl_module: Any) -> None:
        for attached, _ in pl_module.language.attached:
            attached.hook(pl_module.model)

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Restore hooks, and put slow copies on the module's device."""
        self._restore_hooks(pl_module)
        if pl_module.critic is not None:
            pl_module.critic.place(pl_module.device)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Begin an empty window, at the step of a checkpoint if there is one; Lightning knows this step only now.

        Raises:
            ValueError: If micro-batches would be left over at the end of an epoch that DeepSpeed carries into the next
                one.
        """
        pl_module.language.means, pl_module.language.share_of_loss = WindowMeans(), 0.0
        check_windows_fit(trainer)
        self._step, self._gradients = trainer.global_step, None

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Undo DeepSpeed's division of the loss by the number of micro-batches, which Lightning has done already."""
        size = window_size(pl_module)
        if size > 1 and trainer.strategy.handles_gradient_accumulation and loss.requires_grad:
            loss.register_hook(lambda grad: grad * size)

    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
        """Log the value gradient of all backward passes of an optimizer step."""
        totals = None if pl_module.critic is None else pl_module.critic.gradient_totals(pl_module)
        if totals is not None:
            self._gradients = totals if self._gradients is None else self._gradients + totals
        if self._gradients is not None and ends_window(pl_module):
            totals, self._gradients = self._gradients, None
            log_metrics(pl_module, gradient_metrics(totals))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        """Update slow copies if the optimizer has made a step."""
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            if pl_module.critic is not None:
                pl_module.critic.follow(self._step)

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Restore hooks, and save the random state of training.

        A resumed run does not repeat a validation that came after its checkpoint, so validation must not change the
        numbers that training draws.
        """
        self._restore_hooks(pl_module)
        if pl_module.critic is not None:
            pl_module.critic.place(pl_module.device)
        self._dice = {**random_state(pl_module.device), "drafts": pl_module.draft_state()}

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Restore the random state from before the validation."""
        load_random_state(self._dice, pl_module.device)
        pl_module.load_draft_state(self._dice["drafts"])

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Add a note to the error if `ckpt_path` is a model's folder: how to start from that model.

        An earlier check is not possible: Lightning reads the checkpoint before it calls any hook that knows the path.
        """
        path = trainer.ckpt_path
        if isinstance(exception, Exception) and path is not None and is_model_folder(path):
            exception.add_note(
                f"ckpt_path={str(path)!r} is no checkpoint of Lightning: it is a model, or was written by another "
                f"trainer. Start from it with {type(pl_module).__name__}(model={str(path)!r}) instead of ckpt_path."
            )
