"""What cannot work in TRL's host is refused before any work starts, in a sentence that says what to do."""

import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3ForSequenceClassification, T5Config, TrainingArguments
from transformers import T5ForConditionalGeneration as T5
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import rl_plugins.lightning as lightning_host
from rl_plugins.moe.config import BalancingConfig
from rl_plugins.trl import (
    EpisodeRollouts,
    GRPOVariantConfig,
    GRPOVariantTrainer,
    MoEBalancingCallback,
    MTPCriticConfig,
    MTPCriticTrainer,
    MTPSFTConfig,
    MTPSFTTrainer,
    PPOConfig,
    PPOTrainer,
)

from .helpers.bad_rewards import ARGUMENTS, RETURNS, asks, closed, reads, scalar
from .helpers.tiny import ON_CPU

Make = Callable[..., Any]
HOST: dict[str, Any] = {
    **ON_CPU,
    "max_steps": 1,
    "logging_steps": 1,
}
ONLINE: dict[str, Any] = {"max_completion_length": 6}
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "critic": (MTPCriticConfig, MTPCriticTrainer, ONLINE),
    "ppo": (PPOConfig, PPOTrainer, {**ONLINE, "beta": 0.0}),
    "variant": (GRPOVariantConfig, GRPOVariantTrainer, {**ONLINE, "num_generations": 4}),
    "sft": (MTPSFTConfig, MTPSFTTrainer, {}),
}
CHAT = [[{"role": "user", "content": "1+1="}]]
DEMONSTRATIONS = {"prompt": ["1+1="] * 8, "completion": ["2"] * 8}


@pytest.fixture
def make(tiny_model: Callable[..., Any], tokenizer: Any, dataset: Any, reward: Any, tmp_path: Path) -> Make:
    """Factory: a trainer on a tiny model; keywords are the trainer's, or the config's."""

    def factory(kind: str, **options: Any) -> Any:
        config, trainer, own = KINDS[kind]
        data = Dataset.from_dict(DEMONSTRATIONS) if kind == "sft" else dataset
        given: dict[str, Any] = {"model": None, "train_dataset": data, "processing_class": tokenizer}
        given |= {} if kind == "sft" else {"reward_funcs": reward}
        arguments = "model", "train_dataset", "eval_dataset", "processing_class", "reward_funcs", "callbacks"
        for name in (*arguments, "rollout_func"):
            if name in options:
                given[name] = options.pop(name)
        given["model"] = tiny_model() if given["model"] is None else given["model"]
        return trainer(args=config(**{"output_dir": str(tmp_path / "run"), **HOST, **own, **options}), **given)

    return factory


# Models


def t5(**_: Any) -> Any:
    return T5(T5Config(vocab_size=16, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


MODELS: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "encoder-decoder": (lambda model: t5(), ValueError, "T5ForConditionalGeneration is an encoder-decoder .* Use a"),
    "trunk": (lambda model: model.model, ValueError, "Qwen3Model has no LM head.* AutoModelForCausalLM"),
    "classifier": (
        lambda model: Qwen3ForSequenceClassification(model.config),
        ValueError,
        "Qwen3ForSequenceClassification has no LM head",
    ),
    "float16": (lambda model: model.half(), ValueError, "is in float16.* Load the model in float32"),
    "module": (lambda model: torch.nn.Linear(2, 2), TypeError, "PreTrainedModel or a PEFT model.* got Linear"),
    "number": (lambda model: 3, TypeError, "PreTrainedModel or a PEFT model.* got int"),
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
def test_models_are_looked_at_before_they_are_loaded(
    make: Make, tiny_model: Callable[..., Any], tmp_path: Path, kind: str, name: str
) -> None:
    model, error, message = MODELS[name]
    model(tiny_model()).config.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    architecture = type(model(tiny_model())).__name__
    if "architectures" not in config:
        (tmp_path / "config.json").write_text(config.replace("{", f'{{"architectures": ["{architecture}"],', 1))
    with pytest.raises(error, match=message):
        make(kind, model=str(tmp_path))  # there are no weights


# Data


def stream(rows: list[dict[str, Any]]) -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(rows))


ONLINE_DATA: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no prompt": (
        {"train_dataset": Dataset.from_dict({"question": ["1"], "answer": ["2"]})},
        ValueError,
        "train_dataset has no column `prompt`, only question, answer. Rename",
    ),
    "no prompt to evaluate": (
        {"eval_dataset": {"easy": Dataset.from_dict({"question": ["1"]})}},
        ValueError,
        r"eval_dataset\['easy'\] has no column `prompt`, only question",
    ),
    "no prompt in a stream": (
        {"train_dataset": stream([{"question": "1"}])},
        ValueError,
        "no column `prompt`, only q",
    ),
    "chat": (
        {"train_dataset": Dataset.from_dict({"prompt": CHAT * 8, "answer": ["2"] * 8})},
        ValueError,
        "no chat template. Set tokenizer.chat_template",
    ),
}
ANY_DATA: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "empty": ({"train_dataset": Dataset.from_dict({"prompt": []})}, ValueError, "train_dataset is empty. Give it"),
    "empty stream": ({"train_dataset": stream([])}, ValueError, "train_dataset is empty. Give it"),
    "empty evaluation": ({"eval_dataset": Dataset.from_dict({"prompt": []})}, ValueError, "eval_dataset is empty"),
    "path": ({"train_dataset": "no/such/data"}, TypeError, "must be a `Dataset` or `IterableDataset`, got `str`"),
}


@pytest.mark.parametrize("kind", ["critic", "ppo", "variant"])
@pytest.mark.parametrize("name", ONLINE_DATA)
def test_data(make: Make, kind: str, name: str) -> None:
    given, error, message = ONLINE_DATA[name]
    with pytest.raises(error, match=message):
        make(kind, **given)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ANY_DATA)
def test_data_of_any_trainer(make: Make, kind: str, name: str) -> None:
    given, error, message = ANY_DATA[name]
    with pytest.raises(error, match=message):
        make(kind, **given)


def test_demonstrations(make: Make) -> None:
    with pytest.raises(ValueError, match="none of the columns .* `text`, `messages`, or `prompt` and .* has question"):
        make("sft", train_dataset=Dataset.from_dict({"question": ["1"]}))


def test_a_tokenizer_without_an_end(make: Make, tokenizer: Any) -> None:
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="neither a pad token nor an end-of-text token: set its eos_token"):
        make("critic", processing_class=bare)


def test_prompts_that_leave_no_room(make: Make) -> None:
    config = GPT2Config(vocab_size=16, n_positions=12, n_embd=16, n_layer=1, n_head=2, eos_token_id=1, pad_token_id=0)
    trainer = make("critic", model=GPT2LMHeadModel(config))
    with pytest.raises(ValueError, match="prompt of 7 tokens and max_completion_length=6 need 13 .* model has 12"):
        trainer._generate_single_turn([[2] * 7, [2]])


# Reward functions


def score(trainer: Any) -> Any:
    rows = [{"prompt": "1+1=", "answer": "2"}] * 2
    return trainer._calculate_rewards(rows, ["1+1="] * 2, ["2", "3"], [[4], [5]])


@pytest.mark.parametrize(("func", "error", "message"), RETURNS, ids=lambda x: getattr(x, "__name__", None))
def test_what_reward_functions_return(make: Make, func: Any, error: Any, message: str) -> None:
    trainer = make("variant", reward_funcs=[func])
    with pytest.raises(error, match=message):
        score(trainer)


@pytest.mark.parametrize("kind", ["critic", "ppo", "variant"])
@pytest.mark.parametrize(("func", "error", "message"), ARGUMENTS, ids=lambda x: getattr(x, "__name__", None))
def test_what_reward_functions_take(make: Make, kind: str, func: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make(kind, reward_funcs=[func])


def test_columns_to_evaluate_with(make: Make) -> None:
    with pytest.raises(TypeError, match="'closed' does not take"):
        make("critic", reward_funcs=closed)
    bare = Dataset.from_dict({"prompt": ["1+1="] * 8})
    with pytest.raises(TypeError, match="'asks' asks for `solution`"):
        make("critic", reward_funcs=asks, eval_dataset=bare, train_dataset=bare.add_column("solution", ["2"] * 8))


def test_what_a_reward_function_raises(make: Make) -> None:
    with pytest.raises(KeyError, match="solution") as caught:
        score(make("critic", reward_funcs=reads))
    assert caught.value.__notes__[0] == "Raised by the reward function 'reads'."
    assert caught.value.__notes__[1].startswith("It was called in step 1 with prompts, completions, ")
    assert ", answer, " in caught.value.__notes__[1]


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

    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    whole = make("critic", output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    func = Fails()
    with pytest.raises(error) as caught:
        make("critic", reward_funcs=func, **options).train()
    if error is ValueError:
        assert "'Fails' returned 99 rewards for completion 0 in step 3, which has " in str(caught.value)
    else:
        assert "Raised by the reward function 'Fails'." in caught.value.__notes__
        assert caught.value.__notes__[1].startswith("It was called in step 3 with")
    func.limit = -1
    resumed = make("critic", reward_funcs=func, **options)
    resumed.train(resume_from_checkpoint=True)
    expected = dict(whole.model.named_parameters())
    for name, param in resumed.model.named_parameters():
        assert torch.equal(param, expected[name]), name


class Judge:
    """A reward function with a state."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, completions: list[str], **kwargs: Any) -> list[float]:
        self.calls += 1
        return [float(len(text)) for text in completions]


@pytest.mark.parametrize("kind", ["critic", "ppo", "variant"])
def test_reward_functions_are_those_that_were_given(make: Make, reward: Any, kind: str) -> None:
    judge = Judge()
    given = [judge, reward]
    trainer = make(kind, reward_funcs=given)
    for _ in range(2):
        rewards = score(trainer)
        assert trainer.reward_funcs[0] is judge and trainer.reward_funcs[1] is reward
    assert judge.calls == 2 and rewards.tolist() == [[1.0, 0.0], [1.0, 1.0]]
    assert make(kind, reward_funcs=judge).reward_funcs == [judge] and given == [judge, reward]
    assert make(kind, reward_funcs=(judge, reward)).reward_funcs == given


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["critic", "ppo"])
def test_columns_of_reward_functions_stay_beside_ours(make: Make, reward: Any, kind: str) -> None:
    def extra(completions: list[str], log_extra: Any, **kwargs: Any) -> list[float]:
        log_extra("value", [float(i) for i in range(len(completions))])
        return reward(completions)

    trainer = make(kind, reward_funcs=extra, log_completions=True, num_completions_to_print=0)
    trainer.train()
    columns = trainer._logs["extra"]
    assert list(columns["value"]) == [float(i) for i in range(8)]
    expected = trainer.last_rollout["old_values"][:, 0, 0].tolist()
    assert list(columns["critic_value"]) == pytest.approx(expected)


def test_length_alone_is_no_reward(make: Make) -> None:
    for none in (None, []):
        with pytest.raises(ValueError, match="no reward functions, so overlong_shaping=True .* length penalty alone"):
            make("variant", preset="dapo", reward_funcs=none)


# Environments


class Silent:
    """An environment that pays nothing."""

    reward: float | None = None

    def reset(self, prompt: str, **_: Any) -> str:
        return ""

    def step(self, action: str) -> Any:
        return "", self.reward, True, False, {}


class FourTuple(Silent):
    def step(self, action: str) -> Any:
        return "", 1.0, True, {}


class Paying(Silent):
    reward = 1.0


EPISODES = {
    "four": (
        FourTuple,
        "In turn 1 of an episode with FourTuple. Its step.text. has to return .observation, reward, te",
    ),
    "silent": (Silent, "There is no reward: Silent.step returned None as reward for every turn of the first batch"),
}


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
@pytest.mark.parametrize("name", EPISODES)
def test_environments(make: Make, name: str) -> None:
    environment, message = EPISODES[name]
    episodes = EpisodeRollouts(environment, max_turn_length=2)
    trainer = make("critic", reward_funcs=episodes.earned, rollout_func=episodes)
    with pytest.raises(ValueError) as caught:
        trainer.train()
    said = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert re.search(message, said), said


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
def test_rewards_that_nobody_asks_for(make: Make, reward: Any) -> None:
    episodes = EpisodeRollouts(Paying, max_turn_length=2)
    trainer = make("critic", reward_funcs=reward, rollout_func=episodes)
    with pytest.warns(UserWarning, match="environment pays, but nothing is learnt from it: .* Add it to reward_funcs"):
        trainer.train()


STEPS = {"prompt": ["1+1="] * 8, "completion": ["2"] * 8, "reward": [[1.0, 0.5]] * 8}


@pytest.mark.parametrize(
    "options", [{}, {"packing": True}, {"padding_free": True, "max_length": None}], ids=lambda x: ",".join(x)
)
def test_demonstrations_with_rewards_of_steps(make: Make, options: dict[str, Any]) -> None:
    message = r"`reward` column holds \[1.0, 0.5\] \(list\), but a row of supervised fine-tuning has one number.* sum"
    with pytest.raises(TypeError, match=message):
        make("sft", train_dataset=Dataset.from_dict(STEPS), **options)
    later = Dataset.from_dict({**STEPS, "reward": [None, *[[1.0, 0.5]] * 7]})
    with pytest.raises((TypeError, ValueError), match="`reward` column"):
        make("sft", train_dataset=later, **options).train()


# Options

OPTIONS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    (
        "critic",
        {"preset": "dapo"},
        TypeError,
        "MTPCriticConfig has no presets. GRPOVariantConfig.*dapo.*PPOConfig.*vpg",
    ),
    ("sft", {"preset": "dapo"}, TypeError, "MTPSFTConfig has no presets. GRPOVariantConfig"),
    ("ppo", {"preset": "dapo"}, ValueError, "Unknown preset 'dapo'; choose one of vpg. GRPOVariantConfig.*dapo"),
    ("variant", {"preset": "vpg"}, ValueError, "Unknown preset 'vpg'.* PPOConfig.* has vpg"),
    ("critic", {"target_tau": 0}, ValueError, "target_tau=0 never moves the target heads.* Set it above 0"),
    ("sft", {"target_tau": 0.0}, ValueError, "target_tau=0 never moves the target heads"),
    ("critic", {"num_mtp_heads": 7}, ValueError, "num_mtp_heads=7 is larger than max_completion_length=6.* at most 6"),
    ("variant", {"num_mtp_heads": 7, "speculative": True}, ValueError, "larger than max_completion_length=6"),
    ("sft", {"num_mtp_heads": 8, "max_length": 8}, ValueError, "num_mtp_heads=8 is larger than max_length - 1=7"),
    ("critic", {"num_mtp_heads": 0}, ValueError, "num_mtp_heads must be at least 1, got 0"),
    ("critic", {"num_mtp_heads": 1.5}, ValueError, "num_mtp_heads must be a whole number, got 1.5"),
    ("critic", {"gamma": [1.0]}, TypeError, r"gamma must be a number, got \[1.0\] \(list\)"),
    ("sft", {"gamma": 1.5}, ValueError, r"gamma must be in \[0, 1\], got 1.5"),
    ("ppo", {"lam_value": float("nan")}, ValueError, r"lam_value must be in \[0, 1\], got nan"),
    ("sft", {"value_loss_coef": "much"}, TypeError, "value_loss_coef must be a number, got the text 'much'"),
    (
        "critic",
        {"mtp_heads_path": "./nowhere"},
        FileNotFoundError,
        "No mtp_heads.safetensors in ./nowhere: there is no",
    ),
    ("ppo", {"value_model_path": "./nowhere"}, FileNotFoundError, "value_model_path='./nowhere': there is no such"),
    ("critic", {"reward_weights": [1.0, 2.0]}, ValueError, r"reward weights \(2\) must match .* functions \(1\)"),
    (
        "critic",
        {"multi_objective_aggregation": "normalize_then_sum"},
        ValueError,
        "multi_objective_aggregation='normalize_then_sum' has no effect: .* TRL's own advantages, .* from the critic",
    ),
    ("ppo", {"multi_objective_aggregation": "normalize_then_sum"}, ValueError, "no effect: .* from the critic"),
    (
        "variant",
        {"multi_objective_aggregation": "normalize_then_sum", "advantage": "leave_one_out"},
        ValueError,
        "has no effect: .* they come from advantage='leave_one_out'. Leave it at 'sum_then_normalize'",
    ),
    ("critic", {"use_critic": False, "num_generations": 1}, ValueError, "num_generations is 1. Set it to 2 or more"),
]
ANY_OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"learning_rate": -1.0}, ValueError, "learning_rate must be at least 0, got -1.0"),
    ({"learning_rate": "fast"}, TypeError, "learning_rate must be a number, got the text 'fast'"),
    ({"per_device_train_batch_size": 0}, ValueError, "per_device_train_batch_size must be at least 1, got 0"),
    ({"gradient_accumulation_steps": -1}, ValueError, "gradient_accumulation_steps must be at least 1, got -1"),
    ({"max_steps": 0}, ValueError, "max_steps=0 does not mean an end at once"),
    ({"max_steps": -1, "num_train_epochs": 0}, ValueError, "num_train_epochs must be above 0, got 0"),
]


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"), OPTIONS, ids=[f"{k}-{','.join(o)}" for k, o, *_ in OPTIONS]
)
def test_options(make: Make, kind: str, options: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make(kind, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("options", "error", "message"), ANY_OPTIONS, ids=lambda x: ",".join(x) if x == {} else None)
def test_options_of_any_trainer(make: Make, kind: str, options: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make(kind, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_yaml_reads_as_text(tmp_path: Path, kind: str) -> None:
    config, _, own = KINDS[kind]
    options = {**HOST, **own, "learning_rate": "1e-3", "max_steps": "2e0", "logging_steps": "1e0"}
    if kind != "sft":
        options["reward_weights"] = ["1e-1", 2]
    args = config(str(tmp_path), **options)
    assert (args.learning_rate, args.max_steps, args.logging_steps) == (0.001, 2, 1.0)
    assert isinstance(args.max_steps, int)
    assert kind == "sft" or args.reward_weights == [0.1, 2.0]


def test_options_of_functions_that_yaml_reads_as_text(tmp_path: Path) -> None:
    options: dict[str, Any] = {"advantage": "pass_at_k", "advantage_kwargs": {"k": "4"}, "policy_loss": "kl_cov"}
    args = GRPOVariantConfig(str(tmp_path), **HOST, **options, policy_loss_kwargs={"ratio": "2e-4"})
    loss = args.make_policy_loss()
    assert args.advantage_kwargs == {"k": 4} and loss is not None and loss.options["ratio"] == 0.0002


def test_a_step_that_yaml_reads_as_text() -> None:
    assert BalancingConfig(rate="1e-3").rate == 0.001  # type: ignore[arg-type]
    assert MoEBalancingCallback(rate="1e-3", stop="9e-1").config == BalancingConfig(rate=0.001, stop=0.9)
    with pytest.raises(TypeError, match="rate must be a number, got the text 'slow'"):
        MoEBalancingCallback(rate="slow")


def test_without_the_critic_the_number_of_generations_is_trls(tmp_path: Path) -> None:
    args = MTPCriticConfig(str(tmp_path), use_critic=False, **HOST)
    assert args.num_generations == GRPOConfig(str(tmp_path), **HOST).num_generations == 8
    assert MTPCriticConfig(str(tmp_path), use_critic=False, num_generations=4, **HOST).num_generations == 4
    assert MTPCriticConfig(str(tmp_path), **HOST).num_generations == 1


# Arguments of other trainers


@pytest.mark.parametrize("config", [TrainingArguments, SFTConfig])
def test_configs_of_the_host_are_completed(
    tiny_model: Callable[..., Any], tokenizer: Any, tmp_path: Path, config: Any
) -> None:
    given = config(str(tmp_path), **HOST, learning_rate=3e-4, hub_token="secret", seed=7)
    data = Dataset.from_dict(DEMONSTRATIONS)
    trainer = MTPSFTTrainer(tiny_model(), given, train_dataset=data, processing_class=tokenizer)
    ours, stock = trainer.args, SFTTrainer(tiny_model(), given, train_dataset=data, processing_class=tokenizer).args
    assert isinstance(ours, MTPSFTConfig) and (ours.mtp_loss_coef, ours.num_mtp_heads) == (0.3, 1)
    ignored = {"ddp_find_unused_parameters"}
    for name in stock.to_dict().keys() - ignored:
        assert getattr(ours, name) == getattr(stock, name), name
    assert ours.hub_token == "secret" and ours.learning_rate == 3e-4


def test_configs_of_other_trainers(make: Make, tiny_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> None:
    other = GRPOConfig(str(tmp_path), **HOST)
    for kind, (config, trainer, _) in KINDS.items():
        given: dict[str, Any] = {"args": other, "processing_class": tokenizer}
        given |= {} if kind == "sft" else {"reward_funcs": scalar}
        message = f"args must be of type {config.__name__}, got GRPOConfig. Give the options to {config.__name__}"
        with pytest.raises(TypeError, match=message):
            trainer(tiny_model(), **given)


CALLBACKS: list[Any] = [
    lightning_host.MoEBalancingCallback,
    lightning_host.PolyakCallback,
    lightning_host.TokenValueReport,
]


@pytest.mark.parametrize("callback", CALLBACKS)
def test_callbacks_of_lightning(make: Make, tiny_model: Any, tokenizer: Any, tmp_path: Path, callback: Any) -> None:
    with pytest.raises(TypeError, match=f"{callback.__name__} of rl_plugins.lightning.* no callback of transformers"):
        make("critic", callbacks=[callback()])
    with pytest.raises(TypeError, match="Import it from rl_plugins.trl"):
        make("sft").add_callback(callback)
    with pytest.raises(TypeError, match="is a callback of Lightning's Trainer. Import the one for TRL"):
        data = Dataset.from_dict(DEMONSTRATIONS)
        args = SFTConfig(str(tmp_path), **HOST)
        SFTTrainer(tiny_model(), args, train_dataset=data, processing_class=tokenizer, callbacks=[callback()])


def test_balancing_nothing() -> None:
    with pytest.raises(
        ValueError, match="rate=0 without a loss balances nothing. Give rate > 0 .* or count_only=True"
    ):
        MoEBalancingCallback(rate=0.0)
    with pytest.raises(ValueError, match="count_only=True balances nothing, but rate="):
        MoEBalancingCallback(count_only=True)
    assert MoEBalancingCallback(rate=0.0, count_only=True).config.count_only
    assert MoEBalancingCallback(rate=0.0, z_loss_coef=0.1).config.has_loss


def test_deepspeed_needs_a_launcher(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    trainer = make("critic")
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match="DeepSpeed needs a launcher, even for one process.* `accelerate launch`"):
        trainer.train()


# Checkpoints


def stock_checkpoint(kind: str, model: Any, tokenizer: Any, dataset: Any, directory: Path) -> Path:
    options: dict[str, Any] = {**HOST, "save_strategy": "steps", "save_steps": 1}
    if kind == "sft":
        data, args = Dataset.from_dict(DEMONSTRATIONS), SFTConfig(str(directory), **options)
        SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer).train()
    else:
        args = GRPOConfig(str(directory), num_generations=4, max_completion_length=2, **options)
        GRPOTrainer(model, Judge(), args, dataset, processing_class=tokenizer).train()
    return directory / "checkpoint-1"


@pytest.mark.slow
@pytest.mark.parametrize("origin", ["grpo", "sft"])
def test_checkpoints_of_stock_trainers(
    make: Make, tiny_model: Callable[..., Any], tokenizer: Any, dataset: Any, tmp_path: Path, origin: str
) -> None:
    checkpoint = str(stock_checkpoint(origin, tiny_model(), tokenizer, dataset, tmp_path / origin))
    for kind in KINDS:
        trainer = make(kind)
        before = {name: p.clone() for name, p in trainer.model.named_parameters()}
        message = (
            f"written by another trainer .* it has no .*Start from it with model='{checkpoint}' instead of resume"
        )
        with pytest.raises(FileNotFoundError, match=message):
            trainer.train(resume_from_checkpoint=checkpoint)
        assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
        trainer.args.output_dir = str(tmp_path / origin)
        with pytest.raises(FileNotFoundError, match=message):
            trainer.train(resume_from_checkpoint=True)
    make("critic", model=checkpoint, use_critic=False)  # as the message says
    make("sft", model=checkpoint)


@pytest.mark.slow
def test_checkpoints_of_our_other_trainers(make: Make, tmp_path: Path) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
    written = {kind: tmp_path / kind / "checkpoint-1" for kind in KINDS}
    for kind, path in written.items():
        make(kind, output_dir=str(path.parent), **saving).train()
    for kind in KINDS:
        for origin, path in written.items():
            if origin != kind:
                with pytest.raises(FileNotFoundError, match="written by another trainer .* Start from it with model="):
                    make(kind).train(resume_from_checkpoint=str(path))


@pytest.mark.parametrize("kind", KINDS)
def test_models_and_missing_folders_are_no_checkpoints(
    make: Make, tiny_model: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    trainer = make(kind)
    with pytest.raises(FileNotFoundError, match="no trainer_state.json. Start from it with model='.*model' instead"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "model"))
    with pytest.raises(FileNotFoundError, match="nowhere': there is no such folder"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "nowhere"))


# Extras

EXTRAS = [
    ("rl_plugins.trl", "trl", "trl"),
    ("rl_plugins.lightning", "lightning.pytorch", "lightning"),
    ("rl_plugins.classic", "gymnasium", "lightning"),
    ("rl_plugins.lightning.deepspeed", "deepspeed", "deepspeed"),
]


@pytest.mark.parametrize(("package", "missing", "extra"), EXTRAS)
def test_missing_extras(package: str, missing: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import_module(package)
    monkeypatch.delitem(sys.modules, package)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf'{missing} is not installed. Run: pip install "rl-plugins\[{extra}\]"'):
        import_module(package)


def test_pictures_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rl_plugins.report import plot_training_curves

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "rl-plugins\[report\]"'):
        plot_training_curves([{"step": 1, "loss": 1.0, "reward": 1.0}], tmp_path / "curves.png")
