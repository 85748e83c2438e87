"""Experts balanced in Lightning on two gloo ranks equal those of one process, under DDP and DeepSpeed, and a resumed
run goes on as if it had not been interrupted."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from .helpers import distributed, moe_models
from .helpers.distributed import assert_same_biases, gap, start_both

pytestmark = pytest.mark.slow


FAMILIES = ("mixtral", "deepseek_v3", "afmoe")  # added bias; own buffer; own parameters
VOCABULARY, LENGTH, PADDING = 17, 12, 2
BATCH, STEPS, CHECKPOINT = 4, 4, 2  # rows of a micro-batch on all ranks; optimizer steps
LR = 0.03
BALANCE = {"rate": 0.02, "aux_loss_coef": 0.5, "batch": "global"}

# Family, backend, micro-batches of a step.
NAMES = ["mixtral_ddp_1", "deepseek_v3_ddp_2", "afmoe_ddp_1", "mixtral_zero2_2", "afmoe_zero2_1"]
NAMES += ["mixtral_zero3_1", "deepseek_v3_zero3_2", "afmoe_zero3_1"]
# Models that come when the callback has been set up already.
NAMES += ["late_deepseek_v3_ddp_1", "late_deepseek_v3_zero2_1"]
NAMES += ["late_mixtral_zero3_1", "late_deepseek_v3_zero3_1", "late_afmoe_zero3_1"]
RESUMED = ["mixtral_ddp_1", "deepseek_v3_ddp_2", "mixtral_zero2_2", "afmoe_zero3_1"]
STOPPED = ["afmoe_zero2_1", "afmoe_zero3_1"]

Run = dict[str, Any]


def reference(name: str) -> str:
    """The same in one process."""
    family, _, accumulate = name.removeprefix("late_").rsplit("_", 2)
    return f"{family}_one_{accumulate}"


class Workplace(distributed.Workplace):  # type: ignore[misc]
    """Runs of the worker that balances experts in Lightning."""

    worker = Path(__file__).parent / "workers" / "lightning_moe_worker.py"

    def run(self, name: str, **options: Any) -> Run:
        family, backend, accumulate = name.removeprefix("late_").rsplit("_", 2)
        # Lightning and DeepSpeed both divide the loss by the number of micro-batches; a larger step makes up for it.
        lr = LR * int(accumulate) if backend.startswith("zero") else LR
        run = {
            "out": str(self.root / name),
            "model": str(self.root / family),
            "data": str(self.root / f"{accumulate}.json"),
            "balance": BALANCE,
            "backend": backend,
            "batch": BATCH if backend == "one" else BATCH // 2,
            "lr": lr,
            "late": name.startswith("late"),
            "args": {"max_steps": STEPS, "accumulate_grad_batches": int(accumulate)},
        }
        return {**run, **options}

    def rank_logs(self, name: str) -> list[dict[str, Any]]:
        first = self.log(name)
        second = self.root / name / "log_1.json"
        return [first, json.loads(second.read_text())] if second.exists() else [first]

    def loads(self, name: str) -> list[dict[str, Any]]:
        self.log(name)
        return [json.loads(line) for line in (self.root / name / "moe_load.jsonl").read_text().splitlines()]


def make_rows(size: int) -> dict[str, Tensor]:
    """Random tokens with as much padding on the right in every row, so that ranks weigh equally."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (size, LENGTH), generator=generator)
    mask = (torch.arange(LENGTH) < LENGTH - PADDING).expand_as(ids)
    return {
        "input_ids": ids.masked_fill(~mask, 0),
        "attention_mask": mask.long(),
        "labels": ids.masked_fill(~mask, -100),
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    place = Workplace(tmp_path_factory.mktemp("lightning_moe"))
    for accumulate in (1, 2):
        # An epoch ends at a checkpoint, since Lightning does not skip batches.
        columns = make_rows(BATCH * CHECKPOINT * accumulate)
        file = place.root / f"{accumulate}.json"
        file.write_text(json.dumps({name: column.tolist() for name, column in columns.items()}))
    for family in FAMILIES:
        for seed, name in enumerate((family, f"other_{family}")):
            moe_models.make_moe_model(family, seed, vocab_size=VOCABULARY).save_pretrained(place.root / name)
    return place


@pytest.fixture(scope="module")
def two(place: Workplace) -> Workplace:
    """All runs, those of one process beside those of two ranks."""
    runs = [place.run(name, **({"checkpoint": CHECKPOINT} if name in RESUMED else {})) for name in NAMES]
    for name in RESUMED:
        checkpoint = place.root / name / f"step={CHECKPOINT}.ckpt"
        run = place.run(name, resume=str(checkpoint), model=str(place.root / f"other_{name.rsplit('_', 2)[0]}"))
        runs.append({**run, "out": f"{run['out']}_resumed"})
    for name in STOPPED:
        run = place.run(name, balance={**BALANCE, "stop": 0.5})
        runs.append({**run, "out": f"{run['out']}_stopped"})
    start_both(place, [place.run(name) for name in dict.fromkeys(map(reference, NAMES))], runs)
    return place


def test_biases_change_the_routing(two: Workplace) -> None:
    for name in map(reference, NAMES):
        two.log(name)
        assert all(bias.max() - bias.min() > 1.5 * BALANCE["rate"] for bias in two.tensors(name, "masters").values())


def test_own_parameters_were_sharded(two: Workplace) -> None:
    two.log("afmoe_zero3_1")
    for what, name in (("live", "afmoe_zero3_1"), ("weights", "afmoe_zero3_1"), ("weights", "mixtral_zero3_1")):
        with safe_open(two.root / name / f"{what}_0.safetensors", "pt") as file:
            assert file.metadata()["sharded"] == "True"


@pytest.mark.parametrize("name", NAMES)
class TestTwoRanksEqualOneProcess:
    def test_losses(self, two: Workplace, name: str) -> None:
        """Of every micro-batch: the mean over ranks is the loss of the global batch."""
        ranks = torch.tensor([log["losses"] for log in two.rank_logs(name)], dtype=torch.float64)
        expected = torch.tensor(two.log(reference(name))["losses"], dtype=torch.float64)
        assert len(ranks) == 2 and len(expected) == STEPS * int(name[-1]) == len(expected.unique())
        print("GAPS", name, "losses", (ranks.mean(0) - expected).abs().max().item())
        assert (ranks.mean(0) - expected).abs().max() < 1e-6
        assert (ranks[0] - ranks[1]).abs().max() > 1e-3  # each had rows of its own

    def test_biases(self, two: Workplace, name: str) -> None:
        assert gap(assert_same_biases(two, name), two.tensors(reference(name), "masters")) == 0.0

    def test_weights(self, two: Workplace, name: str) -> None:
        two.log(name)
        first, second = (two.tensors(name, "weights", rank) for rank in (0, 1))
        assert all(torch.equal(first[key], second[key]) for key in first)
        expected = two.tensors(reference(name), "weights")
        print("GAPS", name, "weights", gap(first, expected))
        assert gap(first, expected) < 1e-6

    def test_loads_of_all_ranks_are_written_once(self, two: Workplace, name: str) -> None:
        lines = two.loads(name)
        assert lines == two.loads(reference(name))
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        tokens = BATCH * int(name[-1]) * (LENGTH - PADDING)
        assert all(sum(layer) == 2 * tokens for line in lines for layer in line["counts"])
        assert [log["writes"] for log in two.rank_logs(name)] == [["moe_load.jsonl"] * STEPS, []]

    def test_metrics(self, two: Workplace, name: str) -> None:
        first, second = (log["metrics"] for log in two.rank_logs(name))
        expected = two.log(reference(name))["metrics"]
        assert first == second and len(first) == STEPS
        for mine, other in zip(first, expected, strict=True):
            assert mine == pytest.approx(other, abs=1e-6) and {"moe/max_violation", "moe/aux_loss"} <= mine.keys()
        with (two.root / name / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [{key: float(row[key]) for key in first[0]} for row in rows] == first


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_run_equals_one_in_one_go(two: Workplace, name: str) -> None:
    again = f"{name}_resumed"
    assert_same_biases(two, again)
    for what in ("masters", "live", "weights"):
        for rank in (0, 1):
            assert gap(two.tensors(again, what, rank), two.tensors(name, what, rank)) == 0.0
    for whole, resumed in zip(two.rank_logs(name), two.rank_logs(again), strict=True):
        assert resumed["losses"] == whole["losses"][CHECKPOINT * int(name[-1]) :]
        assert resumed["metrics"] == whole["metrics"][CHECKPOINT:]
    assert two.loads(again) == two.loads(name)[CHECKPOINT:]


@pytest.mark.parametrize("name", STOPPED)
def test_biases_stay_when_the_schedule_stops(two: Workplace, name: str) -> None:
    """The optimizer, which holds master copies of all that is trainable, does not write over them."""
    assert gap(assert_same_biases(two, f"{name}_stopped"), two.tensors(name, "masters")) > 0.0
