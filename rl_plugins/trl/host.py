"""What we lean on in TRL and transformers, in one place.

Private hooks (tests/test_host_hooks.py checks each signature):

- `GRPOTrainer._generate_and_score_completions`, `_generate_single_turn`, `_calculate_rewards`, `_prepare_inputs`,
  `_get_per_token_logps_and_entropies`, `_compute_loss`; attributes `_metrics`, `_logs`, `_step`, `_buffered_inputs`,
  `_dist`, `_tokenizer`, `_entropy_bonus_enabled`.
- `SFTTrainer._prepare_dataset`, `_set_signature_columns_if_needed`, `_metrics`.
- `VLLMGeneration._iter_named_params`.
- `Trainer._save`, `_save_checkpoint`, `_load_from_checkpoint`, `_load_best_model`, `_load_optimizer_and_scheduler`,
  `_issue_warnings_after_load`, `_get_output_dir`.
- `trl.trainer.utils.maybe_gather_lm_head_ctx`, `trl.data_utils.get_dataset_column_names`.
- for native MTP layers (`rl_plugins.modules.native_mtp*`): `MtpLayer`, `MtpModel.from_pretrained`,
  `PreTrainedConfig.get_mtp_config`, `revert_weight_conversion`, `PreTrainedModel._init_weights`,
  `_keys_to_ignore_on_load_unexpected`, `_gradient_checkpointing_func`.

Not private, but not documented either: `trl.scripts.grpo.GRPOScriptArguments`, `GRPOTrainer.get_off_policy_mask`,
`get_high_entropy_mask`; `Trainer.callback_handler`, `current_gradient_accumulation_steps`,
`TrainerState.stateful_callbacks`; `generate(custom_generate=...)` with a callable.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import trl
from packaging.version import Version
from torch import Tensor, nn
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.utils import maybe_gather_lm_head_ctx

from rl_plugins.modules.attach import HEADS_ATTRIBUTE, base_model_of
from rl_plugins.modules.native_mtp import NATIVE_ATTRIBUTE
from rl_plugins.modules.routers import Router
from rl_plugins.modules.value_model import CRITIC_ATTRIBUTE

OLDEST_TRL, FIRST_UNTESTED_TRL = "1.15", "1.17"


def require_tested_trl() -> None:
    """Refuse a TRL whose private hooks we have not tested.

    Raises:
        ImportError: Naming the range to install.
    """
    if not Version(OLDEST_TRL) <= Version(trl.__version__) < Version(FIRST_UNTESTED_TRL):
        raise ImportError(
            f"rl_plugins is tested with trl>={OLDEST_TRL},<{FIRST_UNTESTED_TRL}, but trl {trl.__version__} is "
            f'installed. Run: pip install "trl>={OLDEST_TRL},<{FIRST_UNTESTED_TRL}"'
        )


def gather_lm_head(params: Sequence[Tensor]) -> AbstractContextManager[None]:
    """Whole LM-head weights under ZeRO-3; leaves weights that are whole already (tied embeddings) alone."""
    return maybe_gather_lm_head_ctx(*params)


def without_critics(stream: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Drop heads, native MTP layers and value model from a stream of named parameters; every parameter is still
    consumed, since gathering it is collective."""
    for name, tensor in stream:
        if {HEADS_ATTRIBUTE, NATIVE_ATTRIBUTE, CRITIC_ATTRIBUTE}.isdisjoint(name.split(".")):
            yield name, tensor


def hide_critics_from_vllm(generation: VLLMGeneration) -> None:
    """vLLM loads every parameter that TRL streams to it, and does not know ours."""
    stream = generation._iter_named_params
    generation._iter_named_params = lambda: without_critics(stream())


def own_router_loss(host: Any, model: nn.Module) -> float:
    """Coefficient of the router loss that the host itself adds to a model's loss; 0 where it adds none.

    transformers adds it where the model's config asks for router logits, TRL for every config that could ask.

    Args:
        host: The trainer, or its arguments where it is not at hand.
        model: Its model.
    """
    config = base_model_of(model).config.get_text_config()
    coef = getattr(config, "router_aux_loss_coef", 0.0)
    if "aux_loss_enabled" in vars(host):
        return host.router_aux_loss_coef if host.aux_loss_enabled else 0.0
    if "router_aux_loss_coef" in vars(host):
        coef = coef if host.router_aux_loss_coef is None else host.router_aux_loss_coef
        return coef if hasattr(config, "output_router_logits") else 0.0
    return coef if getattr(config, "output_router_logits", False) else 0.0


def stream_biases_to_vllm(generation: VLLMGeneration, routers: Sequence[Router]) -> None:
    """TRL streams parameters to vLLM, and no buffers: add the selection biases that are buffers, and parameters of
    which it streams a rounded copy.

    Raises:
        ValueError: If a bias was added to an architecture without one, which vLLM cannot hold.
    """
    added = [router.name for router in routers if router.injected is not None]
    if added:
        raise ValueError(
            f"vLLM's model has no place for the selection biases of {added[0]} and the others, so it would route "
            "otherwise than the policy. Balance with an auxiliary loss (rate=0, aux_loss_coef=0.01), or generate "
            "without vLLM."
        )
    stream = generation._iter_named_params

    def with_biases() -> Iterator[tuple[str, Tensor]]:
        yield from stream()
        for router in routers:
            if router.is_rounded or not isinstance(router.stored_bias, nn.Parameter):
                yield router.bias_key, router.bias

    generation._iter_named_params = with_biases
