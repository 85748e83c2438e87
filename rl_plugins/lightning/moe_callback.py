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
from rl_plugins.moe.balancer import RouterBalancer
from rl_plugins.moe.config import BalancingConfig
from rl_plugins.moe.load_log import LoadLog
from rl_plugins.report.expert_load import LOAD_FILE_NAME, append_load


class MoEBalancingCallback(LightningOnly, Callback):
    """Balances the experts of the Hugging Face model inside a LightningModule: by a selection bias, auxiliary losses,
    or both.

    ```python
    Trainer(callbacks=[MoEBalancingCallback(rate=1e-3)]).fit(module)
    ```

    The module may be anything that calls a Hugging Face MoE model in `training_step`. Metrics `moe/...` go to its
    loggers, the load of every expert to `moe_load.jsonl` in the trainer's log directory, and the biases into its
    checkpoints.

    Args:
        config: Settings; the defaults of [`BalancingConfig`] if not given.
        record_load: Write `moe_load.jsonl`.
        settings: Fields of [`BalancingConfig`] that differ from `config`.

    Raises:
        TypeError: When training starts, if the module holds no Hugging Face model, or one that cannot be balanced.
        ValueError: For settings out of range; when training starts, for a schedule that never starts, or an auxiliary
            loss in float16.
        RuntimeError: At the first step, if the model is in evaluation mode, or its routers have not run.
    """

    def __init__(self, config: BalancingConfig | None = None, *, record_load: bool = True, **settings: Any) -> None:
        self.config = dataclasses.replace(config or BalancingConfig(), **settings)
        self.record_load = record_load
        self.balancer: RouterBalancer | None = None
        self._saved: dict[str, Tensor] | None = None
        self._log = LoadLog()
        self._step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach to a model that is there already: best before DDP or DeepSpeed wrap it.

        DDP waits for the gradient of a bias that is a parameter unless it is frozen by then, and ZeRO-3 puts its own
        nodes between a router's logits and what is computed of them.
        """
        model = find_language_model(pl_module)
        if stage == "fit" and self.balancer is None and model is not None:
            self.balancer = RouterBalancer(model, self.config)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to a model that came later, and go on from a checkpoint."""
        if self.config.has_loss and trainer.precision in ("16-mixed", "16-true"):
            raise ValueError(
                "Auxiliary losses of MoEBalancingCallback do not know float16's loss scale. Train with "
                "precision='bf16-mixed', or with a selection bias only (aux_loss_coef=0, z_loss_coef=0)."
            )
        if math.isfinite(trainer.estimated_stepping_batches):
            self.config.check_schedule(int(trainer.estimated_stepping_batches))
        if self.balancer is None:
            model = find_language_model(pl_module)
            if model is None:
                name = type(pl_module).__name__
                raise TypeError(f"{name} holds no Hugging Face model; MoEBalancingCallback balances those only.")
            self.balancer = RouterBalancer(model, self.config)
        if self._saved is not None:
            self.balancer.load_state_dict(self._saved)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on from the step of a checkpoint, which Lightning knows only now."""
        self._step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Weigh each micro-batch's auxiliary loss like Lightning weighs its loss."""
        assert self.balancer is not None
        scale = 1.0 / trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1.0
        twice = trainer.strategy.handles_gradient_accumulation and not hasattr(pl_module, "language")
        # DeepSpeed accumulates by itself, and Lightning does not know: both divide the loss.
        self.balancer.loss_scale = scale**2 if twice else scale

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Weigh it by the micro-batch's share of the tokens or rows of its accumulation window, where the module knows
        them by now."""
        weights = router_weights(pl_module)
        if self.balancer is not None and weights is not None:
            by_tokens, by_rows = (weight / trainer.accumulate_grad_batches for weight in weights)
            self.balancer.set_loss_scales(by_tokens, by_rows)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the biases where the optimizer has made a step."""
        assert self.balancer is not None
        if trainer.global_step == self._step:
            return
        if not (self.balancer.last_counts or self.balancer.routers[0].module.training):
            raise RuntimeError(
                "The model is in evaluation mode, as from_pretrained leaves it and Lightning keeps it. Call "
                "model.train() where the LightningModule loads it; MoEBalancingCallback counts in training mode only."
            )
        metrics = self.balancer.update(self._step / trainer.estimated_stepping_batches)
        self._step = trainer.global_step
        pl_module.log_dict(metrics)
        self._log.add({}, self.balancer.last_counts)
        if self._step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._write_load(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is left, and leave the model as it is."""
        self._write_load(trainer)
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the model as it is, also when training fails or is interrupted."""
        self._detach()

    def _detach(self) -> None:
        if self.balancer is not None:
            self.balancer.detach()
            self._saved, self.balancer = self.balancer.state_dict(), None

    def _write_load(self, trainer: Trainer) -> None:
        counts = self._log.flush()[1]
        directory = Path(trainer.log_dir or trainer.default_root_dir)  # asks all ranks
        if self.record_load and counts and trainer.is_global_zero:
            assert self.balancer is not None
            layers = [router.name for router in self.balancer.routers]
            append_load(directory / LOAD_FILE_NAME, self._step, layers, counts)

    def state_dict(self) -> dict[str, Any]:
        """The float32 biases, for Lightning's checkpoints."""
        return {"biases": self._saved if self.balancer is None else self.balancer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the biases of a checkpoint, or keep them until the model is there."""
        self._saved = state_dict["biases"]
        if self.balancer is not None and self._saved is not None:
            # DeepSpeed and FSDP restore after `on_fit_start`.
            self.balancer.load_state_dict(self._saved)
