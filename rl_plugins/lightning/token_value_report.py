"""A page that shows the critic's values of single tokens, written during training."""

from itertools import chain
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from rl_plugins.lightning.callbacks import LightningOnly
from rl_plugins.lightning.prompts import PromptDataModule
from rl_plugins.report.token_values import write_token_values_html
from rl_plugins.report.traces import traces_from_rollout


class TokenValueReport(LightningOnly, Callback):
    """Callback that writes `token_values.html` after every validation and at the end: the newest completions of the
    first rank, coloured by the critic's values and temporal-difference errors.

    It works with [`MTPCriticModule`] and [`PPOModule`]. Where the rows of a [`PromptDataModule`] have an `answer` or a
    `solution`, the page shows it beside the completion.

    Args:
        path: File to write; `token_values.html` in the trainer's log directory by default.
        limit: Completions to show.
        title: Heading of the page.

    Raises:
        ValueError: When training starts, for a module without a critic.
    """

    def __init__(
        self, path: str | Path | None = None, *, limit: int = 48, title: str = "What the critic thinks of each token"
    ) -> None:
        self.path, self.limit, self.title = path, limit, title

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a module that has no values to show."""
        if getattr(pl_module, "critic", None) is None or not hasattr(pl_module, "rollout"):
            raise ValueError(
                f"TokenValueReport shows a critic's values of completions, and {type(pl_module).__name__} is no "
                "module that has a critic and generates. Use TokenValueReport with MTPCriticModule or PPOModule."
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the completions of the validation."""
        if not trainer.sanity_checking:
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the last completions."""
        self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        directory = Path(trainer.log_dir or trainer.default_root_dir)  # a collective call
        rollout: Any = pl_module.last_rollout
        if not trainer.is_global_zero or "td_errors" not in rollout:
            return
        path = Path(self.path) if self.path is not None else directory / "token_values.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = getattr(trainer, "datamodule", None)
        rows = (data.eval_dataset or (), data.train_dataset) if isinstance(data, PromptDataModule) else ()
        traces = traces_from_rollout(pl_module.tokenizer, rollout, self.limit, dataset=chain(*rows))
        subtitle = f"After {trainer.global_step} optimizer steps."
        write_token_values_html(traces, path, title=self.title, subtitle=subtitle)
