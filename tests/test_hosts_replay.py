"""The replay of values in both hosts: whose values are used, which states are cached, what is left alone, resume."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback

from rl_plugins.lightning import MTPCriticModule, PromptDataModule
from rl_plugins.nn import MTPHeads, attach_mtp_heads
from rl_plugins.nn.attachment import base_model_of
from rl_plugins.nn.target_heads import RowCopy, ValueCopy
from rl_plugins.trl import MTPCriticConfig, MTPCriticTrainer

from .helpers.host_pairs import attach_trainer
from .helpers.lightning_runs import Numbers, assert_equal_states, every_step, fit, prompts, state_of
from .helpers.speculative_cases import spread
from .helpers.speculative_models import randomise_heads
from .helpers.tiny import ON_CPU, make_dataset, make_tiny_model

pytestmark = pytest.mark.filterwarnings(r"ignore:::lightning\.pytorch.*")
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

HOSTS = ("trl", "lightning")
HEADS = ("parallel", "sequential")


def talkative(head_type: str = "parallel", num_heads: int = 2) -> Any:
    """A model whose completions end at different places, with heads of whose drafts some are accepted."""
    model = make_tiny_model(0, initializer_range=0.3)
    randomise_heads(attach_mtp_heads(model, num_heads, head_type=head_type), 0.05)
    return model


@pytest.fixture
def make(tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    """Factory: a trainer or a module, as a run of its host has it."""

    def factory(
        host: str, head_type: str = "parallel", output_dir: str = "run", attached: bool = True, **options: Any
    ) -> Any:
        options = {
            "num_mtp_heads": 2,
            "mtp_head_type": head_type,
            "max_completion_length": 8,
            "learning_rate": 1e-3,
            "value_replay": 2,
            "value_replay_learning_rate": 1e-2,
            **options,
        }
        model = options.pop("model", None) or talkative(head_type, options["num_mtp_heads"])
        if host == "lightning":
            module = MTPCriticModule(model, tokenizer, spread, beta=0.0, lr_scheduler_type="constant", **options)
            module.generation["suppress_tokens"] = [0]  # TRL takes a sampled padding token for an end
            if attached:
                attach_trainer(module)
            return module
        callbacks = options.pop("callbacks", None)
        args = MTPCriticConfig(
            **{
                "output_dir": str(tmp_path / output_dir),
                **ON_CPU,
                "per_device_train_batch_size": 8,
                "max_steps": 2,
                "logging_steps": 1,
                "generation_kwargs": {"suppress_tokens": [0]},
                **options,
            }
        )
        data: Dataset = make_dataset()
        trainer = MTPCriticTrainer(model, spread, args, data, processing_class=tokenizer, callbacks=callbacks)
        trainer.current_gradient_accumulation_steps = 1
        return trainer

    return factory


def rollout(host: Any, rows: int = 8, seed: int = 0, training: bool = True) -> dict[str, Any]:
    """One batch of completions of `8+8=` and so on: some prompts are shorter than others."""
    torch.manual_seed(seed)
    host.model.train(training)
    if not hasattr(host, "accelerator"):
        host.train(training)
    asked = [{"prompt": f"{n}+{n}="} for n in range(8, 8 + rows)]
    if hasattr(host, "accelerator"):
        return host._generate_and_score_completions(asked)
    return host.rollout(asked)[0]


@torch.no_grad()
def states_by_hand(model: Any, batch: dict[str, Any]) -> Tensor:
    """What parallel heads judge (N, D): every completion alone, from one pass over its row."""
    found, base = [], base_model_of(model)
    heads = MTPHeads.of(base)
    assert heads is not None
    for i in range(len(batch["completion_ids"])):
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
        completion = batch["completion_ids"][i][batch["completion_mask"][i].bool()]
        kept: list[Tensor] = []
        with heads.watching(lambda hidden, kept=kept: kept.append(heads.states(hidden))):
            base(input_ids=torch.cat([prompt, completion])[None], use_cache=False)
        found.append(kept[0][0, len(prompt) - 1 : -1])
    return torch.cat(found)


@torch.no_grad()
def values_by_hand(model: Any, judge: Any, batch: dict[str, Any]) -> Tensor:
    """What a copy of the heads says of every state (N, K), each completion alone."""
    if isinstance(judge, ValueCopy):
        return judge(states_by_hand(model, batch))
    found, base = [], base_model_of(model)
    for i in range(len(batch["completion_ids"])):
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
        completion = batch["completion_ids"][i][batch["completion_mask"][i].bool()]
        ids = torch.cat([prompt, completion])[None]
        hidden = base.model(input_ids=ids, use_cache=False).last_hidden_state
        found.append(judge(hidden, ids, None, None)[0, len(prompt) - 1 : -1])
    return torch.cat(found)


def replay_of(host: Any) -> Any:
    return host.critic.replay


GENERATION: dict[str, dict[str, Any]] = {
    "generate": {},
    "no_cache": {"generation_kwargs": {"suppress_tokens": [0], "use_cache": False}},
    "a_pass": {"generation_kwargs": {"suppress_tokens": [0], "num_beams": 2}},
    "speculative": {"speculative": True, "draft_cost": 0.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("way", GENERATION)
@pytest.mark.parametrize("head_type", HEADS)
@pytest.mark.parametrize("host", HOSTS)
def test_states_are_those_of_the_finished_rows(make: Callable[..., Any], host: str, head_type: str, way: str) -> None:
    critic = make(host, head_type, **GENERATION[way])
    batch = rollout(critic)
    mask = batch["completion_mask"].bool()
    assert mask.sum(1).unique().numel() > 1 and not mask.all()
    (kept,) = replay_of(critic).rollouts
    assert torch.equal(kept.mask, mask)
    if head_type == "parallel":
        torch.testing.assert_close(kept.states, states_by_hand(critic.model, batch), atol=1e-5, rtol=1e-4)
    else:
        hidden, ids, whole, positions = kept.rows
        for i, real in enumerate(whole.bool()):
            with torch.no_grad():
                expected = base_model_of(critic.model).model(input_ids=ids[i, real][None]).last_hidden_state
            torch.testing.assert_close(hidden[i, real], expected[0], atol=1e-5, rtol=1e-4)
            assert (positions[i, real].diff() == 1).all()
        real = whole.bool()
        assert torch.equal(whole, torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1))
        assert torch.equal(ids[real], torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)[real])
    at_the_end = kept.rewards.sum(1)
    torch.testing.assert_close(at_the_end, batch["returns"][:, 0] * mask[:, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("head_type", HEADS)
@pytest.mark.parametrize("host", HOSTS)
def test_values_are_those_of_the_copy_as_it_was_before(make: Callable[..., Any], host: str, head_type: str) -> None:
    """A rollout is judged before the copy learns from it, and the policy's own heads learn nothing from a replay."""
    critic = make(host, head_type)
    heads = MTPHeads.of(critic.model)
    assert heads is not None
    assert isinstance(critic.critic.target, ValueCopy if head_type == "parallel" else RowCopy)
    assert critic.polyak_target is None
    before = {name: p.detach().clone() for name, p in critic.model.named_parameters()}
    rollout(critic, seed=1)
    learned = copy.deepcopy(critic.critic.target)
    batch = rollout(critic, seed=2)
    mask = batch["completion_mask"].bool()
    expected = values_by_hand(critic.model, learned, batch)
    later = values_by_hand(critic.model, critic.critic.target, batch)
    own = values_by_hand(critic.model, (ValueCopy if head_type == "parallel" else RowCopy)(heads), batch)
    torch.testing.assert_close(batch["old_values"][mask], expected, atol=1e-5, rtol=1e-4)
    assert (expected - own).abs().max() > 0.01 and (expected - later).abs().max() > 0.001
    assert all(torch.equal(p, before[name]) for name, p in critic.model.named_parameters())
    values, rewards = batch["old_values"][..., 0] * mask, batch["returns"] * mask
    # Lambda 1: what was observed, less the values times the slope that fits them to it.
    observed, forecast = rewards[mask], values[mask]
    slope = torch.cov(torch.stack([forecast, observed]))[0, 1] / forecast.var()
    real = observed - slope.clamp(0, 1) * forecast
    white = (real - real.mean()) / real.std(correction=0)
    torch.testing.assert_close(batch["advantages"][mask], white, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("head_type", HEADS)
@pytest.mark.parametrize("host", HOSTS)
def test_the_losses_of_the_step_are_those_without_a_replay(
    make: Callable[..., Any], host: str, head_type: str
) -> None:
    """On the first rollout the copy is the heads, so that nothing differs."""
    batches, terms = [], []
    for passes in (0, 3):
        critic = make(host, head_type, value_replay=passes)
        batches.append(rollout(critic))
        batch = batches[-1]
        loss = critic._compute_loss(critic.model, dict(batch)) if host == "trl" else critic.loss(batch)[0]
        loss.backward()
        terms.append((loss.detach(), {n: p.grad for n, p in critic.model.named_parameters() if p.grad is not None}))
    mask = batches[0]["completion_mask"].bool()
    for name in ("advantages", "returns", "old_values", "td_errors"):
        torch.testing.assert_close(batches[0][name][mask], batches[1][name][mask], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(terms[0][0], terms[1][0])
    assert terms[0][1].keys() == terms[1][1].keys()
    for name, gradient in terms[0][1].items():
        torch.testing.assert_close(gradient, terms[1][1][name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("host", HOSTS)
def test_an_evaluation_teaches_nothing(make: Callable[..., Any], host: str) -> None:
    critic = make(host)
    rollout(critic)
    before, kept = copy.deepcopy(critic.critic.state_dict()), len(replay_of(critic).rollouts)
    rollout(critic, seed=5, training=False)
    assert len(replay_of(critic).rollouts) == kept
    after = critic.critic.state_dict()
    assert after["num_learned"] == before["num_learned"]
    assert all(torch.equal(after["values"][name], x) for name, x in before["values"].items())


@pytest.mark.parametrize("head_type", HEADS)
def test_both_hosts_learn_the_same(make: Callable[..., Any], head_type: str) -> None:
    trl, lightning = make("trl", head_type, seed=0), make("lightning", head_type)
    for seed in range(3):
        batches = [rollout(host, seed=seed) for host in (trl, lightning)]
        assert torch.equal(batches[0]["completion_ids"], batches[1]["completion_ids"])
        torch.testing.assert_close(batches[0]["advantages"], batches[1]["advantages"])
    states = [host.critic.state_dict()["values"] for host in (trl, lightning)]
    for name, x in states[0].items():
        torch.testing.assert_close(states[1][name], x, msg=name)


@pytest.mark.parametrize("head_type", HEADS)
@pytest.mark.parametrize("host", HOSTS)
def test_memory_is_bounded(make: Callable[..., Any], host: str, head_type: str) -> None:
    size = 60 if head_type == "parallel" else 120
    critic = make(host, head_type, value_replay_size=size, value_replay_rollouts=3)
    for seed in range(5):
        batch = rollout(critic, seed=seed)
        rollouts = replay_of(critic).rollouts
        states = [kept.states[:, 0] if head_type == "parallel" else kept.rows[1].flatten() for kept in rollouts]
        assert all(0 < len(x) <= size // 3 for x in states)
        assert all(len(kept.mask) < len(batch["completion_mask"]) for kept in rollouts)
    assert len(rollouts) == 3
    assert critic.critic._kept is None


@pytest.mark.parametrize("host", HOSTS)
def test_a_clipped_value_loss_is_refused(make: Callable[..., Any], host: str) -> None:
    with pytest.raises(ValueError, match="value_loss_type='squared'"):
        make(host, value_loss_type="clipped")


@pytest.mark.parametrize("host", HOSTS)
def test_unscored_completions_teach_nothing(make: Callable[..., Any], tokenizer: Any, host: str) -> None:
    critic = make(host)

    def some(completions: list[str], **kwargs: Any) -> list[float | None]:
        return [None if i % 2 else 1.0 for i in range(len(completions))]

    critic.reward_funcs = [some]
    batch = rollout(critic)
    (kept,) = replay_of(critic).rollouts
    mask = batch["completion_mask"].bool()
    mask[1::2] = False
    assert torch.equal(kept.mask, mask) and len(kept.states) == mask.sum()


class Stop(TrainerCallback):
    """Fails in the middle of a run."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise InterruptedError


class Interrupt(Numbers):
    """Fails in the middle of a run."""

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 3:
            raise InterruptedError


def assert_equal_replays(ours: Any, theirs: Any) -> None:
    ours, theirs = ({**x.critic.state_dict(), **x.critic.rank_state()} for x in (ours, theirs))
    assert ours["num_learned"] == theirs["num_learned"] == 4
    assert all(torch.equal(ours["values"][name], x) for name, x in theirs["values"].items())
    for name in ("exp_avg", "exp_avg_sq", "step"):
        pairs = zip(ours["optimizer"]["state"].values(), theirs["optimizer"]["state"].values(), strict=True)
        assert all(torch.equal(a[name], b[name]) for a, b in pairs)
    for a, b in zip(ours["rollouts"], theirs["rollouts"], strict=True):
        assert a.keys() == b.keys() and a["num_steps"] == b["num_steps"]
        assert all(torch.equal(a[name], b[name]) for name in ("rewards", "mask"))
        states = [[x["states"]] if x["kind"] == "states" else x["rows"] for x in (a, b)]
        assert all(torch.equal(x, y) for x, y in zip(*states, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("head_type", HEADS)
def test_trl_resumes_where_it_stopped(make: Callable[..., Any], tmp_path: Path, head_type: str) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    through = make("trl", head_type, "through", **options)
    through.train()
    with pytest.raises(InterruptedError):
        make("trl", head_type, "killed", callbacks=[Stop()], **options).train()
    resumed = make("trl", head_type, "resumed", **options)
    with torch.no_grad():
        for p in resumed.model.parameters():
            p.add_(1.0)
    resumed.train(resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-2"))
    assert_equal_replays(resumed, through)
    weights = dict(through.model.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in resumed.model.named_parameters())
    logged = [
        [row["critic/replay_loss"] for row in x.state.log_history if "critic/replay_loss" in row]
        for x in (through, resumed)
    ]
    assert logged[0] == logged[1] and len(logged[0]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("head_type", HEADS)
def test_lightning_resumes_where_it_stopped(make: Callable[..., Any], tmp_path: Path, head_type: str) -> None:
    def data() -> PromptDataModule:
        return PromptDataModule(prompts(), batch_size=2)

    torch.manual_seed(0)
    through = fit(make("lightning", head_type, attached=False), data(), every_step(tmp_path / "a"), max_steps=4)
    torch.manual_seed(0)
    with pytest.raises(InterruptedError):
        fit(make("lightning", head_type, attached=False), data(), every_step(tmp_path), Interrupt(), max_steps=4)
    fresh = make("lightning", head_type, attached=False)
    with torch.no_grad():
        for p in fresh.parameters():
            p.add_(1.0)
    resumed = fit(fresh, data(), every_step(tmp_path / "b"), max_steps=4, ckpt_path=tmp_path / "step=2.ckpt")
    assert_equal_states(state_of(resumed), state_of(through))
    assert_equal_replays(resumed.lightning_module, through.lightning_module)
