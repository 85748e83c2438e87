"""What workers share: a list of runs, each in a process of its own, on every rank.

Every run is a fresh process, forked after the slow imports, so that a run may be killed and a list of runs costs
little more than one. A run that fails leaves `error_<rank>.txt` in its directory.

Import this module first: it sets the environment, and where `tests` is found.
"""

import gc
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1", "TORCHELASTIC_USE_AGENT_STORE": "False"}
os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "CI": "1"}
sys.path.insert(0, str(Path(__file__).parents[2]))

import deepspeed
import deepspeed.ops
import torch
import transformers
import yaml
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

import rl_plugins.trl  # noqa: F401  (slow, and most workers import it)
from rl_plugins.nn.sharding import whole_parameters

torch._dynamo.config.disable = True  # the variable is read when torch is imported, which it may be already

Run = dict[str, Any]
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
DEFAULTS = {
    "use_cpu": True,
    "bf16": False,
    "optim": "adamw_torch",
    "dataloader_pin_memory": False,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


class KillAt(TrainerCallback):
    """Dies as a preempted job does: without a word, some steps after its last checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def start_deepspeed() -> None:
    """Before the trainer's arguments are made."""
    # Compiling the shared-memory collectives takes a minute and brings nothing here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, timeout=timedelta(seconds=60))


def start_fsdp() -> None:
    """Before the trainer's arguments are made: accelerate drops an FSDP plugin in silence where there is no GPU."""
    stock = AcceleratorState.__init__

    @wraps(stock)
    def with_fsdp(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        stock(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and "fsdp_plugin" not in vars(self):
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = with_fsdp


def start_engine(run: Run) -> None:
    """Prepare for the engine that the options of a run name, if they do, or its `accelerate`, a launch config."""
    if run["args"].get("deepspeed"):
        start_deepspeed()
    if run["args"].get("fsdp") or "accelerate" in run:
        start_fsdp()
    if "accelerate" in run:
        config = yaml.safe_load(Path(run["accelerate"]).read_text())
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_MIXED_PRECISION": config["mixed_precision"]}
        os.environ |= {key.upper(): str(value) for key, value in config["fsdp_config"].items()}


def check_backend(trainer: Any) -> None:
    """A host that silently trains otherwise than it was told would make the comparisons worthless."""
    assert trainer.accelerator.num_processes == WORLD
    if trainer.args.deepspeed is not None:
        assert trainer.accelerator.distributed_type == DistributedType.DEEPSPEED
    if trainer.args.fsdp or "ACCELERATE_USE_FSDP" in os.environ:
        assert trainer.is_fsdp_enabled and trainer.accelerator.is_fsdp2
        trainer.add_callback(CheckSharded())


class CheckSharded(TrainerCallback):
    """Sees that FSDP2 has sharded every parameter."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        assert all(isinstance(param, DTensor) for param in model.parameters())


def save_whole(named: dict[str, Tensor], out: Path, what: str) -> None:
    """Gather what is sharded; the file says whether anything was, and whether engines keep it whole between steps."""
    sharded = any(x.numel() == 0 or isinstance(x, DTensor) for x in named.values())
    persistent = all(vars(x).get("ds_persist", False) for x in named.values())
    with whole_parameters(list(named.values())) as tensors:
        whole = {name: x.detach().clone().contiguous() for name, x in zip(named, tensors, strict=True)}
    save_file(whole, out / f"{what}_{RANK}.safetensors", {"sharded": str(sharded), "persistent": str(persistent)})


def in_child(run: Run, train: Callable[[Run], None]) -> int:
    """Call `train` in a forked process; return its wait status."""
    out = Path(run["out"])
    out.mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    os.environ["MASTER_PORT"] = str(run["port"])
    try:
        train(run)
    except BaseException:
        (out / f"error_{RANK}.txt").write_text(traceback.format_exc())
        traceback.print_exc()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


def main(train: Callable[[Run], None], warm_up: Callable[[Run], Any]) -> None:
    """All runs of the list that the command line names, one after the other.

    Args:
        train: One run, on this rank.
        warm_up: Called with the first run, for what every run would do again: fill the caches of transformers, walk
            through all that was imported.
    """
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    runs = json.loads(Path(sys.argv[1]).read_text())
    warm_up(runs[0])
    gc.freeze()
    for run in runs:
        print(run["out"], "ended with status", in_child(run, train), flush=True)
