"""Optional dependencies: which extra of the package brings them."""

from importlib import import_module


def require(extra: str, *modules: str) -> None:
    """Import modules that an extra of the package installs.

    Args:
        extra: Of `rl-plugins`.
        modules: What to import.

    Raises:
        ImportError: If one is missing; the message says what to install.
    """
    for name in modules:
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            raise ImportError(
                f'{error.name or name} is not installed. Run: pip install "rl-plugins[{extra}]"', name=error.name
            ) from error
