"""The parser of commands and recipes: TRL's parser, with options in groups, ours first, and errors of one line."""

import dataclasses
import difflib
import inspect
import json
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from trl import TrlParser

from rl_plugins.usage import OneLineErrors, one_line_errors

USAGE = "%(prog)s [-h] [--config FILE] [--OPTION VALUE ...]"
CONFIG, TRACEBACK = "--config", "--traceback"


class OptionParser(OneLineErrors, TrlParser):
    """Parses dataclasses of options as [`~trl.TrlParser`] does, with a clearer help and shorter errors.

    `--help` shows a group of options for each dataclass that declares some, ours before those of the hosts. A wrong
    value leads to one line on stderr and exit status 2; `--traceback` shows the traceback as well.

    Args:
        dataclass_types: Dataclasses of options.
        prog: Name of the command; that of the script by default.
        description: Says in `--help` what the command does.
    """

    def __init__(
        self, dataclass_types: Iterable[type], *, prog: str | None = None, description: str | None = None
    ) -> None:
        arguments: dict[str, Any] = {"prog": prog, "usage": USAGE, "description": description}
        super().__init__(dataclass_types=dataclass_types, **arguments)  # type: ignore[call-arg]
        self.show_traceback = False
        self.add_argument(CONFIG, metavar="FILE", help="YAML file of options; the command line overrides it.")
        self.add_argument(TRACEBACK, action="store_true", help="Show where in the code a wrong value was noticed.")
        self._group_by_declaration()

    def _group_by_declaration(self) -> None:
        """Move each option into the group of the dataclass that declares it first."""
        general = self._optionals._group_actions
        owners = {name: owner for kind in self.dataclass_types for name, owner in declaring_classes(kind).items()}
        kinds = [base for kind in self.dataclass_types for base in kind.__mro__ if base in set(owners.values())]
        for owner in sorted(dict.fromkeys(kinds), key=is_host):  # a stable sort keeps the order of inheritance
            group = self.add_argument_group(group_title(owner), group_description(owner))
            group._group_actions.extend(action for action in general if owners.get(action.dest) is owner)
        general[:] = [action for action in general if action.dest not in owners]

    def catching(self, **options: Any) -> AbstractContextManager[None]:
        """Turn errors that come from the user's input into one line; see [`~rl_plugins.usage.one_line_errors`]."""
        return one_line_errors(self.prog, show_traceback=self.show_traceback, **options)

    def parse_args_and_config(self, args: Iterable[str] | None = None, **kwargs: Any) -> tuple[Any, ...]:
        """Parse the command line and the file that `--config` names.

        Args:
            args: The arguments; those of the process by default.
            kwargs: None: those of TRL return unknown options to the caller, and here such options are errors.

        Returns:
            An instance of each dataclass.

        Raises:
            SystemExit: With status 2 and one line on stderr, if an option is unknown or a value is wrong.
        """
        given = list(_split_equals(sys.argv[1:] if args is None else args))
        self.show_traceback = TRACEBACK in given
        with self.catching():
            self._check_config(given)
            *found, in_file, in_line = super().parse_args_and_config(
                given, return_remaining_strings=True, separate_remaining_strings=True, **kwargs
            )
        self._refuse_unknown(in_line, "")
        self._refuse_unknown(in_file, "in the --config file: ")
        return tuple(found[: len(self.dataclass_types)])  # without the rest: --traceback

    def _check_config(self, given: Sequence[str]) -> None:
        """Read the config file once, for errors that name it."""
        if CONFIG not in given:
            return
        place = given.index(CONFIG) + 1
        if place == len(given) or CONFIG in given[place:]:
            self.error(f"argument {CONFIG}: expected one file")
        path = given[place]
        try:
            found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            self.error(f"argument {CONFIG}: {path}: {error.strerror}")
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            self.error(f"argument {CONFIG}: {path} is no YAML: {error}")
        if not isinstance(found, dict):
            self.error(f"argument {CONFIG}: {path} must hold lines such as `max_steps: 100`, got {found!r:.80}")
        for name in found:
            if not isinstance(name, str):
                self.error(f"argument {CONFIG}: {path}: {name!r} is not the name of an option")

    def _refuse_unknown(self, strings: Sequence[str], place: str) -> None:
        if not strings:
            return
        unknown = next((text for text in strings if text.startswith("-")), None)
        if unknown is None:
            self.error(f"{place}unexpected value {strings[0]!r}: options begin with two hyphens")
        close = difflib.get_close_matches(unknown, list(self._option_string_actions), n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        self.error(f"{place}unknown option {unknown}; {hint}{self.prog} --help lists all")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and refuse text that begins like JSON and is not: the hosts' errors would not name the option."""
        found, rest = super().parse_known_args(args, namespace)
        for kind in self.dataclass_types:
            for name in getattr(kind, "_VALID_DICT_FIELDS", ()):
                value = getattr(found, name, None)
                if isinstance(value, str) and value.startswith("{"):
                    try:
                        json.loads(value)
                    except ValueError as error:
                        self.error(f"argument --{name}: {value} is no JSON: {error}")
        return found, rest

    def parse_args_into_dataclasses(self, args: Any = None, *other: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Parse without the file `<script>.args` that transformers looks for beside the script."""
        return super().parse_args_into_dataclasses(args, *other, **{**kwargs, "look_for_args_file": False})


def _split_equals(args: Iterable[str]) -> Iterable[str]:
    """Split `--config=FILE` into two arguments, the only form that TRL reads."""
    for argument in args:
        if argument.startswith(f"{CONFIG}="):
            yield from argument.split("=", 1)
        else:
            yield argument


def declaring_classes(kind: type) -> dict[str, type]:
    """Find for each field of a dataclass the class that declares it first; later ones only change its default."""
    owners: dict[str, type] = {}
    for base in reversed(kind.__mro__):
        for name in base.__dict__.get("__annotations__", {}):
            owners.setdefault(name, base)
    return {field.name: owners[field.name] for field in dataclasses.fields(kind) if field.init}


def is_host(owner: type) -> bool:
    """Whether a class of options is one of the hosts', and neither ours nor a recipe's."""
    return owner.__module__.partition(".")[0] in ("trl", "transformers")


def group_title(owner: type) -> str:
    """Name a group of options after the class that declares them: `ValueHeadOptions` becomes `value head options`."""
    if is_host(owner):
        return f"{owner.__name__} of {owner.__module__.partition('.')[0]}"
    words = re.findall(r"[A-Z]+(?=[A-Z][a-z]|$)|[A-Z][a-z]+", re.sub("(Options|Config)$", "", owner.__name__))
    return " ".join([*(word if word.isupper() else word.lower() for word in words), "options"])


def group_description(owner: type) -> str | None:
    """Describe a group of options by the first sentence about the class that declares them."""
    text = inspect.cleandoc(owner.__doc__ or "").split("\n\n")[0]
    sentence = re.sub(r"\[?`~?([\w.]+)`\]?", lambda name: name[1].rpartition(".")[2], text)
    first = re.split(r"(?<=[.])\s", " ".join(sentence.split()))[0]
    return None if first.startswith(f"{owner.__name__}(") else first
