"""Class depth: at most two classes of ours above a host's, so that a trainer or module can be read in two files."""

import pytest

import rl_plugins.classic
import rl_plugins.lightning
import rl_plugins.trl

PUBLIC = [
    getattr(package, name)
    for package in (rl_plugins.trl, rl_plugins.lightning, rl_plugins.classic)
    for name in package.__all__
]


def ours(cls: type) -> list[str]:
    """Names of our classes in the resolution order of a class, mixins counted."""
    return [base.__name__ for base in cls.__mro__ if base.__module__.startswith("rl_plugins.")]


TRAINED = [
    cls
    for cls in PUBLIC
    if isinstance(cls, type) and any(base.__name__ in ("Trainer", "LightningModule") for base in cls.__mro__)
]


@pytest.mark.parametrize("cls", TRAINED, ids=lambda cls: f"{cls.__module__.split('.')[1]}.{cls.__name__}")
def test_at_most_two_classes_above_the_hosts(cls: type) -> None:
    order = [base.__name__ for base in cls.__mro__]
    print(" -> ".join(order[: order.index("object")]))
    assert 1 <= len(ours(cls)) <= 2


def test_all_trainers_and_modules_are_looked_at() -> None:
    names = {cls.__name__ for cls in TRAINED}
    assert {"MTPCriticTrainer", "PPOTrainer", "GRPOVariantTrainer", "MTPSFTTrainer", "RLTrainer"} <= names
    assert {"MTPCriticModule", "PPOModule", "GRPOModule", "MTPSFTModule", "RLModule"} <= names
