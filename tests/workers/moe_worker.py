"""Balances tiny mixtures of experts as a list of runs says: `torchrun --nproc_per_node 2 moe_worker.py runs.json`.

A run leaves in its directory, beside `moe_load.jsonl`, for every rank: `masters_<rank>.safetensors` (the float32
biases), `live_<rank>.safetensors` (those that the model routes with), `weights_<rank>.safetensors`, and
`log_<rank>.json` (`log.json` on rank 0) with the history and which added biases this rank wrote to which directory; if
it fails, `error_<rank>.txt` instead.

A run is a dictionary:
    out: directory of the run, also the trainer's `output_dir`
    model: directory with the model
    port: free port for this run's rendezvous
    trainer: `plain` (transformers', the default), `sft` (TRL's) or `mtp` (ours)
    balance: settings of `MoEBalancingCallback`; without them nothing is balanced
    given: whether the trainer gets the callback in `callbacks`, not by `add_to`
    data: JSON file with the columns of the dataset
    dtype: of the model; float32 by default
    args: options of its config (`deepspeed` among them)
    loaded: when the model is made: `before` the trainer's arguments, or after (the default; sharded from the start)
    lora: whether to train a LoRA adapter
    kill_at: number of optimizer steps after which every rank kills itself
    resume: checkpoint directory to go on from
    save: directory for `save_model` after training
"""

import json
from pathlib import Path
from typing import Any

from common import DEFAULTS, RANK, KillAt, Run, check_backend, main, save_whole, start_engine  # isort: skip  sets env

import torch
from critic_worker import reward
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator
from trl import SFTConfig, SFTTrainer

from rl_plugins.moe import files
from rl_plugins.trl import MoEBalancingCallback, MTPCriticConfig, MTPCriticTrainer

# Not Adam, which hides the scale of gradients and makes steps of rounding errors; no clipping, which hides it too.
STEPS = {**DEFAULTS, "optim": "sgd", "learning_rate": 0.03, "max_grad_norm": 1e4, "prediction_loss_only": True}
GENERATION = {**DEFAULTS, "max_completion_length": 6, "num_mtp_heads": 2, "head_learning_rate": 1e-2}
CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (TrainingArguments, STEPS),
    "sft": (SFTConfig, {**STEPS, "router_aux_loss_coef": 0.0}),
    "mtp": (MTPCriticConfig, GENERATION),
}
writes: list[str] = []
"""Files of added biases that this rank has written."""


def noted_save(tensors: dict[str, Tensor], path: Path) -> None:
    """As `save_file`."""
    writes.append(str(path))
    save_file(tensors, path)


def load(run: Run) -> Any:
    """The model as an object."""
    model = AutoModelForCausalLM.from_pretrained(
        run["model"], dtype=run.get("dtype", "float32"), attn_implementation="eager"
    )
    if not run.get("lora"):
        return model
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


def make_trainer(run: Run, model: Any, args: Any, callbacks: list[Any]) -> Any:
    kind, columns = run.get("trainer", "plain"), json.loads(Path(run["data"]).read_text())
    if kind == "plain":
        data = Dataset.from_dict(columns)
        return Trainer(
            model,
            args,
            data_collator=default_data_collator,
            train_dataset=data,
            eval_dataset=data.select(range(8)),
            callbacks=callbacks,
        )
    tokenizer = AutoTokenizer.from_pretrained(run["model"])
    if kind == "sft":
        real = [[i for i in ids if i] for ids in columns["input_ids"]]
        data = Dataset.from_dict({"input_ids": real})
        return SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer, callbacks=callbacks)
    prompts = Dataset.from_dict({"prompt": [f"{i}+{7 * i}=" for i in range(64)]})
    return MTPCriticTrainer(model, reward, args, prompts, processing_class=tokenizer, callbacks=callbacks)


def train(run: Run) -> None:
    """One run, on this rank."""
    files.save_file = noted_save
    start_engine(run)
    model = load(run) if run.get("loaded") == "before" else None
    config_class, defaults = CONFIGS[run.get("trainer", "plain")]
    args = config_class(**{"output_dir": run["out"], **defaults, **run["args"]})
    balancing = MoEBalancingCallback(**run["balance"]) if "balance" in run else None
    callbacks: list[Any] = [KillAt(run["kill_at"])] if run.get("kill_at") else []
    if balancing and run.get("given"):
        callbacks.append(balancing)
    torch.manual_seed(0)
    trainer = make_trainer(run, load(run) if model is None else model, args, callbacks)
    if balancing and not run.get("given"):
        balancing.add_to(trainer)
    check_backend(trainer)
    trainer.train(resume_from_checkpoint=run.get("resume"))
    write_results(trainer, Path(run["out"]))
    if run.get("save"):
        trainer.save_model(run["save"])
    log = {"history": trainer.state.log_history, "writes": writes}
    (Path(run["out"]) / ("log.json" if RANK == 0 else f"log_{RANK}.json")).write_text(json.dumps(log))


def write_results(trainer: Any, out: Path) -> None:
    """What the tests compare."""
    # The trainer may have made the callback anew from a checkpoint.
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, MoEBalancingCallback):
            assert callback.run is not None
            balancer = callback.run.balancer
            save_file(balancer.state_dict(), out / f"masters_{RANK}.safetensors")
            save_whole({router.name: router.bias for router in balancer.routers if router.has_bias}, out, "live")
    save_whole(dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters()), out, "weights")


if __name__ == "__main__":
    main(train, load)
