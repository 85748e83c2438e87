"""Warnings of hosts that nobody can act on are hidden, one by one, and the user's own filters come first."""

import logging
import subprocess
import sys
import warnings

import pytest

from rl_plugins.known_warnings import KNOWN_LOG_LINES, KNOWN_WARNINGS, ignore_known_warnings

MESSAGES = [
    ("`gradient_checkpointing` is deprecated and will be removed in v6.", FutureWarning),
    ("`gradient_checkpointing_enable` is deprecated and will be removed in v6.", FutureWarning),
    ("`gradient_checkpointing_disable` is deprecated and will be removed in v6.", FutureWarning),
    ("`is_gradient_checkpointing` is deprecated and will be removed in v6.", FutureWarning),
    ("'pin_memory' argument is set as true but no accelerator is found", UserWarning),
    ("You are using 'rollout_func', which is an experimental feature.", UserWarning),
    ("You are using 'environment_factory', which is an experimental feature.", UserWarning),
    ("`isinstance(treespec, LeafSpec)` is deprecated, use ...", FutureWarning),
]


def shown(message: str, category: type[Warning]) -> bool:
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        ignore_known_warnings()
        warnings.warn(message, category, stacklevel=1)
    return bool(caught)


@pytest.mark.parametrize(("message", "category"), MESSAGES)
def test_these_are_hidden_and_others_of_the_category_are_not(message: str, category: type[Warning]) -> None:
    assert not shown(message, category)
    assert shown(message, RuntimeWarning), "of another category"
    assert shown(f"And {message}", category), "another message"


def test_filters_of_the_user_come_first() -> None:
    message, category = MESSAGES[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        ignore_known_warnings()
        with pytest.raises(FutureWarning):
            warnings.warn(message, category, stacklevel=1)
        before = list(warnings.filters)
        ignore_known_warnings()
        assert warnings.filters == before, "a second call adds nothing"


def test_the_log_line_is_hidden_and_others_are_not() -> None:
    ignore_known_warnings()
    logger = logging.getLogger("DeepSpeed")
    ignore_known_warnings()
    known = [f for f in logger.filters if type(f).__module__ == "rl_plugins.known_warnings"]
    assert len(known) == 1 == len(KNOWN_LOG_LINES)

    def passes(message: str) -> bool:
        record = logging.LogRecord("DeepSpeed", logging.WARNING, "", 0, message, (), None)
        return all(f.filter(record) for f in known)  # type: ignore[union-attr]

    assert not passes("Setting accelerator to CPU. If you have GPU") and passes("Out of memory")


@pytest.mark.slow
def test_imports_leave_the_filters_alone() -> None:
    """Those of hosts are there with or without us; ours come with the first config."""
    code = """
import warnings, trl, transformers
from trl import GRPOTrainer, SFTTrainer
before = list(warnings.filters)
import rl_plugins.trl
assert warnings.filters == before
from rl_plugins.trl import MTPSFTConfig
MTPSFTConfig("out", use_cpu=True, bf16=False)
print(len(warnings.filters) - len(before), warnings.filters[: len(before)] == before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == f"{len(KNOWN_WARNINGS)} True\n", done.stderr
    assert "FutureWarning" not in done.stderr
