"""Lists of runs on one process or on two gloo ranks, what they left, and how far apart two of them are."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from .processes import free_port, run_script
from .step_rewards import LENGTH

STEPS, CHECKPOINT, KILL_AT = 6, 3, 4
GREEDY = {"max_steps": 5, "generation_kwargs": {"do_sample": False}}
ITERATIONS = {"num_iterations": 2, "steps_per_generation": 2, "gradient_accumulation_steps": 2}
RESUMABLE = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": CHECKPOINT}
MID_CYCLE = {"gradient_accumulation_steps": 2, "steps_per_generation": 4}
# Ranks that wait for each other for ever are found out within a minute.
EPISODES = {"reward": "episodes", "max_completion_length": LENGTH, "ddp_timeout": 60}

Run = dict[str, Any]


def zero(stage: int) -> dict[str, Any]:
    """DeepSpeed config that shards even the tiny model's smallest parameter."""
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": stage,
            "stage3_gather_16bit_weights_on_model_save": True,
            "stage3_param_persistence_threshold": 0,
        },
    }


def fsdp(state_dict: str = "FULL") -> dict[str, Any]:
    """Options for FSDP2, and how it writes checkpoints."""
    config = {"version": 2, "reshard_after_forward": True, "state_dict_type": f"{state_dict}_STATE_DICT"}
    return {"fsdp": True, "fsdp_config": config}


class Workplace:
    """Starts lists of runs of a worker and reads what they left."""

    worker = Path(__file__).parents[1] / "workers" / "critic_worker.py"
    timeout = 900  # for busy machines

    def __init__(self, root: Path) -> None:
        self.root = root

    def run(self, name: str, model: str = "tied", batch: int = 8, **options: Any) -> Run:
        """One run; what is not an option of the worker is one of the trainer."""
        worker = {key: options.pop(key) for key in ("reward", "lora", "kill_at", "resume", "save") if key in options}
        args = {"per_device_train_batch_size": batch, **options}
        return {"out": str(self.root / name), "model": str(self.root / model), "args": args, **worker}

    def resumed(self, name: str, batch: int, **options: Any) -> list[Run]:
        """An uninterrupted run, one that is killed, and one that goes on from its checkpoint."""
        checkpoint = str(self.root / f"{name}_killed" / f"checkpoint-{CHECKPOINT}")
        options = {**RESUMABLE, **options, "batch": batch}
        return [
            self.run(f"{name}_whole", **options),
            self.run(f"{name}_killed", **options, kill_at=KILL_AT),
            self.run(f"{name}_resumed", **options, resume=checkpoint),
        ]

    def start(self, runs: list[Run], ranks: int) -> None:
        """Run the worker; a failed run leaves an error file for `results`."""
        file = self.root / f"runs_{ranks}.json"
        file.write_text(json.dumps([{**run, "port": free_port()} for run in runs]))
        done = run_script(self.worker, str(file), ranks=ranks, timeout=self.timeout)
        assert done.returncode == 0, done.stderr[-4000:]

    def log(self, name: str) -> dict[str, Any]:
        """What a run logged; its error if it failed."""
        out = self.root / name
        errors = [path.read_text() for path in sorted(out.glob("error_*.txt"))]
        assert not errors, "\n".join(errors)
        return json.loads((out / "log.json").read_text())

    def history(self, name: str) -> list[dict[str, float]]:
        """Log entries of the optimizer steps, without times."""
        entries = [entry for entry in self.log(name)["history"] if "loss" in entry]
        return [{key: value for key, value in entry.items() if key != "step_time"} for entry in entries]

    def episodes(self, name: str, rows: int) -> tuple[list[list[int]], list[list[bool]]]:
        """Most turns in each batch of each rank, and whether an episode was truncated; `rows` are a rank's."""
        self.log(name)
        played = [json.loads((self.root / name / f"episodes_{rank}.json").read_text()) for rank in (0, 1)]
        batches = [[episodes[i : i + rows] for i in range(0, len(episodes), rows)] for episodes in played]
        turns = [[max(turns for _, turns, _ in batch) for batch in rank] for rank in batches]
        return turns, [[any(cut for _, _, cut in batch) for batch in rank] for rank in batches]

    def assert_ranks_play_apart(self, name: str, rows: int) -> None:
        """Each rank had turns to make when the other had none left, and one was alone with truncated episodes."""
        turns, cut = self.episodes(name, rows)
        for ours, theirs in (turns, turns[::-1]):
            assert any(mine > other for mine, other in zip(ours, theirs, strict=True))
        assert any(mine != other for mine, other in zip(*cut, strict=True))

    def tensors(self, name: str, what: str, rank: int = 0) -> dict[str, Tensor]:
        """Trained heads or their targets."""
        return load_file(self.root / name / f"{what}_{rank}.safetensors")


def start_both(place: Workplace, one: list[Run], two: list[Run]) -> None:
    """Runs of one process beside those of two ranks, which wait for each other often enough."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(place.start, (one, two), (1, 2)))


def largest_gap(a: list[dict[str, float]], b: list[dict[str, float]], prefix: str) -> float:
    """Largest difference over steps and metrics that start with `prefix`."""
    gaps = [0.0]
    for mine, other in zip(a, b, strict=True):
        names = {name for name in {*mine, *other} if name.startswith(prefix)}
        for name in names:
            # The host logs None where a metric is not defined at a step, and so does every backend.
            assert (mine[name] is None) == (other[name] is None), name
            if mine[name] is not None:
                gaps.append(abs(mine[name] - other[name]))
    assert all(map(math.isfinite, gaps))
    return max(gaps)


def gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference of two sets of tensors."""
    assert a.keys() == b.keys() and a
    return max((a[name] - b[name]).abs().max().item() for name in a)


def assert_same_biases(place: Workplace, name: str) -> dict[str, Tensor]:
    """Both ranks have the same masters, which moved, and route with them; returns them."""
    place.log(name)
    first, second = (place.tensors(name, "masters", rank) for rank in (0, 1))
    assert first.keys() == second.keys() and first
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert all(bias.dtype == torch.float32 and bias.any() for bias in first.values())
    for rank in (0, 1):
        live = place.tensors(name, "live", rank)
        assert all(torch.equal(live[key].view(-1), first[key].to(live[key].dtype)) for key in first)
    return first
