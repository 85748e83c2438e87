"""What cannot work in Lightning is refused before any work starts, in a sentence that says what to do."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3ForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from rl_plugins.lightning import (
    GRPOModule,
    MoEBalancingCallback,
    PolyakCallback,
    PromptDataModule,
)
from rl_plugins.moe.config import BalancingConfig
from rl_plugins.rollouts import TokenRewards
from rl_plugins.trl import MoEBalancingCallback as TRLBalancing

from .helpers.bad_rewards import ARGUMENTS, RETURNS, asks, closed, reads
from .helpers.lightning_runs import KINDS, ONLINE, every_step, fit, module_factory, prompts

Make = Callable[..., Any]
DEMONSTRATIONS = [{"prompt": "1+1=", "completion": "2"}] * 4
CHAT = [{"role": "user", "content": "1+1="}]


@pytest.fixture
def make(tiny_model: Callable[..., Any], tokenizer: Any, reward: Any) -> Make:
    return module_factory(tiny_model, tokenizer, reward)


def rows(kind: str) -> list[dict[str, Any]]:
    return DEMONSTRATIONS if kind == "sft" else prompts(4)


# Models


MODELS: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "encoder-decoder": (
        lambda model: T5ForConditionalGeneration(T5Config(vocab_size=16, d_model=16, d_kv=8, d_ff=16, num_layers=1)),
        ValueError,
        "T5ForConditionalGeneration is an encoder-decoder .* Use a causal",
    ),
    "trunk": (lambda model: model.model, ValueError, "Qwen3Model has no LM head.* AutoModelForCausalLM"),
    "classifier": (
        lambda model: Qwen3ForSequenceClassification(model.config),
        ValueError,
        "Qwen3ForSequenceClassification has no LM head",
    ),
    "module": (lambda model: torch.nn.Linear(2, 2), TypeError, "PreTrainedModel or a PEFT model.* got Linear"),
    "no folder": (lambda model: "./no/such/model", FileNotFoundError, "model='./no/such/model': there is no"),
    "no hub id": (lambda model: "no-such/model", FileNotFoundError, "model='no-such/model' is neither .* Check"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_models(make: Make, tiny_model: Callable[..., Any], kind: str, name: str) -> None:
    model, error, message = MODELS[name]
    with pytest.raises(error, match=message):
        make(kind, model=model(tiny_model()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["encoder-decoder", "trunk", "classifier"])
def test_saved_models(make: Make, tiny_model: Callable[..., Any], tmp_path: Path, kind: str, name: str) -> None:
    model, error, message = MODELS[name]
    model(tiny_model(tie_word_embeddings=False)).save_pretrained(tmp_path)
    with pytest.raises(error, match=message):  # and no head is made up
        make(kind, model=str(tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_float16_weights(make: Make, tiny_model: Callable[..., Any], kind: str) -> None:
    data = PromptDataModule(rows(kind), batch_size=2)
    with pytest.raises(ValueError, match="is in float16.* Load the model in float32"):
        fit(make(kind, model=tiny_model().half()), data, max_steps=1)
    with pytest.raises(ValueError, match="precision='16-true' trains float16 weights .* Use precision='bf16-mixed'"):
        fit(make(kind), data, max_steps=1, precision="16-true")


def test_tokenizers(tiny_model: Callable[..., Any], tokenizer: Any, reward: Any) -> None:
    class Processor:
        def __init__(self, tokenizer: Any) -> None:
            self.tokenizer = tokenizer

    def module(tokenizer: Any) -> Any:
        return GRPOModule(tiny_model(), tokenizer, reward)

    with pytest.raises(TypeError, match="A tokenizer is needed, got Processor. Give its `tokenizer` attribute"):
        module(Processor(tokenizer))
    with pytest.raises(ValueError, match="neither a pad token nor an end-of-text token: set its eos_token"):
        module(type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer))
    with pytest.raises(FileNotFoundError, match="tokenizer='./nowhere': there is no such"):
        module("./nowhere")


# Data

DATA: list[tuple[str, Any, type[Exception], str]] = [
    ("grpo", [{"question": "1"}] * 4, ValueError, "needs a `prompt`, and one has only question"),
    ("sft", [{"question": "1"}] * 4, ValueError, "needs `prompt` and `completion`, or `text`; one has question"),
    ("grpo", [], ValueError, "train_dataset is empty. Give it at least one row"),
    ("sft", "no/such/data", TypeError, "train_dataset must be a sequence of rows, .* got str"),
    ("grpo", {"prompt": ["1"]}, TypeError, "train_dataset must be a sequence of rows, .* got dict"),
    ("grpo", ["1+1="] * 4, TypeError, "rows of train_dataset must be dictionaries .* got str"),
    ("grpo", [{"prompt": CHAT}] * 4, ValueError, "no chat template. Set tokenizer.chat_template"),
]


@pytest.mark.parametrize(("kind", "data", "error", "message"), DATA)
def test_data(make: Make, kind: str, data: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        fit(make(kind), PromptDataModule(data, batch_size=2), max_steps=1)


def test_batches_of_nothing() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        PromptDataModule(prompts(4), batch_size=0)
    with pytest.raises(ValueError, match="eval_dataset is empty"):
        PromptDataModule(prompts(4), [])


def test_prompts_that_leave_no_room(make: Make) -> None:
    config = GPT2Config(vocab_size=16, n_positions=8, n_embd=16, n_layer=1, n_head=2, eos_token_id=1, pad_token_id=0)
    module = make("grpo", model=GPT2LMHeadModel(config))
    with pytest.raises(ValueError, match="prompt of 4 tokens and max_completion_length=5 need 9 .* the model has 8"):
        module.rollout([{"prompt": "1+1="}])


# Reward functions


class Scored:
    """Completions that are there already."""

    @staticmethod
    def token_lists() -> list[list[int]]:
        return [[4], [5]]

    @staticmethod
    def policy_lists() -> None:
        return None


@pytest.mark.parametrize(("func", "error", "message"), RETURNS, ids=lambda x: getattr(x, "__name__", None))
def test_what_reward_functions_return(make: Make, func: Any, error: Any, message: str) -> None:
    module = make("grpo", reward_funcs=[func])
    with pytest.raises(error, match=message.replace(" in step 1", "")):
        module.score([{"prompt": "1+1=", "answer": "2"}] * 2, Scored())


@pytest.mark.parametrize("kind", ONLINE)
@pytest.mark.parametrize(("func", "error", "message"), ARGUMENTS, ids=lambda x: getattr(x, "__name__", None))
def test_what_reward_functions_take(make: Make, kind: str, func: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        fit(make(kind, reward_funcs=[func]), PromptDataModule(prompts(4), batch_size=2), max_steps=1)


def test_arguments_are_looked_at_before_anything_is_generated(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="'closed' does not take"):
        make("grpo", reward_funcs=closed)  # before the data are known
    module = make("grpo", reward_funcs=asks)
    monkeypatch.setattr(module, "generate", lambda *_: pytest.fail("has generated"))
    with pytest.raises(TypeError, match="'asks' asks for `solution`"):
        module.rollout([{"prompt": "1+1=", "answer": "2"}])


def test_what_a_reward_function_raises(make: Make) -> None:
    with pytest.raises(KeyError, match="solution") as caught:
        fit(make("grpo", reward_funcs=reads), PromptDataModule(prompts(4), batch_size=2), max_steps=1)
    assert caught.value.__notes__[0] == "Raised by the reward function 'reads'."
    assert caught.value.__notes__[1].startswith("It was called in step 1 with answer, ")


@pytest.mark.slow
@pytest.mark.parametrize("error", [ConnectionError, ValueError], ids=["raises", "wrong length"])
def test_what_was_computed_before_a_reward_function_failed_is_kept(
    make: Make, tmp_path: Path, reward: Any, error: Any
) -> None:
    class Fails:
        limit = 2

        def __call__(self, completions: list[str], trainer_state: Any, **kwargs: Any) -> list[Any]:
            if trainer_state.global_step != self.limit:
                return reward(completions)
            if error is ValueError:
                return [[1.0] * 99] * len(completions)
            raise ConnectionError("the judge is down")

    def run(directory: Path, reward_funcs: Any, ckpt_path: Any = None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        module, data = make("critic", reward_funcs=reward_funcs), PromptDataModule(prompts(), batch_size=2)
        fit(module, data, every_step(directory), max_steps=4, ckpt_path=ckpt_path)
        return dict(module.named_parameters())

    whole, func = run(tmp_path / "whole", reward), Fails()
    with pytest.raises(error) as caught:
        run(tmp_path / "run", func)
    if error is ValueError:
        assert "'Fails' returned 99 rewards for completion 0 in step 3, which has " in str(caught.value)
    else:
        assert caught.value.__notes__[1].startswith("It was called in step 3 with")
    func.limit = -1
    resumed = run(tmp_path / "run", func, tmp_path / "run" / "step=2.ckpt")
    assert all(torch.equal(param, whole[name]) for name, param in resumed.items())


class Silent:
    """An environment that pays nothing."""

    def reset(self, **_: Any) -> None:
        return None

    def step(self, action: str) -> Any:
        return "", None, True, False, {}


class FourTuple(Silent):
    def step(self, action: str) -> Any:
        return "", 1.0, True, {}


EPISODES = {
    "four": (
        FourTuple,
        "In turn 1 of an episode with FourTuple. Its step.text. has to return .observation, reward, te",
    ),
    "silent": (Silent, "There is no reward: Silent.step returned None as reward for every turn of the first batch"),
}


@pytest.mark.parametrize("name", EPISODES)
def test_environments(make: Make, name: str) -> None:
    environment, message = EPISODES[name]
    module = make("critic", reward_funcs=None, environment=environment, max_turn_length=2)
    with pytest.raises(ValueError) as caught:
        fit(module, PromptDataModule(prompts(4), batch_size=2), max_steps=1)
    said = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert re.search(message, said), said


def test_rewards_at_tokens_that_are_not_there(make: Make) -> None:
    class Scores(GRPOModule):
        narrow: bool

        def score(self, rows: Any, completions: Any) -> Any:
            rewards = torch.ones(completions.completion_ids.shape) * completions.completion_mask
            return TokenRewards(rewards[:, :-1] if self.narrow else rewards + 1)

    module = make("grpo", cls=Scores, reward_funcs=None)
    module.narrow = True
    with pytest.raises(ValueError, match="are not one for each token of the completions"):
        module.rollout(prompts(4))
    module.narrow = False
    with pytest.raises(ValueError, match="paid at tokens that the policy did not choose.* at the policy's last token"):
        module.rollout(prompts(4))


def test_rewards_from_nowhere(make: Make) -> None:
    class Generates(GRPOModule):
        def generate(self, prompts: Any) -> Any:
            return super().generate(prompts)

    with pytest.raises(ValueError, match="There are no rewards: no reward_funcs, no environment, and `generate` ret"):
        make("grpo", cls=Generates, reward_funcs=None).rollout(prompts(4))


def test_demonstrations_with_rewards_of_steps(make: Make) -> None:
    message = r"`reward` column holds \[1.0, 0.5\] \(list\), but a row of supervised fine-tuning has one number.* sum"
    steps = [{**row, "reward": [1.0, 0.5]} for row in DEMONSTRATIONS]
    with pytest.raises(TypeError, match=message):
        fit(make("sft"), PromptDataModule(steps, batch_size=2), max_steps=1)
    module = make("sft")
    batch = {**module.collate(DEMONSTRATIONS), "reward": torch.tensor([[1.0, 0.5]] * 4)}
    with pytest.raises(TypeError, match=message):
        module.loss(batch)


# Settings

SETTINGS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("critic", {"preset": "dapo"}, TypeError, "MTPCriticModule has no argument preset"),
    (
        "critic",
        {"multi_objective_aggregation": "normalize_then_sum"},
        TypeError,
        "MTPCriticModule has no argument multi_objective_aggregation",
    ),
    ("grpo", {"preset": "nope"}, ValueError, "Unknown preset 'nope'; choose one of grpo, dr_grpo, dapo"),
    ("ppo", {"preset": "dapo"}, ValueError, "Unknown preset 'dapo'; choose one of vpg"),
    ("sft", {"gama": 0.9}, TypeError, "MTPSFTModule has no argument gama"),
    ("critic", {"target_tau": 0}, ValueError, "target_tau=0 never moves the target heads.* Set it above 0"),
    ("sft", {"target_tau": 0.0}, ValueError, "target_tau=0 never moves the target heads"),
    ("critic", {"num_mtp_heads": 6}, ValueError, "num_mtp_heads=6 is larger than max_completion_length=5"),
    ("sft", {"num_mtp_heads": 8, "max_length": 8}, ValueError, "num_mtp_heads=8 is larger than max_length - 1=7"),
    (
        "grpo",
        {"speculative": True, "num_mtp_heads": 6},
        ValueError,
        "num_mtp_heads=6 is larger than max_completion_length=5",
    ),
    ("critic", {"num_mtp_heads": 0}, ValueError, "num_mtp_heads must be at least 1, got 0"),
    ("critic", {"num_mtp_heads": 2.5}, ValueError, "num_mtp_heads must be a whole number, got 2.5"),
    ("grpo", {"num_generations": 2.5}, TypeError, "num_generations must be an integer, got 2.5"),
    ("grpo", {"learning_rate": -1.0}, ValueError, "learning_rate must be at least 0, got -1.0"),
    ("grpo", {"learning_rate": "1e-3"}, TypeError, "learning_rate must be a number, .*'1e-3'.* write 1.0e-3"),
    ("critic", {"head_learning_rate": "fast"}, TypeError, "head_learning_rate must be a number, got the text 'fast'"),
    (
        "ppo",
        {"value_learning_rate": [1e-3]},
        TypeError,
        r"value_learning_rate must be a number, got \[0.001\] \(list\)",
    ),
    ("ppo", {"beta": "1e-3"}, TypeError, "beta must be a number, .* write 1.0e-3"),
    ("grpo", {"temperature": "1e0"}, TypeError, "temperature must be a number, .* write 1.0e-3"),
    ("grpo", {"entropy_coef": "1e-3"}, TypeError, "entropy_coef must be a number, .* write 1.0e-3"),
    ("critic", {"lam_policy": "much"}, TypeError, "lam_policy must be a number, got the text 'much'"),
    ("critic", {"value_clip_range": "wide"}, TypeError, "value_clip_range must be a number, got the text 'wide'"),
    ("sft", {"gamma": [1.0]}, TypeError, r"gamma must be a number, got \[1.0\] \(list\)"),
    ("sft", {"gamma": 1.5}, ValueError, r"gamma must be in \[0, 1\], got 1.5"),
    ("grpo", {"top_p": 1.5}, ValueError, r"top_p must be in \[0, 1\], got 1.5"),
    (
        "critic",
        {"mtp_heads_path": "./nowhere"},
        FileNotFoundError,
        "No mtp_heads.safetensors in ./nowhere: there",
    ),
    ("ppo", {"value_model": "./nowhere"}, FileNotFoundError, "value_model='./nowhere': there is no such"),
    ("grpo", {"reward_weights": [1.0, 2.0]}, ValueError, "reward_weights has 2 numbers for 1 reward functions"),
]


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"), SETTINGS, ids=[f"{k}-{','.join(o)}" for k, o, *_ in SETTINGS]
)
def test_settings(make: Make, kind: str, options: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make(kind, **options)


def test_options_of_functions_that_yaml_reads_as_text(make: Make) -> None:
    options: dict[str, Any] = {"policy_loss": "kl_cov", "policy_loss_kwargs": {"ratio": "2e-4"}}
    module = make("grpo", num_generations=8, advantage="pass_at_k", advantage_kwargs={"k": "4"}, **options)
    assert module.signal.options.advantage_options == {"k": 4} and module.policy_loss.options["ratio"] == 0.0002


def test_options_that_yaml_reads_as_text(make: Make) -> None:
    options = {"head_learning_rate": "1e-3", "num_mtp_heads": 2.0, "lam_policy": "9e-1", "value_clip_range": "1e-1"}
    critic = make("critic", **options).critic
    assert (critic.learning_rate, critic.options.num_mtp_heads) == (1e-3, 2)
    assert type(critic.options.num_mtp_heads) is int
    assert (critic.values.lam_policy, critic.values.value_clip_range) == (0.9, 0.1)
    assert make("ppo", value_learning_rate="1e-3").critic.learning_rate == 1e-3


def test_callbacks() -> None:
    with pytest.raises(ValueError, match="rate=0 without a loss balances nothing. Give rate > 0"):
        MoEBalancingCallback(rate=0)
    assert MoEBalancingCallback(rate="1e-3").config == BalancingConfig(rate=0.001)
    with pytest.raises(ValueError, match="tau=0 never moves the target heads"):
        PolyakCallback(tau=0)
    with pytest.raises(ValueError, match=r"tau must be in \[0, 1\], got 2"):
        PolyakCallback(tau=2)


def test_callbacks_of_trl() -> None:
    with pytest.raises(TypeError, match="is a callback of transformers' Trainer. Import the one for Lightning"):
        Trainer(accelerator="cpu", callbacks=[TRLBalancing()])


# Checkpoints


@pytest.mark.parametrize("kind", KINDS)
def test_models_are_no_checkpoints(make: Make, tiny_model: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    tiny_model().save_pretrained(tmp_path)
    data = PromptDataModule(rows(kind), batch_size=2)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        module = make(kind)
        before = {name: p.clone() for name, p in module.named_parameters()}
        with pytest.raises(Exception) as caught:
            fit(module, data, max_steps=1, ckpt_path=str(path))
        (note,) = caught.value.__notes__
        assert note.startswith(f"ckpt_path='{path}' is no checkpoint of Lightning: it is a model, or was written by")
        assert f"Start from it with {type(module).__name__}(model='{path}') instead of ckpt_path." in note
        assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fit(make(kind), data, max_steps=1, ckpt_path=str(tmp_path / "nowhere"))


def test_checkpoints_of_other_modules(make: Make, tmp_path: Path) -> None:
    data = PromptDataModule(prompts(4), batch_size=2)
    fit(make("grpo"), data, every_step(tmp_path), max_steps=1)
    path = tmp_path / "step=1.ckpt"
    with pytest.raises(ValueError, match="written by another architecture than this MTPCriticModule"):
        fit(make("critic"), data, max_steps=2, ckpt_path=path)
    checkpoint = torch.load(path, weights_only=False)
    del checkpoint["rl_plugins"]
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"written by another module .* start from it with GRPOModule\(model=path\)"):
        fit(make("grpo"), data, max_steps=2, ckpt_path=path)
