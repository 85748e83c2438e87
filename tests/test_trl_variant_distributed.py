"""GRPO variants on two gloo ranks equal one process under DDP and ZeRO-2/3, and a killed run goes on unharmed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from .helpers import distributed
from .helpers.distributed import start_both

pytestmark = pytest.mark.slow


Base: Any = distributed.Workplace
zero, largest_gap = distributed.zero, distributed.largest_gap
STEPS, CHECKPOINT, KILL_AT = distributed.STEPS, distributed.CHECKPOINT, distributed.KILL_AT

GROUP, ROWS = 4, 8  # completions of a prompt, and of a rank
BACKENDS: dict[str, dict[str, Any]] = {"ddp": {}, "zero2": {"deepspeed": zero(2)}, "zero3": {"deepspeed": zero(3)}}
# Not Adam, which hides the scale of gradients and makes steps of rounding errors; no clipping, which hides it too.
GREEDY: dict[str, Any] = {
    "max_steps": 3,
    "num_generations": GROUP,
    "generation_kwargs": {"do_sample": False},
    "optim": "sgd",
    "learning_rate": 0.05,
    "max_grad_norm": 1e4,
}
TWICE = {"num_iterations": 2, "max_steps": 4}  # the second pass over a batch is off-policy
UNEVEN = {"batch": 6}  # 3 groups of 4 on two ranks
# By what is trained the same on one process and on two: `batch` is a rank's, `reward` and `prompts` the worker's.
CASES: dict[str, dict[str, Any]] = {
    "dapo": {"preset": "dapo"},
    "reject_uniform": {"advantage": "group_normalized", "reject_uniform": True, "reward": "thirds", **UNEVEN},
    "tracker": {
        "preset": "spo", "advantage_kwargs": {"half_life": 1.0, "low": 0.1, "high": 1.0}, "num_generations": 2,
        "batch": 5, "prompts": 10,
    },
    "gvpo": {"preset": "gvpo", **TWICE},
    "gpg": {"preset": "gpg", "reward": "thirds", **UNEVEN},
    "reinforce++": {"preset": "reinforce++", "num_generations": 1, "beta": 0.1},
    # Groups on two ranks, one of them rejected, and micro-batches that cut the others.
    "scale_rl": {
        "preset": "scale_rl", "reward": "thirds", "batch": 3, "gradient_accumulation_steps": 2, **TWICE,
    },
    # A share that both signs are near, so that the bounds of a rank by itself would be others.
    "bapo": {"preset": "bapo", "policy_loss_kwargs": {"target_share": 0.5}, **TWICE},
    "clip_cov": {"preset": "clip_cov", "policy_loss_kwargs": {"ratio": 0.0}, **TWICE},
    "reward_to_go": {"advantage": "reward_to_go", "reward": "steps"},
    # Groups on two ranks, whose longest completions differ.
    "process": {"advantage": "process_normalized", "reward": "steps", **UNEVEN},
    "turn": {"advantage": "turn_normalized", **distributed.EPISODES, **UNEVEN},
}  # fmt: skip
# Each rank draws or keeps its own groups: no one process does the same.
OWN_DRAWS: dict[str, dict[str, Any]] = {
    "redraw": {"preset": "dapo", "reward": "thirds", "max_draws": 20},
    "replay": {"advantage": "group_normalized", "replay_buffer_size": 4, "reward": "thirds", "max_steps": 5},
}
# What ranks exchange is the same under every backend. Each has an on-policy and an off-policy case, one with uneven
# groups or draws of its own, and ZeRO-3 all that makes more forward passes.
ON: dict[str, tuple[str, ...]] = {
    "dapo": ("ddp", "zero2", "zero3"),
    "reject_uniform": ("ddp",),
    "tracker": ("ddp", "zero3"),
    "gvpo": ("ddp", "zero2"),
    "gpg": ("zero2",),
    "reinforce++": ("ddp", "zero3"),
    "scale_rl": ("ddp",),
    "bapo": ("zero2",),
    "clip_cov": ("zero3",),
    "reward_to_go": ("ddp",),
    "process": ("zero2",),
    "turn": ("zero3",),
    "redraw": ("ddp", "zero3"),
    "replay": ("zero2",),
}
PAIRS = [(case, backend) for case in CASES for backend in ON[case]]
# Kills between two slices of a generation batch. Not shuffled where there is a second epoch: after resuming, the host
# shuffles that one as if it were the first.
SLICED = {"num_generations": GROUP, "steps_per_generation": 2, "gradient_accumulation_steps": 1}
RESUMED: dict[str, dict[str, Any]] = {
    "replay_resumed": {
        "preset": "dapo", "max_draws": 1, "replay_buffer_size": 4, "reward": "thirds", **SLICED, **BACKENDS["zero2"],
    },
    "tracker_resumed": {
        **SLICED, **CASES["tracker"], "shuffle_dataset": False, **BACKENDS["zero3"],
    },
}  # fmt: skip


class Workplace(Base):
    """Runs of `GRPOVariantTrainer`."""

    def run(self, name: str, model: str = "tied", batch: int = ROWS, **options: Any) -> dict[str, Any]:
        worker = {"reward": options.pop("reward", "spread"), "prompts": options.pop("prompts", 64)}
        return {**super().run(name, model, batch, **options), "trainer": "variant", **worker}

    def batches(self, name: str) -> list[list[dict[str, Any]]]:
        """What each rank noted of its batches."""
        self.log(name)
        return [json.loads((self.root / name / f"batches_{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
) -> Workplace:
    place = Workplace(tmp_path_factory.mktemp("variants"))
    # Weights large enough that greedy completions differ in length and in reward.
    tiny_model(initializer_range=0.2).save_pretrained(place.root / "tied")
    tokenizer.save_pretrained(place.root / "tied")
    return place


@pytest.fixture(scope="module")
def two(place: Workplace) -> Workplace:
    """All runs, those of one process beside those of two ranks."""
    one = [
        place.run(f"{name}_one", **{**GREEDY, **case, "batch": 2 * case.get("batch", ROWS)})
        for name, case in CASES.items()
    ]
    runs = [
        place.run(f"{name}_{backend}", **{**GREEDY, **case, **BACKENDS[backend]})
        for name, case in {**CASES, **OWN_DRAWS}.items()
        for backend in ON[name]
    ]
    for name, options in RESUMED.items():
        runs += place.resumed(name, **{"batch": ROWS, **options})
    start_both(place, one, runs)
    return place


def assert_ranks_agree(place: Workplace, name: str) -> None:
    """Both ranks have the same weights, which are not those of the start, on the backend that the name says."""
    first, second = (place.tensors(name, "policy", rank) for rank in (0, 1))
    start = AutoModelForCausalLM.from_pretrained(place.root / "tied").state_dict()
    assert first.keys() == second.keys() <= start.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert all(not torch.equal(first[key], start[key]) for key in first)
    assert place.log(name)["sharded"] == ("zero3" in name)


def assert_items_are_counted(place: Workplace, name: str) -> None:
    """Losses are averaged over the tokens of all ranks."""
    for mine, other in zip(*place.batches(name), strict=True):
        assert mine["items"] == other["items"] == mine["tokens"] + other["tokens"] > 0


@pytest.mark.parametrize(("case", "backend"), PAIRS)
class TestTwoRanksEqualOneProcess:
    def test_metrics(self, two: Workplace, case: str, backend: str) -> None:
        mine, other = two.history(f"{case}_{backend}"), two.history(f"{case}_one")
        assert len(mine) == {**GREEDY, **CASES[case]}["max_steps"]
        assert len({entry["grad_norm"] for entry in mine}) > 1 and all(entry["grad_norm"] > 0 for entry in mine)
        names = ("loss", "reward", "step_rewards/", "kl", "clip_ratio/", "sampling/", "value_tracker/", "completions/")
        gaps = {name: largest_gap(mine, other, name) for name in names}
        norms = max(abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in zip(mine, other, strict=True))
        print(case, backend, "norms", norms, gaps)
        assert max(gaps.values()) < 1e-5 and norms < 1e-4

    def test_weights(self, two: Workplace, case: str, backend: str) -> None:
        name = f"{case}_{backend}"
        assert_ranks_agree(two, name)
        assert_items_are_counted(two, name)
        expected, found = two.tensors(f"{case}_one", "policy"), two.tensors(name, "policy")
        print(name, "weights", max((found[key] - expected[key]).abs().max().item() for key in expected))
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], atol=1e-5, rtol=0.0)


class TestOwnDraws:
    def check(self, place: Workplace, name: str) -> None:
        assert_ranks_agree(place, name)
        assert_items_are_counted(place, name)
        for batch in [batch for rank in place.batches(name) for batch in rank]:
            assert len(batch["prompts"]) == ROWS
            for i in range(0, ROWS, GROUP):
                assert len(set(batch["prompts"][i : i + GROUP])) == 1  # a whole group

    @staticmethod
    def informative(batch: dict[str, Any]) -> list[bool]:
        return [len(set(batch["rewards"][i : i + GROUP])) > 1 for i in range(0, ROWS, GROUP)]

    @pytest.mark.parametrize("backend", ON["redraw"])
    def test_every_group_teaches_something(self, two: Workplace, backend: str) -> None:
        self.check(two, f"redraw_{backend}")
        first, second = two.batches(f"redraw_{backend}")
        assert all(all(self.informative(batch)) for batch in first + second)
        history = two.history(f"redraw_{backend}")
        assert sum(entry["sampling/draws"] for entry in history) > 0
        assert all(entry["sampling/unfilled_groups"] == 0 for entry in history)
        assert [batch["prompts"] for batch in first] != [batch["prompts"] for batch in second]

    @pytest.mark.parametrize("backend", ON["replay"])
    def test_groups_are_replayed(self, two: Workplace, backend: str) -> None:
        self.check(two, f"replay_{backend}")
        history = two.history(f"replay_{backend}")
        assert sum(entry["sampling/replayed_groups"] for entry in history) > 0
        for i, entry in enumerate(history):
            groups = [informs for rank in two.batches(f"replay_{backend}") for informs in self.informative(rank[i])]
            assert groups.count(False) == entry["sampling/unfilled_groups"]
        for rank, batches in enumerate(two.batches(f"replay_{backend}")):
            state = torch.load(two.root / f"replay_{backend}" / f"replay_{rank}.pt", weights_only=True)
            assert 0 < len(state["groups"]) <= 4
            assert all(step <= len(batches) for _, _, step in state["groups"])


class TestWhatACaseIsAbout:
    """Runs exercise what they are named after."""

    @pytest.mark.parametrize("backend", ON["reject_uniform"])
    def test_uniform_groups_are_rejected(self, two: Workplace, backend: str) -> None:
        history = two.history(f"reject_uniform_{backend}")
        rejected = [entry["sampling/unfilled_groups"] for entry in history]
        assert all(count < 3 for count in rejected) and sum(rejected) > 0

    @pytest.mark.parametrize("name", ["reward_to_go_ddp", "process_zero2", "turn_zero3"])
    def test_steps_are_paid(self, two: Workplace, name: str) -> None:
        assert all(entry["step_rewards/before_end"] > 0.1 for entry in two.history(name))
        first, second = ([batch["width"] for batch in rank] for rank in two.batches(name))
        print(name, first, second)
        assert first != second
        if name.startswith("turn"):
            turns, _ = two.episodes(name, rows=6)
            assert turns[0] != turns[1] and max(turns[0]) == 3

    @pytest.mark.parametrize("name", ["gpg_zero2", "scale_rl_ddp", "process_zero2", "turn_zero3"])
    def test_groups_are_cut_across_ranks(self, two: Workplace, name: str) -> None:
        for first, second in zip(*two.batches(name), strict=True):
            assert len(first["prompts"]) == 6 and set(first["prompts"][4:]) == set(second["prompts"][:2])

    @pytest.mark.parametrize("backend", ON["gpg"])
    def test_gpg_makes_up_for_uniform_groups(self, two: Workplace, backend: str) -> None:
        assert any(0 < entry["frac_reward_zero_std"] < 1 for entry in two.history(f"gpg_{backend}"))

    @pytest.mark.parametrize("backend", ON["dapo"])
    def test_full_batches_are_not_redrawn(self, two: Workplace, backend: str) -> None:
        history = two.history(f"dapo_{backend}")
        assert [entry["sampling/draws"] for entry in history] == [0.0] * len(history)

    @pytest.mark.parametrize("backend", ON["tracker"])
    def test_tracker(self, two: Workplace, backend: str) -> None:
        two.log(f"tracker_{backend}")
        first, second = (
            json.loads((two.root / f"tracker_{backend}" / f"tracker_{r}.json").read_text()) for r in (0, 1)
        )
        expected = json.loads((two.root / "tracker_one" / "tracker_0.json").read_text())
        assert first == second and first.keys() == expected.keys() and len(first) == 10
        gap = max(abs(a - b) for key in expected for a, b in zip(first[key], expected[key], strict=True))
        print("tracker", backend, gap)
        assert gap < 1e-5
        forget = [entry["value_tracker/forget_mean"] for entry in two.history(f"tracker_{backend}")[1:]]
        assert len(forget) == 2 and all(0.1 < rho < 0.9 for rho in forget)

    @pytest.mark.parametrize("backend", ON["reinforce++"])
    def test_kl_in_the_reward(self, two: Workplace, backend: str) -> None:
        assert any(abs(entry["kl"]) > 1e-4 for entry in two.history(f"reinforce++_{backend}"))

    @pytest.mark.parametrize("name", ["bapo_zero2", "clip_cov_zero3"])
    def test_second_passes_are_clipped(self, two: Workplace, name: str) -> None:
        shares = [entry["clip_ratio/region_mean"] for entry in two.history(name)]
        assert shares[0::2] == [0.0, 0.0] and max(shares[1::2]) > 0


def kept(run: Path, rank: int) -> Any:
    """What a finished run knew of earlier batches: tracker or replay buffer."""
    tracker = run / f"tracker_{rank}.json"
    if tracker.exists():
        counts = json.loads(tracker.read_text())
        assert len(counts) == 10
        return counts
    state = torch.load(run / f"replay_{rank}.pt", weights_only=True)
    assert len(state["groups"]) > 0
    return state


@pytest.mark.parametrize("name", RESUMED)
class TestResume:
    def test_as_if_nothing_had_happened(self, two: Workplace, name: str) -> None:
        killed = two.root / f"{name}_killed"
        assert not (killed / "log.json").exists() and not list(killed.glob("error_*"))
        for rank in (0, 1):
            state = torch.load(killed / f"checkpoint-{CHECKPOINT}" / f"rollout_{rank}.pt", weights_only=True)
            assert state["step"] == CHECKPOINT and len(state["buffered_inputs"]) == 2  # between two slices
        whole, resumed = two.history(f"{name}_whole"), two.history(f"{name}_resumed")
        assert len(whole) == STEPS > KILL_AT
        assert resumed == whole
        for rank in (0, 1):
            expected, found = (two.tensors(f"{name}_{end}", "policy", rank) for end in ("whole", "resumed"))
            assert all(torch.equal(found[key], expected[key]) for key in expected)
            expected, found = (kept(two.root / f"{name}_{end}", rank) for end in ("whole", "resumed"))
            torch.testing.assert_close(found, expected, atol=0.0, rtol=0.0)
