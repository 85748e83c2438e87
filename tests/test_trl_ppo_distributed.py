"""PPO on two gloo ranks equals one process under DDP and ZeRO-1/2/3, and a killed run goes on unharmed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from rl_plugins.nn import ValueModel

from .helpers import distributed

pytestmark = pytest.mark.slow


zero, largest_gap = distributed.zero, distributed.largest_gap
STEPS, CHECKPOINT, KILL_AT = distributed.STEPS, distributed.CHECKPOINT, distributed.KILL_AT

# One minibatch per epoch: each rank shuffles its own rows. No entropy bonus: TRL's is a mean of each rank's own mean.
GREEDY: dict[str, Any] = {
    "max_steps": 5,
    "num_iterations": 1,
    "beta": 0.1,
    "generation_kwargs": {"do_sample": False},
}
EPOCHS = {**GREEDY, "max_steps": 4, "num_iterations": 2}
MID_EPOCH = {"num_iterations": 2, "steps_per_generation": 2}


class Workplace(distributed.Workplace):  # type: ignore[misc]
    """Runs of `PPOTrainer`."""

    def run(self, name: str, model: str = "tied", batch: int = 8, **options: Any) -> dict[str, Any]:
        loaded = options.pop("loaded", None)
        return {**super().run(name, model, batch, **options), "trainer": "ppo", "loaded": loaded}


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
) -> Workplace:
    place = Workplace(tmp_path_factory.mktemp("ppo"))
    # Weights large enough that greedy completions differ in length and in reward.
    tiny_model(initializer_range=0.2).save_pretrained(place.root / "tied")
    tokenizer.save_pretrained(place.root / "tied")
    tiny_model(seed=3, initializer_range=0.2, num_hidden_layers=1).save_pretrained(place.root / "small")
    return place


@pytest.fixture(scope="module")
def one(place: Workplace) -> Workplace:
    """All runs of one process."""
    runs = [
        place.run("one", **GREEDY),
        place.run("one_lora", lora=True, **GREEDY),
        place.run("one_small", value_model_path=str(place.root / "small"), **GREEDY),
        place.run("one_epochs", **EPOCHS),
        *place.resumed("plain", batch=4, **MID_EPOCH),
    ]
    place.start(runs, ranks=1)
    return place


def saved(place: Workplace, name: str) -> dict[str, str]:
    return {"save": str(place.root / name / "final")}


@pytest.fixture(scope="module")
def two(one: Workplace) -> Workplace:
    """All runs of two ranks."""
    small = {"value_model_path": str(one.root / "small")}
    runs = [
        one.run("ddp", batch=4, **GREEDY),
        one.run("zero1", batch=4, deepspeed=zero(1), **GREEDY),
        one.run("zero2", batch=4, deepspeed=zero(2), **saved(one, "zero2"), **GREEDY),
        one.run("zero3", batch=4, deepspeed=zero(3), **saved(one, "zero3"), **GREEDY),
        one.run("zero3_small", batch=4, deepspeed=zero(3), **small, **GREEDY),
        one.run("zero3_lora", batch=4, lora=True, deepspeed=zero(3), **saved(one, "zero3_lora"), **GREEDY),
        one.run("zero3_before", batch=4, deepspeed=zero(3), loaded="before", **GREEDY),
        one.run("zero3_after", batch=4, deepspeed=zero(3), loaded="after", **GREEDY),
        one.run("zero3_epochs", batch=4, deepspeed=zero(3), **EPOCHS),
        one.run("zero3_warmup", batch=4, deepspeed=zero(3), value_warmup_steps=5, weight_decay=0.1, **GREEDY)
        | saved(one, "zero3_warmup"),
        *one.resumed("zero3_mid_epoch", batch=4, deepspeed=zero(3), **MID_EPOCH),
    ]
    one.start(runs, ranks=2)
    return one


PAIRS = [
    ("ddp", "one"),
    ("zero1", "one"),
    ("zero2", "one"),
    ("zero3", "one"),
    ("zero3_small", "one_small"),
    ("zero3_lora", "one_lora"),
    ("zero3_before", "one"),
    ("zero3_after", "one"),
    ("zero3_epochs", "one_epochs"),
]


class TestTwoRanksEqualOneProcess:
    @pytest.mark.parametrize(("backend", "reference"), PAIRS)
    def test_metrics(self, two: Workplace, backend: str, reference: str) -> None:
        mine, other = two.history(backend), two.history(reference)
        assert len(mine) == (4 if "epochs" in backend else 5)
        assert len({entry["loss"] for entry in mine}) == len(mine)
        gaps = {name: largest_gap(mine, other, name) for name in ("loss", "grad_norm", "critic/", "kl", "reward")}
        print(backend, gaps)
        assert gaps["loss"] < 1e-5 and gaps["grad_norm"] < 1e-5
        assert gaps["critic/"] < 1e-5 and gaps["kl"] < 1e-5 and gaps["reward"] < 1e-6
        assert {"critic/explained_variance", "critic/value_loss", "kl"} <= mine[0].keys()
        assert any(entry.get("kl", 0.0) != 0.0 for entry in mine)

    @pytest.mark.parametrize(("backend", "reference"), PAIRS)
    def test_value_models(self, two: Workplace, backend: str, reference: str) -> None:
        first, second = (two.tensors(backend, "value_model", rank) for rank in (0, 1))
        expected = two.tensors(reference, "value_model")
        assert first.keys() == second.keys() == expected.keys()
        start = AutoModel.from_pretrained(two.root / ("small" if "small" in backend else "tied")).state_dict()
        for name in expected:
            assert torch.equal(first[name], second[name]), name
            # Adam turns a gradient of rounding errors into a step, so weights differ by more than losses.
            torch.testing.assert_close(first[name], expected[name], atol=1e-4, rtol=0.0)
            trunk = name.removeprefix("trunk.")
            assert trunk not in start or not torch.equal(first[name], start[trunk]), name
        gap = max((first[name] - expected[name]).abs().max().item() for name in expected)
        print(backend, "weights", gap)
        assert two.log(backend)["sharded"] == ("zero3" in backend)


def test_warmup_under_zero3_leaves_the_policy_bit_identical(two: Workplace) -> None:
    two.log("zero3_warmup")
    start = AutoModelForCausalLM.from_pretrained(two.root / "tied").state_dict()
    end = AutoModelForCausalLM.from_pretrained(two.root / "zero3_warmup" / "final").state_dict()
    assert all(torch.equal(start[name], end[name]) for name in start)
    losses = [entry["critic/value_loss"] for entry in two.history("zero3_warmup")]
    assert losses[-1] < losses[0]


class TestResume:
    @pytest.mark.parametrize(("name", "ranks"), [("plain", 1), ("zero3_mid_epoch", 2)])
    def test_as_if_nothing_had_happened(self, two: Workplace, name: str, ranks: int) -> None:
        killed = two.root / f"{name}_killed"
        assert (killed / f"checkpoint-{CHECKPOINT}").is_dir() and not (killed / "log.json").exists()
        state = torch.load(killed / f"checkpoint-{CHECKPOINT}" / "rollout_0.pt", weights_only=True)
        assert state["step"] == 3 and len(state["buffered_inputs"]) == 2  # inside the second epoch
        whole, resumed = two.history(f"{name}_whole"), two.history(f"{name}_resumed")
        assert len(whole) == STEPS > KILL_AT
        assert resumed == whole
        for rank in range(ranks):
            expected, tensors = (two.tensors(f"{name}_{end}", "value_model", rank) for end in ("whole", "resumed"))
            assert all(torch.equal(tensors[key], expected[key]) for key in expected)


class TestSavedModel:
    def check(self, place: Workplace, backend: str) -> dict[str, Tensor]:
        place.log(backend)
        critic = ValueModel.from_pretrained(place.root / backend / "final" / "value_model").state_dict()
        trained = place.tensors(backend, "value_model")
        assert critic.keys() == trained.keys()
        assert all(torch.equal(critic[name], trained[name]) for name in trained)
        assert critic["head.weight"].any()
        return critic

    @pytest.mark.parametrize("backend", ["zero2", "zero3"])
    def test_stock_transformers_loads_it(self, two: Workplace, backend: str) -> None:
        self.check(two, backend)
        final = two.root / backend / "final"
        for auto, folder in ((AutoModelForCausalLM, final), (AutoModel, final / "value_model")):
            _, info = auto.from_pretrained(folder, output_loading_info=True)
            assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]

    def test_adapter(self, two: Workplace) -> None:
        self.check(two, "zero3_lora")
        adapter = load_file(two.root / "zero3_lora" / "final" / "adapter_model.safetensors")
        assert adapter and all("lora_" in name and value.numel() for name, value in adapter.items())
