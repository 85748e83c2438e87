"""Trains tiny policies with a critic as a list of runs says: `torchrun --nproc_per_node 2 critic_worker.py runs.json`.

Every run is a fresh process, forked after the slow imports, so that a run may be killed and a list of runs costs
little more than one. A run leaves in its directory: `log.json` (history and what was captured) and, per rank,
`target_<rank>.safetensors` and `heads_<rank>.safetensors` (MTP critic) or `value_model_<rank>.safetensors` (PPO); if
it fails, `error_<rank>.txt` instead.

A run is a dictionary:
    out: directory of the run, also the trainer's `output_dir`
    model: directory with model and tokenizer
    port: free port for this run's rendezvous
    trainer: `mtp` (the default) or `ppo`
    args: options of its config (`deepspeed` among them)
    loaded: whether the trainer gets the model itself: `before` the config is made, or `after`
    lora: whether to train a LoRA adapter
    kill_at: number of optimizer steps after which every rank kills itself
    resume: checkpoint directory to go on from
    save: directory for `save_model` after training
"""

import json
import os
import signal
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1", "TORCHELASTIC_USE_AGENT_STORE": "False"}
os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "CI": "1"}

import deepspeed
import deepspeed.ops
import torch
import transformers
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from rl_plugins.generation.value_capture import ValueRecorder
from rl_plugins.trl import MTPCriticConfig, MTPCriticTrainer, PPOConfig, PPOTrainer
from rl_plugins.trl.critic_module import whole_parameters

Run = dict[str, Any]
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
DEFAULTS = {
    "use_cpu": True,
    "bf16": False,
    "optim": "adamw_torch",
    "dataloader_pin_memory": False,
    "model_init_kwargs": {"dtype": "float32"},
    "max_completion_length": 6,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
TRAINERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mtp": (MTPCriticTrainer, MTPCriticConfig, {"head_learning_rate": 1e-2}),
    "ppo": (PPOTrainer, PPOConfig, {"value_learning_rate": 1e-2}),
}

finished: list[bool] = []
"""Of every finished recorder: whether it had the values of the whole completion."""


class RecordingRecorder(ValueRecorder):
    """A recorder that flushes more than once per completion, and remembers how it ended."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, flush_every=4)

    def finish(self, num_tokens: int) -> Any:
        values = super().finish(num_tokens)
        finished.append(values is not None)
        return values


class KillAt(TrainerCallback):
    """Dies as a preempted job does: without a word, some steps after its last checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    """Share of odd digits."""
    return [sum(c in "13579" for c in text) / max(len(text), 1) for text in completions]


def load(run: Run) -> Any:
    """The policy as an object."""
    return AutoModelForCausalLM.from_pretrained(run["model"], dtype="float32")


def train(run: Run) -> None:
    """One run, on this rank."""
    import rl_plugins.trl.critic_trainer as critic_trainer

    critic_trainer.ValueRecorder = RecordingRecorder
    if run["args"].get("deepspeed"):
        # Compiling the shared-memory collectives takes a minute and brings nothing here.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, timeout=timedelta(seconds=60))
    trainer_class, config_class, own_defaults = TRAINERS[run.get("trainer", "mtp")]
    model = load(run) if run.get("loaded") == "before" else run["model"]
    args = config_class(**{"output_dir": run["out"], **DEFAULTS, **own_defaults, **run["args"]})
    if run.get("loaded") == "after":
        model = load(run)
    if run.get("loaded"):
        args.model_init_kwargs = None
    torch.manual_seed(0)
    trainer = trainer_class(
        model,
        reward,
        args,
        Dataset.from_dict({"prompt": [f"{i}+{7 * i}=" for i in range(64)]}),
        processing_class=AutoTokenizer.from_pretrained(run["model"]),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if run.get("lora") else None,
        callbacks=[KillAt(run["kill_at"])] if run.get("kill_at") else None,
    )
    assert trainer.accelerator.num_processes == WORLD
    if args.deepspeed is not None:
        assert trainer.accelerator.distributed_type == DistributedType.DEEPSPEED
    trainer.train(resume_from_checkpoint=run.get("resume"))
    write_results(trainer, Path(run["out"]))
    if run.get("save"):
        trainer.save_model(run["save"])


def write_results(trainer: Any, out: Path) -> None:
    """What the tests compare."""
    params = list(trainer.critic_module.parameters())
    sharded = hasattr(params[0], "ds_id") and all(p.numel() == 0 for p in params)
    with whole_parameters(params):
        weights = {k: v.detach().clone() for k, v in trainer.critic_module.state_dict().items()}
    name = "heads" if isinstance(trainer, MTPCriticTrainer) else "value_model"
    save_file(weights, out / f"{name}_{RANK}.safetensors")
    if isinstance(trainer, MTPCriticTrainer):
        save_file(trainer.polyak_target.state_dict(), out / f"target_{RANK}.safetensors")
    if RANK == 0:
        log = {"history": trainer.state.log_history, "captured": finished, "sharded": sharded}
        (out / "log.json").write_text(json.dumps(log))


def in_child(run: Run) -> int:
    """Run `train` in a forked process; return its wait status."""
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


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    for run in json.loads(Path(sys.argv[1]).read_text()):
        print(run["out"], "ended with status", in_child(run), flush=True)
