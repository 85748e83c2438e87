"""Signatures of the private hooks that `rl_plugins/trl/host.py` and `rl_plugins/lightning/host.py` list."""

import inspect
import re
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import trl.data_utils
import trl.trainer.utils
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loops.fetchers import _PrefetchDataFetcher
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from transformers import DeepseekV3ForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel, Trainer
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_layers import MtpLayer, MtpModel
from trl import GRPOTrainer, SFTTrainer
from trl.generation.vllm_generation import VLLMGeneration

from rl_plugins.lightning import PromptDataModule
from rl_plugins.lightning import host as lightning_host
from rl_plugins.trl import MTPCriticTrainer, host

HOOKS: dict[tuple[type | Any, str], list[str]] = {
    (GRPOTrainer, "_generate_and_score_completions"): ["inputs"],
    (GRPOTrainer, "_generate_single_turn"): [
        "prompt_ids",
        "images",
        "multimodal_fields",
        "num_generations",
        "has_tool_images",
    ],
    (GRPOTrainer, "_calculate_rewards"): ["inputs", "prompts", "completions", "completion_ids_list"],
    (GRPOTrainer, "_prepare_inputs"): ["generation_batch"],
    (GRPOTrainer, "_compute_loss"): ["model", "inputs"],
    (GRPOTrainer, "_save_checkpoint"): ["model", "trial"],
    (GRPOTrainer, "_load_optimizer_and_scheduler"): ["checkpoint"],
    (GRPOTrainer, "get_off_policy_mask"): [
        "advantages",
        "per_token_logps",
        "sampling_per_token_logps",
        "mask",
        "off_policy_threshold",
    ],
    (GRPOTrainer, "get_high_entropy_mask"): ["entropies", "mask", "threshold"],
    (SFTTrainer, "_set_signature_columns_if_needed"): [],
    (VLLMGeneration, "_iter_named_params"): [],
    (Trainer, "_save"): ["output_dir", "state_dict"],
    (Trainer, "_save_checkpoint"): ["model", "trial"],
    (Trainer, "_load_from_checkpoint"): ["resume_from_checkpoint", "model"],
    (Trainer, "_load_best_model"): [],
    (Trainer, "_load_optimizer_and_scheduler"): ["checkpoint"],
    (Trainer, "_issue_warnings_after_load"): ["load_result"],
    (Trainer, "_get_output_dir"): ["trial"],
    (PreTrainedModel, "_init_weights"): ["module"],
    (trl.trainer.utils, "maybe_gather_lm_head_ctx"): ["params"],
    (trl.data_utils, "get_dataset_column_names"): ["dataset"],
}
# Host methods of which only the first parameters matter.
PREFIXES: dict[tuple[type, str], list[str]] = {
    (GRPOTrainer, "_get_per_token_logps_and_entropies"): [
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
        "compute_entropy",
        "compute_aux_loss",
    ],
    (SFTTrainer, "_prepare_dataset"): ["dataset", "processing_class", "args", "packing"],
}
ATTRIBUTES = {"_metrics", "_logs", "_step", "_buffered_inputs", "_dist", "_tokenizer", "_entropy_bonus_enabled"}
MODEL_ATTRIBUTES = {"_keys_to_ignore_on_load_unexpected", "_gradient_checkpointing_func"}


def parameters(owner: Any, name: str) -> list[str]:
    names = list(inspect.signature(getattr(owner, name)).parameters)
    return names[1:] if names and names[0] == "self" else names


@pytest.mark.parametrize(("hook", "expected"), HOOKS.items(), ids=[name for _, name in HOOKS])
def test_signature(hook: tuple[Any, str], expected: list[str]) -> None:
    assert parameters(*hook) == expected


@pytest.mark.parametrize(("hook", "expected"), PREFIXES.items(), ids=[name for _, name in PREFIXES])
def test_first_parameters(hook: tuple[Any, str], expected: list[str]) -> None:
    assert parameters(*hook)[: len(expected)] == expected


def test_host_lists_every_hook_that_is_tested_and_the_other_way_round() -> None:
    functions = "maybe_gather_lm_head_ctx|get_dataset_column_names|get_off_policy_mask|get_high_entropy_mask"
    listed = set(re.findall(rf"`(?:\w+\.)*(_\w+|{functions})`", host.__doc__ or ""))
    assert listed == {name for _, name in HOOKS} | {name for _, name in PREFIXES} | ATTRIBUTES | MODEL_ATTRIBUTES


def test_what_native_layers_and_decoding_lean_on(tiny_model: Callable[..., Any]) -> None:
    assert parameters(MtpLayer, "__init__")[:4] == ["config", "decoder_layer_cls", "norm_cls", "layer_idx"]
    assert parameters(MtpModel, "from_pretrained")[:2] == ["main_model", "device_map"]
    assert parameters(PreTrainedConfig, "get_mtp_config") == []
    assert list(inspect.signature(revert_weight_conversion).parameters) == ["model", "state_dict"]
    assert "custom_generate" in parameters(GenerationMixin, "generate")
    assert isinstance(DeepseekV3ForCausalLM._keys_to_ignore_on_load_unexpected, list)
    model = tiny_model()
    model.gradient_checkpointing_enable()
    assert callable(model.model.layers[0]._gradient_checkpointing_func)


def test_private_attributes_of_a_live_trainer(
    tiny_model: Callable[..., Any],
    tokenizer: Any,
    dataset: Any,
    reward: Any,
    critic_args: Callable[..., Any],
    tmp_path: Path,
) -> None:
    trainer = MTPCriticTrainer(tiny_model(), reward, critic_args(tmp_path), dataset, processing_class=tokenizer)
    assert trainer._step == 0 and trainer._buffered_inputs is None
    assert set(trainer._metrics) == {"train", "eval"} and isinstance(trainer._metrics["train"], defaultdict)
    assert trainer._metrics["train"]["new"] == []
    assert isinstance(trainer._logs["advantages"], deque) and isinstance(trainer._logs["extra"]["value"], deque)
    assert trainer._entropy_bonus_enabled is False and trainer._tokenizer.pad_token_id == tokenizer.pad_token_id
    weights = list(trainer.model.parameters())[:1]
    with trainer._dist.gather_params(weights):
        assert weights[0].shape == (16, 32)
    assert callable(trainer.model.forward) and trainer.temperature == 1.0 and trainer.beta == 0.0


def test_hooks_of_lightning() -> None:
    listed = set(re.findall(r"`(?:\w+\.)*(_\w+)`", lightning_host.__doc__ or ""))
    assert listed == {
        "_trainer",
        "_parse_ckpt_path",
        "_init_deepspeed_distributed",
        "_data_fetcher",
        "_should_accumulate",
        "_on_before_batch_transfer",
    }
    assert parameters(LightningModule, "_on_before_batch_transfer") == ["batch", "dataloader_idx"]
    loop = lightning.pytorch.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False).fit_loop
    assert loop._data_fetcher is None and parameters(loop, "_should_accumulate") == []
    assert loop.epoch_loop.batch_progress.current.ready == 0
    fetcher = _PrefetchDataFetcher()
    fetcher.setup(CombinedLoader(iter([1, 2]), "max_size_cycle"))
    assert iter(fetcher).batches == [(1, 0, 0)] and next(fetcher.iterator) == (2, 1, 0)
    assert LightningModule()._trainer is None
    assert parameters(LightningCLI, "_parse_ckpt_path") == []
    assert parameters(DeepSpeedStrategy, "_init_deepspeed_distributed") == []
    assert parameters(Strategy, "setup_environment") == parameters(DeepSpeedStrategy, "setup_environment") == []
    rows = [{"prompt": "1"}]
    assert is_overridden("val_dataloader", PromptDataModule(rows, rows))
    assert not is_overridden("val_dataloader", PromptDataModule(rows))
