"""Experts balanced on two gloo ranks equal those of one process under DDP and ZeRO-1/2/3, and a killed run goes on as
if it had not been killed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from rl_plugins.moe import load_selection_bias
from rl_plugins.nn.attachment import SELECTION_BIAS_NAME

from .helpers import distributed, moe_models
from .helpers.distributed import assert_same_biases, gap, start_both

pytestmark = pytest.mark.slow


zero, largest_gap = distributed.zero, distributed.largest_gap

FAMILIES = ("mixtral", "deepseek_v3", "afmoe", "ernie4_5_moe")  # added bias; own buffer; own parameters
VOCABULARY, LENGTH, STEPS = 17, 12, 5
BATCH, EVALUATED = 4, 8  # rows: of all ranks in a micro-batch; of an evaluation
RATE = 0.02  # of a bias that changes the routing within five steps
CHECKPOINT, KILL_AT = 2, 3
LOGS = ("log.json", "log_1.json")

Run = dict[str, Any]


def default_zero3() -> dict[str, Any]:
    """ZeRO-3 that keeps small parameters whole on every rank, as it does unless told otherwise."""
    config = zero(3)
    del config["zero_optimization"]["stage3_param_persistence_threshold"]
    return config


BACKENDS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "zero1": {"deepspeed": zero(1)},
    "zero2": {"deepspeed": zero(2)},
    "zero3": {"deepspeed": zero(3)},
    "zero3_persistent": {"deepspeed": default_zero3()},
    "fsdp": distributed.fsdp(),
}
BIAS = {"rate": RATE}
AUX = {"rate": 0.0, "aux_loss_coef": 0.5}
BOTH = {"rate": RATE, "aux_loss_coef": 0.5}
GLOBAL = {"batch": "global"}
REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
NON_REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
EVALUATE = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": EVALUATED // 2}
TWICE = {"gradient_accumulation_steps": 2}

# One process.
REFERENCES: dict[str, dict[str, Any]] = {
    **{family: {"model": family, "balance": BIAS} for family in FAMILIES},
    "none": {"data": "even"},
    "proportional": {"balance": {**BIAS, "rule": "proportional"}, **TWICE},
    "aux": {"balance": AUX, "data": "even"},
    "pooled": {"balance": {**AUX, "aux_loss_type": "pooled"}, "data": "even"},
    "both": {"model": "deepseek_v3", "balance": {**BOTH, "z_loss_coef": 0.01}, "data": "even"},
    "window": {"balance": {**AUX, "batch": "accumulated"}, "data": "even", **TWICE},
    "lora": {"balance": BOTH, "data": "even", "lora": True},
    "sft": {"balance": BOTH, "data": "even", "trainer": "sft"},
    # Two ranks that do not know of each other's load are one process with as many micro-batches.
    "local": {"balance": BOTH, "batch": BATCH // 2, **TWICE},
    "sequence": {"balance": {**AUX, "aux_loss_type": "sequence"}, "batch": BATCH // 2, **TWICE},
    "quantile": {"balance": {"rate": 0.5, "rule": "quantile"}, "batch": BATCH // 2, **TWICE},
}  # fmt: skip
# Two ranks: name of the reference, backends, and what differs from the reference but for the backend.
CASES: list[tuple[str, list[str], dict[str, Any]]] = [
    ("mixtral", ["ddp", "zero1"], {}),
    # In training mode again after an evaluation, which does not count; and the callback given as any other.
    ("mixtral", ["zero2", "zero3", "fsdp"], {**EVALUATE, "given": True}),
    ("deepseek_v3", ["ddp", "zero2", "fsdp"], {}),
    ("deepseek_v3", ["zero3"], {"loaded": "before"}),
    ("afmoe", ["ddp", "zero1", "zero3", "fsdp"], {}),
    ("ernie4_5_moe", ["zero2", "zero3", "zero3_persistent", "fsdp"], {}),
    # What is made of the loads of all ranks is the same under every backend, so that one or two of them will do.
    ("proportional", ["ddp"], {}),
    ("aux", ["ddp", "zero3"], {"balance": {**AUX, **GLOBAL}}),
    ("pooled", ["zero3"], {"balance": {**AUX, **GLOBAL, "aux_loss_type": "pooled"}}),
    ("both", ["zero2"], {"balance": {**BOTH, **GLOBAL, "z_loss_coef": 0.01}}),
    ("window", ["ddp", "zero2"], {"balance": {**AUX, **GLOBAL}}),
    ("lora", ["zero3"], {"balance": {**BOTH, **GLOBAL}, **EVALUATE}),
    ("sft", ["zero3"], {"balance": {**BOTH, **GLOBAL}, "given": True}),
    ("local", ["ddp"], {"gradient_accumulation_steps": 1}),
    ("sequence", ["zero2"], {"gradient_accumulation_steps": 1}),
    ("quantile", ["ddp"], {"gradient_accumulation_steps": 1}),
]
CHECKPOINTING: list[tuple[str, list[str], dict[str, Any]]] = [
    (reference, backends, {"balance": {**REFERENCES[reference]["balance"], **GLOBAL}, **how})
    for reference, backends, how in (
        ("aux", ["ddp", "zero3"], NON_REENTRANT),
        ("aux", ["zero2"], REENTRANT),
        ("both", ["zero3"], REENTRANT),
        ("window", ["zero3"], REENTRANT),
    )
]
SAVED = ["mixtral_zero2", "mixtral_zero3", "mixtral_fsdp", "lora_zero3"]
# Killed and resumed.
RESUMED: dict[str, dict[str, Any]] = {
    "zero2_resumed": {"balance": BOTH, **BACKENDS["zero2"], **TWICE},
    "zero3_resumed": {"model": "afmoe", "balance": BOTH, **BACKENDS["zero3"], "given": True},
    # Adam, since torch restores no optimizer without a state.
    "fsdp_resumed": {"model": "afmoe", "balance": BOTH, **BACKENDS["fsdp"], "optim": "adamw_torch"},
}

HALF = ("mixtral_bf16", "deepseek_v3_bf16", "afmoe_bf16")
"""Runs in bfloat16: a bias that is added, one that is a buffer, and one that is a parameter, which DeepSpeed casts."""


class Workplace(distributed.Workplace):  # type: ignore[misc]
    """Runs of the worker that balances experts."""

    worker = Path(__file__).parent / "workers" / "moe_worker.py"

    def run(self, name: str, model: str = "mixtral", batch: int = BATCH, **options: Any) -> Run:
        own = ("trainer", "balance", "given", "dtype", "loaded")
        worker = {key: options.pop(key) for key in own if key in options}
        worker["data"] = str(self.root / f"{options.pop('data', 'ragged')}.json")
        return {**super().run(name, model, batch, **{"max_steps": STEPS, **options}), **worker}

    def load(self, name: str) -> str:
        """Tokens of every expert at every step."""
        self.log(name)
        return (self.root / name / "moe_load.jsonl").read_text()

    def has(self, name: str, what: str, state: str) -> bool:
        """Whether what a file holds was `sharded` when it was written, or `persistent`."""
        self.log(name)
        with safe_open(self.root / name / f"{what}_0.safetensors", "pt") as file:
            return bool(file.metadata()[state] == "True")


def make_rows(*, even: bool) -> dict[str, Tensor]:
    """Random tokens, padded on the right; `even`: as many in every row."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (48, LENGTH), generator=generator)
    lengths = torch.randint(4, LENGTH + 1, (len(ids), 1), generator=generator)
    mask = torch.arange(LENGTH) < (LENGTH - 2 if even else lengths)
    mask = mask.expand_as(ids)
    return {
        "input_ids": ids.masked_fill(~mask, 0),
        "attention_mask": mask.long(),
        "labels": ids.masked_fill(~mask, -100),
    }


def named(cases: list[tuple[str, list[str], dict[str, Any]]]) -> list[tuple[str, str, dict[str, Any]]]:
    """Name of the run, name of its reference, its options."""
    runs = []
    for reference, backends, options in cases:
        how = options.get("gradient_checkpointing_kwargs")
        suffix = "" if how is None else "_reentrant" if how["use_reentrant"] else "_checkpointed"
        runs += [
            (f"{reference}_{backend}{suffix}", reference, {**options, **BACKENDS[backend]}) for backend in backends
        ]
    return runs


PAIRS = [(name, reference) for name, reference, _ in named(CASES + CHECKPOINTING)]
BIASED = [pair for pair in PAIRS if REFERENCES[pair[1]]["balance"]["rate"] > 0]
WITH_LOSS = [pair for pair in PAIRS if "aux_loss_coef" in REFERENCES[pair[1]]["balance"]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Workplace:
    place = Workplace(tmp_path_factory.mktemp("moe"))
    for name in ("even", "ragged"):
        columns = {key: column.tolist() for key, column in make_rows(even=name == "even").items()}
        (place.root / f"{name}.json").write_text(json.dumps(columns))
    for family in FAMILIES:
        moe_models.make_moe_model(family, vocab_size=VOCABULARY).save_pretrained(place.root / family)
        tokenizer.save_pretrained(place.root / family)
    return place


@pytest.fixture(scope="module")
def two(place: Workplace) -> Workplace:
    """All runs, those of one process beside those of two ranks."""
    runs = [
        place.run(name, **{**REFERENCES[reference], "batch": BATCH // 2, **options})
        for name, reference, options in named(CASES + CHECKPOINTING)
    ]
    for run in runs:
        if Path(run["out"]).name in SAVED:
            run["save"] = f"{run['out']}/final"
            run["args"] |= {"save_strategy": "steps", "save_steps": CHECKPOINT}
    for name, options in RESUMED.items():
        options = {**options, "save_strategy": "steps", "save_steps": CHECKPOINT, "batch": BATCH // 2}
        checkpoint = str(place.root / f"{name}_killed" / f"checkpoint-{CHECKPOINT}")
        runs.append(place.run(f"{name}_whole", **options))
        runs.append(place.run(f"{name}_killed", **options, kill_at=KILL_AT))
        runs.append(place.run(f"{name}_continued", **options, resume=checkpoint))
    half = {"balance": BIAS, "batch": BATCH // 2, "bf16": True, "dtype": "bfloat16", **BACKENDS["zero3"]}
    runs += [place.run(name, model=name.removesuffix("_bf16"), **half) for name in HALF]
    runs.append(place.run("mtp_zero3", trainer="mtp", balance=BIAS, **BACKENDS["zero3"]))
    start_both(place, [place.run(name, **options) for name, options in REFERENCES.items()], runs)
    return place


def load_saved(directory: Path) -> PreTrainedModel | PeftModel:
    """A saved model, with its adapter if it has one."""
    if (directory / "adapter_config.json").exists():
        base = AutoModelForCausalLM.from_pretrained(directory.parent.parent / "mixtral")
        return PeftModel.from_pretrained(base, directory)
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model


class TestTwoRanksEqualOneProcess:
    @pytest.mark.parametrize(("name", "reference"), PAIRS)
    def test_counts_and_losses(self, two: Workplace, name: str, reference: str) -> None:
        assert two.load(name) == two.load(reference)
        assert len(two.load(name).splitlines()) == STEPS
        mine, other = two.history(name), two.history(reference)
        assert len({entry["loss"] for entry in mine}) == STEPS
        gaps = {key: largest_gap(mine, other, key) for key in ("loss", "moe/max", "moe/load", "moe/un", "moe/bias")}
        norms = max(abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in zip(mine, other, strict=True))
        print("GAPS", name, "norms", norms, gaps)
        assert max(gaps.values()) < 1e-6 and norms < 1e-5

    @pytest.mark.parametrize(("name", "reference"), PAIRS)
    def test_weights(self, two: Workplace, name: str, reference: str) -> None:
        assert two.has(name, "weights", "sharded") == ("zero3" in name or "fsdp" in name)
        first, second = (two.tensors(name, "weights", rank) for rank in (0, 1))
        assert all(torch.equal(first[key], second[key]) for key in first)
        expected = two.tensors(reference, "weights")
        print("GAPS", name, "weights", gap(first, expected))
        assert gap(first, expected) < 1e-6

    @pytest.mark.parametrize(("name", "reference"), BIASED)
    def test_biases(self, two: Workplace, name: str, reference: str) -> None:
        found, expected = assert_same_biases(two, name), two.tensors(reference, "masters")
        print("GAPS", name, "biases", gap(found, expected))
        # Only quantiles are made of scores, the other rules of counts.
        assert gap(found, expected) <= (1e-6 if reference == "quantile" else 0.0)

    @pytest.mark.parametrize(("name", "reference"), WITH_LOSS)
    def test_aux_losses(self, two: Workplace, name: str, reference: str) -> None:
        """Each rank logs the loss of its own tokens."""
        logs = [json.loads((two.root / name / file).read_text())["history"] for file in LOGS]
        for key in ["moe/aux_loss", "moe/z_loss"][: 2 if reference == "both" else 1]:
            ranks = [torch.tensor([entry[key] for entry in log if "loss" in entry]) for log in logs]
            expected = torch.tensor([entry[key] for entry in two.history(reference)])
            print("GAPS", name, key, (torch.stack(ranks).mean(0) - expected).abs().max().item())
            torch.testing.assert_close(torch.stack(ranks).mean(0), expected, atol=1e-6, rtol=1e-6)


class TestWhatACaseIsAbout:
    """Runs exercise what they are named after."""

    def test_biases_change_the_routing(self, two: Workplace) -> None:
        for name in ("lora", "sft", *FAMILIES):
            biases = two.tensors(name, "masters")
            assert all(bias.max() - bias.min() > 1.5 * RATE for bias in biases.values())
        first, *_ = two.tensors("proportional", "masters").values()
        assert len(first.unique()) > 5  # not steps of the sign

    def test_losses_have_a_gradient(self, two: Workplace) -> None:
        weights = {name: two.tensors(name, "weights") for name in ("none", "aux", "pooled")}
        assert gap(weights["none"], weights["aux"]) > 1e-2
        assert gap(weights["pooled"], weights["aux"]) > 1e-3

    def test_loads_differ_between_ranks(self, two: Workplace) -> None:
        """With each rank's own load, the loss is another one than with that of all; its log is the mean."""
        logs = [json.loads((two.root / name / LOGS[0]).read_text())["history"] for name in ("aux_ddp", "local_ddp")]
        assert abs(logs[0][0]["moe/aux_loss"] - logs[1][0]["moe/aux_loss"]) > 1e-3

    def test_own_parameters_were_sharded(self, two: Workplace) -> None:
        for name in ("afmoe_zero3", "ernie4_5_moe_zero3", "afmoe_fsdp", "ernie4_5_moe_fsdp"):
            assert two.has(name, "live", "sharded") and not two.has(name, "live", "persistent")
        assert two.has("ernie4_5_moe_zero3_persistent", "live", "persistent")

    @pytest.mark.parametrize("name", [name for name, *_ in named(CHECKPOINTING)])
    def test_checkpointing_keeps_the_gradient(self, two: Workplace, name: str) -> None:
        weights = two.tensors(name, "weights")
        if name.startswith("aux"):
            assert gap(weights, two.tensors("none", "weights")) > 1e-2
            assert gap(weights, two.tensors("aux_ddp", "weights")) < 1e-6


@pytest.mark.parametrize("name", RESUMED)
class TestResume:
    def test_the_killed_run_was_killed(self, two: Workplace, name: str) -> None:
        killed = two.root / f"{name}_killed"
        assert (killed / f"checkpoint-{CHECKPOINT}").is_dir() and STEPS > KILL_AT > CHECKPOINT
        assert not (killed / "log.json").exists() and not list(killed.glob("error_*"))

    def test_as_if_nothing_had_happened(self, two: Workplace, name: str) -> None:
        whole, continued = two.history(f"{name}_whole"), two.history(f"{name}_continued")
        assert len(whole) == STEPS and continued == whole
        assert_same_biases(two, f"{name}_continued")
        for what in ("masters", "live", "weights"):
            for rank in (0, 1):
                expected, found = (two.tensors(f"{name}_{end}", what, rank) for end in ("whole", "continued"))
                assert gap(found, expected) == 0.0
        after = two.load(f"{name}_whole").splitlines()[CHECKPOINT:]
        assert two.load(f"{name}_continued").splitlines() == after


@pytest.mark.parametrize("name", SAVED)
class TestSavedModel:
    """Added biases."""

    def test_one_rank_writes_them_once(self, two: Workplace, name: str) -> None:
        two.log(name)
        out = two.root / name
        written = [json.loads((out / file).read_text())["writes"] for file in LOGS]
        places = [f"checkpoint-{step}" for step in (2, 4, 5)] + ["final"]
        assert written == [[str(out / folder / SELECTION_BIAS_NAME) for folder in places], []]
        masters = two.tensors(name, "masters")
        assert gap(load_file(out / "final" / SELECTION_BIAS_NAME), masters) == 0.0
        assert gap(load_file(out / "checkpoint-2" / SELECTION_BIAS_NAME), masters) > 0.0

    def test_a_fresh_process_routes_with_them(self, two: Workplace, name: str) -> None:
        """It has the loss that the last evaluation of the training had."""
        history, final = two.log(name)["history"], two.root / name / "final"
        expected = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
        assert len(expected) == STEPS
        batch = {key: column[:EVALUATED] for key, column in make_rows(even="lora" in name).items()}
        model = load_saved(final)
        with torch.no_grad():
            unbiased = model(**batch).loss.item()
            load_selection_bias(model, final)
            found = model(**batch).loss.item()
        print("GAPS", name, "reloaded", found - expected[-1], "without biases", unbiased - expected[-1])
        assert abs(found - expected[-1]) < 1e-6 and abs(unbiased - expected[-1]) > 1e-4


class TestHalfPrecision:
    @pytest.mark.parametrize("name", HALF)
    def test_biases(self, two: Workplace, name: str) -> None:
        two.log(name)
        masters = assert_same_biases(two, name)
        assert all(abs(bias.mean()) < 1e-7 for bias in masters.values())
        live = two.tensors(name, "live")
        assert {bias.dtype for bias in live.values()} == {torch.float32}
        assert {weight.dtype for weight in two.tensors(name, "weights").values()} == {torch.bfloat16}
        assert all(torch.equal(live[key].view(-1), bias) for key, bias in masters.items())
        assert any(not torch.equal(bias, bias.bfloat16().float()) for bias in masters.values())


class TestCritic:
    def test_biases(self, two: Workplace) -> None:
        name = "mtp_zero3"
        two.log(name)
        assert_same_biases(two, name)
        history = two.history(name)
        assert len(history) == STEPS == len(two.load(name).splitlines())
        assert all({"moe/max_violation", "critic/explained_variance"} <= entry.keys() for entry in history)
