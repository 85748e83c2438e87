"""Slow target heads for any LightningModule that trains a model with MTP heads."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from rl_plugins.lightning.callbacks import LightningOnly
from rl_plugins.lightning.models import find_language_model
from rl_plugins.nn.mtp_heads import MTPHeads
from rl_plugins.nn.sharding import whole_module, whole_parameters
from rl_plugins.nn.target_heads import PolyakTarget, check_polyak


class PolyakCallback(LightningOnly, Callback):
    """Callback that keeps a float32 copy of the parameters by which MTP heads compute values. The copy follows the
    heads slowly: `theta' <- tau theta + (1 - tau) theta'`.

    ```python
    polyak = PolyakCallback(tau=0.05)
    Trainer(callbacks=[polyak]).fit(module)  # where the heads run: polyak.target(heads.states(hidden_states))
    ```

    [`MTPSFTModule`] and [`MTPCriticModule`] have target heads of their own. This callback is for a module of yours.

    Args:
        tau: Step towards the online heads after every optimizer step, above 0 and at most 1.
        period: If set, the online heads are copied once in so many optimizer steps instead.

    Attributes:
        target: The slow heads (see [`PolyakTarget`]), from `setup` on. They are not part of the module, so that no
            engine partitions them. Lightning's checkpoints contain them.

    Raises:
        ValueError: For settings out of range. When training starts, also for a module without MTP heads.
    """

    def __init__(self, tau: float = 0.05, period: int | None = None) -> None:
        check_polyak(tau=tau, period=period)
        self.tau, self.period = tau, period
        self.target: PolyakTarget | None = None
        self._heads: MTPHeads | None = None
        self._saved: dict[str, Tensor] | None = None
        self._step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copy the heads, before DDP or DeepSpeed wrap the model."""
        self._copy(pl_module)

    def _copy(self, pl_module: LightningModule) -> None:
        model = find_language_model(pl_module)
        heads = None if model is None else MTPHeads.of(model)
        if self.target is None and heads is not None:
            self._heads = heads
            with whole_parameters(list(heads.value_path.parameters())), whole_module(heads.value_path):
                self.target = PolyakTarget(heads, tau=self.tau, period=self.period)
            if self._saved is not None:
                self.target.load_state_dict(self._saved)

    def _start(self, pl_module: LightningModule) -> None:
        self._copy(pl_module)
        if self.target is None:
            raise ValueError(
                f"{type(pl_module).__name__} holds no model with MTP heads for PolyakCallback to follow. "
                "Call attach_mtp_heads(model) in the module's __init__."
            )
        self.target.to(pl_module.device)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the copy on the module's device."""
        self._start(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the copy on the module's device, for a `trainer.validate` without a fit before it."""
        self._start(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue from the step of a checkpoint, which Lightning knows only at this point."""
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Update the copy if the optimizer has made a step."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        assert self._heads is not None and self.target is not None
        with whole_parameters(list(self._heads.value_path.parameters())) as online:
            self.target.update(online, step=self._step)

    def state_dict(self) -> dict[str, Any]:
        """Return the slow heads, for Lightning's checkpoints."""
        return {"target": self._saved if self.target is None else self.target.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the slow heads of a checkpoint, or keep them until there is a module."""
        self._saved = state_dict["target"]
        if self.target is not None and self._saved is not None:
            # DeepSpeed and FSDP restore after `on_fit_start`.
            self.target.load_state_dict(self._saved)
