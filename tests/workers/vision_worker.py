"""Trains tiny vision-language models as a list of runs says: `torchrun --nproc_per_node 2 vision_worker.py runs.json`.

A run leaves `log.json` (history) and, per rank, `weights_<rank>.safetensors` in its directory; if it fails,
`error_<rank>.txt` instead.

A run is a dictionary:
    out: directory of the run, also the trainer's `output_dir`
    port: free port for this run's rendezvous
    family: `llava_next` or `qwen2_5_vl`
    kind: `images`, `text` or `mixed`
    trainer: `stock`, `critic`, `ppo`, `variant` or `sft`
    args: options of its config
"""

import json
from pathlib import Path
from typing import Any

from common import DEFAULTS, RANK, Run, check_backend, main  # isort: skip  sets the environment

import torch
from safetensors.torch import save_file
from trl import GRPOConfig, GRPOTrainer

from rl_plugins.trl import (
    GRPOVariantConfig,
    GRPOVariantTrainer,
    MTPCriticConfig,
    MTPCriticTrainer,
    MTPSFTConfig,
    MTPSFTTrainer,
    PPOConfig,
    PPOTrainer,
)
from tests.helpers.vision_models import lessons, looks, vision_language

# Completions of one length, so that two ranks, and one process in two micro-steps, weigh tokens alike.
SAMPLING = {"max_completion_length": 4, "generation_kwargs": {"do_sample": False, "min_new_tokens": 4}}
ONLINE = {**SAMPLING, "shuffle_dataset": False, "log_multimodal": False, "steps_per_generation": 1}
# The token loss at all tokens, because every rank draws its own.
HEADS = {"num_mtp_heads": 2, "mtp_loss_share": 1.0}
TRAINERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "stock": (GRPOTrainer, GRPOConfig, {**ONLINE, "num_generations": 2, "scale_rewards": "none"}),
    "critic": (
        MTPCriticTrainer,
        MTPCriticConfig,
        {**ONLINE, **HEADS, "advantage_scaling": "none", "calibrate_values": False},
    ),
    "ppo": (PPOTrainer, PPOConfig, {**ONLINE, "advantage_scaling": "none", "beta": 0.0, "num_iterations": 1}),
    "variant": (
        GRPOVariantTrainer,
        GRPOVariantConfig,
        {**ONLINE, **HEADS, "num_generations": 1, "advantage": "reward", "policy_loss": "dapo", "speculative": True},
    ),
    "sft": (MTPSFTTrainer, MTPSFTConfig, {"train_sampling_strategy": "sequential", "max_length": None}),
}


def odd(completions: list[Any], **kwargs: Any) -> list[float]:
    """Something that depends on the completion, in [0, 1)."""
    return [sum((k + 1) * ord(c) for k, c in enumerate(text[0]["content"])) % 97 / 97 for text in completions]


def train(run: Run) -> None:
    """One run, on this rank."""
    trainer_class, config_class, own = TRAINERS[run["trainer"]]
    model, processor = vision_language(run["family"])
    rates = {key: 0.1 for key in ("head_learning_rate", "value_learning_rate") if hasattr(config_class, key)}
    options = {**DEFAULTS, **own, **rates, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    args = config_class(**{"output_dir": run["out"], **options, "max_steps": 3, **run["args"]})
    torch.manual_seed(0)
    if run["trainer"] == "sft":
        trainer = trainer_class(model, args, train_dataset=lessons(run["kind"]), processing_class=processor)
    else:
        trainer = trainer_class(model, odd, args, looks(run["kind"]), processing_class=processor)
    check_backend(trainer)
    trainer.train()
    named = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    save_file(named, Path(run["out"]) / f"weights_{RANK}.safetensors")
    if RANK == 0:
        (Path(run["out"]) / "log.json").write_text(json.dumps({"history": trainer.state.log_history}))


if __name__ == "__main__":
    main(train, lambda run: vision_language(run["family"]))
