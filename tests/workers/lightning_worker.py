"""Trains tiny language models in Lightning: `python lightning_worker.py runs.json`, which forks the ranks itself, so
that what is imported is imported once.

A run leaves in its directory, beside checkpoints, for every rank: `weights_<rank>.safetensors` (the whole model),
`target_<rank>.safetensors` (the slow heads, where there are any), and `log_<rank>.json` (`log.json` on rank 0) with
the loss of every micro-batch and what was logged with it, the norm of every gradient before it is clipped, and the
completions of every rollout; `episodes_<rank>.json` where there is an environment; if it fails, `error_<rank>.txt`
instead.

A run is a dictionary:
    out: directory of the run
    model: directory with model and tokenizer
    port: free port for this run's rendezvous
    kind: which of `MODULES`
    module: its options
    reward: `spread` by default, `steps` to pay tokens, or `episodes` to play with an environment
    backend: `one` (process), or of two ranks `ddp`, or a stage of ZeRO, `zero2`
    batch: prompts of a rank
    args: options of Lightning's `Trainer`
    checkpoint: number of optimizer steps between checkpoints
    kill_at: number of optimizer steps after which every rank kills itself
    resume: checkpoint to go on from
    save: whether to export the model after training
"""

import json
import logging
import os
import signal
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import common  # isort: skip  sets the environment
from common import Run, main, save_whole, start_deepspeed  # isort: skip

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from safetensors.torch import save_file
from torch import distributed
from transformers import AutoModelForCausalLM, AutoTokenizer

from rl_plugins.lightning import GRPOModule, MTPCriticModule, MTPSFTModule, PPOModule, PromptDataModule
from rl_plugins.lightning.deepspeed import CPUDeepSpeedStrategy
from rl_plugins.rollouts.completions import Completions, eos_token_ids, pad_left, until_eos
from rl_plugins.rollouts.rewards import prompt_tokens
from tests.helpers.step_rewards import LIMITS, Sums, per_token

WORLD = 2
TIMEOUT = timedelta(seconds=60)
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "num_sanity_val_steps": 0}
PROMPTS, NUMBERS, FIRST = 24, 14, 2  # rows; characters of the tokenizer, whose ids start at 2


class TwistedGRPO(GRPOModule):
    """With greedy decoding its completions depend on prompt, weights and place in the group alone, so that they are
    those of one process and differ within a group all the same."""

    def generate(self, prompts: Sequence[Any]) -> Completions:
        found = super().generate(prompts)
        place = torch.arange(len(prompts)).unsqueeze(1) % self.num_generations
        steps = torch.arange(1, found.completion_ids.shape[1] + 1)
        moved = FIRST + (found.completion_ids - FIRST + place * steps) % NUMBERS
        ids = torch.where(found.completion_ids < FIRST, found.completion_ids, moved)
        # Shorter by a token for each place, so that lengths differ in a group, too.
        mask = (steps <= (found.completion_mask.sum(1, keepdim=True) - place).clamp(min=1)).long()
        ended = found.ended & (mask.sum(1) == found.completion_mask.sum(1))
        return found._replace(completion_ids=ids * mask, completion_mask=mask, ended=ended)


class FixedCritic(MTPCriticModule):
    """Its completions depend on the prompt alone, so that they are those of a run in another precision."""

    def generate(self, prompts: Sequence[Any]) -> Completions:
        tokens, pad = prompt_tokens(self.tokenizer, prompts), self.tokenizer.pad_token_id
        ids, mask = pad_left(tokens, pad, self.device)
        eos = eos_token_ids(self.model, self.tokenizer)
        rows = [[FIRST + (sum(row) * (k + 3)) % NUMBERS for k in range(6)] for row in tokens]
        completions = torch.tensor([[*row[: 2 + sum(row) % 5], *eos, *row][:6] for row in rows])
        completion_mask, ended = until_eos(completions, eos)
        return Completions(ids, mask, completions * completion_mask, completion_mask, ended)


ONLINE: dict[str, Any] = {"max_completion_length": 6}
GREEDY: dict[str, Any] = {**ONLINE, "top_k": 1}
# The heads' token loss at all tokens, because every rank draws its own.
CRITIC: dict[str, Any] = {"num_mtp_heads": 2, "head_learning_rate": 1e-2, "mtp_loss_share": 1.0}
MODULES: dict[str, tuple[Any, dict[str, Any]]] = {
    "critic": (MTPCriticModule, {**GREEDY, **CRITIC}),
    "sampling_critic": (MTPCriticModule, {**ONLINE, **CRITIC}),
    "fixed_critic": (FixedCritic, {**ONLINE, "num_mtp_heads": 2, "mtp_loss_share": 1.0}),
    "grpo": (TwistedGRPO, {**GREEDY, "num_generations": 3}),
    "ppo": (PPOModule, {**GREEDY, "value_learning_rate": 1e-2}),
    "sft": (MTPSFTModule, {"num_mtp_heads": 2, "head_learning_rate": 1e-2}),
}


class Watch(Callback):
    """Keeps what a run says, and at its end what it has made; may kill it."""

    def __init__(self, run: Run) -> None:
        self.run, self.out = run, Path(run["out"])
        self.metrics: list[dict[str, float]] = []
        self.norms: list[float] = []
        self.step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_backend(trainer, self.run)
        self.step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Dies as a preempted job does: without a word, some steps after its last checkpoint."""
        if trainer.global_step == self.run.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if not self.run["backend"].startswith("zero"):
            grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
            self.norms.append(torch.nn.utils.get_total_norm(grads).item())

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.metrics.append({name: x.item() for name, x in trainer.callback_metrics.items()})
        if trainer.global_step > self.step:
            self.step = trainer.global_step
            if self.run["backend"].startswith("zero"):
                self.norms.append(float(trainer.strategy.model.get_global_grad_norm()))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        save_whole(dict(pl_module.named_parameters()), self.out, "weights")
        target = getattr(pl_module, "polyak_target", None)
        if target is not None:
            save_file(target.state_dict(), self.out / f"target_{common.RANK}.safetensors")


def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """In [0, 1), different for nearly any two completions."""
    return [sum((k + 1) * (i + 3) ** 2 for k, i in enumerate(ids)) % 97 / 97 for ids in completion_ids]


REWARDS: dict[str, dict[str, Any]] = {
    "spread": {"reward_funcs": reward},
    "steps": {"reward_funcs": [per_token, reward]},
    "episodes": {"environment": Sums, **LIMITS},
}


def make_rows() -> list[dict[str, Any]]:
    """Sums with an answer, for fine-tuning, too; some have a reward."""
    answers = [str(8 * i) for i in range(PROMPTS)]
    return [
        {"prompt": f"{i}+{7 * i}=", "completion": answer, "reward": None if i % 3 == 0 else i % 5 / 4}
        for i, answer in enumerate(answers)
    ]


def make_strategy(backend: str) -> Any:
    if backend == "one":
        return "auto"
    if backend == "ddp":
        return DDPStrategy(process_group_backend="gloo", timeout=TIMEOUT)
    start_deepspeed()
    # Shards even the tiny model's smallest parameter.
    zero = {"stage": int(backend[-1]), "stage3_param_persistence_threshold": 0}
    untested = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    return CPUDeepSpeedStrategy(config={"zero_optimization": zero, **untested})


def check_backend(trainer: Trainer, run: Run) -> None:
    """A host that silently trains otherwise than it was told would make the comparisons worthless."""
    if run["backend"] == "one":
        assert trainer.world_size == 1 and not distributed.is_initialized()
        return
    assert trainer.world_size == WORLD and trainer.global_rank == common.RANK and distributed.get_backend() == "gloo"
    engine: Any = trainer.strategy.model
    name = "DistributedDataParallel" if run["backend"] == "ddp" else "DeepSpeedEngine"
    assert type(engine).__name__ == name, type(engine)
    if run["backend"] != "ddp":
        assert engine.zero_optimization_stage() == int(run["backend"][-1])


def note_calls(module: Any, name: str, keep: Callable[[Any, Any], Any]) -> list[Any]:
    """Have a method's calls noted; returns the notes."""
    notes: list[Any] = []
    method = getattr(module, name)

    def noted(first: Any, *args: Any) -> Any:
        found = method(first, *args)
        notes.append(keep(first, found))
        return found

    setattr(module, name, noted)
    return notes


def train(run: Run) -> None:
    """One run, on all its ranks."""
    if run["backend"] == "one":
        train_rank(run)
        return
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(WORLD)}
    second = os.fork()
    common.RANK = int(second == 0)
    os.environ |= {"RANK": str(common.RANK), "LOCAL_RANK": str(common.RANK)}
    try:
        train_rank(run)
    except BaseException:
        if second:
            raise
        (Path(run["out"]) / "error_1.txt").write_text(traceback.format_exc())
    if second:
        os.waitpid(second, 0)
    else:
        os._exit(0)


def train_rank(run: Run) -> None:
    """One run, on this rank."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    out = Path(run["out"])
    watch = Watch(run)
    callbacks: list[Callback] = [watch]
    if "checkpoint" in run:
        callbacks.append(ModelCheckpoint(out, "{step}", every_n_train_steps=run["checkpoint"], save_top_k=-1))
    trainer = Trainer(
        accelerator="cpu",
        devices=1 if run["backend"] == "one" else WORLD,
        strategy=make_strategy(run["backend"]),
        callbacks=callbacks,
        default_root_dir=out,
        enable_checkpointing="checkpoint" in run,
        **QUIET,
        **run["args"],
    )
    torch.manual_seed(0)
    module_class, defaults = MODULES[run["kind"]]
    rewards = {} if run["kind"] == "sft" else REWARDS[run.get("reward", "spread")]
    module = module_class(run["model"], **rewards, **{"learning_rate": 1e-3, **defaults, **run["module"]})
    losses = note_calls(module, "training_step", lambda batch, loss: loss.item())
    rollouts = []
    if rewards:
        rollouts = note_calls(module, "_complete", lambda prompts, found: (list(prompts), found.token_lists()))
    torch.manual_seed(common.RANK)  # so that a rank that goes on with another's generator is found out
    rows = make_rows()
    held_out = rows[:4] if "val_check_interval" in run["args"] else None
    trainer.fit(module, PromptDataModule(rows, held_out, batch_size=run["batch"]), ckpt_path=run.get("resume"))
    log = {"losses": losses, "metrics": watch.metrics, "norms": watch.norms, "rollouts": rollouts}
    (out / (f"log_{common.RANK}.json" if common.RANK else "log.json")).write_text(json.dumps(log))
    if Sums.played:
        (out / f"episodes_{common.RANK}.json").write_text(json.dumps(Sums.played))
    if run.get("save"):
        module.save_pretrained(out / "final")


def load(run: Run) -> Any:
    """What every run does again."""
    AutoTokenizer.from_pretrained(run["model"])
    return AutoModelForCausalLM.from_pretrained(run["model"], dtype="float32")


if __name__ == "__main__":
    main(train, load)
