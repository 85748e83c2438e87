"""Fixtures on what `tests/helpers/tiny.py` makes, and the server of `tests/helpers/processes.py`.

Nothing here imports torch before a test file does: pytest-xdist's controller imports this file, too, and no test.
"""

import gc
import importlib.metadata
import importlib.util
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import pytest

from .helpers import processes

# accelerate asks for some thirty packages whenever a trainer is made, and reads their files each time.
importlib.metadata.metadata = cache(importlib.metadata.metadata)

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Iterator[None]:
    """All test files are imported and no test has run: the moment to fork the server of scripts."""
    controls = session.config.getoption("numprocesses", None) and not hasattr(session.config, "workerinput")
    if session.config.option.collectonly or controls:
        return (yield)
    import torch

    # Two torch threads on busy cores are ten times slower than one for models this small.
    torch.set_num_threads(1)
    save_time()
    warm_up()
    # Hosts collect garbage after every run, which takes longer than the run if all that was imported is looked at.
    gc.collect()
    gc.freeze()
    processes.SERVER = processes.Server()
    try:
        return (yield)
    finally:
        processes.SERVER.stop()


def save_time() -> None:
    """Leave out what hosts do again and again and no test can see: a quarter of what a run of three steps takes."""
    import datasets.arrow_dataset
    import datasets.fingerprint
    import torch

    # Of every transformation a hash of all that it uses, for files of a cache that data in memory does not have.
    for module in (datasets.fingerprint, datasets.arrow_dataset):
        module.update_fingerprint = lambda *args: datasets.fingerprint.generate_random_fingerprint()
    # A seed is noted for devices that are not there, together with the stack of calls.
    for device in (torch.cuda, torch.xpu, torch.mtia):
        if not device.is_available():
            device.manual_seed_all = lambda seed: None


def warm_up() -> None:
    """Do here what takes a second of the first run in a process, so that no fork does it anew."""
    import torch.nn.modules.linear_cross_entropy  # noqa: F401

    from .helpers.tiny import make_tiny_model

    if importlib.util.find_spec("deepspeed"):
        importlib.import_module("deepspeed")  # accelerate imports it with the first trainer
    with tempfile.TemporaryDirectory() as folder:
        make_tiny_model().save_pretrained(folder)  # lists how the weights of all families are called


@pytest.fixture(scope="session", autouse=True)
def quiet() -> None:
    """No progress bars, no chatter about special tokens and generation configs."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def no_warnings_from_hosts() -> Iterator[None]:
    """Hosts warn about their own deprecations at run time."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(trl|transformers|accelerate|peft|torch)\b.*")
        yield


@pytest.fixture(scope="session")
def tiny_model() -> "Callable[..., Qwen3ForCausalLM]":
    """Factory: `tiny_model(seed=0, **config_overrides)`."""
    from .helpers.tiny import make_tiny_model

    return make_tiny_model


@pytest.fixture(scope="session")
def tokenizer() -> "PreTrainedTokenizerFast":
    """Character tokenizer."""
    from .helpers.tiny import make_tokenizer

    return make_tokenizer()


@pytest.fixture
def dataset() -> "Dataset":
    """64 sums."""
    from .helpers.tiny import make_dataset

    return make_dataset()


@pytest.fixture
def reward() -> Callable[..., list[float]]:
    """Share of odd digits in the completion."""
    from .helpers.tiny import digit_reward

    return digit_reward


@pytest.fixture
def critic_args() -> Callable[..., Any]:
    """Factory: `critic_args(tmp_path, **overrides)`."""
    from .helpers.tiny import make_critic_args

    return make_critic_args
