"""Language models trained in Lightning on two gloo ranks equal those of one process, under DDP and DeepSpeed, and a
killed run goes on as if it had not been killed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.deepspeed import convert_zero_checkpoint_to_fp32_state_dict
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from rl_plugins.lightning import MTPCriticModule
from rl_plugins.nn import load_mtp_heads

from .helpers import distributed
from .helpers.distributed import gap
from .helpers.step_rewards import LENGTH

pytestmark = pytest.mark.slow

STEPS, BATCH = 4, 4  # optimizer steps; prompts of all ranks in a batch
CLIP, ACCUMULATE = 1.0, 2
# What is trained the same on one process and on two. The second pass over a batch of completions is off-policy.
CASES: dict[str, dict[str, Any]] = {
    "critic": {"kind": "critic", "module": {"num_iterations": 2}},
    "accumulate": {
        "kind": "critic",
        "module": {"value_grad_clip": 0.002, "head_learning_rate": 1e-3},
        "args": {"max_steps": STEPS // ACCUMULATE, "accumulate_grad_batches": ACCUMULATE},
    },
    "phases": {"kind": "critic", "module": {"phasic_every": 1}},
    "grpo": {"kind": "grpo", "module": {"num_iterations": 2, "beta": 0.1}},
    "ppo": {
        "kind": "ppo",
        "module": {"num_iterations": 2, "value_warmup_steps": 1, "weight_decay": 0.1},
        "args": {"val_check_interval": STEPS - 1},
    },
    "sft": {"kind": "sft", "model": "untied"},
    "steps": {"kind": "critic", "module": {"num_iterations": 2, "bootstrap_truncated": True}, "reward": "steps"},
    "process": {"kind": "grpo", "module": {"advantage": "process_normalized"}, "reward": "steps"},
    "episodes": {"kind": "critic", "module": {"max_completion_length": LENGTH}, "reward": "episodes"},
    # With a lambda below 1, so that the slow copies enter the advantages.
    "sequential": {
        "kind": "critic",
        "module": {"num_iterations": 2, "mtp_head_type": "sequential", "lam_policy": 0.95},
    },
    "sequentialsft": {"kind": "sft", "model": "untied", "module": {"mtp_head_type": "sequential"}},
}
BACKENDS = {
    "critic": ("ddp", "zero1", "zero2", "zero3"),
    "accumulate": ("ddp", "zero2"),
    "phases": ("ddp",),
    "grpo": ("ddp", "zero2"),
    "ppo": ("zero3",),
    "sft": ("zero3",),
    "steps": ("zero2",),
    "process": ("ddp",),
    "episodes": ("ddp", "zero3"),
    "sequential": ("ddp", "zero3"),
    "sequentialsft": ("zero2",),
}
NAMES = [f"{case}_{backend}" for case, backends in BACKENDS.items() for backend in backends]
SHARDED = [name for name in NAMES if name.startswith("critic_zero")]
# One batch of eight rows, or two ranks with two micro-batches of two rows each; for the second step also.
WINDOWS: dict[str, dict[str, Any]] = {
    "windowsft": {"kind": "sft", "module": {"value_grad_clip": 0.3, "mtp_detach_trunk": False}},
    "windowcritic": {"kind": "critic", "module": {"beta": 0.1, "entropy_coef": 0.1, "head_learning_rate": 1e-3}},
}
WINDOW_BACKENDS = {"windowsft": ("ddp", "zero2"), "windowcritic": ("zero3",)}
WINDOW_STEPS = 2
# Dies a step after its last checkpoint, in the second of two passes over two slices of one batch of completions. The
# fifth step is the first on the next batch.
MID_CYCLE: dict[str, Any] = {
    "kind": "sampling_critic",
    "module": {"steps_per_generation": 2, "num_iterations": 2},
    "args": {"max_steps": 5},
}
CHECKPOINT, KILL_AT = 2, 3
# Resumed beside what `MID_CYCLE` says.
RESUMED: dict[str, dict[str, Any]] = {
    "ddp": {"module": {"bootstrap_truncated": True}, "reward": "steps"},
    "zero3": {"module": {"max_completion_length": LENGTH}, "reward": "episodes"},
}
HALF = {"kind": "fixed_critic"}

Run = dict[str, Any]


class Workplace(distributed.Workplace):  # type: ignore[misc]
    """Runs of the worker that trains language models in Lightning."""

    worker = Path(__file__).parent / "workers" / "lightning_worker.py"

    def run(self, name: str, backend: str, *, model: str = "tied", **options: Any) -> Run:  # type: ignore[override]
        return {
            "out": str(self.root / name),
            "model": str(self.root / model),
            "module": {},
            "backend": backend,
            "batch": BATCH if backend == "one" else BATCH // 2,
            **options,
            "args": {"max_steps": STEPS, "gradient_clip_val": CLIP, **options.get("args", {})},
        }

    def killed(self, backend: str) -> list[Run]:
        """An uninterrupted run, one that is killed, and one that goes on from its checkpoint."""
        paid = RESUMED[backend]
        options = {**MID_CYCLE, **paid, "module": {**MID_CYCLE["module"], **paid["module"]}, "checkpoint": CHECKPOINT}
        checkpoint = self.root / f"killed_{backend}" / f"step={CHECKPOINT}.ckpt"
        return [
            self.run(f"whole_{backend}", backend, **options),
            self.run(f"killed_{backend}", backend, **options, kill_at=KILL_AT),
            self.run(f"resumed_{backend}", backend, **options, model="other", resume=str(checkpoint)),
        ]

    def logs(self, name: str) -> list[dict[str, Any]]:
        """Of both ranks."""
        return [self.log(name), json.loads((self.root / name / "log_1.json").read_text())]


def reference(name: str) -> str:
    """The same in one process."""
    return f"{name.split('_')[0]}_one"


@pytest.fixture(scope="module")
def two(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
) -> Workplace:
    """All runs, those of one process among them."""
    place = Workplace(tmp_path_factory.mktemp("lightning"))
    # Weights so large that greedy completions differ in length and in reward, and such that the first of one rank are
    # longer than those of the other.
    for name, seed in {"tied": 6, "untied": 1, "other": 2}.items():
        model = tiny_model(seed, initializer_range=0.2, tie_word_embeddings=name != "untied")
        model.save_pretrained(place.root / name)
        tokenizer.save_pretrained(place.root / name)
    runs = [place.run(f"{case}_one", "one", **options) for case, options in CASES.items()]
    runs.append(place.run("half_one", "one", **HALF))
    for case, backends in BACKENDS.items():
        for backend in backends:
            saved = {"checkpoint": STEPS, "save": True} if case == "critic" else {}
            runs.append(place.run(f"{case}_{backend}", backend, **CASES[case], **saved))
    runs.append(place.run("half_zero2", "zero2", **{**HALF, "args": {"precision": "bf16-true"}}))
    for backend in RESUMED:
        runs += place.killed(backend)
    for name, options in WINDOWS.items():
        sliced = {} if name == "windowsft" else {"steps_per_generation": ACCUMULATE}
        args = {"max_steps": WINDOW_STEPS, "accumulate_grad_batches": ACCUMULATE}
        cut = {**options, "module": {**options["module"], **sliced}, "args": args}
        whole = {**options, "args": {"max_steps": WINDOW_STEPS}, "batch": 8}
        runs.append(place.run(f"{name}_one", "one", **whole))
        size = 2 if name == "windowsft" else 4
        runs += [place.run(f"{name}_{backend}", backend, **cut, batch=size) for backend in WINDOW_BACKENDS[name]]
    place.start(runs, ranks=1)  # the worker starts the others
    return place


def assert_close(mine: list[dict[str, float]], other: list[dict[str, float]], bound: float) -> None:
    """The same numbers at every training step."""
    assert len(mine) == len(other) > 0
    for i, (a, b) in enumerate(zip(mine, other, strict=True)):
        assert a.keys() == b.keys()
        gaps = {name: abs(a[name] - b[name]) for name in a}
        # Within an accumulation window nothing is logged.
        assert max(gaps.values(), default=0.0) < bound, (i, max(gaps, key=lambda name: gaps[name]), max(gaps.values()))


def by_prompt(log: dict[str, Any]) -> list[dict[str, list[int]]]:
    """Completions of every rollout."""
    return [dict(zip(*rollout, strict=True)) for rollout in log["rollouts"]]


@pytest.mark.parametrize("name", NAMES)
class TestTwoRanksEqualOneProcess:
    def test_losses(self, two: Workplace, name: str) -> None:
        """The mean over ranks is the loss of the global batch, at every training step."""
        ranks = torch.tensor([log["losses"] for log in two.logs(name)], dtype=torch.float64)
        expected = torch.tensor(two.log(reference(name))["losses"], dtype=torch.float64)
        assert len(expected) == STEPS == len(expected.unique())
        assert (ranks.mean(0) - expected).abs().max() < 5e-6
        assert (ranks[0] - ranks[1]).abs().max() > 1e-2  # each had rows of its own

    def test_metrics(self, two: Workplace, name: str) -> None:
        first, second = (log["metrics"] for log in two.logs(name))
        assert first == second
        assert_close(first, two.log(reference(name))["metrics"], 1e-5)
        assert {"loss", "mtp/token_loss" if "sft" in name else "reward"} <= first[-1].keys()
        assert ("eval_reward" in first[-1]) == ("ppo" in name)

    def test_gradient_norms(self, two: Workplace, name: str) -> None:
        """AdamW does not see the scale of gradients. Lightning divides by the number of micro-batches, and DeepSpeed
        once more, which the module undoes."""
        found = torch.tensor([log["norms"] for log in two.logs(name)])
        expected = torch.tensor(two.log(reference(name))["norms"])
        assert torch.equal(found[0], found[1]) and expected.max() > CLIP
        torch.testing.assert_close(found[0], expected, atol=0.0, rtol=1e-5)

    def test_weights(self, two: Workplace, name: str) -> None:
        first, second = (two.tensors(name, "weights", rank) for rank in (0, 1))
        assert gap(first, second) == 0.0
        # AdamW's first steps are of one length, and make much of rounding errors where a gradient is next to nothing.
        assert gap(first, two.tensors(reference(name), "weights")) < 1e-4
        with safe_open(two.root / name / "weights_0.safetensors", "pt") as file:
            assert file.metadata()["sharded"] == str(name.endswith("zero3"))


@pytest.mark.parametrize("name", [name for name in NAMES if name.split("_")[0] not in ("grpo", "ppo", "process")])
def test_polyak_targets_equal_those_of_one_process(two: Workplace, name: str) -> None:
    two.log(name)
    first, second = (two.tensors(name, "target", rank) for rank in (0, 1))
    assert gap(first, second) == 0.0
    assert gap(first, two.tensors(reference(name), "target")) < 1e-5  # a fifth of what AdamW makes of the weights
    path = "mtp_heads.value_heads." if name.startswith("sequential") else "mtp_heads."  # what makes the values
    heads = {f"heads.{key.split(path)[1]}": x for key, x in two.tensors(name, "weights").items() if path in key}
    assert gap(first, heads) > 1e-4


@pytest.mark.parametrize("backend", ["ddp", "zero3"])
def test_ranks_stop_generating_at_different_lengths(two: Workplace, backend: str) -> None:
    """Under ZeRO-3 the rank that is done goes on with the other, or both would wait for ever."""
    ranks = [by_prompt(log) for log in two.logs(f"critic_{backend}")]
    expected = by_prompt(two.log("critic_one"))
    assert [first | second for first, second in zip(*ranks, strict=True)] == expected
    longest = [[max(map(len, rollout.values())) for rollout in rank] for rank in ranks]
    assert longest[0] != longest[1]


@pytest.mark.parametrize("name", ["steps_zero2", "process_ddp", "episodes_ddp", "episodes_zero3"])
def test_steps_are_paid(two: Workplace, name: str) -> None:
    assert all(step["step_rewards/before_end"] > 0.1 for step in two.log(name)["metrics"])
    if name.startswith("episodes"):
        two.assert_ranks_play_apart(name, rows=BATCH // 2)
        return
    first, second = ([max(map(len, made)) for _, made in log["rollouts"]] for log in two.logs(name))
    assert first != second  # the ranks pad to different widths


@pytest.mark.parametrize("name", [f"{case}_{backend}" for case in WINDOWS for backend in WINDOW_BACKENDS[case]])
class TestTwoRanksWithTwoMicroBatchesEqualOneBatch:
    def test_gradient_norms_and_weights(self, two: Workplace, name: str) -> None:
        first, second = two.logs(name)
        expected = torch.tensor(two.log(reference(name))["norms"])
        assert first["norms"] == second["norms"] and len(expected) == WINDOW_STEPS
        torch.testing.assert_close(torch.tensor(first["norms"]), expected, atol=0.0, rtol=2e-6)
        ours, theirs = two.tensors(name, "weights"), two.tensors(reference(name), "weights")
        assert gap(ours, theirs) < 5e-5  # AdamW makes much of rounding errors where a gradient is next to nothing

    def test_numbers_are_those_of_the_window(self, two: Workplace, name: str) -> None:
        ours = two.log(name)["metrics"][ACCUMULATE - 1 :: ACCUMULATE]
        theirs = two.log(reference(name))["metrics"]
        assert len(ours) == len(theirs) == WINDOW_STEPS
        means = {n for n in theirs[0] if not any(part in n for part in ("std", "explained", "terminated"))}
        assert {"loss", "mtp/token_loss/head_2", "critic/grad_norm", "critic/value_loss"} <= means
        assert_close(*([{n: row[n] for n in means} for row in rows] for rows in (ours, theirs)), 1e-5)


def test_gradient_clamp_acts(two: Workplace) -> None:
    """Its limit follows the loss, which one host divides more often than the other."""
    for name in ("accumulate_one", "accumulate_zero2"):
        assert 0.0 < two.log(name)["metrics"][-1]["critic/grad_clamped"] < 1.0


class TestBfloat16:
    def test_losses(self, two: Workplace) -> None:
        ranks = torch.tensor([log["losses"] for log in two.logs("half_zero2")], dtype=torch.float64)
        expected = torch.tensor(two.log("half_one")["losses"], dtype=torch.float64)
        assert ranks.isfinite().all() and len(expected) == STEPS
        assert (ranks.mean(0) - expected).abs().max() < 2e-3
        assert (expected - expected.mean()).abs().max() > 1e-2

    def test_slow_heads_are_float32(self, two: Workplace) -> None:
        two.log("half_zero2")
        assert {x.dtype for x in two.tensors("half_zero2", "weights").values()} == {torch.bfloat16}
        target = two.tensors("half_zero2", "target")
        assert {x.dtype for x in target.values()} == {torch.float32}
        assert gap(target, two.tensors("half_one", "target")) < 1e-3
        # Steps that bfloat16 would have rounded away.
        assert any(not torch.equal(x, x.bfloat16().float()) for x in target.values())


@pytest.mark.parametrize("backend", RESUMED)
class TestResume:
    def test_goes_on_as_if_not_killed(self, two: Workplace, backend: str) -> None:
        whole, resumed = two.logs(f"whole_{backend}"), two.logs(f"resumed_{backend}")
        for mine, other in zip(resumed, whole, strict=True):
            assert len(other["losses"]) == 5 and len(other["rollouts"]) == 2
            for what in ("losses", "metrics", "norms"):
                assert mine[what] == other[what][CHECKPOINT:]
            assert mine["rollouts"] == other["rollouts"][1:]
        for what in ("weights", "target"):
            for rank in (0, 1):
                found, expected = (two.tensors(f"{run}_{backend}", what, rank) for run in ("resumed", "whole"))
                assert gap(found, expected) == 0.0

    def test_was_killed(self, two: Workplace, backend: str) -> None:
        killed = two.root / f"killed_{backend}"
        assert (killed / f"step={CHECKPOINT}.ckpt").exists()
        assert not list(killed.glob("*.json")) and not list(killed.glob("error_*"))


def test_checkpoint_fell_between_two_rollouts(two: Workplace) -> None:
    file = two.root / "killed_ddp" / f"step={CHECKPOINT}.ckpt"
    states = torch.load(file, weights_only=True)["rl_plugins"]["ranks"]
    assert [state["position"] for state in states] == [CHECKPOINT, CHECKPOINT]
    assert all(len(state["slices"]) == 2 for state in states)
    assert not torch.equal(states[0]["cpu_rng"], states[1]["cpu_rng"])


def assert_has_weights(model: torch.nn.Module, expected: dict[str, Tensor]) -> None:
    found = {f"model.{name}": x.detach() for name, x in model.named_parameters()}
    assert found.keys() == expected.keys() and gap(found, expected) == 0.0


@pytest.mark.parametrize("name", SHARDED)
def test_checkpoint_converts_to_plain_weights(two: Workplace, name: str, tmp_path: Path) -> None:
    two.log(name)
    checkpoint, file = two.root / name / f"step={STEPS}.ckpt", tmp_path / "plain.ckpt"
    convert_zero_checkpoint_to_fp32_state_dict(checkpoint, file)
    module = MTPCriticModule(str(two.root / "other"), reward_funcs=lambda **kwargs: [], num_mtp_heads=2)
    module.load_state_dict(torch.load(file, weights_only=True)["state_dict"])
    assert_has_weights(module.model, two.tensors(name, "weights"))


@pytest.mark.parametrize("name", ["critic_ddp", "critic_zero3"])
def test_exported_model_is_whole(two: Workplace, name: str) -> None:
    two.log(name)
    final = two.root / name / "final"
    model, info = AutoModelForCausalLM.from_pretrained(final, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    load_mtp_heads(model, final)
    assert_has_weights(model, two.tensors(name, "weights"))
