"""Checks of settings before any work starts, for the configs and modules of all hosts."""

from collections.abc import Iterable


def check_unit_interval(**settings: float | None) -> None:
    """Refuse a setting outside [0, 1]; `None` passes.

    Raises:
        ValueError: Naming the first one.
    """
    for name, value in settings.items():
        if value is not None and not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must be in [0, 1], got {value}.")


def check_at_least(low: float, **settings: float | None) -> None:
    """Refuse a setting below `low`; `None` passes.

    Raises:
        ValueError: Naming the first one.
    """
    for name, value in settings.items():
        if value is not None and value < low:
            raise ValueError(f"{name} must be at least {low}, got {value}.")


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Refuse a name that is not among `choices`.

    Raises:
        ValueError: With the valid ones.
    """
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"Unknown {name} {value!r}; choose one of {', '.join(choices)}.")
