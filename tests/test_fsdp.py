"""FSDP2: two gloo ranks equal one process for every trainer, and a killed run goes on as if it had not been killed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from rl_plugins.nn import MTPHeads, load_mtp_heads
from rl_plugins.nn.released_layers import count_released_layers
from rl_plugins.trl.attachments import check_fsdp

from .helpers import distributed
from .helpers.distributed import gap, start_both
from .helpers.moe_models import make_moe_model
from .helpers.tiny import CHARACTERS

Base: Any = distributed.Workplace
largest_gap, fsdp = distributed.largest_gap, distributed.fsdp
STEPS, CHECKPOINT, KILL_AT = distributed.STEPS, distributed.CHECKPOINT, distributed.KILL_AT

# Not Adam, which hides the scale of gradients and makes steps of rounding errors; no clipping, which hides it too.
PLAIN: dict[str, Any] = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 1e4}
SFT: dict[str, Any] = {"trainer": "sft", **PLAIN, "head_learning_rate": 0.05}
ONLINE: dict[str, Any] = {**PLAIN, "generation_kwargs": {"do_sample": False}, "max_completion_length": 24}
# What is trained the same in one process and on two ranks; `batch` is of all ranks. One row per rank, so that ranks
# end at different steps.
CASES: dict[str, dict[str, Any]] = {
    "critic": {**ONLINE, "batch": 2, "head_learning_rate": 0.05, "value_warmup_steps": 1},
    "untied": {**ONLINE, "batch": 4, "head_learning_rate": 0.05, "model": "untied", "lora": True},
    "ppo": {"trainer": "ppo", **ONLINE, "batch": 2, "value_learning_rate": 0.05, "num_iterations": 1,
            "value_warmup_steps": 1},
    "variant": {"trainer": "variant", "reward": "spread", **ONLINE, "batch": 4, "num_generations": 2,
                "preset": "dapo", "beta": 0.1},
    "episodes": {**ONLINE, **distributed.EPISODES, "batch": 2, "head_learning_rate": 0.05},
    "sft": {**SFT, "reward": "scored", "model": "untied"},
    # No output of the model has a gradient then: without checkpointing, which would have inputs require one.
    "frozen": {**SFT, "reward": "scored", "model": "untied", "freeze_trunk": True, "gradient_checkpointing": False},
    "sequential": {**SFT, "reward": "scored", "model": "experts", "mtp_head_type": "sequential", "num_mtp_heads": 2,
                   "mtp_detach_trunk": False},
    "sequential_critic": {**ONLINE, "batch": 2, "head_learning_rate": 0.05, "mtp_head_type": "sequential"},
}  # fmt: skip
PARAMETERS = {"ppo": "value_model", "variant": "policy"}
"""Which parameters a case trains, if not heads."""

HELD: dict[str, Any] = {"full": (fsdp(), distributed.MID_CYCLE), "sharded": (fsdp("SHARDED"), {"phasic_every": 2})}


def name_of(case: str) -> str:
    """What a case trains."""
    return PARAMETERS.get(case, "heads")


class Workplace(Base):
    """Runs of every trainer."""

    timeout = 600

    def run(self, name: str, model: str = "tied", batch: int = 8, **options: Any) -> dict[str, Any]:
        worker = {key: options.pop(key) for key in ("trainer", "reward") if key in options}
        return {**super().run(name, model, batch, **options), **worker}


@pytest.fixture(scope="module")
def two(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
) -> Workplace:
    """All runs, those of one process beside those of two ranks."""
    place = Workplace(tmp_path_factory.mktemp("fsdp"))
    # Weights large enough that greedy completions differ in length and in reward.
    tiny_model(initializer_range=0.2).save_pretrained(place.root / "tied")
    tiny_model(initializer_range=0.2, tie_word_embeddings=False).save_pretrained(place.root / "untied")
    experts = make_moe_model("glm4_moe", vocab_size=2 + len(CHARACTERS), num_hidden_layers=2)
    experts.save_pretrained(place.root / "experts")
    for name in ("tied", "untied", "experts"):
        tokenizer.save_pretrained(place.root / name)
    one, both = [], []
    for name, case in CASES.items():
        one.append(place.run(f"{name}_one", **case))
        half = {**case, "batch": case.get("batch", 8) // 2, "save": str(place.root / f"{name}_fsdp" / "final")}
        both.append(place.run(f"{name}_fsdp", **half, **fsdp()))
    both += place.resumed("full", batch=4, lora=True, **HELD["full"][0], **HELD["full"][1])
    both += place.resumed("sharded", batch=4, **HELD["sharded"][0], **HELD["sharded"][1])
    start_both(place, one, both)
    return place


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
class TestTwoRanksEqualOneProcess:
    def test_losses_and_metrics(self, two: Workplace, case: str) -> None:
        mine, other = two.history(f"{case}_fsdp"), two.history(f"{case}_one")
        assert len(mine) == 3 and len({entry["loss"] for entry in mine}) > 1
        gaps = {name: largest_gap(mine, other, name) for name in {key for entry in other for key in entry}}
        print("GAPS", case, gaps)
        assert gaps["loss"] < 1e-6 and gaps["grad_norm"] < 1e-5
        # Its denominator is the variance of a few returns.
        assert max(g for name, g in gaps.items() if "explained_variance" not in name and name != "grad_norm") < 2e-6
        assert max((g for name, g in gaps.items() if "explained_variance" in name), default=0.0) < 1e-4

    def test_weights(self, two: Workplace, case: str) -> None:
        assert two.log(f"{case}_fsdp")["sharded"] and not two.log(f"{case}_one")["sharded"]
        name = name_of(case)
        expected = two.tensors(f"{case}_one", name)
        for what in (name, *(("target",) if name == "heads" else ())):
            first, second = (two.tensors(f"{case}_fsdp", what, rank) for rank in (0, 1))
            assert gap(first, second) == 0.0
            print("GAPS", case, what, gap(first, two.tensors(f"{case}_one", what)))
            assert gap(first, two.tensors(f"{case}_one", what)) < 1e-6
        if name == "heads":
            path = (
                "value_heads." if case.startswith("sequential") else ""
            )  # of sequential heads, what makes values alone
            heads = {f"heads.{key.removeprefix(path)}": x for key, x in expected.items() if key.startswith(path)}
            assert gap(two.tensors(f"{case}_one", "target"), heads) > 1e-4  # the copies are slow


@pytest.mark.slow
class TestWhatACaseIsAbout:
    """Runs exercise what they are named after."""

    def test_ranks_end_at_different_steps(self, two: Workplace) -> None:
        for case in ("critic", "ppo"):
            lengths = [(e["completions/min_length"], e["completions/max_length"]) for e in two.history(f"{case}_fsdp")]
            assert any(shortest < longest for shortest, longest in lengths)

    def test_ranks_make_different_numbers_of_turns(self, two: Workplace) -> None:
        two.assert_ranks_play_apart("episodes_fsdp", rows=1)

    def test_values_come_from_a_pass(self, two: Workplace) -> None:
        """The heads run outside the forward while tokens are chosen, which ranks do not do in step."""
        assert two.log("critic_fsdp")["captured"] == [False, True] * 3  # a pass fills in

    def test_frozen_heads_learn(self, two: Workplace) -> None:
        history = two.history("frozen_fsdp")
        assert all(entry["grad_norm"] > 0.0 for entry in history)
        assert history[-1]["critic/value_loss"] != history[0]["critic/value_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("name", HELD)
class TestResume:
    def test_as_if_nothing_had_happened(self, two: Workplace, name: str) -> None:
        killed = two.root / f"{name}_killed"
        assert not (killed / "log.json").exists() and not list(killed.glob("error_*"))
        stored = "pytorch_model_fsdp.bin" if name == "full" else "pytorch_model_fsdp_0"
        assert (killed / f"checkpoint-{CHECKPOINT}" / stored).exists()
        whole, resumed = two.history(f"{name}_whole"), two.history(f"{name}_resumed")
        assert len(whole) == STEPS > KILL_AT
        assert resumed == whole
        for what in ("heads", "target"):
            for rank in (0, 1):
                assert gap(two.tensors(f"{name}_resumed", what, rank), two.tensors(f"{name}_whole", what, rank)) == 0.0


@pytest.mark.slow
class TestSavedModel:
    @pytest.mark.parametrize("case", [case for case in CASES if case != "untied"])
    def test_stock_transformers_loads_it(self, two: Workplace, case: str) -> None:
        two.log(f"{case}_fsdp")
        final = two.root / f"{case}_fsdp" / "final"
        model, info = AutoModelForCausalLM.from_pretrained(final, output_loading_info=True)
        assert not info["missing_keys"] and not info["mismatched_keys"]
        if case == "sequential":  # whose layers are in the checkpoint, too
            assert count_released_layers(model, final) == 2
        else:
            assert not info["unexpected_keys"]
        start = AutoModelForCausalLM.from_pretrained(two.root / CASES[case].get("model", "tied")).state_dict()
        assert (gap(model.state_dict(), start) > 0.0) == (case != "frozen")
        if name_of(case) == "heads":
            heads = dict(load_mtp_heads(model, final).named_parameters())
            assert gap(heads, two.tensors(f"{case}_fsdp", "heads")) == 0.0
        if case == "ppo":
            trunk = AutoModel.from_pretrained(final / "value_model").state_dict()
            trained = two.tensors("ppo_fsdp", "value_model")
            assert all(torch.equal(trained[f"trunk.{key}"], weight) for key, weight in trunk.items())

    def test_adapter(self, two: Workplace) -> None:
        two.log("untied_fsdp")
        final = two.root / "untied_fsdp" / "final"
        assert gap(load_file(final / MTPHeads.mark), two.tensors("untied_fsdp", "heads")) == 0.0
        adapter = load_file(final / "adapter_model.safetensors")
        assert adapter and all("lora_" in name and value.numel() for name, value in adapter.items())


class TestRefusals:
    def plugin(self, **options: Any) -> FullyShardedDataParallelPlugin:
        return FullyShardedDataParallelPlugin(**{"fsdp_version": 2, "reshard_after_forward": True, **options})

    def test_fsdp1(self) -> None:
        with pytest.raises(ValueError, match="Use FSDP2"):
            check_fsdp(self.plugin(fsdp_version=1, reshard_after_forward="FULL_SHARD"), adapters=False)

    def test_sharded_checkpoints_of_adapters(self) -> None:
        sharded, full = (self.plugin(state_dict_type=f"{kind}_STATE_DICT") for kind in ("SHARDED", "FULL"))
        with pytest.raises(ValueError, match="SHARDED_STATE_DICT.*Set state_dict_type to FULL_STATE_DICT"):
            check_fsdp(sharded, adapters=True)
        check_fsdp(sharded, adapters=False)
        check_fsdp(full, adapters=True)
