"""The trainers with a real vLLM in their process (`make test-vllm`): after every update it samples from the policy."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from rl_plugins.nn import MTPHeads, attach_mtp_heads
from rl_plugins.rollouts import completion_values
from rl_plugins.trl import (
    GRPOVariantConfig,
    GRPOVariantTrainer,
    MoEBalancingCallback,
    MTPCriticConfig,
    MTPCriticTrainer,
    PPOConfig,
    PPOTrainer,
)

from .helpers.moe_models import make_moe_model
from .helpers.tiny import DEVICE

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed; `make test-vllm` does it"),
]
# On a GPU vLLM's attention has no float32. Control runs are off by more than 1.
DTYPE, LIMIT = ("float32", 1e-4) if DEVICE == "cpu" else ("bfloat16", 0.5)
MOE_SIZES = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "head_dim": 32}
VARIANT = (GRPOVariantTrainer, GRPOVariantConfig)
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
TRAINERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "critic": (MTPCriticTrainer, MTPCriticConfig, {"head_learning_rate": 1e-2}),
    "critic_lora": (MTPCriticTrainer, MTPCriticConfig, {"head_learning_rate": 1e-2, "peft_config": LORA}),
    "ppo": (PPOTrainer, PPOConfig, {"value_learning_rate": 1e-2, "beta": 0.0}),
    "dapo": (*VARIANT, {"preset": "dapo", "num_generations": 4, "max_draws": 1}),
    "dppo": (*VARIANT, {"preset": "dppo", "num_generations": 4}),
    "spo": (*VARIANT, {"preset": "spo"}),
}


@pytest.fixture(scope="module", autouse=True)
def engine() -> Any:
    """The helpers; they import vllm."""
    from .helpers import vllm_engine

    vllm_engine.prepare_engine(DTYPE)
    return vllm_engine


@pytest.fixture(autouse=True)
def fresh_groups(engine: Any) -> Iterator[None]:
    """An engine takes over the process groups of the one before, and a dense model's lack that of the experts."""
    yield
    engine.destroy_model_parallel()


@pytest.fixture
def make(tokenizer: Any, dataset: Dataset, reward: Any, tmp_path: Path, engine: Any) -> Callable[..., Any]:
    """Factory: a trainer on a saved model; keywords go to its config."""

    def factory(trainer_class: Any, config_class: Any, model: Any, **options: Any) -> Any:
        given = {name: options.pop(name) for name in ("peft_config", "rollout_func") if name in options}
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        args = config_class(
            **{
                "output_dir": str(tmp_path / "run"),
                "use_cpu": DEVICE == "cpu",
                "bf16": DTYPE == "bfloat16",
                "model_init_kwargs": {"dtype": "float32"},
                "gradient_checkpointing": False,
                "per_device_train_batch_size": 8,
                "max_completion_length": 6,
                "max_steps": 3,
                "num_iterations": 1,
                "logging_steps": 1,
                "learning_rate": 1e-2,
                "lr_scheduler_type": "constant",
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                **engine.VLLM,
                **options,
            }
        )
        return trainer_class(str(tmp_path / "model"), reward, args, train_dataset=dataset, **given)

    return factory


def rows_of(batch: dict[str, Any], kind: str) -> list[list[int]]:
    pairs = zip(batch[f"{kind}_ids"], batch[f"{kind}_mask"], strict=True)
    return [row[mask.bool()].tolist() for row, mask in pairs]


def record_gaps(trainer: Any) -> list[float]:
    """The list that fills, at every rollout, with the largest gap between the engine's log-probabilities and those of
    the policy at that moment: what TRL logs too, unless its correction is off."""
    generate, found = trainer._generate_and_score_completions, []

    def noted(inputs: Any) -> Any:
        batch = generate(inputs)
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        length = batch["completion_ids"].shape[1]
        with torch.no_grad():
            logps = GRPOTrainer._get_per_token_logps_and_entropies(trainer, trainer.model, ids, mask, length)[0]
        gap = (logps - batch["sampling_per_token_logps"]).abs()
        found.append(float(gap.masked_fill(~batch["completion_mask"].bool(), 0.0).max()))
        return batch

    trainer._generate_and_score_completions = noted
    return found


@pytest.mark.parametrize("name", TRAINERS)
def test_the_engine_samples_from_the_policy_after_every_update(
    name: str, make: Callable[..., Any], tiny_model: Callable[..., Any], engine: Any
) -> None:
    trainer_class, config_class, options = TRAINERS[name]
    stock = tiny_model(**engine.SIZES)
    trainer = make(trainer_class, config_class, stock, **options)
    names, found = engine.record_names(trainer), record_gaps(trainer)
    trainer.train()
    assert len(found) >= 3 and max(found) < LIMIT
    logged = engine.gaps(trainer)
    assert (len(logged) == 3 and max(logged) < LIMIT) or name == "dppo", "dppo turns TRL's correction off"
    assert names == {key for key, _ in stock.named_parameters()}, "neither heads nor value model, adapters merged"
    trained = dict(trainer.model.named_parameters())
    if name != "critic_lora":
        moved = [float((trained[key] - p).abs().max()) for key, p in stock.named_parameters()]
        assert min(moved) > 1e-3, "all that is streamed has changed meanwhile"


def test_weights_that_are_not_streamed_show(
    make: Callable[..., Any], tiny_model: Callable[..., Any], engine: Any
) -> None:
    """The control of the tests above: an engine that keeps its first weights is found out."""
    trainer = make(MTPCriticTrainer, MTPCriticConfig, tiny_model(**engine.SIZES))
    trainer.vllm_generation._iter_named_params = lambda: iter(())
    trainer.train()
    first, *later = engine.gaps(trainer)
    assert first < LIMIT and min(later) > max(0.1, LIMIT)


def test_values_are_those_of_a_pass_over_the_finished_completions(
    make: Callable[..., Any], tiny_model: Callable[..., Any], tokenizer: Any, tmp_path: Path, engine: Any
) -> None:
    model = tiny_model(**engine.SIZES)
    heads = attach_mtp_heads(model, 2)
    torch.manual_seed(3)
    for p in heads.parameters():
        torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(tmp_path / "model")
    MTPHeads.of(model).save(tmp_path / "model")
    trainer = make(MTPCriticTrainer, MTPCriticConfig, model, num_mtp_heads=2, max_steps=2)
    assert trainer.mtp_heads.state_dict().keys() == heads.state_dict().keys()
    generate, checked = trainer._generate_and_score_completions, []

    def noted(inputs: Any) -> Any:
        batch = generate(inputs)
        alone = completion_values(trainer.model, rows_of(batch, "prompt"), rows_of(batch, "completion"))
        for values, expected in zip(batch["old_values"], alone, strict=True):
            torch.testing.assert_close(values[: len(expected)], expected, rtol=1e-4, atol=1e-5)
        checked.append(torch.cat(alone).std())
        return batch

    trainer._generate_and_score_completions = noted
    trainer.train()
    assert len(checked) == 2 and min(checked) > 0.1, "there is something to tell apart"


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
def test_several_turns_with_what_an_environment_says_between(
    make: Callable[..., Any], tiny_model: Callable[..., Any], engine: Any
) -> None:
    said = [5, 6]

    def two_turns(prompts: list[str], trainer: Any) -> dict[str, Any]:
        ids = [trainer.processing_class(p, add_special_tokens=False)["input_ids"] for p in prompts]
        generate = trainer.vllm_generation.generate
        _, first, before, _ = generate(ids, None, 1)
        _, second, after, _ = generate([[*p, *c, *said] for p, c in zip(ids, first, strict=True)], None, 1)
        turns = list(zip(first, second, before, after, strict=True))
        return {
            "prompt_ids": ids,
            "completion_ids": [[*a, *said, *b] for a, b, _, _ in turns],
            "logprobs": [[*(x[0] for x in la), 0.0, 0.0, *(x[0] for x in lb)] for _, _, la, lb in turns],
            "env_mask": [[*[1] * len(a), 0, 0, *[1] * len(b)] for a, b, _, _ in turns],
        }

    trainer = make(MTPCriticTrainer, MTPCriticConfig, tiny_model(**engine.SIZES), rollout_func=two_turns)
    trainer.train()
    assert len(engine.gaps(trainer)) == 3 and max(engine.gaps(trainer)) < LIMIT
    values, mask = trainer.last_rollout["old_values"], trainer.last_rollout["critic_mask"]
    assert mask.sum() < trainer.last_rollout["completion_mask"].sum() and values[mask.bool()].std() > 0


# Ranks


@pytest.mark.skipif(DEVICE == "cuda", reason="two engines on one GPU")
def test_two_ranks_with_an_engine_each(tiny_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> None:
    from .helpers import vllm_engine

    tiny_model(**vllm_engine.SIZES).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    worker = Path(__file__).parent / "workers" / "vllm_worker.py"
    done = subprocess.run([*launcher, str(worker), str(tmp_path)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in (0, 1))
    for rank in (first, second):
        assert rank["world"] == 2 and len(rank["gaps"]) == 3 and max(rank["gaps"]) < LIMIT
        assert not any("mtp" in name for name in rank["names"]) and len(rank["names"]) == len(first["names"]) > 20
    assert first["weights"] == second["weights"] and first["completions"] != second["completions"]


# Experts


def balanced(make: Callable[..., Any], rate: float = 0.1) -> Any:
    trainer = make(*VARIANT, make_moe_model("glm4_moe", **MOE_SIZES), num_generations=4, router_aux_loss_coef=0.0)
    MoEBalancingCallback(rate=rate, record_load=False).add_to(trainer)
    return trainer


def test_own_biases_reach_the_engine(make: Callable[..., Any], engine: Any) -> None:
    trainer = balanced(make)
    names = engine.record_names(trainer)
    trainer.train()
    assert len(engine.gaps(trainer)) == 3 and max(engine.gaps(trainer)) < LIMIT
    trainer.vllm_generation.sync_weights()
    theirs = engine.engine_weights(trainer)
    ours = {name: bias for name, bias in trainer.model.named_buffers() if name.endswith("e_score_correction_bias")}
    assert len(ours) == 2 and ours.keys() <= names
    for name, bias in ours.items():
        assert bias.abs().max() >= 0.1 - 1e-6
        (engines,) = (x for key, x in theirs.items() if key.endswith("bias") and name.split(".mlp")[0] in key)
        torch.testing.assert_close(engines.float(), bias.float(), rtol=0, atol=0)


def test_biases_that_are_not_pushed_show(make: Callable[..., Any], engine: Any) -> None:
    """The control: TRL alone streams parameters only."""
    trainer = balanced(make)
    generation = trainer.vllm_generation
    generation._iter_named_params = lambda: type(generation)._iter_named_params(generation)
    trainer.train()
    assert max(engine.gaps(trainer)) > max(0.1, 2 * LIMIT)


def test_attached_modules_stay_behind_in_any_trainer(make: Callable[..., Any], engine: Any) -> None:
    """A model that came with heads, which this trainer does not use."""
    trainer = make(*VARIANT, make_moe_model("glm4_moe", **MOE_SIZES), num_generations=4, router_aux_loss_coef=0.0)
    plain = {name for name, _ in trainer.model.named_parameters()}
    attach_mtp_heads(trainer.model, 2, head_type="sequential")
    names = engine.record_names(trainer)
    trainer.vllm_generation.sync_weights()
    assert names == plain


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_added_biases_are_refused_with_what_to_do(family: str, make: Callable[..., Any]) -> None:
    trainer = make(GRPOTrainer, GRPOConfig, make_moe_model(family, **MOE_SIZES), num_generations=4)
    with pytest.raises(ValueError, match=r"no place for the selection biases of model.* Balance with an auxiliary"):
        MoEBalancingCallback(rate=0.1).add_to(trainer)
