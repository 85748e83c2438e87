"""`GRPOVariantTrainer` on a tiny model: advantages, sampling, tracker and replay by their numbers."""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from rl_plugins.functional.advantages import group as pure
from rl_plugins.functional.advantages.traces import lambda_trace
from rl_plugins.functional.advantages.tracked import forget_factor
from rl_plugins.functional.policy_losses.aggregation import AGGREGATIONS
from rl_plugins.functional.policy_losses.gvpo import gvpo
from rl_plugins.functional.rewards import overlong_penalty
from rl_plugins.rollouts.batch import loss_mask
from rl_plugins.signals import sampling as module
from rl_plugins.signals.advantages import ADVANTAGES, advantages_of
from rl_plugins.signals.presets import GRPO_PRESETS
from rl_plugins.signals.signals import GroupSignal
from rl_plugins.signals.value_tracker import prompt_key
from rl_plugins.trl import GRPOVariantConfig, GRPOVariantTrainer

from .helpers.tiny import ON_CPU

Make = Callable[..., GRPOVariantTrainer]
Batch = dict[str, Any]
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
NAN = math.nan
QUICK: dict[str, Any] = {
    **ON_CPU,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 6,
    "max_steps": 2,
    "logging_steps": 1,
    "learning_rate": 1e-3,
}
# What the presets set only where the user has not.
GENERATIONS = {name: {"num_generations": 1} for name in ("reinforce++", "spo")} | {"pass_at_k": {"num_generations": 8}}
OPTIONS: dict[str, dict[str, Any]] = {"pass_at_k": {"k": 2}, "lambda_trace": {"lam": 0.9, "style": "both"}}


def spread(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """In [0, 1), different for nearly any two completions."""
    return [sum((k + 1) * (i + 3) ** 2 for k, i in enumerate(ids)) % 97 / 97 for ids in completion_ids]


def patchy(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """As `spread`, but unscorable for some completions, in each of the ways there are."""
    holes = {2: None, 5: NAN, 8: math.inf, 11: -math.inf}
    return [holes.get(ids[0], value) for ids, value in zip(completion_ids, spread(completion_ids), strict=True)]


def number(prompt: str) -> int:
    return int(prompt.split("+")[0])


def from_ten(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Uniform for the short prompts, those of one digit."""
    rewards = spread(completion_ids)
    return [r if number(p) >= 10 else 0.5 for p, r in zip(prompts, rewards, strict=True)]


def constant(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [0.25] * len(completion_ids)


def right_half(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Differs within every third prompt only."""
    rewards = spread(completion_ids)
    return [r if number(p) % 3 == 0 else 1.0 for p, r in zip(prompts, rewards, strict=True)]


@pytest.fixture
def make(
    tiny_model: Callable[..., Any], tokenizer: Any, dataset: Dataset, tmp_path: Path
) -> Callable[..., GRPOVariantTrainer]:
    """Factory: a trainer on a tiny model; keywords go to the config. `beta` gets a reference by path."""

    def factory(
        model: Any = None,
        reward_funcs: Any = spread,
        output_dir: str = "run",
        train_dataset: Any = dataset,
        eval_dataset: Any = None,
        processing_class: Any = tokenizer,
        peft_config: Any = None,
        reward_processing_classes: Any = None,
        **options: Any,
    ) -> GRPOVariantTrainer:
        args = GRPOVariantConfig(
            **{
                "output_dir": str(tmp_path / output_dir),
                **QUICK,
                **GENERATIONS.get(options.get("preset", ""), {}),
                **options,
            }
        )
        if model is None:
            model = tiny_model()
            if args.beta and peft_config is None:
                path = tmp_path / "model"
                model.save_pretrained(path)
                tokenizer.save_pretrained(path)
                model = str(path)
        return GRPOVariantTrainer(
            model,
            reward_funcs,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            reward_processing_classes=reward_processing_classes,
        )

    return factory


def rows_of(dataset: Any, first: int, rows: int, group: int) -> list[dict[str, Any]]:
    """`rows` inputs as TRL's sampler gives them: each prompt `group` times."""
    return [dict(dataset[first + i // group]) for i in range(rows)]


def generate(trainer: GRPOVariantTrainer, first: int = 0, rows: int = 8, seed: int = 0, train: bool = True) -> Batch:
    """One batch, in the order of its prompts."""
    trainer.model.train(train)
    torch.manual_seed(seed)
    group = trainer.num_generations if train else trainer.num_generations_eval
    return trainer._generate_and_score_completions(rows_of(trainer.train_dataset, first, rows, group))


def ids_of(batch: Batch) -> list[list[int]]:
    return [
        ids[mask.bool()].tolist() for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    ]


def prompts_of(trainer: GRPOVariantTrainer, batch: Batch) -> list[str]:
    tokenizer: Any = trainer.processing_class
    return [
        tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
    ]


def weights(trainer: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def perturb(trainer: GRPOVariantTrainer, scale: float = 0.1, seed: int = 5) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=g))


def metrics(trainer: GRPOVariantTrainer, mode: str = "train") -> dict[str, list[float]]:
    return {name: list(values) for name, values in trainer._metrics[mode].items()}


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def equal(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


# Advantages


@pytest.mark.parametrize("reward", [spread, patchy], ids=["dense", "patchy"])
@pytest.mark.parametrize("name", [name for name in ADVANTAGES if name != "value_tracker"])
def test_the_batch_has_the_functions_advantages(make: Make, name: str, reward: Any) -> None:
    options = OPTIONS.get(name, {})
    trainer = make(reward_funcs=reward, advantage=name, advantage_kwargs=options, per_device_train_batch_size=16)
    batch = generate(trainer, rows=16)
    scores = torch.tensor([NAN if r is None or math.isinf(r) else r for r in reward(ids_of(batch))])
    assert torch.equal(trainer._rewards[0].nan_to_num(7.0), scores.nan_to_num(7.0))  # type: ignore[union-attr]
    if reward is patchy:
        assert 0 < scores.isnan().sum() < 10
    mask = batch["completion_mask"].bool()
    expected = pure.group_normalized(scores, 4)
    if name == "lambda_trace":
        expected = lambda_trace(expected, mask, **options)
    elif name in ("process_normalized", "turn_normalized"):  # one reward at the end is one step, the last
        expected = expected.unsqueeze(1) * mask
    elif name == "reward_to_go":
        real = mask & ~scores.isnan().unsqueeze(1)
        expected = pure.batch_normalized(scores.unsqueeze(1).expand_as(mask), mask=real)
    else:
        expected = advantages_of(name, scores, 4, mask, options=options)
    equal(batch["advantages"], expected)
    assert batch["advantages"].dtype == torch.float32 and batch["advantages"].abs().max() > 0.1
    assert (batch["advantages"][scores.isnan()] == 0).all()
    assert not {"scores", "informative", "table_row"} & set(batch)
    assert (expected.ndim == 2) == ADVANTAGES[name].per_token
    table = torch.tensor(list(trainer._logs["advantages"])[-16:])
    per_row = expected if expected.ndim == 1 else (expected * mask).sum(1) / mask.sum(1)
    equal(table, per_row)


def partly(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    return [None if ids[0] in (2, 5, 8) else r for ids, r in zip(completion_ids, spread(completion_ids), strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "scale"),
    [("group_normalized", "group"), ("group_centered", "none"), ("group_centered_batch_scaled", "batch")],
)
def test_three_of_them_are_trls(make: Make, name: str, scale: str) -> None:
    for reward in (spread, partly):
        ours = generate(make(reward_funcs=reward, advantage=name), rows=16)
        trainer = make(reward_funcs=reward, scale_rewards=scale)
        theirs = generate(trainer, rows=16)
        assert ids_of(ours) == ids_of(theirs)
        torch.testing.assert_close(ours["advantages"], theirs["advantages"], rtol=1e-4, atol=1e-5)
        assert theirs["advantages"].abs().max() > 0.1


@pytest.mark.slow
def test_nothing_set_is_trl_bit_by_bit(
    make: Make, tiny_model: Callable[..., Any], tokenizer: Any, dataset: Dataset, tmp_path: Path
) -> None:
    for scale in ("group", "batch"):
        ours = make(max_steps=3, scale_rewards=scale, output_dir=f"ours-{scale}")
        before = weights(ours)
        ours.train()  # the seed is set where a trainer is made
        args = GRPOConfig(str(tmp_path / f"theirs-{scale}"), **{**QUICK, "max_steps": 3, "scale_rewards": scale})
        theirs = GRPOTrainer(tiny_model(), spread, args, train_dataset=dataset, processing_class=tokenizer)
        theirs.train()
        mine, other = weights(ours), weights(theirs)
        assert all(torch.equal(mine[name], other[name]) for name in mine)
        assert any(not torch.equal(mine[name], before[name]) for name in mine)
        assert logged(ours, "loss") == logged(theirs, "loss") and len(logged(ours, "loss")) == 3


@pytest.mark.slow
def test_the_grpo_preset_trains_like_trl(make: Make) -> None:
    # Not Adam, whose first steps are the signs of gradients, of which some are 0 but for rounding.
    options = {"max_steps": 3, "beta": 0.1, "optim": "sgd", "learning_rate": 0.5}
    ours = make(preset="grpo", output_dir="ours", **options)
    ours.train()
    theirs = make(loss_type="grpo", output_dir="theirs", **options)
    before = weights(theirs)
    theirs.train()
    after = weights(theirs)
    for name, value in weights(ours).items():
        torch.testing.assert_close(value, after[name], rtol=0, atol=1e-5)
    assert max((after[name] - before[name]).abs().max() for name in before) > 0.01
    assert logged(ours, "reward") == logged(theirs, "reward")
    assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), abs=1e-5)


def test_reward_weights_and_patches(make: Make) -> None:
    trainer = make(reward_funcs=[spread, partly, constant], reward_weights=[2.0, -0.5, 3.0], advantage="reward")
    batch = generate(trainer, rows=16)
    first, second = torch.tensor(spread(ids_of(batch))), partly(ids_of(batch))
    holes = torch.tensor([r is None for r in second])
    expected = 2.0 * first - 0.5 * torch.tensor([0.0 if r is None else r for r in second]) + 0.75
    assert 0 < holes.sum() < 16
    equal(batch["advantages"], expected)


@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize("name", ["group_normalized", "pass_at_k", "length_weighted", "kalman", "lambda_trace"])
def test_evaluation_with_another_number_of_completions(make: Make, name: str, size: int) -> None:
    options = OPTIONS.get(name, {})
    trainer = make(advantage=name, advantage_kwargs=options, num_generations_eval=size, per_device_eval_batch_size=8)
    batch = generate(trainer, rows=8, train=False)
    scores, mask = torch.tensor(spread(ids_of(batch))), batch["completion_mask"].bool()
    if name == "lambda_trace":
        expected = lambda_trace(pure.group_normalized(scores, size), mask, **options)
    else:
        expected = advantages_of(name, scores, size, mask, options=options)
    equal(batch["advantages"], expected)
    equal(
        torch.tensor(list(trainer._logs["advantages"])[-8:]),
        expected if expected.ndim == 1 else ((expected * mask).sum(1) / mask.sum(1)),
    )


@pytest.mark.slow
def test_evaluation_changes_no_state(make: Make, dataset: Dataset) -> None:
    sampling = {"dynamic_sampling": True, "replay_buffer_size": 4, "reject_uniform": True}
    common = {"num_generations_eval": 2, "per_device_eval_batch_size": 8, "eval_dataset": dataset.select(range(8))}
    trainer = make(reward_funcs=right_half, advantage="group_normalized", **sampling, **common)
    generate(trainer)
    assert trainer.replay_buffer is not None
    before = (len(trainer.replay_buffer), trainer.replay_buffer.generator.get_state())
    trainer.model.eval()
    found = trainer.evaluate()
    assert math.isfinite(found["eval_loss"]) and not any(key.startswith("eval_sampling") for key in found)
    assert len(trainer.replay_buffer) == before[0] > 0
    assert torch.equal(trainer.replay_buffer.generator.get_state(), before[1])

    spo = make(advantage="value_tracker", advantage_kwargs={"forget": 0.9}, num_generations=1, **common)
    generate(spo)
    pending = spo.signal.tracked.unabsorbed
    spo.model.eval()
    assert math.isfinite(spo.evaluate()["eval_loss"])
    assert spo.signal.tracked.unabsorbed is pending and pending is not None
    assert spo.value_tracker is not None and len(spo.value_tracker) == 0


# KL in the reward


def test_kl_in_the_reward_by_hand(make: Make) -> None:
    trainer = make(preset="reinforce++", beta=0.3, reward_funcs=patchy)
    assert trainer.num_generations == 1
    perturb(trainer)
    batch = generate(trainer, rows=16)
    logps, ref, mask = batch["old_per_token_logps"], batch["ref_per_token_logps"], batch["completion_mask"]
    equal(logps, trainer.log_probs(batch))
    scores = [NAN if r is None or math.isinf(r) else r for r in patchy(ids_of(batch))]
    returns = torch.full(mask.shape, NAN, dtype=torch.float64)
    kl: list[float] = []
    for i, score in enumerate(scores):
        if math.isnan(score):
            continue
        left = score
        for t in reversed(range(int(mask[i].sum()))):
            gap = (logps[i, t] - ref[i, t]).item()
            left -= 0.3 * gap
            kl.append(gap)
            returns[i, t] = left
    real = returns[~returns.isnan()]
    expected = ((returns - real.mean()) / real.std(correction=0)).nan_to_num(0.0).float()
    torch.testing.assert_close(batch["advantages"], expected, rtol=1e-4, atol=1e-4)
    assert 0 < sum(map(math.isnan, scores)) < 16 and max(map(abs, kl)) > 0.1
    assert metrics(trainer)["kl"][-1] == pytest.approx(sum(kl) / len(kl), abs=1e-5)


def test_rejected_groups_are_out_of_the_statistics_of_tokens(make: Make) -> None:
    options = {"advantage": "batch_normalized", "kl_in_reward": True, "beta": 0.3}
    trainer = make(reward_funcs=right_half, reject_uniform=True, **options)
    perturb(trainer)
    batch = generate(trainer, first=2, rows=16)  # of 2, 3, 4, 5 only 3 stays
    kept, mask = batch["advantages"][4:8], batch["completion_mask"][4:8].bool()
    assert kept[mask].mean().item() == pytest.approx(0.0, abs=1e-5)
    assert kept[mask].std(correction=0).item() == pytest.approx(1.0, abs=1e-4)
    assert batch["advantages"].abs().sum().item() == pytest.approx(kept[mask].abs().sum().item())
    gap = (batch["old_per_token_logps"] - batch["ref_per_token_logps"])[4:8][mask].mean().item()
    assert metrics(trainer)["kl"][-1] == pytest.approx(gap, abs=1e-5)


def test_kl_in_the_reward_is_not_in_the_loss_too(make: Make) -> None:
    trainer = make(preset="reinforce++", beta=0.3)
    perturb(trainer)
    batch = generate(trainer)
    trainer.current_gradient_accumulation_steps = 1
    count = len(metrics(trainer)["kl"])
    loss = trainer._compute_loss(trainer.model, {**batch, "advantages": torch.zeros_like(batch["advantages"])})
    assert loss.item() == 0.0 and trainer.beta == 0.3
    assert len(metrics(trainer)["kl"]) == count
    trainer.signal = GroupSignal(dataclasses.replace(trainer.signal.options, kl_in_reward=False))
    assert trainer._compute_loss(trainer.model, {**batch, "advantages": batch["advantages"] * 0}).item() > 0.01


# Dynamic sampling


def whole_groups(trainer: GRPOVariantTrainer, batch: Batch) -> list[str]:
    """The prompt of each group; the rows of a group share it."""
    prompts = prompts_of(trainer, batch)
    size = trainer.num_generations
    for i in range(0, len(prompts), size):
        assert len(set(prompts[i : i + size])) == 1
    return prompts[::size]


MIXED = {"steps_per_generation": 2, "gradient_accumulation_steps": 1}  # logps of the sampler are kept


def assert_aligned(trainer: GRPOVariantTrainer, batch: Batch, *, old: bool = True) -> None:
    """Log-probabilities belong to the tokens beside them: those of both models, computed again."""
    real = loss_mask(batch).bool()
    assert real.any() and not real.all()
    if old:
        torch.testing.assert_close(
            batch["old_per_token_logps"][real], trainer.log_probs(batch)[real], rtol=1e-4, atol=1e-5
        )
    if "ref_per_token_logps" in batch:
        with torch.no_grad():
            ref = trainer._pass(trainer.ref_model, batch)[0]
        torch.testing.assert_close(batch["ref_per_token_logps"][real], ref[real], rtol=1e-4, atol=1e-5)
        assert (ref - trainer.log_probs(batch))[real].abs().max() > 0.1


@pytest.fixture
def joins(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[set[tuple[int, int]]]]:
    """The widths of prompts and completions of what is joined."""
    seen: list[set[tuple[int, int]]] = []
    join = module.join_rows

    def spy(batches: Any, pad: int) -> Batch:
        seen.append({(b["prompt_ids"].shape[1], b["completion_ids"].shape[1]) for b in batches})
        return join(batches, pad)

    monkeypatch.setattr(module, "join_rows", spy)
    yield seen


def short_when_small(trainer: GRPOVariantTrainer) -> None:
    """Completions of the one-digit prompts end early, so that batches have different lengths."""
    sample = trainer._generate_single_turn

    def cut(prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        completions, logps = sample(prompt_ids, *args, **kwargs)
        return [ids[:3] if len(p) == 4 else ids for p, ids in zip(prompt_ids, completions, strict=True)], logps

    trainer._generate_single_turn = cut


def test_all_groups_become_informative(make: Make, joins: list[set[tuple[int, int]]]) -> None:
    trainer = make(reward_funcs=from_ten, advantage="group_normalized", dynamic_sampling=True, beta=0.1, **MIXED)
    perturb(trainer)
    short_when_small(trainer)
    batch = generate(trainer, first=8, rows=16)  # prompts 8 to 11: two are uniform, two are not
    assert len(joins) >= 1
    scores = torch.tensor(from_ten(prompts_of(trainer, batch), ids_of(batch)))
    assert (scores.view(4, 4).std(dim=1) > 0).all()
    groups = whole_groups(trainer, batch)
    assert groups[:2] == ["10+10=", "11+11="] and all(number(p) >= 10 for p in groups)
    equal(batch["advantages"], pure.group_normalized(scores, 4))
    assert batch["num_items_in_batch"] == batch["completion_mask"].sum()
    assert_aligned(trainer, batch)
    found = metrics(trainer)
    assert found["sampling/informative_groups"] == [0.5] and found["sampling/unfilled_groups"] == [0.0]
    assert found["sampling/draws"] == [float(len(joins))]
    table = list(trainer._logs["advantages"])
    assert len(table) == 16  # of the last generation batch


@pytest.mark.slow
def test_joined_batches_of_different_lengths_stay_aligned(make: Make, joins: list[set[tuple[int, int]]]) -> None:
    def by_length(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        rewards = spread(completion_ids)
        return [r if number(p) >= 10 or number(p) == 3 else 0.5 for p, r in zip(prompts, rewards, strict=True)]

    trainer = make(reward_funcs=by_length, advantage="leave_one_out", dynamic_sampling=True, beta=0.1, **MIXED)
    perturb(trainer)
    short_when_small(trainer)
    batch = generate(trainer, first=0, rows=16)  # prompts 0 to 3, of which 3 teaches something
    assert any(len({w[0] for w in widths}) > 1 and len({w[1] for w in widths}) > 1 for widths in joins)
    groups = whole_groups(trainer, batch)
    assert groups[0] == "3+3=" and sum(number(p) >= 10 for p in groups) >= 2
    assert max(map(len, ids_of(batch)[:4])) == 3 and max(map(len, ids_of(batch))) == 6
    scores = torch.tensor(by_length(prompts_of(trainer, batch), ids_of(batch)))
    equal(batch["advantages"], pure.leave_one_out(scores, 4))
    assert batch["num_items_in_batch"] == batch["completion_mask"].sum()
    assert_aligned(trainer, batch)


@pytest.mark.slow
def test_draws_are_bounded_and_training_goes_on(make: Make) -> None:
    trainer = make(reward_funcs=constant, advantage="group_normalized", dynamic_sampling=True, max_draws=3)
    calls: list[int] = []
    sample = trainer._generate_single_turn

    def counted(prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(prompt_ids))
        return sample(prompt_ids, *args, **kwargs)

    trainer._generate_single_turn = counted
    batch = generate(trainer)
    assert calls == [8, 8, 8, 8] and (batch["advantages"] == 0).all()
    assert metrics(trainer)["sampling/draws"] == [3.0] and metrics(trainer)["sampling/unfilled_groups"] == [2.0]
    assert metrics(trainer)["sampling/informative_groups"] == [0.0]
    before = weights(trainer)
    trainer.train()
    assert trainer.state.global_step == 2 and logged(trainer, "loss") == [0.0, 0.0]
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())
    assert logged(trainer, "sampling/unfilled_groups") == [2.0, 2.0]


def test_a_full_batch_draws_nothing_and_is_left_alone(make: Make) -> None:
    plain = generate(make(advantage="group_centered"))
    trainer = make(advantage="group_centered", dynamic_sampling=True, replay_buffer_size=0, reject_uniform=True)
    batch = generate(trainer)
    assert metrics(trainer)["sampling/draws"] == [0.0] and metrics(trainer)["sampling/informative_groups"] == [1.0]
    assert plain.keys() == batch.keys() and all(torch.equal(batch[key], value) for key, value in plain.items())


def test_as_many_are_drawn_as_the_rate_of_success_asks_for(make: Make) -> None:
    trainer = make(reward_funcs=right_half, advantage="group_centered", dynamic_sampling=True, max_draws=50)
    calls: list[int] = []
    draw = trainer._further_prompts

    def counted(groups: int, step: int) -> Any:
        calls.append(groups)
        return draw(groups, step)

    trainer._further_prompts = counted  # type: ignore
    batch = generate(trainer, first=0, rows=32)  # prompts 0, 3 and 6 of 0 to 7
    assert calls[0] == min(8, math.ceil(5 / (3 / 8)))
    assert all(number(p) % 3 == 0 for p in whole_groups(trainer, batch))
    assert metrics(trainer)["sampling/draws"] == [float(len(calls))]


@pytest.mark.slow
def test_the_seed_decides(make: Make) -> None:
    def run(seed: int) -> tuple[list[str], list[float], dict[str, Tensor]]:
        trainer = make(reward_funcs=right_half, preset="dapo", seed=seed, max_steps=3)
        prompts: list[str] = []
        draw = trainer._further_prompts

        def noted(groups: int, step: int) -> Any:
            rows = draw(groups, step)
            prompts.extend(row["prompt"] for row in rows)
            return rows

        trainer._further_prompts = noted  # type: ignore
        trainer.train()
        return prompts, logged(trainer, "loss"), weights(trainer)

    first, again, other = run(1), run(1), run(2)
    assert first[:2] == again[:2] and first[0] != other[0] and len(first[0]) > 0
    assert all(torch.equal(first[2][name], again[2][name]) for name in first[2])


def test_every_draw_of_every_step_is_another(make: Make) -> None:
    trainer = make(advantage="group_centered", dynamic_sampling=True)
    seen = []
    for step in (0, 1):
        trainer._step = step
        for draw in (0, 1):
            rows = trainer._further_prompts(6, draw)
            assert rows == trainer._further_prompts(6, draw) and len(rows) == 24
            assert all(rows[i] == rows[i - i % 4] for i in range(24)) and set(rows[0]) == {"prompt", "answer"}
            seen.append(tuple(row["prompt"] for row in rows))
    assert len(set(seen)) == 4


def test_a_stream_is_refused(make: Make, dataset: Dataset) -> None:
    stream = dataset.to_iterable_dataset()
    with pytest.raises(TypeError, match="dynamic_sampling=True draws further prompts by index, .* is a stream"):
        make(train_dataset=stream, dynamic_sampling=True)
    assert make(train_dataset=stream, reject_uniform=True).train_dataset is not None


# The penalty on length


def test_the_penalty_is_added_but_informs_nobody(make: Make) -> None:
    options = {"overlong_shaping": True, "overlong_cache": 4, "advantage": "reward"}
    trainer = make(reward_funcs=constant, dynamic_sampling=True, max_draws=2, **options)
    batch = generate(trainer, rows=16)
    lengths = batch["completion_mask"].sum(1)
    penalty = overlong_penalty(lengths, max_length=6, cache=4)
    assert len(set(penalty.tolist())) > 1
    equal(batch["advantages"], 0.25 + penalty)
    assert metrics(trainer)["sampling/unfilled_groups"] == [4.0] and metrics(trainer)["sampling/draws"] == [2.0]
    assert trainer.reward_func_names == ["constant", "overlong_penalty"]


def test_the_penalty_has_weight_one(make: Make) -> None:
    trainer = make(
        reward_funcs=[spread, constant],
        reward_weights=[0.5, 2.0],
        reward_processing_classes=[None, None],
        overlong_shaping=True,
        overlong_cache=6,
        advantage="reward",
    )
    batch = generate(trainer)
    penalty = overlong_penalty(batch["completion_mask"].sum(1), max_length=6, cache=6)
    equal(batch["advantages"], 0.5 * torch.tensor(spread(ids_of(batch))) + 0.5 + penalty)


@pytest.mark.parametrize("advantage", ["group_centered", "reward", None])
def test_the_penalty_does_not_score_the_unscorable(make: Make, advantage: str | None) -> None:
    scaling = {} if advantage == "reward" else {"scale_rewards": "none"}
    trainer = make(reward_funcs=patchy, overlong_shaping=True, overlong_cache=6, advantage=advantage, **scaling)
    batch = generate(trainer, rows=16)
    task = torch.tensor([NAN if r is None or math.isinf(r) else r for r in patchy(ids_of(batch))])
    scores = task + overlong_penalty(batch["completion_mask"].sum(1), max_length=6, cache=6)
    assert 0 < scores.isnan().sum() < 10
    equal(
        batch["advantages"],
        advantages_of(advantage or "group_centered", scores, 4, torch.ones(len(scores), 1), options={}),
    )
    assert (batch["advantages"][scores.isnan()] == 0).all()


# Rejection


@pytest.mark.parametrize("advantage", ["reward", "batch_normalized", "group_centered_batch_scaled", None])
def test_rejected_groups_are_out_of_everything(make: Make, advantage: str | None) -> None:
    trainer = make(reward_funcs=right_half, advantage=advantage, reject_uniform=True, scale_rewards="group")
    batch = generate(trainer, first=2, rows=16)  # of 2, 3, 4, 5 only 3 stays
    kept = torch.arange(16) // 4 == 1
    assert (batch["completion_mask"].sum(1) > 0).tolist() == kept.tolist()
    assert batch["num_items_in_batch"] == batch["completion_mask"].sum()
    scores = torch.tensor(right_half(prompts_of(trainer, batch)[4:8], ids_of(batch)[4:8]))
    expected = advantages_of(advantage or "group_normalized", scores, 4, torch.ones(4, 1), options={})
    equal(batch["advantages"][kept], expected)
    assert (batch["advantages"][~kept] == 0).all() and expected.abs().max() > 0.1
    assert metrics(trainer)["sampling/informative_groups"] == [0.25]
    assert metrics(trainer)["sampling/unfilled_groups"] == [3.0]


@pytest.mark.parametrize(("loss", "aggregation"), [("dapo", None), ("bnpo", None), (None, None), ("cispo", "prompt")])
def test_the_loss_over_tokens_is_that_of_the_kept_groups(
    make: Make, loss: str | None, aggregation: str | None
) -> None:
    options = {"advantage": "reward", "reject_uniform": True, "policy_loss": loss, "aggregation": aggregation}
    trainer = make(reward_funcs=right_half, beta=0.2, **options)
    perturb(trainer)
    trainer.current_gradient_accumulation_steps = 1
    batch = generate(trainer, first=2, rows=16)
    kept = {k: v[4:8] if v.ndim else v for k, v in batch.items()}
    if aggregation == "prompt":  # one prompt is left, whose tokens are all that count
        tokens = kept["completion_mask"].sum()
        torch.testing.assert_close(
            batch["prompt_weights"], torch.zeros(16).index_fill(0, torch.arange(4, 8), 16 / tokens)
        )
        kept["prompt_weights"] = (4 / tokens).expand(4)
    whole = trainer._compute_loss(trainer.model, batch)
    torch.testing.assert_close(whole, trainer._compute_loss(trainer.model, kept), rtol=1e-5, atol=1e-6)
    assert whole.abs() > 1e-3


@pytest.mark.slow
def test_rejecting_all_groups_stops_nothing(make: Make) -> None:
    trainer = make(reward_funcs=constant, preset="reinforce_rej")
    before = weights(trainer)
    trainer.train()
    assert logged(trainer, "loss") == [0.0, 0.0]
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())


# Replay


@pytest.mark.slow
def test_empty_groups_are_replaced_with_stored_ones(make: Make) -> None:
    options = {"advantage": "group_normalized", "per_device_train_batch_size": 16, "beta": 0.1}
    trainer = make(reward_funcs=from_ten, replay_buffer_size=3, **options)
    perturb(trainer)
    short_when_small(trainer)
    first = generate(trainer, first=8, rows=16)  # 8 and 9 teach nothing, nothing is stored yet
    assert [number(p) for p in whole_groups(trainer, first)] == [8, 9, 10, 11]
    assert metrics(trainer)["sampling/replayed_groups"] == [0.0]
    assert metrics(trainer)["sampling/unfilled_groups"] == [2.0]
    buffer = trainer.replay_buffer
    assert buffer is not None and len(buffer) == 2
    stds = torch.tensor(from_ten(prompts_of(trainer, first), ids_of(first))).view(4, 4).std(dim=1)
    assert [g.priority for g in buffer.groups] == pytest.approx(stds[2:].tolist(), abs=1e-6)
    second = generate(trainer, first=6, rows=16, seed=1)  # 6 to 9: two of the four slots can be filled
    assert sorted(number(p) for p in whole_groups(trainer, second)[:2]) == [10, 11]
    assert [number(p) for p in whole_groups(trainer, second)[2:]] == [8, 9]
    assert metrics(trainer)["sampling/replayed_groups"] == [0.0, 2.0]
    assert metrics(trainer)["sampling/unfilled_groups"] == [2.0, 2.0]
    stored = [ids for ids in ids_of(second)[:8]]
    assert sorted(stored) == sorted(ids_of(first)[8:])
    scores = torch.tensor(from_ten(prompts_of(trainer, second), ids_of(second)))
    equal(second["advantages"], pure.group_normalized(scores, 4))
    assert second["num_items_in_batch"] == second["completion_mask"].sum()
    assert_aligned(trainer, second)
    table = list(trainer._logs["advantages"])[-16:]
    assert table == [0.0] * 16  # none of the completions in the table is learnt from with an advantage
    assert len(buffer) == 2


def test_replayed_completions_are_in_no_table(make: Make) -> None:
    trainer = make(
        reward_funcs=from_ten, advantage="group_centered", replay_buffer_size=3, per_device_train_batch_size=16
    )
    generate(trainer, first=10, rows=16)
    inputs = [dict(trainer.train_dataset[i]) for i in (20, 21, 1, 2) for _ in range(4)]
    batch = trainer._generate_and_score_completions(inputs)
    assert metrics(trainer)["sampling/replayed_groups"] == [0.0, 2.0]
    assert batch["advantages"][8:].abs().min() > 0
    assert list(trainer._logs["advantages"]) == batch["advantages"][:8].tolist() + [0.0] * 8


def test_replayed_completions_keep_the_logps_of_their_time(make: Make) -> None:
    trainer = make(reward_funcs=from_ten, advantage="group_centered", replay_buffer_size=8)
    first = generate(trainer, first=10, rows=8)
    then = trainer.log_probs(first)
    perturb(trainer)
    second = generate(trainer, first=4, rows=8, seed=1)
    order = [ids_of(first).index(ids) for ids in ids_of(second)]
    real = second["completion_mask"].bool()
    width = second["completion_ids"].shape[1]
    torch.testing.assert_close(second["old_per_token_logps"][real], then[order][:, :width][real], rtol=1e-5, atol=1e-5)
    moved = (second["old_per_token_logps"] - trainer.log_probs(second))[real].abs()
    assert moved.max() > 0.1
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(trainer.model, second)  # off-policy: the ratio is not 1


def test_unscorable_completions_do_not_widen_a_group(make: Make) -> None:
    def nearly_equal(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [None, 5.0, 5.1, 5.2] * (len(completion_ids) // 4)

    trainer = make(reward_funcs=nearly_equal, advantage="group_centered", replay_buffer_size=8)
    generate(trainer)
    assert trainer.replay_buffer is not None
    assert [g.priority for g in trainer.replay_buffer.groups] == pytest.approx([0.1, 0.1], abs=1e-5)


def test_a_full_buffer_keeps_the_widest(make: Make) -> None:
    trainer = make(advantage="group_centered", replay_buffer_size=3)
    priorities = []
    for i in range(4):
        batch = generate(trainer, first=2 * i, seed=i)
        priorities += torch.tensor(spread(ids_of(batch))).view(2, 4).std(dim=1).tolist()
    assert trainer.replay_buffer is not None
    found = sorted(g.priority for g in trainer.replay_buffer.groups)
    assert found == pytest.approx(sorted(priorities)[-3:], abs=1e-6)


# Value tracker


def spo_options(**kwargs: Any) -> dict[str, Any]:
    return {"preset": "spo", "advantage_kwargs": kwargs, "reward_funcs": spread}


def whitened(x: Tensor) -> Tensor:
    return (x - x.mean()) / x.std(correction=0)


def test_two_batches_with_constant_forgetting_by_hand(make: Make) -> None:
    trainer = make(**spo_options(forget=0.5))
    tracker = trainer.value_tracker
    assert tracker is not None and trainer.num_generations == 1
    first = generate(trainer, first=0)
    r1 = torch.tensor(spread(ids_of(first)), dtype=torch.float64)
    equal(first["advantages"], whitened(r1 - 0.5).float())
    assert len(tracker) == 0  # its baseline must not have seen what it judges
    second = generate(trainer, first=4, seed=1)  # 4 to 7 again, 8 to 11 new
    r2 = torch.tensor(spread(ids_of(second)), dtype=torch.float64)
    alpha = 0.25 + r1
    equal(second["advantages"], whitened(r2 - torch.cat([alpha[4:] / 1.5, torch.full((4,), 0.5)])).float())
    assert tracker.counts[prompt_key("0+0=")] == pytest.approx((alpha[0].item(), 1.5 - alpha[0].item()), abs=1e-6)
    generate(trainer, first=20, seed=2)
    for i in range(8, 12):
        assert tracker.counts[prompt_key(f"{i}+{i}=")][0] == pytest.approx(0.25 + r2[i - 4].item(), abs=1e-6)
    for i in range(4, 8):
        assert tracker.counts[prompt_key(f"{i}+{i}=")][0] == pytest.approx(
            (0.5 * alpha[i] + r2[i - 4]).item(), abs=1e-6
        )
    assert metrics(trainer)["value_tracker/prompts"] == [0.0, 8.0, 12.0]
    assert metrics(trainer)["value_tracker/value_mean"][:2] == pytest.approx(
        [0.5, (alpha[4:].sum() / 1.5 + 2.0).item() / 8], abs=1e-6
    )


def test_forgetting_by_how_far_the_policy_has_moved(make: Make) -> None:
    options = {"half_life": 0.5, "low": 0.1, "high": 0.99}
    trainer = make(**spo_options(**options))
    first = generate(trainer)
    rewards, then = spread(ids_of(first)), trainer.log_probs(first)
    torch.testing.assert_close(first["old_per_token_logps"], then)
    perturb(trainer, scale=0.05)
    gap = (then - trainer.log_probs(first)).abs() * first["completion_mask"]
    distance = gap.sum(1) / first["completion_mask"].sum(1)
    forget = forget_factor(distance, **options)
    assert (forget > 0.1).all() and (forget < 0.99).all() and forget.std() > 1e-3
    generate(trainer, first=20, seed=1)
    assert trainer.value_tracker is not None
    for i in range(8):
        alpha, beta = trainer.value_tracker.counts[prompt_key(f"{i}+{i}=")]
        assert alpha == pytest.approx(forget[i].item() / 2 + rewards[i], abs=1e-5)
        assert beta == pytest.approx(forget[i].item() / 2 + 1 - rewards[i], abs=1e-5)
    assert metrics(trainer)["value_tracker/forget_mean"] == [pytest.approx(forget.mean().item(), abs=1e-5)]


def test_a_prompt_twice_in_a_batch(make: Make) -> None:
    trainer = make(**spo_options(forget=0.5), train_dataset=Dataset.from_dict({"prompt": ["1+1="] * 16}))
    rewards = spread(ids_of(generate(trainer)))
    generate(trainer, seed=1)
    assert trainer.value_tracker is not None
    assert trainer.value_tracker.counts == {
        prompt_key("1+1="): pytest.approx((0.25 + sum(rewards), 0.25 + 8 - sum(rewards)), abs=1e-5)
    }


def test_groups_share_one_baseline(make: Make) -> None:
    trainer = make(**spo_options(forget=1.0), num_generations=4)
    batch = generate(trainer)
    rewards = torch.tensor(spread(ids_of(batch)))
    equal(batch["advantages"], whitened(rewards))
    generate(trainer, first=20, seed=1)
    assert trainer.value_tracker is not None
    assert trainer.value_tracker.counts[prompt_key("1+1=")][0] == pytest.approx(
        0.5 + rewards[4:].sum().item(), abs=1e-5
    )


def test_conversations_are_prompts(make: Make, tokenizer: Any) -> None:
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    prompts = [[{"role": "user", "content": f"{i}+{i}="}] for i in range(16)]
    trainer = make(
        **spo_options(forget=1.0), train_dataset=Dataset.from_dict({"prompt": prompts}), processing_class=chat
    )
    rewards = spread(ids_of(generate(trainer)))
    generate(trainer, first=8, seed=1)
    assert trainer.value_tracker is not None
    found = [trainer.value_tracker.counts[prompt_key(prompt)][0] for prompt in prompts[:8]]
    assert found == pytest.approx([0.5 + r for r in rewards], abs=1e-5)


def test_unscorable_completions_leave_no_trace(make: Make) -> None:
    trainer = make(**{**spo_options(forget=1.0), "reward_funcs": patchy})
    batch = generate(trainer, rows=16)
    holes = torch.tensor([r is None or not math.isfinite(r) for r in patchy(ids_of(batch))])
    assert 0 < holes.sum() < 16 and (batch["advantages"][holes] == 0).all()
    generate(trainer, first=20, seed=1)
    assert trainer.value_tracker is not None and len(trainer.value_tracker) == int((~holes).sum())


@pytest.mark.parametrize(("value", "shown"), [(1.5, "from 1.5 to 1.5"), (-1.0, "from -1 to -1")])
def test_rewards_outside_the_unit_interval_say_so(make: Make, value: float, shown: str) -> None:
    def wide(completions: list[str], **_: Any) -> list[float]:
        return [value] * len(completions)

    trainer = make(**{**spo_options(), "reward_funcs": wide})
    with pytest.raises(ValueError, match=rf"with rewards in \[0, 1\], but there are rewards {shown}. Scale them"):
        generate(trainer)


@pytest.mark.slow
@pytest.mark.parametrize("kwargs", [{"forget": 0.9}, {"half_life": 0.5}], ids=["constant", "by_kl"])
def test_the_tracker_is_in_checkpoints(make: Make, tmp_path: Path, kwargs: dict[str, Any]) -> None:
    options = {**spo_options(**kwargs), "save_strategy": "steps", "save_steps": 1}
    trainer = make(**options)
    trainer.train()
    assert trainer.value_tracker is not None and trainer.signal.tracked.unabsorbed is not None
    counts = trainer.value_tracker.counts
    assert len(counts) == 8  # of the first batch; the second is still to be absorbed
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert torch.load(checkpoint / "rl_plugins.pt", weights_only=True)["prompts"] == counts
    resumed = make(**options, output_dir="resumed")
    resumed.create_optimizer_and_scheduler(2)
    resumed._load_optimizer_and_scheduler(str(checkpoint))
    assert resumed.value_tracker is not None and resumed.signal.tracked.unabsorbed is not None
    assert (
        resumed.value_tracker.counts == counts
        and resumed.signal.tracked.unabsorbed["keys"] == trainer.signal.tracked.unabsorbed["keys"]
    )
    assert torch.equal(resumed.signal.tracked.unabsorbed["scores"], trainer.signal.tracked.unabsorbed["scores"])
    resumed.model.load_state_dict(trainer.model.state_dict())
    generate(trainer, first=40)
    generate(resumed, first=40)
    assert resumed.value_tracker.counts == trainer.value_tracker.counts and len(resumed.value_tracker) == 16
    (checkpoint / "rl_plugins.pt").unlink()
    with pytest.raises(FileNotFoundError, match="with other settings: it has no rl_plugins.pt"):
        make(**options).train(resume_from_checkpoint=str(checkpoint))


# GVPO


@pytest.mark.slow
def test_gvpo_sees_whole_groups(make: Make) -> None:
    trainer = make(preset="gvpo", num_iterations=2, steps_per_generation=4, gradient_accumulation_steps=4, max_steps=4)
    seen: list[tuple[float, float]] = []
    compute = trainer._compute_loss

    def checked(model: Any, inputs: Batch) -> Tensor:
        assert inputs["groups"].tolist() in [[g] * 4 + [g + 1] * 4 for g in (0, 2, 4, 6)]
        whole_groups(trainer, inputs)
        scores = torch.tensor(spread(ids_of(inputs)))
        equal(inputs["advantages"], pure.group_centered(scores, 4))
        loss = compute(model, inputs)
        logps, mask = trainer.log_probs(inputs), inputs["completion_mask"]
        old = inputs.get("old_per_token_logps", logps)
        per_token = gvpo(logps, old, scores, mask, groups=torch.arange(8) // 4)
        seen.append((loss.item(), ((per_token.sum(1) / mask.sum(1)).mean() / 4).item()))
        return loss

    trainer._compute_loss = checked  # type: ignore
    trainer.train()
    assert len(seen) == 16 and all(ours == pytest.approx(expected, abs=1e-6) for ours, expected in seen)
    assert len({round(ours, 6) for ours, _ in seen}) > 8 and max(ours for ours, _ in seen) > 1e-3


def test_gvpo_slices_differ_from_trls_only_in_order(make: Make) -> None:
    def slices(**options: Any) -> list[list[int]]:
        trainer = make(steps_per_generation=2, gradient_accumulation_steps=2, num_iterations=1, **options)
        trainer.model.train()
        torch.manual_seed(0)
        trainer._prepare_inputs(rows_of(trainer.train_dataset, 0, 16, 4))
        return sorted(ids for part in trainer._buffered_inputs for ids in ids_of(part))

    assert slices(preset="gvpo") == slices(advantage="group_centered")


# Resumption


RESUMED: dict[str, dict[str, Any]] = {
    "dynamic": {"preset": "dapo", "reward_funcs": right_half},
    "replay": {"advantage": "group_normalized", "replay_buffer_size": 4, "reward_funcs": right_half},
    "replay_all": {
        "preset": "dapo", "replay_buffer_size": 4, "reject_uniform": True, "max_draws": 1, "reward_funcs": right_half,
    },
    "tracker": {"preset": "spo", "advantage_kwargs": {"half_life": 0.5}},
    "tracker_constant": {"preset": "spo", "advantage_kwargs": {"forget": 0.9}},
    "gvpo": {"preset": "gvpo"},
    "reinforce++": {"preset": "reinforce++"},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("save_steps", [2, 4], ids=["mid_generation", "between"])
@pytest.mark.parametrize("name", RESUMED)
def test_resuming_is_as_if_nothing_had_happened(make: Make, tmp_path: Path, name: str, save_steps: int) -> None:
    options = {
        "max_steps": 6, "save_strategy": "steps", "save_steps": save_steps, "steps_per_generation": 4,
        "gradient_accumulation_steps": 1, **RESUMED[name],
    }  # fmt: skip
    through = make(**options, output_dir="through")
    through.train()
    resumed = make(**options, output_dir="resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "through" / f"checkpoint-{save_steps}"))
    assert resumed.state.global_step == 6
    for key in ("loss", "reward", "sampling/draws", "sampling/replayed_groups", "value_tracker/value_mean"):
        assert logged(resumed, key) == logged(through, key), key
    if name in ("dynamic", "replay"):
        assert sum(logged(through, "sampling/draws" if name == "dynamic" else "sampling/replayed_groups")) > 0
    after = weights(resumed)
    assert all(torch.equal(value, after[key]) for key, value in weights(through).items())
    if through.value_tracker is not None and resumed.value_tracker is not None:
        assert through.value_tracker.counts == resumed.value_tracker.counts
        assert len(through.value_tracker) > 0
    if through.replay_buffer is not None and resumed.replay_buffer is not None:
        mine, other = through.replay_buffer.state_dict(), resumed.replay_buffer.state_dict()
        assert torch.equal(mine["generator"], other["generator"])
        assert [group[1:] for group in mine["groups"]] == [group[1:] for group in other["groups"]]
        assert len(through.replay_buffer) > 0


# Presets and models


@pytest.mark.slow
@pytest.mark.parametrize("name", GRPO_PRESETS)
def test_every_preset_trains(make: Make, name: str) -> None:
    trainer = make(preset=name, steps_per_generation=2, gradient_accumulation_steps=1)
    before = weights(trainer)
    trainer.train()
    losses = logged(trainer, "loss")
    assert trainer.state.global_step == 2 and len(losses) == 2 and all(map(math.isfinite, losses))
    after = weights(trainer)
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(value, before[key]) for key, value in after.items())
    assert (
        all(math.isfinite(value) for value in logged(trainer, "grad_norm")) and max(logged(trainer, "grad_norm")) > 0
    )
    assert trainer.num_generations == GENERATIONS.get(name, {}).get("num_generations", 4)
    assert trainer.num_generations > 1 or not ADVANTAGES[GRPO_PRESETS[name]["advantage"]].compares_groups


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["dapo", "grpo", "spo"])
def test_lora(make: Make, preset: str) -> None:
    trainer = make(preset=preset, peft_config=LORA)
    before = weights(trainer)
    trainer.train()
    moved = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert moved and all("lora" in name for name in moved)
    assert all(map(math.isfinite, logged(trainer, "loss")))


@pytest.mark.slow
def test_a_mixture_of_experts(make: Make) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=17, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
            pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )
    )  # fmt: skip
    trainer = make(model, policy_loss="gspo_token", advantage="lambda_trace", router_aux_loss_coef=0.1)
    before = weights(trainer)
    trainer.train()
    assert len(logged(trainer, "aux_loss")) == 2 and all(value > 0 for value in logged(trainer, "aux_loss"))
    assert any("experts" in name and not torch.equal(v, before[name]) for name, v in weights(trainer).items())


# Errors


def test_args_of_another_class_are_refused(tiny_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> None:
    args = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(TypeError, match="args must be of type GRPOVariantConfig, got GRPOConfig"):
        GRPOVariantTrainer(tiny_model(), spread, args, processing_class=tokenizer)


@pytest.mark.slow
def test_images_are_not_moved(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = GRPOTrainer._generate_and_score_completions
    monkeypatch.setattr(
        GRPOTrainer, "_generate_and_score_completions", lambda self, rows: {**draw(self, rows), "num_images": [1] * 8}
    )
    for options in ({"dynamic_sampling": True}, {"replay_buffer_size": 1}, {"policy_loss": "gvpo"}):
        with pytest.raises(NotImplementedError, match="Images are not moved yet"):
            generate(make(**options))
    assert "num_images" in generate(make(reject_uniform=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("aggregation", "options"),
    [(name, {"beta": 0.1 if name == "sequence" else 0.0}) for name in AGGREGATIONS if name != "micro_batch"]
    + [("token", {"beta": 0.1, "kl_in_reward": True, "advantage": "batch_normalized"})],
)
def test_one_batch_of_eight_is_four_of_two(
    make: Make, tiny_model: Callable[..., Any], tmp_path: Path, aggregation: str, options: dict[str, Any]
) -> None:
    """In completions of different lengths; `micro_batch` averages micro-batches by definition."""
    tiny_model(6, initializer_range=0.2).save_pretrained(tmp_path / "start")

    def run(size: int, accumulation: int) -> tuple[list[float], dict[str, Tensor]]:
        trainer = make(
            model=str(tmp_path / "start"),
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, max_steps=1, max_grad_norm=0.0,
            policy_loss="ppo_clip", aggregation=aggregation, optim="sgd", learning_rate=0.3,
            generation_kwargs={"top_k": 1}, num_generations=1, advantage=options.get("advantage", "reward"),
            reward_funcs=spread, **{key: value for key, value in options.items() if key != "advantage"},
        )  # fmt: skip
        trainer.train()
        first = trainer.state.log_history[0]
        assert first["completions/min_length"] < first["completions/max_length"] and first["grad_norm"] > 0.01
        return [first["loss"]], {name: p.detach().clone() for name, p in trainer.model.named_parameters()}

    (losses, whole), (again, split) = run(8, 1), run(2, 4)
    assert again == pytest.approx(losses, abs=1e-5)
    for name in whole:
        torch.testing.assert_close(split[name], whole[name], atol=1e-6, rtol=0.0)
