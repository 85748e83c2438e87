"""What papers set in Lightning's modules: presets, groups of equal rewards and their replacements, phases."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from rl_plugins.functional.advantages.group import group_centered, group_normalized
from rl_plugins.functional.log_probs import kl_to_sampler
from rl_plugins.functional.rewards import overlong_penalty
from rl_plugins.lightning import PromptDataModule
from rl_plugins.signals import (
    GRPO_PRESETS,
    OnlineValueOptions,
    PhasicOptions,
    PolicyOptions,
    SamplingOptions,
    VariantOptions,
    advantages_of,
)

from .helpers.lightning_runs import (
    Numbers,
    assert_equal_states,
    changed,
    every_step,
    fit,
    module_factory,
    perturb,
    prompts,
    state_of,
    weights,
)

pytestmark = pytest.mark.filterwarnings(r"ignore:::lightning\.pytorch.*")
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

Make = Callable[..., Any]


def spread(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Different for almost any two completions, and at least 0."""
    return [sum((i + 1) * t for i, t in enumerate(ids)) % 97 / 97 for ids in completion_ids]


def number(prompt: str) -> int:
    return int(prompt.split("+")[0])


def from_ten(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Equal for all completions of the prompts below 10+10=, which teach nothing then."""
    rewards = spread(completion_ids)
    return [r if number(p) >= 10 else 0.5 for p, r in zip(prompts, rewards, strict=True)]


def constant(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [0.25] * len(completion_ids)


@pytest.fixture(autouse=True)
def dice() -> None:
    torch.manual_seed(0)


@pytest.fixture
def make(tiny_model: Callable[..., Any], tokenizer: Any) -> Make:
    """Factory: a module on a tiny model; keywords go to the module."""
    return module_factory(tiny_model, tokenizer, spread)


class Rollouts:
    """What a module learns from: its rollouts and their metrics, one after the other.

    Args:
        module: Is changed to note them.
    """

    def __init__(self, module: Any) -> None:
        self.batches: list[Any] = []
        self.metrics: list[Any] = []
        self.drawn: list[list[str]] = []
        rollout, draw = module.rollout, module._draw

        def noted(rows: Any) -> Any:
            batch, metrics = rollout(rows)
            self.batches.append(module.last_rollout)
            self.metrics.append(metrics)
            return batch, metrics

        def counted(rows: Any) -> Any:
            self.drawn.append([row["prompt"] for row in rows])
            return draw(rows)

        module.rollout, module._draw = noted, counted


def texts(module: Any, batch: Any) -> list[str]:
    return module.tokenizer.batch_decode(batch["prompt_ids"], skip_special_tokens=True)


def groups(module: Any, batch: Any) -> list[int]:
    """The number in the prompt of each group, whose rows share it."""
    every, size = [number(text) for text in texts(module, batch)], module.num_generations
    assert all(len(set(every[i : i + size])) == 1 for i in range(0, len(every), size))
    return every[::size]


def completions(batch: Any) -> list[list[int]]:
    rows = zip(batch["completion_ids"], batch["completion_mask"].bool(), strict=True)
    return [row[mask].tolist() for row, mask in rows]


def one_rollout(module: Any, first: int, size: int = 4, **options: Any) -> tuple[Any, Any, Rollouts]:
    """The batch and the metrics of the first training rollout, of the prompts `first+first=` and on."""
    rollouts = Rollouts(module)
    rows = [{"prompt": f"{i}+{i}="} for i in range(first, first + 16)]
    fit(module, PromptDataModule(rows, batch_size=size, shuffle=False), max_steps=1, **options)
    return rollouts.batches[0], rollouts.metrics[0], rollouts


# Presets


@pytest.mark.parametrize("name", GRPO_PRESETS)
def test_presets_set_what_they_say(make: Make, name: str) -> None:
    preset = GRPO_PRESETS[name]
    group = {} if "num_generations" in preset else {"num_generations": 6}
    module = make("grpo", preset=name, **{"num_generations": None, "beta": None, **group})
    assert module.num_generations == preset.get("num_generations", 6) and module.beta == preset.get("beta", 0.0)
    assert module.policy_loss.name == preset["policy_loss"]
    assert module.policy_loss.aggregation == preset.get("aggregation", module.policy_loss.entry.aggregation)
    expected = dict(preset.get("policy_loss_kwargs", {}))
    for field, option in (
        ("epsilon", "epsilon_low"), ("epsilon_high", "epsilon_high"), ("importance_sampling_level", "level"),
    ):  # fmt: skip
        if field in preset and option in module.policy_loss.accepted(preset["policy_loss"]):
            expected[option] = preset[field]
    assert module.policy_loss.options == expected
    assert module.signal.options.advantage == preset["advantage"]
    assert module.signal.options.advantage_options == preset.get("advantage_kwargs", {})
    assert module.signal.kl_in_reward == preset.get("kl_in_reward", False)
    for field in ("dynamic_sampling", "reject_uniform", "overlong_shaping"):
        assert getattr(module.sampling.options, field) == preset.get(field, False), field
    assert len(module.reward_funcs) == 1 + preset.get("overlong_shaping", False)


def test_the_preset_of_reinforce(make: Make) -> None:
    module = make("ppo", preset="vpg")
    values = module.critic.values
    assert (module.policy_loss.name, module.num_iterations) == ("vanilla", 1)
    assert (values.advantage_estimator, values.value_loss_type, values.kl_in_reward) == ("mc", "squared", True)
    own = make("ppo", preset="vpg", num_iterations=3, values=OnlineValueOptions(advantage_estimator="td", gamma=0.9))
    assert own.num_iterations == 3 and own.critic.values.gamma == 0.9
    assert (own.critic.values.advantage_estimator, own.critic.values.value_loss_type) == ("td", "squared")


def test_options_that_are_set_win_over_a_preset(make: Make) -> None:
    flat = make("grpo", preset="gspo", policy_loss_kwargs={"epsilon_high": 0.1}, beta=0.5, advantage="group_centered")
    assert flat.policy_loss.options == {"level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 0.1}
    assert flat.beta == 0.5 and flat.signal.options.advantage == "group_centered"
    nested = make(
        "grpo",
        preset="dapo",
        policy=PolicyOptions(policy_loss="vanilla", aggregation="sequence"),
        sampling=SamplingOptions(max_draws=3),
        variant=VariantOptions(advantage="leave_one_out"),
        overlong_shaping=False,
    )
    assert (nested.policy_loss.name, nested.policy_loss.aggregation) == ("vanilla", "sequence")
    assert nested.policy_loss.options == {}, "the preset's bounds are of another loss"
    assert nested.signal.options.advantage == "leave_one_out"
    sampling = nested.sampling.options
    assert (sampling.dynamic_sampling, sampling.max_draws, sampling.overlong_shaping) == (True, 3, False)
    assert make("grpo", preset="kl_cov", policy_loss_kwargs={"kl_coef": 2.0}).policy_loss.options == {"kl_coef": 2.0}


# Dynamic sampling


def test_all_groups_become_informative(make: Make) -> None:
    module = make("grpo", reward_funcs=from_ten, dynamic_sampling=True, beta=0.1, num_generations=4, num_iterations=2)
    perturb(module.model)
    batch, metrics, rollouts = one_rollout(module, first=8)  # prompts 8 to 11: two are uniform, two are not
    found = groups(module, batch)
    assert found[:2] == [10, 11] and len(found) == 4 and min(found) >= 10
    scores = torch.tensor(from_ten(texts(module, batch), completions(batch)))
    torch.testing.assert_close(batch["scores"], scores)
    torch.testing.assert_close(batch["advantages"], group_normalized(scores, 4))
    assert batch["num_items"] == batch["completion_mask"].sum()
    assert metrics["sampling/informative_groups"] == 0.5 and metrics["sampling/unfilled_groups"] == 0.0
    assert metrics["sampling/draws"] == len(rollouts.drawn) - 1 >= 1
    assert metrics["reward"] == pytest.approx(0.25 + float(scores[:8].mean()) / 2), "of the prompts of the loader"
    # Two of four groups taught something, so twice as many prompts as are lacking are drawn.
    assert len(rollouts.drawn[1]) == 4 and all(
        text in {f"{i}+{i}=" for i in range(8, 24)} for text in rollouts.drawn[1]
    )
    # Log-probabilities belong to the tokens beside them; the policy has moved since.
    fresh = make("grpo")
    perturb(fresh.model)
    real = batch["completion_mask"].bool()
    torch.testing.assert_close(batch["old_per_token_logps"][real], fresh.log_probs(batch)[real], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_draws_are_bounded_and_training_goes_on(make: Make) -> None:
    module, numbers = make("grpo", reward_funcs=constant, dynamic_sampling=True, max_draws=3), Numbers()
    rollouts, before = Rollouts(module), weights(module)
    fit(module, PromptDataModule(prompts(), batch_size=4), numbers, max_steps=2)
    assert [len(rows) for rows in rollouts.drawn] == [4] * 8
    assert len(set(map(tuple, rollouts.drawn))) == 8, "every draw of every step is another"
    assert [row["loss"] for row in numbers.rows] == [0.0, 0.0] and not changed(before, weights(module))
    for name, value in {"draws": 3.0, "unfilled_groups": 4.0, "informative_groups": 0.0}.items():
        assert [row[f"sampling/{name}"] for row in numbers.rows] == [value] * 2


def test_rollouts_of_one_optimizer_step_draw_other_prompts(make: Make) -> None:
    module = make("grpo", reward_funcs=constant, dynamic_sampling=True, max_draws=1)
    rollouts = Rollouts(module)
    fit(module, PromptDataModule(prompts(), batch_size=4), max_steps=1, accumulate_grad_batches=2)
    assert len(rollouts.drawn) == 4 and rollouts.drawn[1] != rollouts.drawn[3]


@pytest.mark.slow
def test_a_validation_draws_nothing(make: Make) -> None:
    module, rollouts = (made := make("grpo", reward_funcs=constant, dynamic_sampling=True)), Rollouts(made)
    data = PromptDataModule(prompts(4), prompts(4), batch_size=4)
    trainer = fit(module, data, max_steps=1, num_sanity_val_steps=0)
    assert len(rollouts.drawn) == 1 + 10 + 1 and "sampling/draws" not in rollouts.metrics[-1]
    assert "eval_reward" in trainer.callback_metrics and "eval_sampling/draws" not in trainer.callback_metrics


def test_a_full_batch_is_left_alone(make: Make) -> None:
    batches = []
    for options in ({}, {"dynamic_sampling": True, "reject_uniform": True}):
        torch.manual_seed(0)
        batch, metrics, _ = one_rollout(make("grpo", advantage="group_centered", **options), first=10)
        batches.append(batch)
    assert metrics["sampling/draws"] == 0.0 and metrics["sampling/informative_groups"] == 1.0
    assert all(torch.equal(batches[1][key], value) for key, value in batches[0].items())


def test_a_stream_is_refused(make: Make) -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(prompts())

    loader = DataLoader(Stream(), batch_size=4, collate_fn=list)
    with pytest.raises(TypeError, match="dynamic_sampling=True draws further prompts by index, .* are a stream"):
        fit(make("grpo", dynamic_sampling=True), loader, max_steps=1)
    assert fit(make("grpo", reject_uniform=True), loader, max_steps=1).global_step == 1


# The penalty on length


def test_the_penalty_has_weight_one_and_informs_nobody(make: Make) -> None:
    module = make(
        "grpo", reward_funcs=[constant, constant], reward_weights=[0.5, 2.0], advantage="reward", num_generations=4,
        overlong_shaping=True, overlong_cache=4, dynamic_sampling=True, max_draws=2,
    )  # fmt: skip
    batch, metrics, _ = one_rollout(module, first=10)
    penalty = overlong_penalty(batch["completion_mask"].sum(1), max_length=5, cache=4)
    assert len(set(penalty.tolist())) > 1
    torch.testing.assert_close(batch["advantages"], 0.625 + penalty)
    assert metrics["sampling/unfilled_groups"] == 4.0 and metrics["sampling/draws"] == 2.0
    assert "rewards/overlong_penalty/mean" in metrics


def test_the_penalty_does_not_score_the_unscorable(make: Make) -> None:
    def patchy(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [None if i % 4 == 1 else math.inf if i % 8 == 2 else r for i, r in enumerate(spread(completion_ids))]

    module = make("grpo", reward_funcs=patchy, advantage="group_centered", overlong_shaping=True, num_generations=4)
    batch, _, _ = one_rollout(module, first=10)
    task = torch.tensor([math.nan if r is None or math.isinf(r) else r for r in patchy(completions(batch))])
    scores = task + overlong_penalty(batch["completion_mask"].sum(1), max_length=5, cache=1)
    assert scores.isnan().sum() == 6
    torch.testing.assert_close(batch["scores"], scores, equal_nan=True)
    torch.testing.assert_close(batch["advantages"], group_centered(scores, 4))


# Rejection


@pytest.mark.parametrize("advantage", ["reward", "batch_normalized", "group_centered_batch_scaled"])
def test_rejected_groups_are_out_of_everything(make: Make, advantage: str) -> None:
    module = make("grpo", reward_funcs=from_ten, advantage=advantage, reject_uniform=True, num_generations=4)
    batch, metrics, _ = one_rollout(module, first=7)  # of 7, 8, 9 and 10 only the last stays
    kept = torch.arange(16) >= 12
    assert (batch["completion_mask"].sum(1) > 0).tolist() == kept.tolist()
    assert batch["num_items"] == batch["completion_mask"].sum()
    scores = torch.tensor(from_ten(texts(module, batch)[12:], completions(batch)[12:]))
    expected = advantages_of(advantage, scores, 4, batch["completion_mask"][12:].bool(), options={})
    torch.testing.assert_close(batch["advantages"][kept], expected)
    assert (batch["advantages"][~kept] == 0).all() and expected.abs().max() > 0.1
    assert metrics["sampling/informative_groups"] == 0.25 and metrics["sampling/unfilled_groups"] == 3.0


def test_rejecting_all_groups_stops_nothing(make: Make) -> None:
    module, numbers = make("grpo", reward_funcs=constant, preset="reinforce_rej"), Numbers()
    before = weights(module)
    fit(module, PromptDataModule(prompts(), batch_size=4), numbers, max_steps=2)
    assert [row["loss"] for row in numbers.rows] == [0.0, 0.0] and not changed(before, weights(module))


# Replay


def test_empty_groups_are_replaced_with_stored_ones(make: Make) -> None:
    module = make("grpo", reward_funcs=from_ten, replay_buffer_size=3, num_generations=4, beta=0.1)
    perturb(module.model)
    rollouts = Rollouts(module)
    rows = [{"prompt": f"{i}+{i}="} for i in (8, 9, 10, 11, 6, 7, 8, 9)]
    fit(module, PromptDataModule(rows, batch_size=4, shuffle=False), max_steps=2)
    (first, second), (before, after) = rollouts.batches, rollouts.metrics
    assert groups(module, first) == [8, 9, 10, 11]
    assert before["sampling/replayed_groups"] == 0.0 and before["sampling/unfilled_groups"] == 2.0
    stds = first["scores"].view(4, 4).std(dim=1)[2:]
    assert [g.priority for g in module.sampling.replay_buffer.groups] == pytest.approx(stds.tolist(), abs=1e-6)
    assert sorted(groups(module, second)[:2]) == [10, 11] and groups(module, second)[2:] == [8, 9]
    assert after["sampling/replayed_groups"] == 2.0 and after["sampling/unfilled_groups"] == 2.0
    assert sorted(completions(second)[:8]) == sorted(completions(first)[8:])
    scores = torch.tensor(from_ten(texts(module, second), completions(second)))
    torch.testing.assert_close(second["advantages"], group_normalized(scores, 4))
    # Kept completions keep the log-probabilities of their time, so that they are off-policy now.
    order = [completions(first).index(ids) for ids in completions(second)[:8]]
    real = second["completion_mask"][:8].bool()
    then = first["old_per_token_logps"][order][:, : real.shape[1]]
    assert torch.equal(second["old_per_token_logps"][:8][real], then[real])
    assert (second["old_per_token_logps"][:8] - module.log_probs(second)[:8])[real].abs().max() > 1e-3


# Phases


@pytest.mark.slow
def test_phases_of_a_run(make: Make) -> None:
    """Every second rollout is followed by two passes over both, in which the values learn and the policy is held."""
    module, numbers = make("critic", phasic=PhasicOptions(phasic_every=2, phasic_epochs=2)), Numbers()
    rollouts, learnt = Rollouts(module), []
    loss = module.loss

    def noted(inputs: Any) -> Any:
        before = weights(module)
        found = loss(inputs)
        learnt.append((inputs, before))
        return found

    module.loss = noted
    fit(module, PromptDataModule(prompts(16), batch_size=4, shuffle=False), numbers, max_steps=8)
    assert len(rollouts.batches) == 4 and len(learnt) == 8
    auxiliary = [i for i, row in enumerate(numbers.rows) if "held_logps" in learnt[i][0]]
    assert auxiliary == [2, 3, 4, 5]
    order = [rollouts.batches[i] for i in (0, 1, 0, 1, 0, 1, 2, 3)]
    for (inputs, _), batch in zip(learnt, order, strict=True):
        for key in ("completion_ids", "returns", "old_values"):
            assert torch.equal(inputs[key], batch[key]), key
    # The KL is to the policy as it was when the phase began.
    held = make("critic")
    held.load_state_dict(learnt[2][1], strict=False)
    for step in auxiliary:
        inputs, before = learnt[step]
        mask = inputs["completion_mask"].bool()
        torch.testing.assert_close(inputs["held_logps"][mask], held.log_probs(inputs)[mask], rtol=1e-5, atol=1e-5)
        now = make("critic")
        now.load_state_dict(before, strict=False)  # the output embeddings are tied
        divergence = kl_to_sampler(now.log_probs(inputs), inputs["held_logps"])[mask].mean()
        found = numbers.rows[step]["phasic/kl"]
        assert found == pytest.approx(float(divergence), rel=1e-3, abs=1e-7)
        assert (found < 1e-9) == (step == 2), "nothing has moved since the policy was noted"
    moved = changed(learnt[3][1], learnt[4][1])
    assert {"model.mtp_heads.heads.0.value.weight", "model.model.embed_tokens.weight"} <= moved


@pytest.mark.slow
def test_the_kl_holds_the_policy(make: Make) -> None:
    def drift(coef: float) -> float:
        torch.manual_seed(0)
        options = {"learning_rate": 1e-3, "phasic_kl_coef": coef, "value_loss_coef": 5.0, "value_grad_clip": None}
        module, numbers = make("critic", phasic_every=1, phasic_epochs=8, **options), Numbers()
        perturb(module.mtp_heads, 0.3)
        fit(module, PromptDataModule(prompts(), batch_size=8), numbers, max_steps=9)
        return numbers.rows[-1]["phasic/kl"]

    assert drift(100.0) < 0.5 * drift(0.0)


def test_the_auxiliary_loss_is_that_of_its_parts(make: Make) -> None:
    """`c KL + lambda_2 L_TD + lambda_1 L_MTP`, with nothing of the policy's loss, and the whole value gradient."""
    module = make("critic", phasic_every=1, phasic_kl_coef=3.0, value_grad_scale=0.0, value_grad_clip=None)
    perturb(module.model)
    batch, _ = module.rollout(prompts())
    batch["held_logps"] = module.log_probs(batch) + 0.1 * torch.randn(batch["completion_ids"].shape)
    loss, metrics = module.loss(batch)
    loss.backward()
    critic = 0.1 * float(metrics["critic/value_loss"]) + 0.1 * float(metrics["mtp/token_loss"])
    parts = {k: float(v) for k, v in metrics.items()}
    mask = batch["completion_mask"].bool()
    divergence = kl_to_sampler(module.log_probs(batch), batch["held_logps"])[mask].mean()
    assert parts["phasic/kl"] == pytest.approx(float(divergence), rel=1e-5)
    assert not any(name.startswith("clip_ratio") or name in ("kl", "entropy") for name in parts)
    heads_alone = make("critic", value_grad_scale=0.0, value_grad_clip=None)
    heads_alone.load_state_dict(module.state_dict())
    with heads_alone.critic.learning(batch, batch["num_items"], alone=False, scale=1.0) as run:
        heads_alone._pass(batch, heads_alone.model)
    term, _ = heads_alone.critic.loss(run, batch, batch["num_items"], heads_alone)
    assert float(loss.detach()) == pytest.approx(3.0 * float(divergence) + float(term), rel=1e-5)
    assert critic > 0 and module.model.model.embed_tokens.weight.grad.abs().max() > 0


@pytest.mark.slow
def test_phases_repeat_the_batches_of_the_loader(make: Make) -> None:
    module = make("critic", phasic_every=2, phasic_epochs=1, steps_per_generation=2)
    assert module.batch_repeats == 2 and module.auxiliary_repeats == (2, 4)
    data = PromptDataModule(prompts(12), batch_size=2, shuffle=False)
    seen: list[list[str]] = []
    step = module.training_step
    module.training_step = lambda batch, batch_idx: (
        seen.append([r["prompt"] for r in batch]),
        step(batch, batch_idx),
    )[1]
    fit(module, data, max_epochs=1)
    pairs = [["7+7=", "8+8="], ["9+9=", "10+10="], ["11+11=", "12+12="], ["13+13=", "14+14="]]
    pairs += [["15+15=", "16+16="], ["17+17=", "18+18="]]
    assert seen == [pairs[i] for i in [0, 0, *[1] * 6, 2, 2, *[3] * 6, 4, 4, *[5] * 6]]


def test_phases_that_do_not_fit_are_refused(make: Make) -> None:
    data = PromptDataModule(prompts(), batch_size=4)
    with pytest.raises(ValueError, match="phasic_epochs=1 an auxiliary phase of"):
        fit(make("critic", phasic_every=1, num_iterations=2), data, max_steps=2)
    with pytest.raises(ValueError, match="accumulate_grad_batches = 2"):
        fit(make("critic", phasic_every=1), data, max_steps=2, accumulate_grad_batches=2)
    rows = DataLoader(prompts(), batch_size=4, collate_fn=list)
    with pytest.raises(
        ValueError, match="and of more in the auxiliary phase, but the loader went on.*PromptDataModule"
    ):
        fit(make("critic", phasic_every=1), rows, max_steps=2)
    with pytest.raises(TypeError, match="GRPOModule has no argument phasic_every"):
        make("grpo", phasic_every=1)


@pytest.mark.slow
def test_phases_over_windows_and_slices(make: Make) -> None:
    """Two micro-batches an optimizer step are one of twice the size, in both phases."""
    runs = []
    for slices in (1, 2):
        torch.manual_seed(0)
        module = make(
            "critic", phasic_every=1, phasic_epochs=2, steps_per_generation=slices, generation_kwargs={"top_k": 1},
            value_grad_clip=None,
        )  # fmt: skip
        module.configure_optimizers = lambda module=module: torch.optim.SGD(module.parameter_groups(), lr=0.1)
        data = PromptDataModule(prompts(), batch_size=4, shuffle=False)
        fit(module, data, max_steps=3, accumulate_grad_batches=slices)
        runs.append(weights(module))
    start = weights(make("critic"))
    assert max(float((runs[0][name] - start[name]).abs().max()) for name in start) > 1e-3
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


# Going on

# 8 prompts in batches of 2 make 4 rollouts an epoch.
RESUMED: dict[str, tuple[str, dict[str, Any], dict[str, Any], list[int]]] = {
    "dynamic": (
        "grpo", {"reward_funcs": from_ten, "preset": "dapo", "num_iterations": 2, "max_draws": 2}, {"max_steps": 8},
        [1, 4],
    ),
    "replay": (
        "grpo", {"reward_funcs": from_ten, "replay_buffer_size": 2, "replay_max_age": 3}, {"max_steps": 7}, [2, 5],
    ),
    # Steps of an epoch: rollouts 1 2, auxiliary 3 4, rollouts 5 6, auxiliary 7 8.
    "phases": ("critic", {"phasic_every": 2}, {"max_epochs": 2}, [2, 3, 8, 11]),
    # An epoch of 10: rollouts 1 2 3, auxiliary 4 to 9, rollout 10, which no phase follows.
    "phases_left_over": ("critic", {"phasic_every": 3, "phasic_epochs": 2}, {"max_epochs": 2}, [10, 13]),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_resumption_is_exact(make: Make, tmp_path: Path, name: str) -> None:
    kind, options, settings, stops = RESUMED[name]

    def data() -> PromptDataModule:
        return PromptDataModule(prompts(), batch_size=2)

    numbers = Numbers()
    whole = fit(make(kind, **options), data(), numbers, every_step(tmp_path), **settings)
    expected = state_of(whole)
    if name == "dynamic":
        assert len({row["sampling/draws"] for row in numbers.rows}) > 1
    if name == "replay":
        assert any(row["sampling/replayed_groups"] > 0 for row in numbers.rows[5:])
    for stop in stops:
        torch.manual_seed(100 + stop)  # whatever the new process has drawn so far
        again, rest = make(kind, **options), Numbers()
        resumed = fit(again, data(), rest, ckpt_path=tmp_path / f"step={stop}.ckpt", **settings)
        assert_equal_states(state_of(resumed), expected)
        assert 0 < len(rest.rows) < len(numbers.rows)
        # An auxiliary phase logs nothing of rollouts; what an earlier step has logged is still there in the whole run.
        for ours, theirs in zip(rest.rows, numbers.rows[-len(rest.rows) :], strict=True):
            assert ours.items() <= theirs.items(), stop
            assert "loss" in ours and {"reward", "phasic/kl"} & ours.keys()
