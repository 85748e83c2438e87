"""Data, rewards, and the points to subclass of Lightning's language-model modules."""

import asyncio
import copy
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.deepspeed import remove_module_hooks
from peft import get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader

from rl_plugins.functional.alignment import completion_states
from rl_plugins.lightning import (
    GRPOModule,
    MTPCriticModule,
    MTPSFTModule,
    PromptDataModule,
    RLModule,
)
from rl_plugins.lightning.language import LanguageCallback
from rl_plugins.lightning.prompts import PromptLoader, RepeatSampler, rows_of
from rl_plugins.nn import MTPHeads
from rl_plugins.nn.attachment import trunk_of
from rl_plugins.rollouts.completions import Completions, pad_left
from rl_plugins.signals import Metrics, Signal

from .helpers.lightning_runs import LORA, ONLINE, Numbers, changed, fit, module_factory, perturb, prompts, weights

pytestmark = pytest.mark.filterwarnings(r"ignore:::lightning\.pytorch.*")
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def dice() -> None:
    torch.manual_seed(0)


@pytest.fixture
def make(tiny_model: Callable[..., Any], tokenizer: Any, reward: Any) -> Make:
    """Factory: a module on a tiny model; keywords go to the module."""
    return module_factory(tiny_model, tokenizer, reward)


# Data


def test_rows_of_a_batch() -> None:
    rows = [{"prompt": "1", "answer": 2}, {"prompt": "3", "answer": 4}]
    assert rows_of(rows) == rows
    assert rows_of({"prompt": ["1", "3"], "answer": torch.tensor([2, 4])}) == rows
    assert rows_of(next(iter(DataLoader(rows, batch_size=2)))) == rows  # torch's own collation
    with pytest.raises(TypeError, match="list of rows or a dictionary of columns, got Tensor"):
        rows_of(torch.zeros(2))
    with pytest.raises(TypeError, match="list of rows"):
        rows_of(["1+1="])
    with pytest.raises(ValueError, match="Every row of a batch needs a `prompt`"):
        rows_of([{"text": "1"}])
    with pytest.raises(ValueError, match="there must be at least one row"):
        rows_of([])
    with pytest.raises(ValueError, match=r"must be equally long, got lengths \[1, 2\]"):
        rows_of({"prompt": ["1", "2"], "answer": ["1"]})


def test_every_batch_is_repeated_and_ranks_share_the_rows() -> None:
    samplers = [RepeatSampler(range(11), 2, 3, seed=4, num_replicas=2, rank=rank) for rank in range(2)]
    epochs = []
    for epoch in range(3):
        seen: list[int] = []
        for sampler in samplers:
            sampler.set_epoch(epoch)
            indices = list(sampler)
            assert len(indices) == len(sampler) == 2 * 2 * 3
            batches = [indices[i : i + 2] for i in range(0, len(indices), 2)]
            assert batches == [batches[0]] * 3 + [batches[3]] * 3
            seen += batches[0] + batches[3]
        assert len(set(seen)) == 8, "no prompt twice"
        epochs.append(tuple(seen))
    assert len(set(epochs)) == 3, "another order in every epoch"
    in_order = RepeatSampler(range(5), 2, shuffle=False)
    assert list(in_order) == [0, 1, 2, 3]


def test_a_loader_goes_on_in_the_middle_of_an_epoch() -> None:
    def loader() -> PromptLoader:
        return PromptLoader(prompts(), RepeatSampler(prompts(), 2, 2, seed=1))

    whole = list(loader())
    assert len(whole) == 8 and whole[0] == whole[1] != whole[2]
    first, batches = loader(), []
    for batch in first:
        batches.append(batch)
        if len(batches) == 3:
            break
    second = loader()
    second.load_state_dict(first.state_dict())
    rest = list(second)
    assert batches + rest == whole
    assert second.state_dict() == {"epoch": 0, "batches": 8}
    assert list(second) == whole, "the next pass is a whole one"
    third = loader()
    third.load_state_dict(first.state_dict())
    third.sampler.set_epoch(1)
    assert len(list(third)) == 8, "another epoch starts at its beginning"


@pytest.mark.slow
def test_prompts_for_a_module(make: Make) -> None:
    data = PromptDataModule(prompts(), prompts(3), batch_size=2, shuffle=False)
    batches: list[Any] = []

    class Spy(GRPOModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            batches.append([row["prompt"] for row in batch])
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            batches.append(len(batch))

    fit(make("grpo", cls=Spy, num_iterations=2), data, max_epochs=1, num_sanity_val_steps=0)
    pairs = [["7+7=", "8+8="], ["9+9=", "10+10="], ["11+11=", "12+12="], ["13+13=", "14+14="]]
    assert batches == [pair for pair in pairs for _ in range(2)] + [2, 1]
    with pytest.raises(ValueError, match="8 prompts do not fill one batch of 9 on each of 1 ranks: lower the batch"):
        fit(make("grpo"), PromptDataModule(prompts(), batch_size=9), max_steps=1)


def test_an_empty_prompt(make: Make) -> None:
    rows = [{"prompt": "1+1="}, {"prompt": ""}]
    with pytest.raises(ValueError, match="A prompt has no tokens"):
        fit(make("grpo"), PromptDataModule(rows, batch_size=2), max_steps=1)


# Rewards


def test_reward_functions_see_the_rows_and_the_trainer(make: Make, tokenizer: Any) -> None:
    steps: list[int] = []
    answers: list[list[str]] = []

    def right(
        prompts: Any,
        completions: Any,
        completion_ids: Any,
        answer: Any,
        trainer_state: Any,
        log_metric: Any,
        log_extra: Any,
    ) -> list[Any]:
        steps.append(trainer_state.global_step)
        for value in (1.0, 4.0):
            log_metric("mine", value + trainer_state.global_step)
        log_extra("seen", answer)
        answers.append(answer)
        assert [int(prompt.split("+")[0]) * 2 for prompt in prompts] == [int(a) for a in answer]
        assert tokenizer.batch_decode(completion_ids, skip_special_tokens=True) == completions
        assert prompts[0] == prompts[1] != prompts[2] and len(prompts) == 8
        return [None if i % 4 == 0 else i for i in range(8)]

    async def later(completions: list[str], **kwargs: Any) -> list[float]:
        await asyncio.sleep(0)
        return [1.0 if i == 3 else math.inf if i == 5 else 0.5 for i in range(len(completions))]

    numbers = Numbers()
    module = make("grpo", reward_funcs=[right, later], reward_weights=[2.0, -1.0])
    fit(module, PromptDataModule(prompts(), batch_size=4), numbers, max_steps=2)
    assert steps == [0, 1]
    assert [row["mine"] for row in numbers.rows] == [2.5, 3.5]
    assert module.last_extras == {"seen": answers[1]} and answers[1] != answers[0]
    nan = math.nan
    expected = torch.tensor([-0.5, 1.5, 3.5, 5.0, -0.5, nan, 11.5, 13.5])
    torch.testing.assert_close(module.last_rollout["scores"], expected, equal_nan=True)
    assert numbers.rows[0]["rewards/right/mean"] == pytest.approx((1 + 2 + 3 + 5 + 6 + 7) / 6)
    assert numbers.rows[0]["rewards/later/mean"] == pytest.approx((6 * 0.5 + 1.0) / 7)
    advantages = module.last_rollout["advantages"]
    assert advantages.isfinite().all() and advantages[5] == 0.0


def test_a_reward_function_that_raises_is_named(make: Make) -> None:
    def broken(**kwargs: Any) -> list[float]:
        raise KeyError("answer")

    with pytest.raises(KeyError) as caught:
        fit(make("grpo", reward_funcs=broken), PromptDataModule(prompts(), batch_size=2), max_steps=1)
    assert "Raised by the reward function 'broken'." in caught.value.__notes__


# Points to subclass


def echo(self: Any, texts: Sequence[str]) -> Completions:
    """Every prompt's completion is its own first characters, and an end."""
    ids = self.tokenizer(text=list(texts))["input_ids"]
    rows = [[*row[: 2 + i % 3], 1] for i, row in enumerate(ids)]
    backwards, mask = pad_left([row[::-1] for row in rows], 0, "cpu")
    prompt_ids, prompt_mask = pad_left(ids, 0, "cpu")
    return Completions(
        prompt_ids, prompt_mask, backwards.flip(1), mask.flip(1), torch.ones(len(rows), dtype=torch.bool)
    )


@pytest.mark.parametrize("kind", ONLINE)
def test_rollouts_of_ones_own(make: Make, kind: str) -> None:
    base = ONLINE[kind]
    module = make(kind, cls=type("Echo", (base,), {"generate": echo}), num_generations=2)
    perturb(module.model)
    numbers = Numbers()
    fit(module, PromptDataModule(prompts(), batch_size=4, shuffle=False), numbers, max_steps=1)
    batch = module.last_rollout
    texts = module.tokenizer.batch_decode(batch["completion_ids"], skip_special_tokens=True)
    assert texts == [row["prompt"][: 2 + i % 3] for i, row in enumerate(r for r in prompts(4) for _ in range(2))]
    assert numbers.rows[0]["completions/clipped_ratio"] == 0.0


def heads_values(module: Any, batch: Any, heads: Any) -> Tensor:
    """Values (B, T, K) from the plain hidden states of one forward."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        hidden = module.model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return heads(completion_states(hidden, batch["completion_ids"].shape[1]))


@pytest.mark.parametrize("off_policy", [False, True])
def test_values_of_ones_own_rollouts_come_from_a_pass(make: Make, off_policy: bool) -> None:
    """And are those that would have been saved while generating."""

    class Own(MTPCriticModule):
        def generate(self, prompts: Sequence[Any]) -> Completions:
            return super().generate(prompts)

    rollouts = []
    for cls in (MTPCriticModule, Own):
        module = make("critic", cls=cls, num_iterations=1 + off_policy, max_completion_length=12)
        perturb(module.model)
        torch.manual_seed(0)
        rollouts.append(module.rollout(prompts(16))[0])
    saved, passed = rollouts
    assert torch.equal(saved["completion_ids"], passed["completion_ids"])
    mask = saved["completion_mask"].bool()
    assert mask.sum(1).unique().numel() > 1
    torch.testing.assert_close(passed["old_values"][mask], saved["old_values"][mask], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(passed["returns"], saved["returns"], rtol=1e-5, atol=1e-5)
    exact = heads_values(module, passed, module.mtp_heads)
    torch.testing.assert_close(passed["old_values"][mask], exact[mask], rtol=1e-5, atol=1e-5)
    assert exact[mask].std() > 0.1


@pytest.mark.parametrize(
    ("kwargs", "passes"),
    [
        ({"prefill_chunk_size": 5}, 0),
        ({"prompt_lookup_num_tokens": 3}, 1),
        ({"num_beams": 2}, 1),
        ({"use_cache": False}, 0),
        ({"cache_implementation": "static"}, 0),
    ],
)
def test_values_belong_to_their_tokens_however_they_are_generated(
    make: Make, kwargs: dict[str, Any], passes: int
) -> None:
    module = make("critic", generation_kwargs=kwargs, max_completion_length=12)
    perturb(module.model)
    rows = 1 if "prompt_lookup_num_tokens" in kwargs else 8  # transformers looks up one prompt at a time
    batch = module.rollout(prompts(rows))[0]
    exact, mask = heads_values(module, batch, module.mtp_heads), batch["completion_mask"].bool()
    torch.testing.assert_close(batch["old_values"][mask], exact[mask], rtol=1e-5, atol=1e-5)
    assert exact[mask].std() > 0.1 and len(module.critic._passes) == passes


def test_a_generate_that_is_set_on_the_module_is_ones_own(make: Make) -> None:
    module = make("critic", max_completion_length=12)
    perturb(module.model)
    own = module.generate
    module.generate = lambda prompts: own(list(reversed(prompts)))
    batch = module.rollout(prompts(4))[0]
    exact, mask = heads_values(module, batch, module.mtp_heads), batch["completion_mask"].bool()
    torch.testing.assert_close(batch["old_values"][mask], exact[mask], rtol=1e-5, atol=1e-5)
    assert len(module.critic._passes) == 1


def test_scores_of_ones_own(make: Make) -> None:
    class Counted(GRPOModule):
        def score(self, rows: Any, completions: Completions) -> Tensor:
            assert len(rows) == len(completions.completion_ids)
            return torch.arange(len(rows)).float().unsqueeze(1)

    numbers = Numbers()
    module = make("grpo", cls=Counted)
    fit(module, PromptDataModule(prompts(), batch_size=4), numbers, max_steps=1)
    assert module.last_rollout["scores"].tolist() == list(range(8))
    assert numbers.rows[0]["reward"] == 3.5
    # Deviations of a half from the mean of each pair, over its sample standard deviation.
    expected = torch.tensor([-0.5, 0.5] * 4) / math.sqrt(0.5)
    torch.testing.assert_close(module.last_rollout["advantages"], expected, rtol=1e-3, atol=0.0)


def test_advantages_of_ones_own(make: Make) -> None:
    class Constant(Signal):
        def advantages(self, batch: Any, scores: Tensor, prompts: Any, host: Any) -> Metrics:
            assert len(prompts) == len(scores) and prompts[0] == prompts[1] and host.group_size == 2
            batch["advantages"] = torch.full_like(scores, 2.0)
            return Metrics({"mine": scores.sum()})

    numbers = Numbers()
    module = make("grpo", cls=RLModule, signal=Constant(), policy_loss="vanilla")
    fit(module, PromptDataModule(prompts(), batch_size=4), numbers, max_steps=1)
    batch = module.last_rollout
    assert numbers.rows[0]["mine"] == pytest.approx(float(batch["scores"].sum()))
    fresh = make("grpo", cls=RLModule, signal=Constant(), policy_loss="vanilla")
    logps = fresh.log_probs(batch)
    mask = batch["completion_mask"].bool()
    assert numbers.rows[0]["loss"] == pytest.approx(-2.0 * float(logps[mask].mean()), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ONLINE)
def test_an_adapter_with_its_reference(make: Make, tiny_model: Callable[..., Any], kind: str) -> None:
    """The reference of a PEFT model is the model without its adapters, whatever these have learnt."""
    base = tiny_model(initializer_range=0.2)
    critic = {"value_model": base} if kind == "ppo" else {}  # the trunk of an adapted model is not copied
    module = make(kind, get_peft_model(copy.deepcopy(base), LORA), beta=0.2, num_iterations=2, **critic)
    assert not module.reference.is_copy
    before = weights(module)
    fit(module, PromptDataModule(prompts(), batch_size=4), max_steps=3)
    learnt = {"critic": "mtp_heads", "ppo": "value_model", "grpo": "nothing"}[kind]
    moved = {name for name in changed(before, weights(module)) if learnt not in name.split(".")}
    assert moved and all("lora_" in name for name in moved)
    plain, batch = make("grpo", base), module.last_rollout
    torch.testing.assert_close(batch["ref_per_token_logps"], plain.log_probs(batch), rtol=1e-5, atol=1e-5)
    assert (module.log_probs(batch) - batch["ref_per_token_logps"]).abs().max() > 1e-3


@pytest.mark.slow
def test_the_reference_is_a_copy_without_attachments(make: Make, tiny_model: Callable[..., Any]) -> None:
    first = make("critic")
    second = make("critic", first.model, beta=0.1)  # heads of an earlier run
    reference = second.reference.model
    assert MTPHeads.of(reference) is None and MTPHeads.of(second.model) is first.mtp_heads
    assert not any(p.requires_grad for p in reference.parameters()) and not reference.training
    assert not any("reference" in name for name in second.state_dict())
    seen: list[Tensor] = []
    with second.mtp_heads.watching(seen.append):
        reference(input_ids=torch.tensor([[3, 4]]))
    assert not seen
    start = {name: p.clone() for name, p in reference.named_parameters()}
    fit(second, PromptDataModule(prompts(), batch_size=4), max_steps=2)
    assert all(torch.equal(p, start[name]) for name, p in reference.named_parameters())
    plain = make("grpo", tiny_model(initializer_range=0.2))
    torch.testing.assert_close(
        second.last_rollout["ref_per_token_logps"], plain.log_probs(second.last_rollout), rtol=1e-6, atol=1e-6
    )


def test_log_probabilities_are_of_the_policy_that_samples(make: Make) -> None:
    module = make("ppo", temperature=0.7, steps_per_generation=2)
    batch, _ = module.rollout(prompts())
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        logits = module.model(input_ids=ids, attention_mask=mask).logits[:, batch["prompt_ids"].shape[1] - 1 : -1]
    exact = (logits / 0.7).log_softmax(-1).gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)
    real = batch["completion_mask"].bool()
    torch.testing.assert_close(batch["old_per_token_logps"][real], exact[real], rtol=1e-5, atol=1e-5)
    assert batch["num_items"] == real.sum() / 2


@pytest.mark.parametrize(("kind", "shuffled"), [("ppo", True), ("grpo", False)])
def test_slices_of_every_pass(make: Make, kind: str, shuffled: bool) -> None:
    """Every pass is over the same completions; PPO draws its minibatches anew for each."""
    seen: list[list[str]] = []

    class Spy(ONLINE[kind]):  # type: ignore[misc,name-defined]
        def loss(self, inputs: Any) -> Any:
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
            seen.append(self.tokenizer.batch_decode(ids))
            return super().loss(inputs)

    options = {"steps_per_generation": 2, "num_iterations": 2}
    fit(make(kind, cls=Spy, **options), PromptDataModule(prompts(), batch_size=8), max_steps=4)
    assert [len(rows) for rows in seen] == ([4] * 4 if kind == "ppo" else [8] * 4)
    assert sorted(seen[0] + seen[1]) == sorted(seen[2] + seen[3])
    assert not set(seen[0]) & set(seen[1])
    assert (sorted(seen[0]) != sorted(seen[2])) == shuffled


# Supervised fine-tuning


def test_rows_become_tokens(tiny_model: Callable[..., Any], tokenizer: Any) -> None:
    module = MTPSFTModule(tiny_model(), tokenizer, max_length=7)
    rows = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "12+12=", "completion": "24"}, {"text": "3="}]
    batch = module.collate(rows)
    ids = [[3, 12, 3, 14, 4, 1], [3, 4, 12, 3, 4, 14, 4], [5, 14, 1]]  # the second is cut off
    assert batch["input_ids"].tolist() == [ids[0] + [0], ids[1], ids[2] + [0] * 4]
    assert batch["attention_mask"].tolist() == [[1] * 6 + [0], [1] * 7, [1] * 3 + [0] * 4]
    expected = [[-100] * 4 + [4, 1, -100], [-100] * 6 + [4], [5, 14, 1] + [-100] * 4]
    assert batch["labels"].tolist() == expected
    whole = MTPSFTModule(tiny_model(), tokenizer, completion_only=False).collate(rows[:1])
    assert whole["labels"].tolist() == [ids[0]]
    columns = {"prompt": ["1+1="], "completion": ["2"], "reward": [None]}
    scored = module.tensors(columns)
    assert scored["input_ids"].tolist() == [ids[0]] and scored["reward"].isnan().all()
    assert module.tensors(batch).keys() == batch.keys()
    with pytest.raises(ValueError, match="A row needs `prompt` and `completion`, or `text`; one has prompt"):
        module.collate([{"prompt": "1"}])


def test_conversations_become_tokens(tiny_model: Callable[..., Any], tokenizer: Any) -> None:
    chatty = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>", eos_token="<eos>")
    chatty.chat_template = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}{% if add_generation_prompt %}={% endif %}"  # noqa: E501  # fmt: skip
    module = MTPSFTModule(tiny_model(), chatty)
    row = {
        "prompt": [{"role": "user", "content": "1+1"}],
        "completion": [{"role": "assistant", "content": "=2"}],
    }
    batch = module.collate([row])
    assert batch["input_ids"].tolist() == [[3, 12, 3, 14, 4, 1]]
    assert batch["labels"].tolist() == [[-100] * 4 + [4, 1]]


@pytest.mark.parametrize("host", ["critic", "ppo"])
def test_hooks_that_a_strategy_takes_off_are_put_back(make: Make, host: str) -> None:
    """As Lightning's DeepSpeed strategy does before it evaluates."""
    module = make(host)
    attached = trunk_of(module.model)._forward_hooks if host == "critic" else module.model._forward_pre_hooks
    hooks = list(attached.values())
    for each, _ in module.language.attached:
        each.hook(module.model)
    assert list(attached.values()) == hooks and len(hooks) == 1, "a hook that is there stays alone"
    remove_module_hooks(module)
    rows = prompts()[:4]
    with pytest.raises((ValueError, RuntimeError)):
        module.rollout(rows)
    callback, trainer = LanguageCallback(), Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.critic.copy()
    callback.on_validation_start(trainer, module)
    batch, _ = module.rollout(rows)
    assert batch["old_values"].shape[:2] == batch["completion_ids"].shape
    remove_module_hooks(module)
    callback.on_fit_start(trainer, module)
    loss, _ = module.loss(batch)
    assert loss.isfinite()
