"""Checks of settings before any work starts, for the configs and modules of all hosts."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rl_plugins.settings import check_number


def _numbers(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the settings that are not `None`, and refuse one that is not a number."""
    for name, value in settings.items():
        if value is not None:
            check_number(name, value)
            yield name, value


def check_unit_interval(**settings: float | None) -> None:
    """Refuse a setting outside [0, 1]; `None` passes.

    Raises:
        TypeError: If a setting is not a number.
        ValueError: If a setting is outside [0, 1]; the message names the first one.
    """
    for name, value in _numbers(settings):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must be in [0, 1], got {value}.")


def check_at_least(low: float, **settings: float | None) -> None:
    """Refuse a setting below `low`, or NaN; `None` passes.

    Raises:
        TypeError: If a setting is not a number.
        ValueError: If a setting is below `low`; the message names the first one.
    """
    for name, value in _numbers(settings):
        if not value >= low:
            raise ValueError(f"{name} must be at least {low}, got {value}.")


def check_above(low: float, **settings: float | None) -> None:
    """Refuse a setting that is not above `low`; `None` passes.

    Raises:
        TypeError: If a setting is not a number.
        ValueError: If a setting is not above `low`; the message names the first one.
    """
    for name, value in _numbers(settings):
        if not value > low:
            raise ValueError(f"{name} must be above {low}, got {value}.")


def check_whole(**settings: int | None) -> None:
    """Refuse a setting that is not an integer; `None` passes.

    Raises:
        TypeError: If a setting is not an integer; the message names the first one.
    """
    for name, value in _numbers(settings):
        if not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {value!r}.")


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Refuse a name that is not among `choices`.

    Raises:
        ValueError: If the name is not valid; the message lists the valid ones.
    """
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"Unknown {name} {value!r}; choose one of {', '.join(choices)}.")


def check_head_reach(num_mtp_heads: int, limit: int | None, option: str) -> None:
    """Refuse heads that look beyond the longest sequence.

    Args:
        num_mtp_heads: K; head k forecasts what comes k tokens later.
        limit: Largest number of tokens in a sequence; `None` for no limit.
        option: Name of the setting that gives `limit`.

    Raises:
        ValueError: If the last head would have nothing to learn from.
    """
    if limit is not None and num_mtp_heads > limit:
        raise ValueError(
            f"num_mtp_heads={num_mtp_heads} is larger than {option}={limit}: the last heads look beyond the end of "
            f"every sequence and would learn nothing. Set num_mtp_heads to at most {limit}."
        )
