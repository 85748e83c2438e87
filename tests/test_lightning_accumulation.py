"""Gradient accumulation in Lightning: 1 x 8, 4 x 2 and 8 x 1 rows of different lengths are one and the same step."""

import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from rl_plugins.functional.policy_losses.aggregation import AGGREGATIONS
from rl_plugins.lightning import MoEBalancingCallback, MTPSFTModule
from rl_plugins.lightning.accumulation import Lookahead, WindowMeans, check_windows_fit
from rl_plugins.moe import find_routers
from rl_plugins.rollouts.completions import Completions, pad_left

from .helpers.lightning_runs import KINDS, Numbers, every_step, fit, module_factory, perturb
from .helpers.moe_models import make_moe_model
from .helpers.step_rewards import per_token

pytestmark = pytest.mark.filterwarnings(r"ignore:::lightning\.pytorch.*")
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

Make = Callable[..., Any]
CUTS = [(8, 1), (4, 2), (2, 4), (1, 8)]  # rows of a micro-batch, micro-batches


class Gradients(Callback):
    """The gradient of every optimizer step, before it is clipped."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        found = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}
        self.steps.append(found)


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To 1e-6 of the largest entry of each part of the model."""
    assert found.keys() == expected.keys()
    for part in ("mtp_heads", "value_model", ""):
        names = [n for n in expected if part in n and (part or not ("mtp_heads" in n or "value_model" in n))]
        if names:
            scale = max(expected[n].abs().max().item() for n in names)
            gap = max((found[n] - expected[n]).abs().max().item() for n in names)
            assert scale > 1e-4 and gap < 1e-6 * max(scale, 1.0), (part, gap, scale)


def texts(size: int = 8) -> list[dict[str, Any]]:
    """Rows whose completions have 1 to 11 characters."""
    return [
        {"prompt": f"{i}+{i}=", "completion": "123456789+="[: 1 + (i * 7) % 11], "reward": (i % 5) / 4}
        for i in range(size)
    ]


def listed(rows: list[Any], size: int) -> DataLoader:
    return DataLoader(rows, batch_size=size, collate_fn=list)


@pytest.fixture
def make(tiny_model: Callable[..., Any], tokenizer: Any, reward: Any) -> Make:
    """Factory: a module on a tiny model whose heads and policy stand anywhere; keywords go to the module."""
    factory = module_factory(tiny_model, tokenizer, reward)

    def moved(kind: str, *args: Any, **options: Any) -> Any:
        if kind == "critic":  # the token loss at all tokens, because every micro-batch draws its own
            options = {"mtp_loss_share": 1.0, **options}
        module = factory(kind, *args, cls=scripted(kind), **options)
        perturb(module)
        return module

    return moved


def scripted(kind: str) -> Any:
    """Completions of 1 to 7 tokens, which depend on the prompt and the place in the group alone."""

    class Scripted(KINDS[kind]):  # type: ignore[misc]
        def generate(self, prompts: Any) -> Completions:
            ids, mask = pad_left(self.tokenizer(text=list(prompts))["input_ids"], 0, "cpu")
            rows = []
            for i, prompt in enumerate(prompts):
                dice = sum(ord(c) * 31**k for k, c in enumerate(prompt)) + i % self.num_generations
                length = 1 + dice % 7
                rows.append([2 + (dice * (k + 3)) % 14 for k in range(length)])
            backwards, backward_mask = pad_left([row[::-1] for row in rows], 0, "cpu")
            ended = torch.tensor([len(row) < 7 for row in rows])
            return Completions(ids, mask, backwards.flip(1), backward_mask.flip(1), ended)

    return KINDS[kind] if kind == "sft" else Scripted


def step(module: Any, data: Any, *callbacks: Callback, **options: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradient and numbers of the first optimizer step."""
    gradients, numbers = Gradients(), Numbers()
    fit(module, data, gradients, numbers, *callbacks, **{"max_steps": 1, **options})
    return gradients.steps[0], numbers.rows[-1]


def assert_same_step(
    found: tuple[dict[str, Tensor], dict[str, float]], expected: tuple[dict[str, Tensor], dict[str, float]]
) -> None:
    assert_same_gradients(found[0], expected[0])
    # What is no mean over tokens or rows: an average of micro-batches at most.
    skipped = ("std", "explained", "terminated", "zero_std", "before_end")
    assert found[1].keys() >= {"loss"}
    for name in found[1].keys() & expected[1].keys():
        if not any(part in name for part in skipped):
            assert found[1][name] == pytest.approx(expected[1][name], rel=2e-5, abs=2e-6), name


# Supervised fine-tuning

SFTS: dict[str, dict[str, Any]] = {
    "rewards": {"value_grad_clip": 0.3, "mtp_detach_trunk": False, "mtp_loss_coef": 0.3},
    "td": {"advantage_estimator": "td", "gamma": 0.9, "num_mtp_heads": 3, "value_loss_type": "huber"},
    "tokens": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SFTS)
def test_supervised_fine_tuning(make: Make, name: str) -> None:
    rows = texts()
    if name == "tokens":
        rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]
    expected = step(make("sft", **SFTS[name]), listed(rows, 8))
    if name == "rewards":
        assert 0.0 < expected[1]["critic/grad_clamped"] < 1.0
    for size, number in CUTS[1:]:
        assert_same_step(step(make("sft", **SFTS[name]), listed(rows, size), accumulate_grad_batches=number), expected)


@pytest.mark.slow
def test_sequential_heads(tokenizer: Any) -> None:
    rows = texts()

    def module() -> MTPSFTModule:
        model = make_moe_model("deepseek_v3")
        options = {"mtp_head_type": "sequential", "num_mtp_heads": 2, "lr_scheduler_type": "constant"}
        found = MTPSFTModule(model, tokenizer, **options)
        perturb(found)
        return found

    expected = step(module(), listed(rows, 8))
    assert {"mtp/token_loss/head_2", "critic/value_loss/head_2"} <= expected[1].keys()
    for size, number in CUTS[1::2]:
        assert_same_step(step(module(), listed(rows, size), accumulate_grad_batches=number), expected)


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Rows without a length."""

    def __iter__(self) -> Iterator[Any]:
        yield from texts(7)


@pytest.mark.slow
def test_the_last_window_of_an_epoch_is_short(make: Make) -> None:
    """Seven rows in windows of four and three, in a loader with a length, one without, and a limited one."""
    rows = texts(7)
    whole = DataLoader(rows, batch_sampler=[[0, 1, 2, 3], [4, 5, 6]], collate_fn=list)
    gradients = Gradients()
    fit(make("sft"), whole, gradients, max_epochs=1)
    for data, options in (
        (listed(rows, 1), {}),
        (DataLoader(Stream(), batch_size=1, collate_fn=list), {}),
        (listed(texts(12), 1), {"limit_train_batches": 7}),
    ):
        found = Gradients()
        fit(make("sft"), data, found, max_epochs=1, accumulate_grad_batches=4, **options)
        assert len(found.steps) == 2
        assert_same_gradients(found.steps[0], gradients.steps[0])
        assert_same_gradients(found.steps[1], gradients.steps[1])


def test_rows_of_a_short_micro_batch_weigh_as_the_others(make: Make) -> None:
    """Micro-batches of two rows and of one, where the loss is a mean over rows."""
    rows = [{"prompt": row["prompt"]} for row in texts(5)]
    options: dict[str, Any] = {"policy_loss": "grpo", "beta": 0.1, "advantage": "group_centered"}
    expected = step(make("grpo", **options), listed(rows, 5))
    assert_same_step(step(make("grpo", **options), listed(rows, 2), accumulate_grad_batches=3), expected)


@pytest.mark.slow
def test_accumulation_on_a_schedule(make: Make) -> None:
    """One batch of eight in the first epoch, and eight of one in windows of 8 from the second on."""
    gradients, found = Gradients(), Gradients()
    fit(make("sft"), listed(texts(), 8), gradients, max_epochs=2)
    sizes = DataLoader(texts(), batch_sampler=Batches(), collate_fn=list)
    fit(
        make("sft"), sizes, found, GradientAccumulationScheduler({0: 1, 1: 8}), max_epochs=2,
        reload_dataloaders_every_n_epochs=1,
    )  # fmt: skip
    assert len(found.steps) == 2
    for ours, theirs in zip(found.steps, gradients.steps, strict=True):
        assert_same_gradients(ours, theirs)


class Batches:
    """All of eight rows at once in the first epoch, one by one in the second."""

    def __init__(self) -> None:
        self.epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 8 if self.epoch > 0 else 1

    def __iter__(self) -> Iterator[list[int]]:
        yield from [[i] for i in range(8)] if self.epoch > 0 else [list(range(8))]


# Online


def prompts(size: int = 8) -> list[dict[str, Any]]:
    return [{"prompt": row["prompt"]} for row in texts(size)]


def assert_all_cuts_agree(make: Make, kind: str, slices_only: bool = False, **options: Any) -> dict[str, float]:
    """One rollout of eight prompts in slices, and small rollouts that share an optimizer step."""
    options = {"max_completion_length": 7, **options}
    expected = step(make(kind, **options), Repeated(prompts(), 8, options.get("num_iterations", 1)))
    for size, number in CUTS[1:]:
        loader = Repeated(prompts(), 8, number * options.get("num_iterations", 1))
        slices = make(kind, **{**options, "steps_per_generation": number})
        assert_same_step(step(slices, loader, accumulate_grad_batches=number), expected)
        if not slices_only:
            rollouts = make(kind, **options)
            loader = Repeated(prompts(), size, options.get("num_iterations", 1))
            assert_same_step(step(rollouts, loader, accumulate_grad_batches=number), expected)
    return expected[1]


class Repeated:
    """Batches of rows in order, each several times."""

    def __init__(self, rows: list[Any], size: int, repeats: int) -> None:
        self.batches = [rows[i : i + size] for i in range(0, len(rows), size) for _ in range(repeats)]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


LOSSES = {"token": "dapo", "sequence": "grpo", "constant": "dr_grpo", "sequence_sum": "grpo"}


@pytest.mark.slow
@pytest.mark.parametrize("aggregation", [name for name in AGGREGATIONS if name != "micro_batch"])
def test_every_aggregation(make: Make, aggregation: str) -> None:
    """All but the one that averages micro-batches by definition; with KL and entropy."""
    loss = LOSSES.get(aggregation, "grpo")
    options: dict[str, Any] = {"policy_loss": loss, "aggregation": aggregation, "beta": 0.2, "entropy_coef": 0.1}
    numbers = assert_all_cuts_agree(make, "grpo", advantage="group_centered", **options)
    assert {"kl", "entropy", "reward"} <= numbers.keys()


@pytest.mark.slow
def test_micro_batches_are_averaged_where_the_aggregation_says_so(make: Make) -> None:
    """`micro_batch` depends on the cut by its definition: the mean of the micro-batches' own means, of as many as the
    window has."""
    options: dict[str, Any] = {"policy_loss": "bnpo", "advantage": "group_centered", "num_generations": 2}
    singles = [step(make("grpo", **options), listed(prompts()[i : i + 1], 1))[0] for i in range(3)]
    expected = {name: sum(part[name] for part in singles) / 3 for name in singles[0]}
    gradients = Gradients()
    fit(make("grpo", **options), listed(prompts(3), 1), gradients, max_epochs=1, accumulate_grad_batches=4)
    assert_same_gradients(gradients.steps[0], expected)


CRITICS: dict[str, dict[str, Any]] = {
    "defaults": {"mtp_detach_trunk": False},
    "kl": {"beta": 0.2, "entropy_coef": 0.1, "value_loss_type": "huber", "policy_loss": "grpo"},
    "kl_in_reward": {
        "beta": 0.2,
        "kl_in_reward": True,
        "value_grad_clip": 0.3,
        "advantage_scaling": "none",
        "calibrate_values": False,
    },
    "steps": {
        "reward_funcs": per_token,
        "bootstrap_truncated": True,
        "advantage_scaling": "none",
        "calibrate_values": False,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CRITICS)
def test_critic(make: Make, name: str) -> None:
    """Advantages that are whitened, and values that are calibrated, over a rollout depend on the rollout."""
    whitened = "advantage_scaling" not in CRITICS[name]
    numbers = assert_all_cuts_agree(make, "critic", slices_only=whitened, **CRITICS[name])
    assert {"critic/value_loss/head_2", "mtp/token_loss/head_2"} <= numbers.keys()
    assert ("step_rewards/before_end" in numbers) == (name == "steps")
    if name == "kl_in_reward":
        assert 0.0 < numbers["critic/grad_clamped"] < 1.0


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"beta": 0.1}, {"beta": 0.0, "entropy_coef": 0.1, "num_iterations": 2}])
def test_ppo(make: Make, options: dict[str, Any]) -> None:
    """With two passes over each batch a window would hold both passes over small rollouts."""
    passes = options.get("num_iterations", 1)
    options = {"num_iterations": 1, "advantage_scaling": "none", **options}
    assert_all_cuts_agree(make, "ppo", slices_only=passes > 1, **options)


@pytest.mark.slow
def test_reinforce_with_a_penalty_per_token(make: Make) -> None:
    options = {"policy_loss": "ppo_clip", "advantage": "batch_normalized", "beta": 0.2, "kl_in_reward": True}
    assert_all_cuts_agree(make, "grpo", slices_only=True, **options)


@pytest.mark.slow
def test_steps_compared_in_a_group(make: Make) -> None:
    numbers = assert_all_cuts_agree(make, "grpo", advantage="process_normalized", reward_funcs=per_token)
    assert numbers["step_rewards/before_end"] > 0.1


@pytest.mark.slow
def test_heads_that_draft(make: Make) -> None:
    options = {"policy_loss": "dapo", "advantage": "reward", "num_generations": 1, "speculative": True}
    numbers = assert_all_cuts_agree(make, "grpo", **options, mtp_detach_trunk=False, mtp_loss_share=1.0)
    assert "mtp/token_loss/head_1" in numbers


def test_a_window_ends_inside_a_rollout(make: Make) -> None:
    """Windows of three over rollouts of two slices: a rollout begins in one and ends in the next."""
    module = make("grpo", policy_loss="grpo", advantage="group_centered", steps_per_generation=2)
    gradients, seen = Gradients(), []
    kept = module.rollout
    module.rollout = lambda rows: (seen.append(rows), kept(rows))[1]
    fit(module, Repeated(prompts(), 2, 2), gradients, max_epochs=1, accumulate_grad_batches=3)
    assert len(gradients.steps) == 3 and len(seen) == 4 and not module._queue


# Losses of routers


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sequence", "z"])
def test_router_losses(tokenizer: Any, kind: str) -> None:
    """The z-loss is a mean over tokens, DeepSeek-V3's loss one over sequences."""
    losses: dict[str, Any] = {
        "z": {"z_loss_coef": 0.5},
        "sequence": {"aux_loss_coef": 5.0, "aux_loss_type": "sequence"},
    }
    rows = [{"prompt": "", "completion": row["completion"]} for row in texts()]

    def run(size: int, number: int, **options: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
        model = make_moe_model("qwen3_moe")
        module = MTPSFTModule(model, tokenizer, lr_scheduler_type="constant", completion_only=False)
        balancing = MoEBalancingCallback(rate=0.0, record_load=False, count_only=not options, **options)
        return step(module, listed(rows, size), balancing, accumulate_grad_batches=number)

    expected, plain = run(8, 1, **losses[kind]), run(8, 1)
    assert max((expected[0][n] - plain[0][n]).abs().max() for n in plain[0]) > 1e-3
    for size, number in CUTS[1:]:
        assert_same_step(run(size, number, **losses[kind]), expected)


# Subclasses, and what does not fit


@pytest.mark.slow
def test_a_training_step_of_ones_own(tiny_model: Callable[..., Any], tokenizer: Any) -> None:
    class Mine(MTPSFTModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss, _ = self.loss(self.tensors(batch))
            return loss

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [{**row, "completion": row["completion"][1:] or "0"} for row in batch]

    def run(size: int, number: int) -> dict[str, Tensor]:
        module = Mine(tiny_model(initializer_range=0.2), tokenizer, lr_scheduler_type="constant")
        perturb(module)
        gradients = Gradients()
        fit(module, listed(texts(), size), gradients, max_steps=1, accumulate_grad_batches=number)
        return gradients.steps[0]

    expected = run(8, 1)
    for size, number in CUTS[1:]:
        assert_same_gradients(run(size, number), expected)


def test_batches_that_change_after_they_were_counted(make: Make) -> None:
    class Cut(MTPSFTModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step([{**row, "completion": "1"} for row in batch], batch_idx)

    module = make("sft")
    module.__class__ = Cut
    with pytest.raises(ValueError, match=r"This micro-batch has \[2\.0.* tokens and rows, but had .* began"):
        fit(module, listed(texts(), 1), max_steps=1, accumulate_grad_batches=8)
    other = make("grpo")
    kept = other.training_step
    other.training_step = lambda batch, batch_idx: kept([{"prompt": "1+1="}], batch_idx)
    with pytest.raises(ValueError, match="other prompts than when gradient accumulation began"):
        fit(other, listed(prompts(), 1), max_steps=1, accumulate_grad_batches=8)


@pytest.mark.parametrize(("batches", "epochs", "steps", "refused"), [
    (5, 2, -1, True), (5, 1, -1, False), (6, 2, -1, False), (5, -1, 2, False), (5, -1, 3, True),
    (math.inf, 2, -1, False),
])  # fmt: skip
def test_deepspeed_carries_a_short_window_over(batches: Any, epochs: int, steps: int, refused: bool) -> None:
    strategy = SimpleNamespace(handles_gradient_accumulation=True)
    trainer: Any = SimpleNamespace(
        strategy=strategy, accumulate_grad_batches=2, num_training_batches=batches, max_epochs=epochs, max_steps=steps
    )
    if refused:
        with pytest.raises(ValueError, match=r"An epoch has 5 batches.*=2 does not divide.*limit_train_batches=4"):
            check_windows_fit(trainer)
    else:
        check_windows_fit(trainer)
    strategy.handles_gradient_accumulation = False
    check_windows_fit(trainer)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe"])
def test_bf16_true_routes_by_float32_biases(tokenizer: Any, family: str, tmp_path: Path) -> None:
    """At 5, steps of 1e-3 are none in bfloat16; a resumed run goes on with them."""

    def run(callback: MoEBalancingCallback, steps: int, ckpt_path: Any = None) -> MTPSFTModule:
        model = make_moe_model(family)
        for router in find_routers(model):
            with torch.no_grad():
                router.stored_bias.fill_(5.0)
        torch.manual_seed(0)
        module = MTPSFTModule(model, tokenizer, lr_scheduler_type="constant", mtp_loss_coef=0.0)
        rows = [{"prompt": "", "completion": row["completion"]} for row in texts()]
        options = {"precision": "bf16-true", "max_epochs": steps, "ckpt_path": ckpt_path}
        fit(module, listed(rows, 8), callback, every_step(tmp_path), **options)
        return module

    callback, again = (MoEBalancingCallback(rate=1e-3, record_load=False) for _ in range(2))
    module = run(callback, 4)
    for router, master in zip(find_routers(module.model), callback.state_dict()["biases"].values(), strict=True):
        assert router.stored_bias.dtype == torch.bfloat16 and router.bias.dtype == torch.float32
        assert torch.equal(router.bias.reshape(-1), master) and 0.0 < (master - 5.0).abs().max() < 1e-2
    run(again, 4, ckpt_path=tmp_path / "step=2.ckpt")
    for ours, theirs in zip(
        again.state_dict()["biases"].values(), callback.state_dict()["biases"].values(), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_looking_ahead_leaves_nothing_out() -> None:
    ahead = Lookahead(iter(range(6)))
    assert next(ahead) == 0 and ahead.peek(2) == [1, 2] and ahead.peek(3) == [1, 2, 3]
    assert [next(ahead), next(ahead)] == [1, 2] and ahead.peek(9) == [3, 4, 5]
    assert list(ahead) == [3, 4, 5] and ahead.peek(1) == []


def test_means_of_a_window_by_hand() -> None:
    means = WindowMeans()
    three, one = torch.tensor(3.0), torch.tensor(1.0)
    means.add({"a": one * 2, "b": one, "x/min_length": one * 4}, {"b": torch.tensor(0.0)}, three)
    means.add({"a": one * 6, "b": one * 5, "c": one * torch.nan, "x/min_length": one * 2}, {}, one)
    found = {name: float(value) for name, value in means.flush().items()}
    assert (found["a"], found["b"], found["x/min_length"]) == ((2 * 3 + 6) / 4, 5.0, 2.0)
    assert found["c"] != found["c"]
    means.add({"a": one}, {}, one)
    assert means.flush() == {"a": one}
