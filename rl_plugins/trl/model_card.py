"""Trainers that write the card of their model with method, papers and the code that loads what they have made."""

from pathlib import Path
from typing import Any

from transformers import Trainer

from rl_plugins.trl.balancing import MoEBalancingCallback
from rl_plugins.trl.card_text import CARD, Method, complete_card, host_paper


class WritesModelCard(Trainer):
    """Completes the card that TRL writes beside checkpoints, and that `push_to_hub` sends along."""

    _name: str

    def describe_method(self) -> Method:
        """Say how the model is trained, for its card; trainers override it."""
        return Method(self._name)

    def create_model_card(self, model_name: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Write README.md into the output directory as the host does, then add what its template has no place for.

        Args:
            model_name: Name of the model; that of the output directory by default.
            args: For the host's method.
            kwargs: For the host's method.
        """
        path = Path(str(self.args.output_dir)) / CARD
        method = self.describe_method()
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, MoEBalancingCallback):
                method = callback.describe(method)
        self._name, self._paper = method.name, host_paper(method)
        super().create_model_card(model_name or path.parent.name, *args, **kwargs)
        if self.is_world_process_zero():
            complete_card(path, method, trained_by=type(self).__name__, hub_id=self.hub_model_id)
