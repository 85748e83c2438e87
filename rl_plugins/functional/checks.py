"""Checks of arguments for several modules of this layer. All raise `ValueError`; the message has the numbers."""

from torch import Tensor


def check_shape(name: str, x: Tensor, shape: tuple[int, ...], give: str) -> None:
    """Refuse a tensor of another shape, which broadcasting would silently pair with the wrong entries.

    Args:
        name: the name of the argument.
        x: its value.
        shape: the shape that it must have.
        give: the advice of the message, which ends with the shape.
    """
    if x.shape != shape:
        raise ValueError(f"{name} {tuple(x.shape)}: {give}, {tuple(shape)}.")


def check_groups(name: str, x: Tensor, group_size: int) -> None:
    """Refuse a tensor, of one entry per completion, that cannot be split into groups of equal size."""
    if x.ndim != 1 or group_size < 1 or len(x) % group_size:
        raise ValueError(
            f"{name} {tuple(x.shape)} do not divide into groups of {group_size}: give one number per completion, "
            "(B,), and a group_size that divides B. Keep the completions of a prompt together."
        )


def check_positive(give: str = "give a positive number", **numbers: float) -> None:
    """Refuse the first number that is not above 0."""
    for name, value in numbers.items():
        if not value > 0:
            raise ValueError(f"{name}={value}: {give}.")


def check_widths(**bounds: float) -> None:
    """Refuse the first bound that is negative."""
    for name, value in bounds.items():
        if value < 0:
            raise ValueError(f"{name}={value}: give 0 or a positive number.")


def check_shares(**shares: float) -> None:
    """Refuse the first share outside `[0, 1]`."""
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value}: give a share in [0, 1].")
