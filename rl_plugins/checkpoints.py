"""The check that a checkpoint fits the module that it is loaded into."""

from collections.abc import Mapping
from typing import Any


def check_same_shapes(
    saved: Mapping[str, tuple[int, ...]],
    current: Mapping[str, tuple[int, ...]],
    what: str,
    *,
    settings: Mapping[str, tuple[Any, Any]] | None = None,
) -> None:
    """Compare the shapes that a checkpoint holds with those of the module that it is loaded into.

    Args:
        saved: Shape of every parameter of the checkpoint, by name.
        current: Shape of every parameter of the module.
        what: The class of the module, for the message.
        settings: Settings that differ, by name, as (in the checkpoint, here); they are the likely cause.

    Raises:
        ValueError: With the first differences.
    """
    if dict(saved) == dict(current):
        return
    names = [name for name in {**saved, **current} if saved.get(name) != current.get(name)]
    shown = "; ".join(f"{name}: {saved.get(name)} in the checkpoint, {current.get(name)} here" for name in names[:3])
    causes = "; ".join(f"{name}: {old} in the checkpoint, {new} here" for name, (old, new) in (settings or {}).items())
    raise ValueError(
        f"The checkpoint was written by another architecture than this {what}: {len(names)} parameters differ "
        f"({shown}). Build the module with the model and settings of the run that is resumed, or start a new run."
        + (f" Settings that differ: {causes}." if causes else "")
    )
