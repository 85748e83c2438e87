"""Speculative rollouts on two gloo ranks, in both hosts: losses are those of one process, nobody waits for ever where
ranks end at different steps, acceptance is of all ranks, and a killed run goes on as if it had not been killed."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rl_plugins.nn import attach_mtp_heads

from .helpers import distributed
from .helpers.distributed import gap
from .helpers.speculative_models import randomise_heads

pytestmark = pytest.mark.slow

Run = dict[str, Any]
STEPS, BATCH = 2, 8  # optimizer steps; completions of all ranks
CHECKPOINT, KILL_AT = 2, 3
GREEDY: dict[str, Any] = {"generation_kwargs": {"do_sample": False}}
FSDP = distributed.fsdp()
SEQUENTIAL = {"mtp_head_type": "sequential"}
WHOLE, PARTS = {"ds3_gather_for_generation": True}, {"ds3_gather_for_generation": False}
# Options of TRL's trainers and the backends that they run on.
TRL: dict[str, tuple[str, dict[str, Any], dict[str, dict[str, Any]]]] = {
    "critic": ("mtp", {}, {"ddp": {}, "zero3": PARTS, "zero3whole": WHOLE, "fsdp": FSDP}),
    "grpo": ("variant", {"num_generations": 2}, {"ddp": {}, "zero3": PARTS, "fsdp": FSDP}),
    "ppo": ("ppo", {"num_iterations": 1, "beta": 0.0, "value_warmup_steps": 1}, {"ddp": {}}),
    "sequential": ("mtp", SEQUENTIAL, {"ddp": {}, "zero3": PARTS, "fsdp": FSDP}),
}
LIGHTNING: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "critic": ({}, ("ddp", "zero3")),
    "grpo": ({"num_generations": 2}, ("ddp", "zero3")),
    "ppo": ({"num_iterations": 1, "value_warmup_steps": 1}, ("ddp",)),
    "sequentialgrpo": ({"num_generations": 2, **SEQUENTIAL}, ("zero3",)),
}


# The token loss at all tokens, because every rank draws its own.
DRAFTS = {"max_completion_length": 8, "speculative": True, "num_mtp_heads": 2, "mtp_loss_share": 1.0}


class Workplace(distributed.Workplace):  # type: ignore[misc]
    """Runs of both hosts, in one worker."""

    worker = Path(__file__).parent / "workers" / "speculative_worker.py"

    def model(self, options: dict[str, Any]) -> str:
        """A policy with heads of the type that is asked for."""
        return str(self.root / options.get("mtp_head_type", "parallel"))

    def trl(self, name: str, backend: str, trainer: str, **options: Any) -> Run:
        if backend.startswith("zero"):
            options["deepspeed"] = distributed.zero(int(backend[4]))
        args = {
            "per_device_train_batch_size": BATCH if backend == "one" else BATCH // 2,
            "max_steps": STEPS,
            "max_completion_length": 8,
            "speculative": True,
            "mtp_loss_share": 1.0,  # because every rank draws its own tokens
            **GREEDY,
            **options,
        }
        out = {"out": str(self.root / name), "model": self.model(options)}
        return {**out, "host": "trl", "backend": backend, "trainer": trainer, "reward": "spread", "args": args}

    def lightning(self, name: str, backend: str, kind: str, module: dict[str, Any], **options: Any) -> Run:
        prompts = BATCH // module.get("num_generations", 1)
        return {
            "out": str(self.root / name),
            "model": self.model(module),
            "kind": kind,
            "module": {**DRAFTS, **module},
            "backend": backend,
            "batch": prompts if backend == "one" else prompts // 2,
            **options,
            "args": {"max_steps": STEPS, "gradient_clip_val": 1.0, **options.get("args", {})},
        }

    def killed(self) -> list[Run]:
        """An uninterrupted run, one that is killed, and one that goes on from its checkpoint."""
        options: dict[str, Any] = {"checkpoint": CHECKPOINT, "args": {"max_steps": 5}}
        module, file = {"steps_per_generation": 2, "num_iterations": 2}, f"step={CHECKPOINT}.ckpt"
        more = {"whole": {}, "killed": {"kill_at": KILL_AT}, "resumed": {"resume": str(self.root / "killed" / file)}}
        return [self.lightning(name, "ddp", "sampling_critic", module, **options, **own) for name, own in more.items()]

    def drafts(self, name: str) -> list[torch.Tensor]:
        """Of every rank: steps and counts of its rollouts."""
        self.log(name)
        return [torch.tensor(json.loads(path.read_text())) for path in sorted((self.root / name).glob("drafts_*"))]


@pytest.fixture(scope="module")
def two(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
) -> Workplace:
    """All runs, those of one process among them."""
    place = Workplace(tmp_path_factory.mktemp("speculative"))
    # Weights so large that greedy completions differ in length, and heads of whose drafts some are accepted.
    for head_type, seed in (("parallel", 6), ("sequential", 3)):
        model = tiny_model(seed, initializer_range=0.25)
        heads = randomise_heads(attach_mtp_heads(model, 2, head_type=head_type), 0.01)
        model.save_pretrained(place.root / head_type)
        heads.save(place.root / head_type)
        tokenizer.save_pretrained(place.root / head_type)
    runs = []
    for name, (trainer, options, backends) in TRL.items():
        runs.append(place.trl(f"trl_{name}_one", "one", trainer, **options))
        runs += [place.trl(f"trl_{name}_{key}", key, trainer, **options, **own) for key, own in backends.items()]
    for name, (module, keys) in LIGHTNING.items():
        kind = name.removeprefix("sequential")
        runs += [place.lightning(f"lightning_{name}_{key}", key, kind, module) for key in ("one", *keys)]
    frozen = {"num_generations": 2, "mtp_loss_coef": 0.0}
    runs.append(place.lightning("frozen_lightning", "ddp", "grpo", frozen))
    runs.append(place.trl("frozen_trl", "ddp", "variant", num_generations=2, mtp_loss_coef=0.0))
    place.start([*runs, *place.killed()], ranks=1)  # the worker starts the others
    return place


TRL_NAMES = [f"trl_{name}_{key}" for name, (_, _, backends) in TRL.items() for key in backends]
LIGHTNING_NAMES = [f"lightning_{name}_{key}" for name, (_, keys) in LIGHTNING.items() for key in keys]


def reference(name: str) -> str:
    """The same in one process."""
    return f"{name.rpartition('_')[0]}_one"


def metrics_of(two: Workplace, name: str) -> list[dict[str, float]]:
    """What was logged at every training step."""
    return two.history(name) if "trl" in name else two.log(name)["metrics"]


@pytest.mark.parametrize("name", [*TRL_NAMES, *LIGHTNING_NAMES])
def test_two_ranks_train_as_one_process(two: Workplace, name: str) -> None:
    mine, other = metrics_of(two, name), metrics_of(two, reference(name))
    assert len(mine) == STEPS == len({row["reward"] for row in mine})
    # Rollouts of other batches draft other numbers of tokens, and come to the same.
    drafting = ("mtp/acceptance", "mtp/tokens_per_step")
    for row, expected in zip(mine, other, strict=True):
        names = {key for key in {*row, *expected} if not key.startswith((*drafting, "step_time", "epoch"))}
        assert {"loss", "reward", "mtp/token_loss/head_2"} <= names
        for key in names:
            assert row[key] == pytest.approx(expected[key], abs=1e-4), key
            assert row[key] is None or math.isfinite(row[key])


@pytest.mark.parametrize("name", [*TRL_NAMES, *LIGHTNING_NAMES])
def test_acceptance_is_of_all_ranks(two: Workplace, name: str) -> None:
    ranks, rows = two.drafts(name), metrics_of(two, name)
    assert len(ranks) == 2 and all(len(rank) == STEPS for rank in ranks)
    assert not torch.equal(*ranks)
    if "zero3" in name or "fsdp" in name:  # where every forward gathers from all ranks, all of them go on together
        assert torch.equal(ranks[0][:, 0], ranks[1][:, 0])
    for row, counts in zip(rows, (ranks[0] + ranks[1])[:, 1:], strict=True):
        steps, tokens, *drafted = counts.tolist()
        assert row["mtp/tokens_per_step"] == pytest.approx(tokens / steps, rel=1e-6)
        for k in range(2):
            if drafted[k]:
                expected = drafted[2 + k] / drafted[k]
                assert row[f"mtp/acceptance/head_{k + 1}"] == pytest.approx(expected, rel=1e-6)
    total = (ranks[0] + ranks[1]).sum(0)
    assert 0 < total[5] < total[3]


@pytest.mark.parametrize("name", ["frozen_trl", "frozen_lightning"])
def test_heads_without_a_token_loss_are_not_waited_for(two: Workplace, name: str) -> None:
    rows = metrics_of(two, name)
    assert len(rows) == STEPS and "mtp/tokens_per_step" in rows[0] and "mtp/token_loss" not in rows[0]


def test_a_killed_run_goes_on_as_if_it_had_not_been(two: Workplace) -> None:
    """Sampling, in the middle of a batch of completions, with another number of drafts on each rank."""
    assert not list((two.root / "killed").glob("*.json")) and not list((two.root / "killed").glob("error_*"))
    for rank in range(2):
        file = f"log_{rank}.json" if rank else "log.json"
        whole, resumed = (json.loads((two.root / run / file).read_text()) for run in ("whole", "resumed"))
        assert len(whole["losses"]) == 5 and len(whole["rollouts"]) == 2
        assert resumed["losses"] == whole["losses"][CHECKPOINT:]
        assert resumed["rollouts"] == whole["rollouts"][1:]
        assert torch.equal(two.drafts("resumed")[rank], two.drafts("whole")[rank][1:])
        found, expected = (two.tensors(run, "weights", rank) for run in ("resumed", "whole"))
        assert gap(found, expected) == 0.0
