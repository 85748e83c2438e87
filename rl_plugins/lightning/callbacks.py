"""The check that our callbacks for Lightning share."""

from typing import Any


class LightningOnly:
    """Callback of Lightning that raises an error with a hint when it is given to transformers' `Trainer`."""

    def on_init_end(self, *args: Any, **kwargs: Any) -> None:
        """Refuse transformers' `Trainer`, whose first event this is.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            f"{type(self).__name__} of rl_plugins.lightning is a callback of Lightning's Trainer. Import the one for "
            "TRL and transformers from rl_plugins.trl."
        )
