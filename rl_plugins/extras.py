"""Optional dependencies, and the extras of the package that install them."""

from importlib import import_module


def require(extra: str, *modules: str) -> None:
    """Import modules that an extra of the package installs.

    Args:
        extra: Name of the extra of `rl-plugins`.
        modules: Names of the modules.

    Raises:
        ImportError: If a module is missing; the message says what to install.
    """
    for name in modules:
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            raise ImportError(
                f'{error.name or name} is not installed. Run: pip install "rl-plugins[{extra}]"', name=error.name
            ) from error
