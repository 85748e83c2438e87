"""Callbacks for any transformers `Trainer`."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class PolyakCallback(TrainerCallback):
    """Moves target heads after every optimizer step.

    Under DeepSpeed the engine steps inside `backward`, so only the end of the step is after the update everywhere.

    Args:
        update: Called with the number of optimizer steps done.
    """

    def __init__(self, update: Callable[[int], None]) -> None:
        self.update = update

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called by the trainer after each optimizer step."""
        self.update(state.global_step)
