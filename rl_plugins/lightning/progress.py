"""A progress bar for runs whose steps are mostly generation."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from rl_plugins.lightning.callbacks import LightningOnly

SHOWN = 4
"""Tokens between two refreshes during a rollout."""


class RolloutProgressBar(LightningOnly, TQDMProgressBar):
    """Lightning's progress bar that also moves during rollouts: its description then has the number of tokens so far.

    ```python
    Trainer(callbacks=[RolloutProgressBar()]).fit(module, PromptDataModule(dataset))
    ```

    The bar shows numbers with three digits, and leaves out the version of the run.

    Args:
        kwargs: For [`~lightning.pytorch.callbacks.TQDMProgressBar`].
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._longest = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember how long a completion may become."""
        super().on_train_start(trainer, pl_module)
        self._longest = int(getattr(pl_module, "max_completion_length", 0))

    def on_rollout_token(self, tokens: int) -> None:
        """Show the number of tokens of a rollout so far; [`RLModule`] calls this method after every token."""
        if self.is_disabled or not self.trainer.training or tokens % SHOWN:
            return
        self.train_progress_bar.set_description(f"Rollout {tokens}/{self._longest}")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Show the number of the epoch again."""
        if not self.is_disabled:
            self.train_progress_bar.set_description(f"Epoch {trainer.current_epoch}", refresh=False)
        super().on_train_batch_end(trainer, pl_module, *args, **kwargs)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return the metrics with three digits, without the version of the run."""
        metrics = super().get_metrics(trainer, pl_module)
        return {
            name: f"{value:.3g}" if isinstance(value, float) else value
            for name, value in metrics.items()
            if name != "v_num"
        }
