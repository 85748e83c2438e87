"""Warnings and log lines of host libraries that no user of this package can act on, and one function that hides them.

Each entry hides one message of one category. Nothing is hidden at import: the configs of our trainers call
[`ignore_known_warnings`] when they are made, and commands and recipes call it when they start. The filters are added
after all others, so a filter of the user, such as `python -W error` or `warnings.filterwarnings(...)`, comes first.
"""

import logging
import re
import warnings
from typing import NamedTuple


class KnownWarning(NamedTuple):
    """A warning that a user of this package cannot act on.

    Args:
        message: Regular expression that matches the beginning of the message.
        category: Class of the warning.
        reason: Says why the user cannot act on it.
    """

    message: str
    category: type[Warning]
    reason: str


KNOWN_WARNINGS = (
    KnownWarning(
        r"`(is_)?gradient_checkpointing(_enable|_disable)?` is deprecated",
        FutureWarning,
        "transformers renamed gradient to activation checkpointing; TRL still calls the old names",
    ),
    KnownWarning(
        r"'pin_memory' argument is set as true but no accelerator",
        UserWarning,
        "the DataLoaders of transformers ask for pinned memory by default, also on a CPU",
    ),
    KnownWarning(
        r"Could not find a config file in .* - will assume that the vocabulary was not modified",
        UserWarning,
        "PEFT looks for config.json beside the weights, and a GGUF file holds its own",
    ),
    KnownWarning(
        r"You are using '(rollout_func|environment_factory)'",
        UserWarning,
        "TRL calls them experimental; rl_plugins checks at import that they are as it needs them",
    ),
    KnownWarning(
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
        FutureWarning,
        "Lightning walks through batches with a class of torch that got another name",
    ),
)
"""Warnings that [`ignore_known_warnings`] hides."""

KNOWN_LOG_LINES = {"DeepSpeed": r"Setting accelerator to CPU"}
"""Messages to hide, by the name of their logger. If DeepSpeed is installed, accelerate imports it even when it is not
used, and DeepSpeed then logs that it has found no GPU."""


class _WithoutKnownLines(logging.Filter):
    """Filter that drops the messages whose beginning matches a pattern."""

    def __init__(self, pattern: str) -> None:
        super().__init__()
        self.pattern = pattern

    def filter(self, record: logging.LogRecord) -> bool:
        """Say whether a record is shown."""
        return re.match(self.pattern, record.getMessage()) is None


def ignore_known_warnings() -> None:
    """Hide the warnings of [`KNOWN_WARNINGS`] and the lines of [`KNOWN_LOG_LINES`] for the rest of the process.

    Filters of the user still come first, and a second call adds nothing.
    """
    for known in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", known.message, known.category, append=True)
    for name, pattern in KNOWN_LOG_LINES.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _WithoutKnownLines) for known in logger.filters):
            logger.addFilter(_WithoutKnownLines(pattern))
