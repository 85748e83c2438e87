"""Trains tiny policies with a critic as a list of runs says: `torchrun --nproc_per_node 2 critic_worker.py runs.json`.

A run leaves in its directory: `log.json` (history and what was captured) and, per rank, `target_<rank>.safetensors`
and `heads_<rank>.safetensors` (MTP critic), `value_model_<rank>.safetensors` (PPO) or `policy_<rank>.safetensors`,
`batches_<rank>.json`, `tracker_<rank>.json` and `replay_<rank>.pt` (GRPO variants, the last two where there is one);
`episodes_<rank>.json` where there is an environment; if it fails, `error_<rank>.txt` instead.

A run is a dictionary:
    out: directory of the run, also the trainer's `output_dir`
    model: directory with model and tokenizer
    port: free port for this run's rendezvous
    trainer: `mtp` (the default), `ppo`, `variant` or `sft`
    reward: name of the rewards, of `REWARDS`, or `episodes` to play with an environment; `odd` by default; for `sft`
        whether examples are `scored`
    prompts: size of the dataset, 64 by default
    args: options of its config (`deepspeed` among them)
    accelerate: a config of `accelerate launch`, whose environment the run gets
    loaded: whether the trainer gets the model itself: `before` the config is made, or `after`
    lora: whether to train a LoRA adapter
    kill_at: number of optimizer steps after which every rank kills itself
    resume: checkpoint directory to go on from
    save: directory for `save_model` after training
"""

import json
from itertools import count
from pathlib import Path
from typing import Any

from common import DEFAULTS, RANK, WORLD, KillAt, Run, check_backend, main, start_engine  # isort: skip  sets the environment

import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rl_plugins.nn.sharding import whole_parameters
from rl_plugins.rollouts.batch import loss_mask
from rl_plugins.rollouts.values import ValueRecord
from rl_plugins.signals import critics
from rl_plugins.trl import (
    EpisodeRollouts,
    GRPOVariantConfig,
    GRPOVariantTrainer,
    MTPCriticConfig,
    MTPCriticTrainer,
    MTPSFTConfig,
    MTPSFTTrainer,
    PPOConfig,
    PPOTrainer,
)
from tests.helpers.step_rewards import LIMITS, Sums, per_token

TRL_DEFAULTS = {**DEFAULTS, "model_init_kwargs": {"dtype": "float32"}, "num_mtp_heads": 2}
ONLINE: dict[str, Any] = {"max_completion_length": 6}
finished: list[bool] = []
"""Of every finished record, of `generate` or of a pass: whether it had the values of the whole completion."""


class NotingRecord(ValueRecord):
    """A record that flushes more than once per completion, and remembers how it ended."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, flush_every=4)

    def finish(self, num_tokens: int) -> Any:
        values = super().finish(num_tokens)
        finished.append(values is not None)
        return values


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    """Share of odd digits."""
    return [sum(c in "13579" for c in text) / max(len(text), 1) for text in completions]


def spread(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """In [0, 1), different for nearly any two completions."""
    return [sum((k + 1) * (i + 3) ** 2 for k, i in enumerate(ids)) % 97 / 97 for ids in completion_ids]


def thirds(prompts: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """As `spread`, but for every third prompt all completions get the same."""
    rewards = spread(completion_ids)
    return [0.5 if int(p.split("+")[0]) % 3 == 0 else r for p, r in zip(prompts, rewards, strict=True)]


REWARDS: dict[str, Any] = {"odd": reward, "spread": spread, "thirds": thirds, "steps": [per_token, reward]}


class SteadyVariantTrainer(GRPOVariantTrainer):
    """Under greedy decoding its completions depend on prompt, weights and place in the group alone, so that they are
    those of one process and differ within a group all the same. Notes every batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batches: list[dict[str, Any]] = []

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        completions, logps = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        first = self.accelerator.process_index * len(prompt_ids)
        return [twisted(ids, (first + i) % self.num_generations) for i, ids in enumerate(completions)], logps

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        batch = super()._generate_and_score_completions(inputs)
        rows = zip(batch["prompt_ids"], batch["prompt_mask"].bool(), strict=True)
        prompts = [ids[mask].tolist() for ids, mask in rows]
        texts = [f"{text.split('=')[0]}=" for text in self.processing_class.batch_decode(prompts)]
        note = {"prompts": texts, "rewards": self.last_rollout["scores"].tolist()}
        mask = loss_mask(batch)
        counts = {"items": int(batch["num_items_in_batch"]), "tokens": int(mask.sum()), "width": mask.shape[1]}
        self.batches.append({**note, **counts})
        return batch


def twisted(ids: list[int], place: int) -> list[int]:
    """Other characters, and fewer of them, for each place but 0."""
    moved = [2 + (i - 2 + place * (k + 1)) % 14 for k, i in enumerate(ids)]
    return moved[: max(1, len(ids) - place)] if place else ids


TRAINERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    # The token loss at all tokens, because every rank draws its own.
    "mtp": (MTPCriticTrainer, MTPCriticConfig, {**ONLINE, "head_learning_rate": 1e-2, "mtp_loss_share": 1.0}),
    "ppo": (PPOTrainer, PPOConfig, {**ONLINE, "value_learning_rate": 1e-2}),
    "variant": (SteadyVariantTrainer, GRPOVariantConfig, ONLINE),
    "sft": (MTPSFTTrainer, MTPSFTConfig, {"head_learning_rate": 1e-2}),
}


def episodes_of(args: Any) -> EpisodeRollouts:
    """Rollouts whose environments know their place in the group, on any number of ranks."""
    places = count(RANK * args.generation_batch_size // WORLD)
    return EpisodeRollouts(lambda: Sums(next(places) % args.num_generations), **LIMITS)


def rows_of(run: Run, args: Any) -> dict[str, Any]:
    """The trainer's data and where its rewards come from."""
    numbers, name = range(run.get("prompts", 64)), run.get("reward", "odd")
    prompts = [f"{i}+{7 * i}=" for i in numbers]
    if run.get("trainer") != "sft":
        data = {"train_dataset": Dataset.from_dict({"prompt": prompts})}
        if name != "episodes":
            return {"reward_funcs": REWARDS[name], **data}
        episodes = episodes_of(args)
        return {"reward_funcs": episodes.earned, "rollout_func": episodes, **data}
    columns: dict[str, list[Any]] = {"prompt": prompts, "completion": [f"{8 * i}" for i in numbers]}
    if name == "scored":
        columns["reward"] = [i % 3 / 2 for i in numbers]
    return {"train_dataset": Dataset.from_dict(columns)}


def load(run: Run) -> Any:
    """The policy as an object."""
    return AutoModelForCausalLM.from_pretrained(run["model"], dtype="float32")


def train(run: Run) -> None:
    """One run, on this rank."""
    critics.ValueRecord = NotingRecord  # type: ignore[misc]
    start_engine(run)
    trainer_class, config_class, own_defaults = TRAINERS[run.get("trainer", "mtp")]
    model = load(run) if run.get("loaded") == "before" else run["model"]
    args = config_class(**{"output_dir": run["out"], **TRL_DEFAULTS, **own_defaults, **run["args"]})
    if run.get("loaded") == "after":
        model = load(run)
    if run.get("loaded"):
        args.model_init_kwargs = None
    torch.manual_seed(0)
    trainer = trainer_class(
        model,
        args=args,
        **rows_of(run, args),
        processing_class=AutoTokenizer.from_pretrained(run["model"]),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if run.get("lora") else None,
        callbacks=[KillAt(run["kill_at"])] if run.get("kill_at") else None,
    )
    check_backend(trainer)
    trainer.train(resume_from_checkpoint=run.get("resume"))
    write_results(trainer, Path(run["out"]))
    if run.get("save"):
        trainer.save_model(run["save"])


def write_results(trainer: Any, out: Path) -> None:
    """What the tests compare."""
    if isinstance(trainer, SteadyVariantTrainer):
        name, named = "policy", dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
    else:
        name = "value_model" if isinstance(trainer, PPOTrainer) else "heads"
        named = dict(trainer.critic.module.named_parameters())
    params = list(named.values())
    sharded = all(isinstance(p, DTensor) or (hasattr(p, "ds_id") and p.numel() == 0) for p in params)
    with whole_parameters(params) as whole:
        weights = {key: p.detach().clone() for key, p in zip(named, whole, strict=True)}
        save_file(weights, out / f"{name}_{RANK}.safetensors")
    if name == "heads":
        save_file(trainer.critic.target.state_dict(), out / f"target_{RANK}.safetensors")
    if Sums.played:
        (out / f"episodes_{RANK}.json").write_text(json.dumps(Sums.played))
    if isinstance(trainer, SteadyVariantTrainer):
        (out / f"batches_{RANK}.json").write_text(json.dumps(trainer.batches))
        if trainer.value_tracker is not None:
            trainer.value_tracker.save(out / f"tracker_{RANK}.json")
        if trainer.replay_buffer is not None:
            torch.save(trainer.replay_buffer.state_dict(), out / f"replay_{RANK}.pt")
    if RANK == 0:
        log = {"history": trainer.state.log_history, "captured": finished, "sharded": sharded}
        (out / "log.json").write_text(json.dumps(log))


if __name__ == "__main__":
    main(train, load)
