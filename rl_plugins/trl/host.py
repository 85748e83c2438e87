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

Not private, but not documented either: `trl.scripts.grpo.GRPOScriptArguments`, `GRPOTrainer.get_off_policy_mask`,
`get_high_entropy_mask`.
"""

from collections.abc import Iterator

import trl
from packaging.version import Version
from torch import Tensor
from trl.generation.vllm_generation import VLLMGeneration

from rl_plugins.modules.attach import HEADS_ATTRIBUTE
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


def without_critics(stream: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Drop heads and value model from a stream of named parameters; every parameter is still consumed, since gathering
    it is collective."""
    for name, tensor in stream:
        if not {HEADS_ATTRIBUTE, CRITIC_ATTRIBUTE} & set(name.split(".")):
            yield name, tensor


def hide_critics_from_vllm(generation: VLLMGeneration) -> None:
    """vLLM loads every parameter that TRL streams to it, and does not know ours."""
    stream = generation._iter_named_params
    generation._iter_named_params = lambda: without_critics(stream())
