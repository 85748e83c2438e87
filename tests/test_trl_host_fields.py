"""Every field of the host's config works in our trainers, or is refused."""

import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset, IterableDataset
from packaging.version import Version
from transformers import TrainingArguments
from trl import GRPOConfig

from rl_plugins.trl import (
    GRPOVariantConfig,
    GRPOVariantTrainer,
    MTPCriticConfig,
    MTPCriticTrainer,
    PPOConfig,
    PPOTrainer,
)

from .helpers.tiny import ON_CPU

TESTED = "1.16"
"""TRL whose fields are listed here."""

# Verdicts. Where a field says "refused", `REFUSED` below has the case.
HOST = "works: the host reads it where we leave it alone"
GENERATE = "works: the host's generate, whatever is recorded meanwhile"
SAMPLER = "works: the host's sampler, on a dataset that fills a batch"
LOSS = "works: read by the loss that has such an option, refused for a loss that TRL does not have if that has none"
WEIGHTS = "works: in the host's loss, and as a weight of our loss per token"
ADVANTAGES = "works for the host's advantages, refused with others"
VLLM = "works: the host's engine, which gets the policy without heads"
VERDICTS: dict[str, list[str]] = {
    HOST: [
        *("model_init_kwargs", "trust_remote_code", "disable_dropout", "cast_lm_head_to_fp32"),
        *("max_completion_length", "ds3_gather_for_generation", "chat_template_kwargs", "max_tool_calling_iterations"),
        *("log_completions", "log_multimodal", "num_completions_to_print", "log_unique_prompts"),
        *("log_completions_hub_repo", "beta", "use_bias_correction_kl", "mask_truncated_completions"),
        *("entropy_coef", "use_adaptive_entropy", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta"),
        *("entropy_target", "reward_weights", "num_iterations", "router_aux_loss_coef"),
    ],
    GENERATE: [
        *("pad_to_multiple_of", "temperature", "top_p", "top_k", "min_p", "generation_kwargs", "repetition_penalty"),
        *("cache_implementation", "use_transformers_continuous_batching", "transformers_continuous_batching_config"),
        "use_transformers_paged",
    ],
    SAMPLER: [
        *("num_generations", "num_generations_eval", "shuffle_dataset", "generation_batch_size"),
        "steps_per_generation",
    ],
    LOSS: [
        *("epsilon", "delta", "epsilon_high", "sapo_temperature_neg", "sapo_temperature_pos", "vespo_k_pos"),
        *("vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg", "importance_sampling_level", "loss_type"),
    ],
    WEIGHTS: ["top_entropy_quantile", "off_policy_mask_threshold"],
    ADVANTAGES: ["multi_objective_aggregation", "scale_rewards"],
    "refused with heads or a value model attached": ["sync_ref_model"],
    "works: with sync_ref_model": ["ref_model_mixup_alpha", "ref_model_sync_steps"],
    VLLM: [
        *("use_vllm", "vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_structured_outputs_regex"),
        *("vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port"),
        *("vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size"),
        *("vllm_importance_sampling_correction", "vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max"),
        *("vllm_importance_sampling_clip_min", "vllm_importance_sampling_cap"),
    ],
}

CRITICS: dict[str, tuple[Any, dict[str, Any]]] = {"critic": (MTPCriticConfig, {}), "ppo": (PPOConfig, {})}
VARIANT: dict[str, tuple[Any, dict[str, Any]]] = {"variant": (GRPOVariantConfig, {"advantage": "reward"})}
CONFIGS = {**CRITICS, **VARIANT}
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (CONFIGS, {"scale_rewards": "batch"}, "scale_rewards='batch' has no effect"),
    (CONFIGS, {"scale_rewards": False}, "scale_rewards='none' has no effect"),
    (CONFIGS, {"multi_objective_aggregation": "normalize_then_sum"}, "multi_objective_aggregation=.* has no effect"),
    (CONFIGS, {"policy_loss": "gmpo", "delta": 2.0}, "delta=2.0 has no effect on policy_loss='gmpo', which reads"),
    (CONFIGS, {"policy_loss": "vanilla", "epsilon": 0.3}, "epsilon=0.3 has no .*'vanilla', which reads none of the"),
    (CONFIGS, {"policy_loss": "bapo", "sapo_temperature_pos": 2.0}, "sapo_temperature_pos=2.0 has no effect"),
    (CONFIGS, {"policy_loss": "fipo", "vespo_k_pos": 1.0}, "which reads .*epsilon, epsilon_high"),
    (
        CRITICS,
        {"policy_loss": "clip_cov", "importance_sampling_level": "sequence", "beta": 0.0},
        "importance_sampling_level='sequence' has no effect",
    ),
    (CRITICS, {"sync_ref_model": True, "beta": 0.1}, "reference has no critic. Set sync_ref_model=False"),
    (VARIANT, {"sync_ref_model": True, "beta": 0.1, "speculative": True}, "the reference has no heads"),
]
KEPT: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (CONFIGS, {"policy_loss": "sapo", "sapo_temperature_pos": 2.0}),
    (CONFIGS, {"policy_loss": "gmpo", "loss_type": "grpo"}),  # what carries the other terms of this loss
    (CONFIGS, {"policy_loss": "gmpo", "importance_sampling_level": "sequence", "beta": 0.1}),  # of the KL term
    ({"": (GRPOVariantConfig, {})}, {"scale_rewards": "batch", "multi_objective_aggregation": "normalize_then_sum"}),
    ({"": (GRPOVariantConfig, {})}, {"preset": "dr_grpo", "scale_rewards": "none"}),  # both say the same
    ({"": (MTPCriticConfig, {})}, {"use_critic": False, "num_generations": 2, "scale_rewards": "none"}),
    ({"": (GRPOVariantConfig, {})}, {"sync_ref_model": True, "beta": 0.1}),
]
QUICK = {
    **ON_CPU,
    "per_device_train_batch_size": 8,
    "max_completion_length": 6,
    "logging_steps": 1,
    "learning_rate": 1e-2,
}


def own_fields() -> set[str]:
    """Fields of GRPOConfig that are not those of every trainer of transformers."""
    inherited = {f.name for f in fields(TrainingArguments)}
    return {f.name for f in fields(GRPOConfig)} - inherited


def test_every_field_of_the_host_has_a_verdict() -> None:
    names = [name for listed in VERDICTS.values() for name in listed]
    assert len(names) == len(set(names))
    unknown = sorted(own_fields() - set(names))
    if Version(trl.__version__).release[:2] != Version(TESTED).release:
        if unknown:
            warnings.warn(f"TRL {trl.__version__} has fields without a verdict: {', '.join(unknown)}.", stacklevel=1)
        pytest.skip(f"verdicts are about TRL {TESTED}")
    assert not unknown and set(names) == own_fields()


@pytest.mark.parametrize(("configs", "options", "message"), REFUSED, ids=[str(case[1]) for case in REFUSED])
def test_what_has_no_effect_is_refused(
    configs: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    for config, own in configs.values():
        with pytest.raises(ValueError, match=message):
            config(str(tmp_path), use_cpu=True, bf16=False, **own, **options)


@pytest.mark.parametrize(("configs", "options"), KEPT, ids=[str(case[1]) for case in KEPT])
def test_what_has_an_effect_is_not(configs: dict[str, Any], options: dict[str, Any], tmp_path: Path) -> None:
    for config, own in configs.values():
        args = config(str(tmp_path), use_cpu=True, bf16=False, **own, **options)
        # Once more from its own fields, as parsers and checkpoints do.
        again = {f.name: getattr(args, f.name) for f in fields(args) if f.init}
        config(**{**again, "generation_batch_size": None})


def test_a_loss_of_the_host_beside_another_is_told(tmp_path: Path) -> None:
    for config, own in CONFIGS.values():
        with pytest.warns(UserWarning, match="loss_type='cispo' has no effect: policy_loss='gmpo' takes its place"):
            args = config(str(tmp_path), use_cpu=True, bf16=False, policy_loss="gmpo", loss_type="cispo", **own)
        assert (args.policy_loss, args.aggregation, args.loss_type) == ("gmpo", "sequence", "cispo")


@pytest.fixture
def train(tiny_model: Callable[..., Any], tokenizer: Any, dataset: Dataset, reward: Any, tmp_path: Path) -> Any:
    """Trains `critic`, `ppo` or `variant` and returns the trainer; keywords go to the config."""
    trainers = {"critic": MTPCriticTrainer, "ppo": PPOTrainer, "variant": GRPOVariantTrainer}

    def run(kind: str, data: Any = None, eval_dataset: Any = None, **options: Any) -> Any:
        config, own = CONFIGS[kind]
        args = config(str(tmp_path), **{**QUICK, "max_steps": 3, **own, **options})
        model = tiny_model(initializer_range=0.2)
        data = dataset if data is None else data
        trainer = trainers[kind](model, reward, args, data, eval_dataset, processing_class=tokenizer)
        trainer.train()
        return trainer

    return run


def losses(trainer: Any) -> list[float]:
    return [row["grad_norm"] for row in trainer.state.log_history if "loss" in row]


EFFECTS: list[dict[str, Any]] = [
    {"delta": 1.001},
    {"epsilon": 0.001},
    {"epsilon_high": 0.001},
    {"importance_sampling_level": "sequence"},
    {"top_entropy_quantile": 0.5},
    {"off_policy_mask_threshold": -1.0, "advantage_scaling": "whiten"},  # of negative advantages
    {"entropy_coef": 0.3},
    {"mask_truncated_completions": True},
    {"reward_weights": [0.3]},
    {"beta": 0.5},
    {"beta": 0.5, "use_bias_correction_kl": False},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", EFFECTS, ids=str)
def test_an_option_acts_on_our_loss_as_on_the_hosts(train: Any, options: dict[str, Any]) -> None:
    options = dict(options)
    shared = {"num_iterations": 3, "advantage_scaling": options.pop("advantage_scaling", "none")}
    plain = losses(train("critic", policy_loss="dapo", **shared))
    ours = losses(train("critic", policy_loss="dapo", **shared, **options))
    hosts = losses(train("critic", loss_type="dapo", **shared, **options))
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(hosts), rtol=1e-4, atol=1e-6)
    assert max(abs(a - b) for a, b in zip(ours, plain, strict=True)) > 1e-3


# Fewer prompts than a generation batch takes


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("kind", "prompts", "times"), [("critic", 4, 2), ("ppo", 3, 3), ("variant", 1, 4)])
def test_few_prompts_are_repeated(
    train: Any, dataset: Dataset, kind: str, prompts: int, times: int, stream: bool
) -> None:
    few = dataset.select(range(5, 5 + prompts))
    data = IterableDataset.from_generator(lambda: iter(list(few))) if stream else few
    group = {"num_generations": 2, "advantage": "group_centered"} if kind == "variant" else {}
    fills = 8 // (2 if kind == "variant" else 1)
    with pytest.warns(UserWarning, match=f"has {prompts} prompts, but a generation batch takes {fills} .* {times} ti"):
        trainer = train(kind, data, **group)
    assert trainer.state.global_step == 3 and all(norm > 0 for norm in losses(trainer))
    shown = list(trainer._logs["prompt"])
    assert len(shown) == 8 and set(shown) <= set(few["prompt"])
    if not stream:
        counts = [shown.count(prompt) for prompt in few["prompt"]]
        assert min(counts) >= 8 // prompts - 1 and len(trainer.train_dataset) == times * prompts


@pytest.mark.slow
def test_few_prompts_without_a_number_of_steps(train: Any, dataset: Dataset) -> None:
    with pytest.warns(UserWarning, match="4 prompts"):
        trainer = train("critic", dataset.select(range(4)), max_steps=-1, num_train_epochs=2)
    assert trainer.state.global_step == 2 and trainer.state.epoch == 2


@pytest.mark.slow
def test_enough_prompts_stay_as_they_are(train: Any, dataset: Dataset) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The dataset has")
        trainer = train("critic", dataset.select(range(8)), max_steps=1)
    assert len(trainer.train_dataset) == 8


@pytest.mark.slow
def test_few_prompts_to_evaluate_on(train: Any, dataset: Dataset) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8, "max_steps": 1}
    trainer = train("critic", None, dataset.select(range(3)), **options)
    (found,) = [row for row in trainer.state.log_history if "eval_reward" in row]
    assert len(trainer.last_rollout["scores"]) == 3
    assert found["eval_reward"] == pytest.approx(trainer.last_rollout["scores"].mean().item())


def test_an_optimizer_that_would_leave_the_critic_out_is_refused(
    tiny_model: Callable[..., Any], tokenizer: Any, dataset: Dataset, reward: Any, tmp_path: Path
) -> None:
    for trainer, config, name in ((MTPCriticTrainer, MTPCriticConfig, "mtp_heads"), (PPOTrainer, PPOConfig, "value_")):
        model, args = tiny_model(), config(str(tmp_path), **QUICK)
        optimizers = (torch.optim.SGD(model.parameters()), None)
        with pytest.raises(ValueError, match=f"before the policy had {name}.* would not train"):
            trainer(model, reward, args, dataset, processing_class=tokenizer, optimizers=optimizers)
