"""Callbacks for any transformers `Trainer`."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class TrainerOnly:
    """A callback of transformers' `Trainer` that Lightning's refuses with a hint, when it is given to it."""

    @property
    def state_key(self) -> str:
        """Lightning's Trainer asks a callback that has `state_dict` for this when it is made.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            f"{type(self).__name__} of rl_plugins.trl is a callback of transformers' Trainer. Import the one for "
            "Lightning from rl_plugins.lightning."
        )

    def state_dict(self) -> dict[str, Any]:
        """Nothing; transformers does not ask for it."""
        return {}


class PolyakCallback(TrainerOnly, TrainerCallback):
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
