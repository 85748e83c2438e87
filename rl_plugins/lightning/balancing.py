"""MoE load balancing in any LightningModule that trains a Hugging Face model."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from rl_plugins.lightning.callbacks import LightningOnly
from rl_plugins.lightning.language import router_weights
from rl_plugins.lightning.models import find_language_model
from rl_plugins.moe.config import BalancingConfig
from rl_plugins.moe.load_log import LOAD_FILE_NAME
from rl_plugins.moe.run import BalancingRun


class MoEBalancingCallback(LightningOnly, Callback):
    """Callback that balances the experts of the Hugging Face model inside a LightningModule: by a selection bias,
    auxiliary losses, or both.

    ```python
    Trainer(callbacks=[MoEBalancingCallback(rate=1e-3)]).fit(module)
    ```

    The module may be anything that calls a Hugging Face MoE model in `training_step`. The callback logs the metrics
    `moe/...`, writes the load of every expert to `moe_load.jsonl` in the trainer's log directory, and adds the biases
    to the trainer's checkpoints.

    Args:
        config: Settings; the defaults of [`BalancingConfig`] if not given.
        record_load: Whether to write `moe_load.jsonl`.
        settings: Fields of [`BalancingConfig`] that differ from `config`.

    Raises:
        TypeError: When training starts, if the module holds no Hugging Face model, or one that cannot be balanced.
        ValueError: For settings out of range. When training starts, also for a schedule that never starts, or an
            auxiliary loss in float16.
        RuntimeError: At the first step, if the model is in evaluation mode, or its routers have not run.
    """

    def __init__(self, config: BalancingConfig | None = None, *, record_load: bool = True, **settings: Any) -> None:
        self.config = dataclasses.replace(config or BalancingConfig(), **settings)
        self.record_load = record_load
        self.run: BalancingRun | None = None
        # Biases of a checkpoint that was loaded before there was a model, or of an earlier training.
        self._saved: dict[str, Tensor] | None = None
        self._step = 0

    def _run_on(self, pl_module: LightningModule) -> BalancingRun:
        """Return the run of this callback; attach a new one to the module's model where there is none yet."""
        if self.run is None:
            model = find_language_model(pl_module)
            if model is None:
                name = type(pl_module).__name__
                raise TypeError(f"{name} holds no Hugging Face model; MoEBalancingCallback balances those only.")
            self.run = BalancingRun(model, self.config)
        return self.run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach to the model if the module has one already; it is best to do this before DDP or DeepSpeed wrap it.

        If a bias is a parameter, DDP waits for its gradient unless it is frozen before the wrapping. ZeRO-3 puts nodes
        of its own between a router's logits and the tensors that are computed from them.
        """
        if stage == "fit" and find_language_model(pl_module) is not None:
            self._run_on(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to a model that was made after `setup`, and continue from a checkpoint if there is one."""
        num_steps, log_file = trainer.estimated_stepping_batches, None
        if self.record_load:
            directory = Path(trainer.log_dir or trainer.default_root_dir)  # a collective call
            log_file = directory / LOAD_FILE_NAME if trainer.is_global_zero else None
        self._run_on(pl_module).start(
            int(num_steps) if math.isfinite(num_steps) else None,
            float16=trainer.precision in ("16-mixed", "16-true"),
            log_file=log_file,
            biases=self._saved,
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue from the step of a checkpoint, which Lightning knows only at this point."""
        self._step = trainer.global_step

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Weight the auxiliary losses of a micro-batch as Lightning weights its loss.

        Where the module counts the tokens and rows of the accumulation window, the micro-batch's share of them is
        another factor.
        """
        run, weights = self._run_on(pl_module), router_weights(pl_module)
        if weights is not None:
            run.before_step(*(weight / trainer.accumulate_grad_batches for weight in weights))
            return
        scale = 1.0 / trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1.0
        # DeepSpeed accumulates by itself, and Lightning does not know: both divide the loss of a module not of ours.
        twice = trainer.strategy.handles_gradient_accumulation and not hasattr(pl_module, "language")
        run.before_step(scale**2 if twice else scale)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the biases if the optimizer has made a step."""
        if trainer.global_step == self._step:
            return
        run = self._run_on(pl_module)
        metrics = run.after_step(self._step / trainer.estimated_stepping_batches)
        self._step = trainer.global_step
        pl_module.log_dict(metrics)
        if self._step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            run.log(self._step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the loads that are not written yet, and detach from the model; its biases stay."""
        self._run_on(pl_module).log(self._step)
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detach from the model when training fails or is interrupted; its biases stay."""
        self._detach()

    def _detach(self) -> None:
        if self.run is not None:
            self.run.detach()
            self._saved, self.run = self.run.state_dict(), None

    def state_dict(self) -> dict[str, Any]:
        """Return the float32 biases, for Lightning's checkpoints."""
        return {"biases": self._saved if self.run is None else self.run.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the biases of a checkpoint, or keep them until there is a model."""
        self._saved = state_dict["biases"]
        if self.run is not None and self._saved is not None:
            # DeepSpeed and FSDP restore after `on_fit_start`.
            self.run.load_state_dict(self._saved)
