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
        """Return no attributes; transformers does not ask for them."""
        return {}


class AfterStep(TrainerCallback):
    """Calls something after every optimizer step, such as a critic whose slow copies follow.

    Under DeepSpeed the engine steps inside `backward`, so only the end of the step is after the update everywhere.

    Args:
        call: Given the number of optimizer steps done.
    """

    def __init__(self, call: Callable[[int], None]) -> None:
        self.call = call

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called by the trainer after each optimizer step."""
        self.call(state.global_step)
