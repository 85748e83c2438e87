"""Balances tiny mixtures of experts in Lightning: `torchrun --nproc_per_node 2 lightning_moe_worker.py runs.json`.

A run leaves in its directory, beside `moe_load.jsonl`, `metrics.csv` and checkpoints, for every rank:
`masters_<rank>.safetensors` (the float32 biases), `live_<rank>.safetensors` (those that the model routes with),
`weights_<rank>.safetensors`, and `log_<rank>.json` (`log.json` on rank 0) with the loss of every micro-batch, what the
callback logged at every step, and the files of loads that this rank wrote; if it fails, `error_<rank>.txt` instead.

A run is a dictionary:
    out: directory of the run
    model: directory with the model
    port: free port for this run's rendezvous
    data: JSON file with the columns of the dataset
    balance: settings of `MoEBalancingCallback`
    backend: `one` (process), `ddp`, or a stage of ZeRO, `zero2`
    batch: rows of a rank in a micro-batch
    lr: learning rate
    late: whether the model is made in `setup`, when callbacks have been set up already
    args: options of Lightning's `Trainer`
    checkpoint: number of optimizer steps between checkpoints
    resume: checkpoint to go on from
"""

import json
import logging
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

from common import RANK, WORLD, Run, main, save_whole, start_deepspeed  # isort: skip  sets the environment

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from safetensors.torch import save_file
from torch import Tensor, distributed
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForCausalLM

from rl_plugins.lightning import MoEBalancingCallback
from rl_plugins.lightning.deepspeed import CPUDeepSpeedStrategy
from rl_plugins.moe import run as balancing_run

Batch = dict[str, Tensor]
TIMEOUT = timedelta(seconds=60)
STEPS = {"accelerator": "cpu", "devices": WORLD, "log_every_n_steps": 1, "max_epochs": -1}
QUIET = {"enable_progress_bar": False, "enable_model_summary": False}
writes: list[str] = []
"""Files of loads that this rank has written to."""


def noted_append(path: Path, *args: Any) -> None:
    """As `append_expert_load`."""
    writes.append(path.name)
    append_expert_load(path, *args)


append_expert_load, balancing_run.append_expert_load = balancing_run.append_expert_load, noted_append


class Module(LightningModule):
    """A language model, its loss and an optimizer whose steps show the scale of gradients, with a memory."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.model = None if run.get("late") else load(run)
        self.losses: list[float] = []

    def setup(self, stage: str) -> None:
        if self.model is None:
            self.model = load(self.run)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.run["lr"], momentum=0.9)


class Watch(Callback):
    """Keeps what the callbacks before it logged, and at the end what the tests compare."""

    def __init__(self, run: Run, balancing: MoEBalancingCallback) -> None:
        self.out, self.balancing = Path(run["out"]), balancing
        self.metrics: list[dict[str, float]] = []
        self.step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step = trainer.global_step
        self.balancer = self.balancing.run.balancer  # which lets go of it before this callback's turn

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step > self.step:
            self.step = trainer.global_step
            logged = trainer.callback_metrics
            self.metrics.append({name: x.item() for name, x in logged.items() if name.startswith("moe/")})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        balancer = self.balancer
        save_file(balancer.state_dict(), self.out / f"masters_{RANK}.safetensors")
        save_whole({router.name: router.bias for router in balancer.routers if router.has_bias}, self.out, "live")
        save_whole(dict(pl_module.named_parameters()), self.out, "weights")


def load(run: Run) -> Any:
    """The model as an object."""
    model = AutoModelForCausalLM.from_pretrained(run["model"], dtype="float32", attn_implementation="eager")
    return model.train()  # which Lightning does not call


def make_loader(run: Run) -> DataLoader:
    columns = json.loads(Path(run["data"]).read_text())
    rows = [dict(zip(columns, map(torch.tensor, row), strict=True)) for row in zip(*columns.values(), strict=True)]
    # Lightning's own sampler shuffles where there are several ranks.
    sampler = DistributedSampler(rows, WORLD, RANK, shuffle=False)
    return DataLoader(rows, batch_size=run["batch"], sampler=sampler)


def make_strategy(backend: str) -> Any:
    if backend == "one":
        return "auto"
    if backend == "ddp":
        return DDPStrategy(process_group_backend="gloo", timeout=TIMEOUT)
    start_deepspeed()
    config = {
        # Shards even the tiny model's smallest parameter.
        "zero_optimization": {"stage": int(backend[-1]), "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return CPUDeepSpeedStrategy(config=config)


def check_backend(trainer: Trainer, run: Run) -> None:
    """A host that silently trains otherwise than it was told would make the comparisons worthless."""
    assert trainer.world_size == WORLD and trainer.global_rank == RANK
    if run["backend"] != "one":
        assert distributed.get_backend() == "gloo"
        engine = {"ddp": "DistributedDataParallel"}.get(run["backend"], "DeepSpeedEngine")
        assert type(trainer.strategy.model).__name__ == engine, type(trainer.strategy.model)


def train(run: Run) -> None:
    """One run, on this rank."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    out = Path(run["out"])
    balancing = MoEBalancingCallback(**run["balance"])
    watch = Watch(run, balancing)
    callbacks: list[Callback] = [balancing, watch]
    if "checkpoint" in run:
        callbacks.append(ModelCheckpoint(out, "{step}", every_n_train_steps=run["checkpoint"], save_top_k=-1))
    trainer = Trainer(
        strategy=make_strategy(run["backend"]),
        callbacks=callbacks,
        default_root_dir=out,
        logger=CSVLogger(out, name="", version=""),
        enable_checkpointing="checkpoint" in run,
        **STEPS,
        **QUIET,
        **run["args"],
    )
    torch.manual_seed(0)
    module = Module(run)
    trainer.fit(module, make_loader(run), ckpt_path=run.get("resume"))
    log = {"losses": module.losses, "metrics": watch.metrics, "writes": writes}
    (out / ("log.json" if RANK == 0 else f"log_{RANK}.json")).write_text(json.dumps(log))


if __name__ == "__main__":
    main(train, load)
