"""Errors of commands: wrong input becomes one line on stderr and exit status 2, and a bug shows its traceback."""

import argparse
import builtins
import dis
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import NoReturn

MISTAKE = 2
"""Exit status of a command that was called wrongly, as in argparse."""
MEANT_FOR_USERS = (ValueError, TypeError, ImportError, NotImplementedError)
"""Built-in errors that libraries raise to say what is wrong with their input."""
_RAISE = dis.opmap["RAISE_VARARGS"]


def one_line(message: object) -> str:
    """Join the lines of a message."""
    return " ".join(str(message).split())


def exit_with(prog: str, message: object) -> NoReturn:
    """Write one line to stderr and leave with status 2.

    Args:
        prog: Name of the command.
        message: Says what is wrong and what helps; line breaks become spaces.
    """
    print(f"{prog}: error: {one_line(message)}", file=sys.stderr)
    raise SystemExit(MISTAKE)


class OneLineErrors(argparse.ArgumentParser):
    """Parser whose errors are one line: the usage of four hundred options would push the message off the screen."""

    def error(self, message: str) -> NoReturn:
        """Write the message and leave with status 2."""
        exit_with(self.prog, message)


@contextmanager
def one_line_errors(
    prog: str, *, show_traceback: bool = False, users_code: Collection[str] = (), begun: Callable[[], bool] = bool
) -> Iterator[None]:
    """Turn errors that come from the user's input into one line and exit status 2; others keep their traceback.

    Args:
        prog: Name of the command in the message.
        show_traceback: Leave all errors as they are.
        users_code: Names of modules that the user wrote. An error that comes out of them is the user's bug, and its
            traceback shows where.
        begun: Returns whether the actual work has begun. The input has then shown that it works, and every error keeps
            its traceback.
    """
    try:
        yield
    except Exception as error:
        if show_traceback or begun() or not is_mistake(error, users_code):
            raise
        exit_with(prog, error if str(error) else type(error).__name__)


def is_mistake(error: Exception, users_code: Collection[str] = ()) -> bool:
    """Return whether an error says what is wrong with the input, and is not a bug in the code.

    Errors of the operating system count as wrong input, since they are about files and networks. Errors of a class
    that a library defines, for example for a broken file, count as well. A built-in error counts if a `raise`
    statement raised it, in our code or in a library. If an operation failed, such as adding a number to a text, the
    error is a bug.

    Args:
        error: The error with its traceback.
        users_code: Names of modules whose errors always count as bugs.
    """
    frames = list(_frames(error.__traceback__))
    names = [str(entry.tb_frame.f_globals.get("__name__")) for entry in frames]
    if any(name == module or name.startswith(f"{module}.") for name in names for module in users_code):
        return False
    if isinstance(error, OSError):
        return True
    if isinstance(error, MEANT_FOR_USERS):
        return bool(frames) and _was_raised_on_purpose(frames[-1])
    library = type(error).__module__.partition(".")[0]
    return library not in (builtins.__name__, "torch", "rl_plugins", *sys.stdlib_module_names)


def _frames(traceback: TracebackType | None) -> Iterator[TracebackType]:
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next


def _was_raised_on_purpose(innermost: TracebackType) -> bool:
    """Return whether the frame that an error comes from was executing a `raise` statement."""
    return innermost.tb_frame.f_code.co_code[innermost.tb_lasti] == _RAISE
