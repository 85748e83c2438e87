"""Numbers among settings: those that arrive as text become numbers, and what is no number is refused."""

import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Union, get_args, get_origin, get_type_hints

NUMERIC = {int, float, type(None)}


def as_number(name: str, value: Any, *, whole: bool = False) -> Any:
    """A setting as a number; text such as `"1e-3"`, which YAML 1.1 reads that way, is converted.

    Args:
        name: Of the setting.
        value: A number, or text.
        whole: Whether it has to be an integer, which 2.0 is, too.

    Raises:
        TypeError: If it is no number.
        ValueError: If it has to be an integer and is not.
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
    """Refuse a setting that is no number.

    Raises:
        TypeError: If it is not.
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
    """Options of a function, with numbers in place of text that is one."""
    return {name: _read(value) if isinstance(value, str) else value for name, value in options.items()}


def _read(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def settle_numbers(config: Any) -> None:
    """Make numbers of the numeric fields of a dataclass that hold text, and refuse what is no number.

    Raises:
        TypeError: Naming the first field that holds no number.
        ValueError: Naming the first integer field that holds a fraction.
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
    """Names of the keyword-only parameters of a function, which are its options."""
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
