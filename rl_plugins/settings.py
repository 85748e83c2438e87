"""Checks of settings that must be numbers: text that spells a number is converted, and anything else is refused."""

import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Union, get_args, get_origin, get_type_hints

NUMERIC = {int, float, type(None)}


def as_number(name: str, value: Any, *, whole: bool = False) -> Any:
    """Return a setting as a number; text is converted, since YAML 1.1 reads `1e-3` as text.

    Args:
        name: Name of the setting, for the message.
        value: A number, or text.
        whole: Whether the number has to be an integer; 2.0 counts as one.

    Raises:
        TypeError: If the value is not a number.
        ValueError: If the number has to be an integer and is not.
    """
    number = value
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            raise TypeError(f"{name} must be a number, got the text {value!r}.") from None
    check_number(name, number)
    if whole and isinstance(number, float):
        if not number.is_integer():
            raise ValueError(f"{name} must be a whole number, got {value!r}.")
        return int(number)
    return number


def check_number(name: str, value: Any) -> None:
    """Refuse a setting that is not a number.

    Raises:
        TypeError: If the setting is not a number.
    """
    if isinstance(value, str):
        raise TypeError(
            f"{name} must be a number, got the text {value!r}. YAML reads 1e-3 as text: write 1.0e-3 there, and "
            "numbers without quotes everywhere."
        )
    try:
        float(value)
    except (TypeError, ValueError, RuntimeError):  # the last is torch's
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__}).") from None


def with_numbers(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a function, with numbers in place of text that spells a number."""
    return {name: _read(value) if isinstance(value, str) else value for name, value in options.items()}


def _read(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def settle_numbers(config: Any) -> None:
    """Convert text in the numeric fields of a dataclass to numbers, and refuse any other text.

    Raises:
        TypeError: If a numeric field holds no number; the message names the field.
        ValueError: If an integer field holds a fraction; the message names the field.
    """
    hints = get_type_hints(type(config))
    for field in fields(config):
        value, kinds = getattr(config, field.name), _kinds(hints[field.name])
        if value is None or isinstance(value, bool):
            continue
        if kinds <= NUMERIC and kinds != {type(None)}:
            number: Any = as_number(field.name, value, whole=float not in kinds)
        elif kinds in ({list[float]}, {list[float], type(None)}) and isinstance(value, list):
            number = [x if x is None else as_number(field.name, x) for x in value]
        else:
            continue
        if type(number) is not type(value) or number != value:
            object.__setattr__(config, field.name, number)


def _kinds(hint: Any) -> set[Any]:
    return set(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else {hint}


def keyword_names(function: Callable[..., Any]) -> list[str]:
    """Return the names of the keyword-only parameters of a function, which are its options."""
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
