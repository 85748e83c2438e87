"""The check that our callbacks for Lightning share."""

from typing import Any


class LightningOnly:
    """A callback of Lightning that transformers' `Trainer` refuses with a hint, when it is given to it."""

    def on_init_end(self, *args: Any, **kwargs: Any) -> None:
        """The first event of transformers' `Trainer`.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            f"{type(self).__name__} of rl_plugins.lightning is a callback of Lightning's Trainer. Import the one for "
            "TRL and transformers from rl_plugins.trl."
        )
