"""Callbacks for any transformers `Trainer`."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class TrainerOnly:
    """Base class of callbacks of transformers' `Trainer`, which Lightning's Trainer refuses with a hint."""

    @property
    def state_key(self) -> str:
        """Key that Lightning's Trainer asks for when it is made, from a callback that has `state_dict`.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            f"{type(self).__name__} of rl_plugins.trl is a callback of transformers' Trainer. Import the one for "
            "Lightning from rl_plugins.lightning."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state; transformers does not call this method."""
        return {}


class AfterStep(TrainerCallback):
    """Calls a function after every optimizer step, such as one that updates the slow copies of a critic.

    DeepSpeed's engine makes the optimizer step inside `backward`. So the call is at the end of the trainer's step,
    which comes after the update with every engine.

    Args:
        call: Function of the number of optimizer steps so far.
    """

    def __init__(self, call: Callable[[int], None]) -> None:
        self.call = call

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Call the function; the trainer calls this method after each optimizer step."""
        self.call(state.global_step)
