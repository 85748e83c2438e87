"""Two gloo ranks equal one process under DDP and ZeRO-1/2/3, and a killed run goes on as if it had not been killed."""

from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from rl_plugins.nn import MTPHeads, load_mtp_heads

from .helpers.distributed import (
    CHECKPOINT,
    EPISODES,
    GREEDY,
    ITERATIONS,
    MID_CYCLE,
    STEPS,
    Workplace,
    largest_gap,
    zero,
)

pytestmark = pytest.mark.slow

# Some completions end by themselves, and the others are worth what would follow.
STEPWISE = {"reward": "steps", "bootstrap_truncated": True}
SEQUENTIAL = {"mtp_head_type": "sequential"}
REPLAY = {"value_replay": 2, "value_replay_learning_rate": 1e-3}
ROWS = {**SEQUENTIAL, **REPLAY}


@pytest.fixture(scope="session")
def place(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
) -> Workplace:
    place = Workplace(tmp_path_factory.mktemp("distributed"))
    for name in ("tied", "untied"):
        # Weights large enough that greedy completions differ in length and in reward.
        model = tiny_model(tie_word_embeddings=name == "tied", initializer_range=0.2)
        model.save_pretrained(place.root / name)
        tokenizer.save_pretrained(place.root / name)
    return place


@pytest.fixture(scope="session")
def one(place: Workplace) -> Workplace:
    """All runs of one process."""
    runs = [
        place.run("one", **GREEDY),
        place.run("one_lora", lora=True, **GREEDY),
        place.run("one_iterations", model="untied", **GREEDY, **ITERATIONS),
        place.run("one_steps", **GREEDY, **STEPWISE),
        place.run("one_episodes", **GREEDY, **EPISODES),
        place.run("one_sequential", **GREEDY, **SEQUENTIAL),
        place.run("one_replay", **GREEDY, **REPLAY),
        place.run("one_rows", **GREEDY, **ROWS),
        *place.resumed("plain", batch=8),
        *place.resumed("mid_cycle", batch=4, **MID_CYCLE),
        *place.resumed("phasic", batch=4, phasic_every=2),
    ]
    place.start(runs, ranks=1)
    return place


@pytest.fixture(scope="session")
def two(one: Workplace) -> Workplace:
    """All runs of two ranks."""
    iterations = {**GREEDY, **ITERATIONS, "ds3_gather_for_generation": False}
    runs = [
        one.run("ddp", batch=4, **GREEDY),
        one.run("zero1", batch=4, deepspeed=zero(1), **GREEDY),
        one.run("zero2", batch=4, deepspeed=zero(2), save=str(one.root / "zero2" / "final"), **GREEDY),
        one.run("zero3", batch=4, deepspeed=zero(3), save=str(one.root / "zero3" / "final"), **GREEDY),
        one.run(
            "zero3_lora", batch=4, lora=True, deepspeed=zero(3), save=str(one.root / "zero3_lora" / "final"), **GREEDY
        ),
        one.run("zero3_iterations", model="untied", batch=4, deepspeed=zero(3), **iterations),
        one.run("ddp_steps", batch=4, **GREEDY, **STEPWISE),
        one.run("zero2_steps", batch=4, deepspeed=zero(2), **GREEDY, **STEPWISE),
        one.run("ddp_episodes", batch=4, **GREEDY, **EPISODES),
        one.run("zero3_episodes", batch=4, deepspeed=zero(3), **GREEDY, **EPISODES),
        one.run("ddp_sequential", batch=4, **GREEDY, **SEQUENTIAL),
        one.run("zero2_sequential", batch=4, deepspeed=zero(2), **GREEDY, **SEQUENTIAL),
        one.run("zero3_sequential", batch=4, deepspeed=zero(3), **GREEDY, **SEQUENTIAL),
        one.run("zero3_replay", batch=4, deepspeed=zero(3), **GREEDY, **REPLAY),
        one.run("ddp_rows", batch=4, **GREEDY, **ROWS),
        one.run("zero2_rows", batch=4, deepspeed=zero(2), **GREEDY, **ROWS),
        one.run("zero3_rows", batch=4, deepspeed=zero(3), **GREEDY, **ROWS),
        *one.resumed("zero3_rows", batch=4, deepspeed=zero(3), **ROWS),
        *one.resumed("zero3_mid_cycle", batch=4, deepspeed=zero(3), **MID_CYCLE, **STEPWISE),
        *one.resumed("zero3_sequential", batch=4, deepspeed=zero(3), **SEQUENTIAL),
    ]
    one.start(runs, ranks=2)
    return one


PAIRS = [
    ("ddp", "one"),
    ("zero1", "one"),
    ("zero2", "one"),
    ("zero3", "one"),
    ("zero3_lora", "one_lora"),
    ("zero3_iterations", "one_iterations"),
    ("ddp_steps", "one_steps"),
    ("zero2_steps", "one_steps"),
    ("ddp_episodes", "one_episodes"),
    ("zero3_episodes", "one_episodes"),
    ("ddp_sequential", "one_sequential"),
    ("zero2_sequential", "one_sequential"),
    ("zero3_sequential", "one_sequential"),
    ("zero3_replay", "one_replay"),
    ("ddp_rows", "one_rows"),
    ("zero2_rows", "one_rows"),
    ("zero3_rows", "one_rows"),
]


class TestTwoRanksEqualOneProcess:
    @pytest.mark.parametrize(("backend", "reference"), PAIRS)
    def test_losses_and_gradient_norms(self, two: Workplace, backend: str, reference: str) -> None:
        mine, other = two.history(backend), two.history(reference)
        assert len(mine) == GREEDY["max_steps"]
        assert len({entry["loss"] for entry in mine}) > 1
        assert largest_gap(mine, other, "loss") < 1e-4
        assert largest_gap(mine, other, "grad_norm") < 1e-3

    @pytest.mark.parametrize(("backend", "reference"), PAIRS)
    def test_critic_metrics(self, two: Workplace, backend: str, reference: str) -> None:
        mine, other = two.history(backend), two.history(reference)
        assert "critic/explained_variance" in mine[0] and "critic/advantage_std" in mine[0]
        if "iterations" in backend:
            # What is measured in the loss is averaged over micro-batches, which each rank shuffles on its own.
            names = ("critic/explained_variance", "critic/advantage", "critic/value_mean", "critic/return")
        else:
            names = ("critic/", "mtp/", "completions/", "reward", "step_rewards/", "entropy")
        for name in names:
            assert largest_gap(mine, other, name) < 1e-3, name

    @pytest.mark.parametrize(("backend", "reference"), PAIRS)
    def test_polyak_targets(self, two: Workplace, backend: str, reference: str) -> None:
        first, second = two.tensors(backend, "target", 0), two.tensors(backend, "target", 1)
        expected, heads = two.tensors(reference, "target"), two.tensors(backend, "heads")
        for name in expected:
            assert torch.equal(first[name], second[name]), name
            torch.testing.assert_close(first[name], expected[name], atol=1e-5, rtol=0.0)
        path = "value_heads." if "sequential" in backend else ""  # of sequential heads, what makes values alone
        assert any(not torch.equal(x, heads[path + name.removeprefix("heads.")]) for name, x in first.items())

    @pytest.mark.parametrize("backend", [pair[0] for pair in PAIRS if "rows" not in pair[0]])
    def test_values_are_saved(self, two: Workplace, backend: str) -> None:
        """While generating, or by a pass where an episode was cut or has several turns: at the first try, never
        twice."""
        log = two.log(backend)
        assert log["sharded"] == ("zero3" in backend)
        assert len(log["captured"]) == (3 if "iterations" in backend else 5)
        assert all(log["captured"])

    @pytest.mark.parametrize("backend", ["ddp", "zero3"])
    def test_ranks_make_different_numbers_of_turns(self, two: Workplace, backend: str) -> None:
        two.assert_ranks_play_apart(f"{backend}_episodes", rows=4)

    @pytest.mark.parametrize("name", ["ddp_steps", "zero2_steps", "ddp_episodes", "zero3_episodes"])
    def test_steps_are_paid(self, two: Workplace, name: str) -> None:
        for entry in two.history(name):
            assert entry["step_rewards/per_completion"] > 1.0 and entry["step_rewards/before_end"] > 0.1
        if name.endswith("steps"):
            assert any(0.0 < entry["completions/clipped_ratio"] < 1.0 for entry in two.history(name))

    def test_old_logps_path_ran(self, two: Workplace) -> None:
        """The second pass over a batch is off-policy, so some ratios leave the clip range."""
        assert two.history("zero3_iterations")[1]["clip_ratio/region_mean"] > 0.0


RESUMED = ["plain", "mid_cycle", "phasic"]


class TestResume:
    def check(self, place: Workplace, name: str, ranks: int) -> None:
        whole, resumed = place.history(f"{name}_whole"), place.history(f"{name}_resumed")
        assert len(whole) == STEPS
        assert resumed == whole
        for what in ("heads", "target"):
            for rank in range(ranks):
                expected, tensors = (place.tensors(f"{name}_{end}", what, rank) for end in ("whole", "resumed"))
                assert all(torch.equal(tensors[key], expected[key]) for key in expected)

    @pytest.mark.parametrize("name", RESUMED)
    def test_one_process(self, one: Workplace, name: str) -> None:
        self.check(one, name, ranks=1)

    @pytest.mark.parametrize("name", ["zero3_mid_cycle", "zero3_sequential", "zero3_rows"])
    def test_zero3(self, two: Workplace, name: str) -> None:
        self.check(two, name, ranks=2)

    @pytest.mark.parametrize("name", [*RESUMED, "zero3_mid_cycle", "zero3_sequential", "zero3_rows"])
    def test_the_killed_run_was_killed(self, two: Workplace, name: str) -> None:
        killed = two.root / f"{name}_killed"
        assert (killed / f"checkpoint-{CHECKPOINT}").is_dir()
        assert not (killed / "log.json").exists() and not list(killed.glob("error_*"))

    def test_the_checkpoint_fell_between_two_generations(self, one: Workplace) -> None:
        """Three optimizer steps of two micro-steps, four micro-steps for each generated batch."""
        file = one.root / "mid_cycle_killed" / f"checkpoint-{CHECKPOINT}" / "rollout_0.pt"
        state = torch.load(file, weights_only=True)
        assert state["step"] == 6
        assert len(state["buffered_inputs"]) == MID_CYCLE["steps_per_generation"]


class TestSavedModel:
    @pytest.mark.parametrize("backend", ["zero2", "zero3"])
    def test_stock_transformers_loads_it(self, two: Workplace, backend: str) -> None:
        two.log(backend)
        final = two.root / backend / "final"
        model, info = AutoModelForCausalLM.from_pretrained(final, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        heads = load_mtp_heads(model, final).state_dict()
        trained = two.tensors(backend, "heads")
        assert heads.keys() == trained.keys()
        assert all(torch.equal(heads[name], trained[name]) for name in trained)

    def test_adapter(self, two: Workplace) -> None:
        two.log("zero3_lora")
        final = two.root / "zero3_lora" / "final"
        heads, trained = load_file(final / MTPHeads.mark), two.tensors("zero3_lora", "heads")
        assert all(torch.equal(heads[name], trained[name]) for name in trained)
        adapter = load_file(final / "adapter_model.safetensors")
        assert adapter and all("lora_" in name and value.numel() for name, value in adapter.items())
