"""Speculative rollouts in the Lightning modules: the same training on the same completions, heads that keep up with
the policy, exact resumption, metrics by their counts, the same numbers as in TRL, refusals."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from rl_plugins.functional.alignment import completion_states
from rl_plugins.lightning import GRPOModule, MTPCriticModule, PromptDataModule
from rl_plugins.nn import MTPHeads, attach_mtp_heads
from rl_plugins.rollouts.batch import Batch
from rl_plugins.rollouts.completions import Completions
from rl_plugins.rollouts.speculative.draft_statistics import DraftStatistics
from rl_plugins.signals import DraftOptions, HeadOptions, ValueHeadOptions
from rl_plugins.signals.critics import Values
from rl_plugins.trl import GRPOVariantConfig, GRPOVariantTrainer, PPOConfig, PPOTrainer

from .helpers.lightning_runs import (
    LORA,
    ONLINE,
    Numbers,
    assert_equal_states,
    changed,
    every_step,
    fit,
    module_factory,
    prompts,
    state_of,
    weights,
)
from .helpers.speculative_cases import SMALL, UNSUITABLE, of_heads, of_values, spread, successors
from .helpers.speculative_models import randomise_heads
from .helpers.tiny import record_passes_only

pytestmark = pytest.mark.filterwarnings(r"ignore:::lightning\.pytorch.*")
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

Make = Callable[..., Any]
DRAFTING = ("grpo", "ppo")
"""Modules whose heads do nothing but draft."""


@pytest.fixture(autouse=True)
def dice() -> None:
    torch.manual_seed(0)


@pytest.fixture
def make(tiny_model: Callable[..., Any], tokenizer: Any) -> Make:
    """Factory: a module on a tiny model, speculative unless told otherwise; keywords go to the module."""
    factory = module_factory(tiny_model, tokenizer, spread)

    def speculative(kind: str, model: Any = None, **options: Any) -> Any:
        model = talkative(tiny_model) if model is None else model
        # The token loss at all tokens: what is drawn depends on how often dice were thrown before.
        shared = {"max_completion_length": 8, "speculative": True, "mtp_loss_share": 1.0}
        heads = {} if "heads" in options else {"num_mtp_heads": 2}
        options = {**shared, **heads, **options}
        if kind == "ppo":
            options = {"num_iterations": 1, "value_learning_rate": 2e-2, **options}
        return factory(kind, model, **options)

    return speculative


def talkative(tiny_model: Callable[..., Any], seed: int = 0) -> Any:
    """A model whose completions end at different places."""
    return tiny_model(seed, initializer_range=0.3)


def with_heads(model: Any, num_heads: int = 2, scale: float = 0.05) -> Any:
    """With random heads, of whose drafts some are accepted."""
    randomise_heads(attach_mtp_heads(model, num_heads), scale)
    return model


def data(size: int = 8, batch_size: int = 8, validated: Any = None) -> PromptDataModule:
    return PromptDataModule(prompts(size), validated, batch_size=batch_size, shuffle=False)


def heads_values(module: Any, batch: Batch, heads: Any) -> Tensor:
    """Values (B, T, K) from the plain hidden states of one forward."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        hidden = module.model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return heads(completion_states(hidden, batch["completion_ids"].shape[1]))


def gradients(module: Any, loss: Tensor) -> dict[str, Tensor]:
    """Gradient of every parameter that has one."""
    module.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in module.model.named_parameters() if p.grad is not None}


def note_statistics(module: Any) -> list[DraftStatistics]:
    """Have the statistics of every rollout noted."""
    notes: list[DraftStatistics] = []
    complete = module._complete

    def noted(prompts: Sequence[Any]) -> Completions:
        found = complete(prompts)
        notes.append(module.decoder.last.statistics)
        return found

    module._complete = noted
    return notes


# Values recorded in a speculative rollout


def test_recorded_values_are_those_of_a_pass(make: Make, tiny_model: Callable[..., Any]) -> None:
    """Of heads and of target heads, in a run that moves both."""
    module = make("critic", with_heads(talkative(tiny_model)), head_learning_rate=1e-1)
    recorded, checked = module.critic.recorded, []

    def compared(batch: Batch, host: Any) -> Values:
        found, mask = recorded(batch, host), batch["completion_mask"].bool()
        assert mask.sum(1).unique().numel() > 2  # ragged
        exact = [heads_values(module, batch, heads) for heads in (module.mtp_heads, module.polyak_target)]
        for values, expected in zip((found.online, found.target), exact, strict=True):
            torch.testing.assert_close(values[mask], expected[mask], atol=1e-5, rtol=1e-5)
        assert exact[0][mask].std() > 0.1
        checked.append((exact[0] - exact[1])[mask].abs().max().item())
        return found

    module.critic.recorded = compared
    fit(module, data(32, 16), max_steps=2)
    assert len(checked) == 2 and checked[0] == 0.0 and checked[1] > 0.05
    assert sum(module.decoder.last.statistics.accepted) > 0


def test_recording_saves_a_pass(make: Make, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> tuple[int, Batch]:
        torch.manual_seed(0)
        module = make("critic", with_heads(talkative(tiny_model)))
        forwards: list[int] = []
        module.model.model.register_forward_hook(lambda *_: forwards.append(1))
        return module.rollout(prompts(16))[0], len(forwards)

    saved, forwards = run()
    record_passes_only(monkeypatch)
    passed, more = run()
    assert more == forwards + 1
    assert torch.equal(saved["completion_ids"], passed["completion_ids"])
    mask = saved["critic_mask"]
    torch.testing.assert_close(saved["old_values"][mask], passed["old_values"][mask], atol=1e-5, rtol=1e-5)


# With and without speculation


@pytest.mark.parametrize("kind", ONLINE)
def test_the_same_completions_give_the_same_loss_and_gradient(
    make: Make, tiny_model: Callable[..., Any], kind: str
) -> None:
    """Bit by bit: the heads that draft take the states of the policy's own forward, and give it nothing back."""

    def model() -> Any:
        return with_heads(talkative(tiny_model)) if kind == "critic" else talkative(tiny_model)

    plain, ours = make(kind, model(), speculative=False), make(kind, model())
    assert (ours.draft_heads is not None) == (kind in DRAFTING) and plain.decoder is None
    batch = ours.rollout(prompts(8))[0]
    loss, metrics = plain.loss(batch)
    our_loss, our_metrics = ours.loss(batch)
    plain_gradients, our_gradients = gradients(plain, loss), gradients(ours, our_loss)
    drafting = {name for name in our_gradients if of_heads(name)} if kind in DRAFTING else set()
    assert our_gradients.keys() - plain_gradients.keys() == drafting
    assert all(torch.equal(our_gradients[name], plain_gradients[name]) for name in plain_gradients)
    assert all(torch.equal(our_metrics[name], value) for name, value in metrics.items())
    if kind == "critic":
        assert torch.equal(our_loss, loss) and our_metrics.keys() == metrics.keys()
        return
    assert drafting and not any(of_values(name) for name in drafting)
    lengths = batch["completion_mask"].sum(1)
    sums = [our_metrics[f"mtp/token_loss/head_{k}"] * (lengths - k).clamp(min=0).sum() for k in (1, 2)]
    torch.testing.assert_close(our_loss - loss, 0.1 * sum(sums) / (2 * lengths.sum()), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ONLINE)
def test_a_greedy_run_is_the_same(make: Make, tiny_model: Callable[..., Any], kind: str) -> None:
    """Greedy completions are the same tokens, so all that is logged is the same, step by step."""
    runs = []
    for speculative in (False, True):
        model = with_heads(talkative(tiny_model)) if kind == "critic" else None
        module = make(kind, model, speculative=speculative, generation_kwargs={"top_k": 1}, learning_rate=1e-3)
        numbers = Numbers()
        fit(module, data(24), numbers, max_steps=3)
        runs.append(numbers.rows)
    plain, ours = runs
    assert len(plain) == 3 and plain[0]["reward"] != plain[-1]["reward"]
    for before, row in zip(plain, ours, strict=True):
        assert {name.partition("/")[0] for name in row.keys() - before.keys()} == {"mtp"}
        for name in before.keys() - ({"loss"} if kind in DRAFTING else set()):
            assert row[name] == pytest.approx(before[name], abs=2e-3 if name == "loss" else 1e-3), name


@pytest.mark.parametrize("kind", DRAFTING)
def test_the_loss_is_that_of_trl(
    make: Make, tiny_model: Callable[..., Any], tokenizer: Any, dataset: Any, tmp_path: Path, kind: str
) -> None:
    """And its gradient, with the token loss of heads that draft."""

    def model() -> Any:
        return with_heads(talkative(tiny_model), scale=0.3)

    module = make(kind, model(), temperature=0.8, mtp_loss_coef=0.5, mtp_detach_trunk=False)
    batch = module.rollout(prompts(8))[0]
    trainer_class, config_class = {"grpo": (GRPOVariantTrainer, GRPOVariantConfig), "ppo": (PPOTrainer, PPOConfig)}[
        kind
    ]
    size = len(batch["completion_ids"])
    args = config_class(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=size,
        num_generations=2 if kind == "grpo" else 1,
        max_completion_length=8,
        report_to="none",
        beta=0.0,
        temperature=0.8,
        speculative=True,
        num_mtp_heads=2,
        mtp_loss_share=1.0,
        mtp_loss_coef=0.5,
        mtp_detach_trunk=False,
        **({} if kind == "grpo" else {"num_iterations": 1}),
    )
    trainer = trainer_class(model(), spread, args, dataset, processing_class=tokenizer)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    theirs = trainer._compute_loss(
        trainer.model, {**batch, "num_items_in_batch": batch["completion_mask"].sum().float()}
    )
    ours, metrics = module.loss(batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert [metrics["mtp/token_loss/head_2"].item()] == pytest.approx(
        trainer._metrics["train"]["mtp/token_loss/head_2"], rel=1e-5
    )
    trainer.model.zero_grad()
    theirs.backward()
    expected = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    found = gradients(module, ours)
    assert found.keys() == expected.keys() and any(of_heads(name) for name in found)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6)


# Heads that draft


@pytest.mark.slow
@pytest.mark.parametrize("kind", DRAFTING)
def test_heads_learn_to_draft_and_leave_values_alone(make: Make, kind: str) -> None:
    module = make(kind, head_learning_rate=3e-2, weight_decay=0.1)
    before = weights(module)
    trainer = fit(module, data(), max_steps=3)
    moved = changed(before, weights(module))
    drafting = {name for name in before if of_heads(name) and not of_values(name)}
    assert len(drafting) == 6 and {name for name in moved if of_heads(name)} == drafting and moved - drafting
    (optimizer,) = trainer.optimizers
    names = {id(p): name for name, p in module.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates.keys() == {name for name in before if not of_values(name)}
    expected = {name: 3e-2 if of_heads(name) else 2e-2 if "value_model" in name else 1e-2 for name in rates}
    assert rates == expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", DRAFTING)
def test_without_a_token_loss_heads_stay_as_they_are(make: Make, kind: str) -> None:
    """And take part in nothing, so that no engine waits for their gradients."""
    module, numbers = make(kind, mtp_loss_coef=0.0), Numbers()
    before = weights(module)
    fit(module, data(), numbers, max_steps=2)
    assert not any(of_heads(name) for name in changed(before, weights(module)))
    assert not any(p.requires_grad for p in module.draft_heads.parameters())
    assert "mtp/tokens_per_step" in numbers.rows[0] and "mtp/token_loss" not in numbers.rows[0]


@pytest.mark.slow
def test_warming_up_the_value_model_teaches_the_heads_but_not_the_policy(make: Make) -> None:
    module = make("ppo", value_warmup_steps=2, mtp_detach_trunk=False)
    before = weights(module)
    fit(module, data(), max_steps=2)
    moved = changed(before, weights(module))
    assert {name for name in before if of_heads(name) and not of_values(name)} <= moved
    assert all(of_heads(name) or "value_model" in name.split(".") for name in moved)


@pytest.mark.slow
@pytest.mark.parametrize("kind", DRAFTING)
def test_heads_are_saved_beside_the_model_and_found_again(make: Make, tmp_path: Path, kind: str) -> None:
    module = make(kind)
    fit(module, data(), max_steps=2)
    module.save_pretrained(tmp_path)
    again = make(kind, str(tmp_path))
    assert not changed(weights(module), weights(again))
    assert again.draft_heads is not None and (tmp_path / "value_model").is_dir() == (kind == "ppo")
    with pytest.raises(ValueError, match="Ask for 2 heads with inner size 32"):
        make(kind, str(tmp_path), num_mtp_heads=1)
    # A critic goes on with them.
    critic = MTPCriticModule(str(tmp_path), reward_funcs=spread, num_mtp_heads=2)
    found = dict(critic.mtp_heads.named_parameters())
    assert not changed(dict(module.draft_heads.named_parameters()), found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", DRAFTING)
def test_heads_that_a_model_comes_with_are_used(make: Make, tiny_model: Callable[..., Any], kind: str) -> None:
    model = with_heads(talkative(tiny_model), num_heads=3)
    heads = MTPHeads.of(model)
    module = make(kind, model, num_mtp_heads=3)
    assert module.draft_heads is heads and module.decoder.draft_length.max_drafts == 3
    values = {name: p.clone() for name, p in heads.named_parameters() if ".value." in name}  # type: ignore[union-attr]
    fit(module, data(), max_steps=2)
    assert all(torch.equal(heads.get_parameter(name), p) for name, p in values.items())  # type: ignore[union-attr]


def test_a_critic_drafts_with_its_own_heads(make: Make) -> None:
    module = make("critic", num_mtp_heads=3, num_draft_tokens=2, draft_cost=0.0)
    assert module.draft_heads is None and module.decoder.draft_length.max_drafts == 2
    numbers = Numbers()
    fit(module, data(), numbers, max_steps=1)
    assert "mtp/acceptance/head_2" in numbers.rows[0]
    assert len(module.decoder.last.statistics.reached) == 3 and module.decoder.last.statistics.reached[2] == 0


# Metrics


@pytest.mark.slow
@pytest.mark.parametrize("kind", ONLINE)
def test_acceptance_is_logged_as_it_was_counted(make: Make, tiny_model: Callable[..., Any], kind: str) -> None:
    own = {"draft_cost": 0.0}
    module, numbers = make(kind, with_heads(talkative(tiny_model)), **own), Numbers()
    notes = note_statistics(module)
    trainer = fit(module, data(validated=prompts(8)), numbers, max_steps=2, num_sanity_val_steps=0)
    assert len(notes) == 4  # two epochs of one batch, each with a validation
    logged = [numbers.rows[0], numbers.rows[1], {k: float(v) for k, v in trainer.callback_metrics.items()}]
    for prefix, row, statistics in zip(("", "", "eval_"), logged, (notes[0], notes[2], notes[3]), strict=True):
        assert 0 < statistics.accepted[0] < statistics.reached[0]
        assert row[f"{prefix}mtp/tokens_per_step"] == pytest.approx(statistics.tokens / statistics.steps, rel=1e-6)
        for k in range(2):
            expected = statistics.accepted[k] / statistics.reached[k]
            assert row[f"{prefix}mtp/acceptance/head_{k + 1}"] == pytest.approx(expected, rel=1e-6)
    assert all(0.5 < row["mtp/token_loss/head_2"] < 10.0 for row in numbers.rows)


def test_nothing_is_said_of_rollouts_that_did_not_draft(make: Make) -> None:
    """A `generate` of one's own that drafts in its first rollout only."""

    class Own(GRPOModule):
        calls = 0

        def generate(self, prompts: Sequence[Any]) -> Completions:
            decoder, self.calls = self.decoder, self.calls + 1
            if self.calls > 1:
                self.decoder = None
            try:
                return super().generate(prompts)
            finally:
                self.decoder = decoder

    module, numbers = make("grpo", cls=Own), Numbers()
    first, second = (module.rollout(prompts(4))[1] for _ in range(2))
    assert "mtp/tokens_per_step" in first and "mtp/tokens_per_step" not in second
    fit(module, data(), numbers, max_steps=1)
    assert "mtp/token_loss" in numbers.rows[0]


def test_a_critics_own_rollouts_are_drafted_but_not_recorded(make: Make, tiny_model: Callable[..., Any]) -> None:
    class Own(MTPCriticModule):
        def generate(self, prompts: Sequence[Any]) -> Completions:
            return super().generate(prompts)

    module = make("critic", with_heads(talkative(tiny_model)), cls=Own)
    batch, metrics = module.rollout(prompts(16))
    mask = batch["critic_mask"]
    exact = heads_values(module, batch, module.mtp_heads)
    torch.testing.assert_close(batch["old_values"][mask], exact[mask], atol=1e-5, rtol=1e-5)
    assert metrics["mtp/tokens_per_step"] > 1.0 and "old_per_token_logps" in batch


@pytest.mark.slow
def test_acceptance_does_not_decay_while_the_policy_learns(make: Make) -> None:
    """As in the test of TRL's trainers."""

    def run(coef: float) -> list[float]:
        torch.manual_seed(0)
        module = make(
            "grpo",
            reward_funcs=successors,
            num_generations=8,
            generation_kwargs={"suppress_tokens": [0, 1, *range(6, 17)]},
            mtp_loss_coef=coef,
            head_learning_rate=3e-2,
            draft_cost=0.0,
        )
        numbers = Numbers()
        fit(module, data(16, 4), numbers, max_steps=30)
        rewards = [row["reward"] for row in numbers.rows]
        assert sum(rewards[-7:]) > 1.3 * sum(rewards[:7])  # the policy has moved
        return [row["mtp/acceptance/head_1"] for row in numbers.rows]

    learning, frozen = run(0.1), run(0.0)
    first, last = sum(learning[:7]) / 7, sum(learning[-7:]) / 7
    assert len(learning) == 30 and last > first + 0.2 and last > 0.8
    assert sum(frozen[-7:]) / 7 < 0.2


# The same seed, and going on

CYCLE: dict[str, Any] = {"steps_per_generation": 2, "num_iterations": 2}
# Kind of module, its options, the Trainer's, and the steps after which it is killed: with CYCLE each batch of prompts
# makes 4 steps, and the second epoch begins after step 8.
RESUMED: dict[str, tuple[str, dict[str, Any], dict[str, Any], list[int]]] = {
    "critic": ("critic", CYCLE, {"max_steps": 10}, [4, 6]),
    "grpo": ("grpo", {**CYCLE, "num_mtp_heads": 3, "draft_cost": 0.2}, {"max_steps": 6}, [2]),
    "ppo_validated": ("ppo", CYCLE, {"max_steps": 6, "val_check_interval": 1}, [1, 4]),
}


@pytest.mark.parametrize("name", [pytest.param("critic", marks=pytest.mark.slow), "grpo", "ppo_validated"])
def test_resumption_is_exact(make: Make, tmp_path: Path, name: str) -> None:
    kind, options, settings, stops = RESUMED[name]
    validated = prompts(4) if "val_check_interval" in settings else None

    def trained(numbers: Numbers) -> list[dict[str, float]]:
        return [{k: v for k, v in row.items() if not k.startswith("eval_")} for row in numbers.rows]

    def rows() -> PromptDataModule:
        return PromptDataModule(prompts(), validated, batch_size=4)

    numbers = Numbers()
    torch.manual_seed(0)
    module = make(kind, **options)
    whole = fit(module, rows(), numbers, every_step(tmp_path), **settings)
    expected, drafting = state_of(whole), module.decoder.state_dict()
    for stop in stops:
        torch.manual_seed(100 + stop)  # whatever the new process has drawn so far
        again, rest = make(kind, **options), Numbers()
        resumed = fit(again, rows(), rest, ckpt_path=tmp_path / f"step={stop}.ckpt", **settings)
        assert_equal_states(state_of(resumed), expected)
        assert again.decoder.state_dict() == drafting
        assert 0 < len(rest.rows) < len(numbers.rows)
        # What is undefined at a step stays as it was before, and a resumed run does not know what that was.
        for row, other in zip(trained(rest), trained(numbers)[-len(rest.rows) :], strict=True):
            assert row == {name: other[name] for name in row}, stop


@pytest.mark.slow
def test_a_resumed_run_drafts_as_many_tokens(make: Make, tmp_path: Path) -> None:
    """None here, after all drafts of many steps were rejected; one that forgot this comes to other completions."""
    torch.manual_seed(0)
    through = make("grpo")
    through.decoder.draft_length.record(8, [0.0, 0.0], [200.0, 200.0], 0.0)
    expected = state_of(fit(through, data(), every_step(tmp_path), max_steps=4))
    assert through.decoder.last.statistics.reached == [0, 0]
    for forgets in (False, True):
        resumed = make("grpo")
        if forgets:
            resumed.decoder.load_state_dict = lambda state: None
        state = state_of(fit(resumed, data(), max_steps=4, ckpt_path=tmp_path / "step=2.ckpt"))
        assert torch.equal(state["dice"], expected["dice"]) != forgets
        assert (resumed.decoder.last.statistics.reached[0] > 0) == forgets


@pytest.mark.slow
@pytest.mark.parametrize("kind", ONLINE)
def test_validation_leaves_training_as_it_is(make: Make, kind: str) -> None:
    """Also in how many tokens it drafts; and the seed decides what comes out."""
    states = []
    for validated in (None, None, prompts(4)):
        torch.manual_seed(0)
        module = make(kind, draft_cost=0.2)
        trainer = fit(module, data(validated=validated), max_steps=3, val_check_interval=1)
        states.append({**state_of(trainer), "drafts": module.decoder.state_dict()})
        assert ("eval_mtp/tokens_per_step" in trainer.callback_metrics) == (validated is not None)
    assert_equal_states(states[1], states[0])
    assert_equal_states(states[2], states[0])


# Other settings


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["critic", "grpo"])
def test_lora_with_heads_that_draft(make: Make, tiny_model: Callable[..., Any], kind: str) -> None:
    model = get_peft_model(talkative(tiny_model), LORA)
    module = make(kind, model, head_learning_rate=1e-2) if kind == "critic" else make(kind, model)
    numbers, before = Numbers(), weights(module)
    fit(module, data(), numbers, max_steps=3)
    learning = {n for n in before if of_heads(n) and (kind == "critic" or not of_values(n))}
    assert changed(before, weights(module)) == {n for n in before if "lora_" in n} | learning
    assert all(0.0 <= row["mtp/acceptance/head_1"] <= 1.0 for row in numbers.rows)


@pytest.mark.parametrize("kind", DRAFTING)
def test_completions_that_are_cut_off_do_not_teach_the_heads(make: Make, kind: str) -> None:
    module = make(kind, mask_truncated_completions=True)
    batch = module.rollout(prompts(16))[0]
    cut = batch["completion_mask"].sum(1) == 0
    assert 0 < cut.sum() < len(cut)
    _, metrics = module.loss(batch)
    _, of_rest = module.loss({**{k: v[~cut] for k, v in batch.items() if v.ndim}, "num_items": batch["num_items"]})
    torch.testing.assert_close(metrics["mtp/token_loss"], of_rest["mtp/token_loss"], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_accumulation_changes_nothing(make: Make) -> None:
    """Token losses are averaged over the micro-batches as the policy's loss is."""

    def run(slices: int) -> dict[str, Tensor]:
        torch.manual_seed(0)
        module = make(
            "grpo",
            steps_per_generation=slices,
            generation_kwargs={"top_k": 1},
            mtp_detach_trunk=False,
            head_learning_rate=0.3,
        )
        module.configure_optimizers = lambda: torch.optim.SGD(module.parameter_groups(), lr=0.1)
        before = weights(module)
        fit(module, data(24), max_steps=2, accumulate_grad_batches=slices)
        after = weights(module)
        assert max((after[n] - before[n]).abs().max().item() for n in before if of_heads(n)) > 1e-3
        return after

    whole, split = run(1), run(4)
    for name in whole:
        torch.testing.assert_close(split[name], whole[name], atol=1e-5, rtol=0)


# Refused before any work starts

REFUSED: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
    (tuple(ONLINE), {"num_draft_tokens": 0}, "num_draft_tokens must be at least 1, got 0"),
    (tuple(ONLINE), {"num_draft_tokens": 3}, "num_draft_tokens must be between 1 and num_mtp_heads=2, .* got 3"),
    (tuple(ONLINE), {"draft_cost": -0.1}, "draft_cost must be at least 0"),
    (DRAFTING, {"num_mtp_heads": 0}, "num_mtp_heads must be at least 1"),
    (DRAFTING, {"mtp_loss_coef": -1.0}, "mtp_loss_coef must be at least 0"),
    (DRAFTING, {"head_learning_rate": -1.0}, "head_learning_rate must be at least 0"),
]


@pytest.mark.parametrize(("kinds", "options", "message"), REFUSED)
def test_settings_are_checked_before_work_starts(
    make: Make, kinds: tuple[str, ...], options: dict[str, Any], message: str
) -> None:
    for kind in kinds:
        with pytest.raises(ValueError, match=message):
            make(kind, **options)


@pytest.mark.parametrize("kind", ONLINE)
def test_options_of_drafting_are_options_like_any_other(make: Make, kind: str) -> None:
    """Given one by one or as a dataclass; there is no dictionary of them, and no other name."""
    for name in ("speculative_kwargs", "num_heads", "adaptive"):
        with pytest.raises(TypeError, match=f"{ONLINE[kind].__name__} has no argument {name}"):
            make(kind, **{name: 2})
    flat = make(kind, num_mtp_heads=3, num_draft_tokens=2, draft_cost=0.1)
    kinds = HeadOptions if kind in DRAFTING else ValueHeadOptions
    drafts = DraftOptions(speculative=True, num_draft_tokens=2, draft_cost=0.1)
    nested = make(kind, speculative=True, heads=kinds(num_mtp_heads=3), drafts=drafts)
    for module in (flat, nested):
        assert MTPHeads.of(module.model).config.num_heads == 3  # type: ignore[union-attr]
        assert (module.decoder.num_draft_tokens, module.decoder.draft_cost) == (2, 0.1)


@pytest.mark.parametrize("kind", ONLINE)
@pytest.mark.parametrize("family", UNSUITABLE)
def test_models_that_cannot_be_decoded_so(make: Make, kind: str, family: str) -> None:
    options, message = UNSUITABLE[family]
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**SMALL, **options))
    with pytest.raises(ValueError, match=message):
        make(kind, model)
