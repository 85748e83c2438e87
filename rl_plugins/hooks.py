"""A table of hooks, which are the undocumented parts of other libraries that we use, and the check of this table.

A release of TRL, transformers or Lightning fits as long as its hooks do, whatever its number. The import of one of our
packages checks the hooks that the whole package needs. The first use of a feature checks the hooks of that feature.
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from types import CodeType
from typing import Any, NamedTuple

TESTED = {
    "accelerate": "1.15.0",
    "deepspeed": "0.19.8",
    "lightning": "2.6.6",
    "peft": "0.21.2",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "trl": "1.16.0",
}
"""The releases that every test ran with, as in constraints.txt."""

SPECULATIVE = "speculative decoding"
SEQUENTIAL_HEADS = "sequential heads"
RELEASED_HEADS = "sequential heads in the checkpoint of a model"
BALANCING = "balancing of experts"
VLLM = "generation with vLLM"
FSDP2 = "training under FSDP2"
OFF_POLICY_MASK = "off_policy_mask_threshold"
TOP_ENTROPY = "top_entropy_quantile"
DEEPSPEED_ON_CPU = "CPUDeepSpeedStrategy"

TURN_OFF = {
    SPECULATIVE: "set speculative=False, or leave out custom_generate",
    SEQUENTIAL_HEADS: "use parallel heads (mtp_head_type='parallel')",
    RELEASED_HEADS: "use parallel heads (mtp_head_type='parallel')",
    BALANCING: "train without MoEBalancingCallback",
    VLLM: "set use_vllm=False",
    FSDP2: "train under DDP or DeepSpeed",
    OFF_POLICY_MASK: "leave off_policy_mask_threshold at None",
    TOP_ENTROPY: "leave top_entropy_quantile at 1.0",
}
"""Settings that avoid a feature, for the message about its hooks."""

PRESENT = "is there"


class Hook(NamedTuple):
    """One name that we call, override or read.

    Args:
        target: Dotted path of the name, from the module that we import it from.
        parameters: Names of parameters that we pass or take, in order. Parameters after `*` are passed by keyword, so
            their order does not matter. `a|b` means either name. With `...` at the end the library may add parameters
            that must be given, since we pass on all that we get. `PRESENT` if the name only has to exist. For an
            attribute that a class sets on its objects, this means that the code of the class mentions it.
    """

    target: str
    parameters: str = PRESENT


CACHE = "cache|past_key_values"

HOOKS: dict[str, tuple[Hook, ...]] = {
    "rl_plugins.nn": (
        Hook("transformers.PreTrainedModel.get_decoder", ""),
        Hook("transformers.PreTrainedModel._init_weights", "module"),
        Hook("transformers.PreTrainedModel._keys_to_ignore_on_save"),
        Hook("transformers.utils.cached_file", "path_or_repo_id, filename"),
        Hook("transformers.models.auto.modeling_auto.MODEL_MAPPING_NAMES"),
    ),
    BALANCING: (
        Hook("transformers.PreTrainedModel._can_record_outputs"),
        Hook("transformers.utils.output_capturing.OutputRecorder.target_class"),
    ),
    SEQUENTIAL_HEADS: (
        Hook("transformers.modeling_layers.GradientCheckpointingLayer.gradient_checkpointing"),
        *(
            Hook(
                f"transformers.masking_utils.create_{kind}",
                f"*, config, inputs_embeds, attention_mask, {CACHE}, position_ids, layer_idx",
            )
            for kind in ("causal_mask", "sliding_window_causal_mask", "chunked_causal_mask")
        ),
    ),
    # Our layers are saved under the names of MtpLayer's parts.
    RELEASED_HEADS: (
        Hook("transformers.modeling_layers.MtpLayer.mtp_block"),
        Hook("transformers.modeling_layers.MtpLayer.post_norm"),
        Hook("transformers.modeling_layers.MtpModel.from_pretrained", "main_model, device_map"),
        Hook("transformers.PreTrainedConfig.get_mtp_config", ""),
        Hook("transformers.PreTrainedModel._keys_to_ignore_on_load_unexpected"),
        Hook("transformers.core_model_loading.revert_weight_conversion", "model, state_dict"),
    ),
    SPECULATIVE: (
        Hook("transformers.GenerationMixin.generate", "*, custom_generate"),
        Hook(
            "transformers.GenerationMixin.prepare_inputs_for_generation",
            f"input_ids, *, {CACHE}, attention_mask, position_ids, is_first_iteration",
        ),
        Hook("transformers.GenerationConfig.get_generation_mode", ""),
        Hook("transformers.Cache.__init__", "*, layers"),
        Hook("transformers.Cache.offloading"),
        Hook("transformers.Cache.is_sliding"),
        Hook("transformers.DynamicCache.__init__", "*, config"),
        Hook("transformers.cache_utils.DynamicLayer.update", "key_states, value_states, ..."),
        Hook("transformers.cache_utils.DynamicLayer.get_seq_length", ""),
        Hook("transformers.cache_utils.DynamicSlidingWindowLayer"),
        Hook("transformers.cache_utils.DummyLayer"),
        *(
            Hook(f"transformers.generation.logits_process.{name}")
            for name in (
                "EncoderNoRepeatNGramLogitsProcessor",
                "EncoderRepetitionPenaltyLogitsProcessor",
                "PrefixConstrainedLogitsProcessor",
                "RepetitionPenaltyLogitsProcessor.penalty",
                "RepetitionPenaltyLogitsProcessor.prompt_ignore_length",
                "TopHLogitsWarper",
                "UnbatchedClassifierFreeGuidanceLogitsProcessor",
            )
        ),
        Hook("transformers.generation.stopping_criteria.EosTokenCriteria.eos_token_id"),
        Hook("transformers.generation.stopping_criteria.MaxLengthCriteria.max_length"),
    ),
    "rl_plugins.report": (Hook("transformers.convert_slow_tokenizer.bytes_to_unicode", ""),),
    "rl_plugins.trl": (
        Hook("trl.GRPOTrainer._generate_and_score_completions", "inputs"),
        Hook("trl.GRPOTrainer._generate_single_turn", "prompt_ids, images, multimodal_fields, num_generations"),
        Hook("trl.GRPOTrainer._generate", "prompts"),
        Hook(
            "trl.GRPOTrainer._tool_call_loop",
            "prompts, prompt_ids, completion_ids, completions, logprobs, images, multimodal_fields",
        ),
        Hook("trl.GRPOTrainer._calculate_rewards", "inputs, prompts, completions, completion_ids_list"),
        Hook("trl.GRPOTrainer._prepare_inputs", "generation_batch"),
        Hook(
            "trl.GRPOTrainer._get_per_token_logps_and_entropies",
            "model, input_ids, attention_mask, logits_to_keep, batch_size",
        ),
        Hook("trl.GRPOTrainer._compute_loss", "model, inputs"),
        Hook("trl.GRPOTrainer._save_checkpoint", "model, trial"),
        Hook("trl.GRPOTrainer._load_optimizer_and_scheduler", "checkpoint"),
        *(
            Hook(f"trl.GRPOTrainer.{name}")
            for name in (
                "_metrics",
                "_logs",
                "_step",
                "_buffered_inputs",
                "_tokenizer",
                "_entropy_bonus_enabled",
                "_sync_tool_dicts",
                "_async_tool_dicts",
                "_environment_pool",
            )
        ),
        Hook("trl.SFTTrainer._prepare_dataset", "dataset, processing_class, args, packing, ..."),
        Hook("trl.SFTTrainer._set_signature_columns_if_needed", ""),
        Hook("trl.SFTTrainer.compute_loss", "model, inputs, return_outputs, num_items_in_batch"),
        Hook("trl.SFTTrainer._metrics"),
        Hook("trl.GRPOTrainer._name"),
        Hook("trl.GRPOTrainer._paper"),
        Hook("trl.SFTTrainer._name"),
        Hook("trl.SFTTrainer._paper"),
        Hook("trl.data_utils.get_dataset_column_names", "dataset"),
        Hook("trl.models.utils.disable_gradient_checkpointing", "model, gradient_checkpointing_kwargs"),
        Hook("trl.trainer.base_trainer._BaseTrainer"),
        Hook("trl.trainer.utils.disable_dropout_in_model", "model"),
        Hook("trl.trainer.utils.get_config_model_id", "config"),
        Hook("transformers.Trainer.create_optimizer"),
        Hook("transformers.Trainer.training_step"),
        Hook("transformers.Trainer._save", "output_dir, state_dict"),
        Hook("transformers.Trainer._save_checkpoint", "model, trial"),
        Hook("transformers.Trainer._load_from_checkpoint", "resume_from_checkpoint, model"),
        Hook("transformers.Trainer._load_best_model", ""),
        Hook("transformers.Trainer._load_optimizer_and_scheduler", "checkpoint"),
        Hook("transformers.Trainer._issue_warnings_after_load", "load_result"),
        Hook("transformers.Trainer._get_output_dir", "trial"),
        Hook("transformers.Trainer._signature_columns"),
        Hook("transformers.Trainer.callback_handler"),
        Hook("transformers.Trainer.current_gradient_accumulation_steps"),
        Hook("transformers.trainer.TRAINER_STATE_NAME"),
        Hook("transformers.trainer_callback.ExportableState.state", ""),
        Hook("transformers.trainer_callback.TrainerState.stateful_callbacks"),
        Hook("transformers.trainer_utils.PREFIX_CHECKPOINT_DIR"),
        Hook("transformers.trainer_utils.get_last_checkpoint", "folder"),
        Hook("transformers.utils.peft_utils.find_adapter_config_file", "model_id"),
    ),
    OFF_POLICY_MASK: (
        Hook(
            "trl.GRPOTrainer.get_off_policy_mask",
            "advantages, per_token_logps, sampling_per_token_logps, mask, off_policy_threshold",
        ),
    ),
    TOP_ENTROPY: (Hook("trl.GRPOTrainer.get_high_entropy_mask", "entropies, mask, threshold"),),
    FSDP2: (
        Hook("torch.distributed.fsdp.FSDPModule._get_fsdp_state", ""),
        Hook("torch.distributed.fsdp._fully_shard._fsdp_state.FSDPState._register_pre_backward_hook", "output"),
    ),
    VLLM: (Hook("trl.generation.vllm_generation.VLLMGeneration._iter_named_params", ""),),
    "rl_plugins.trl.scripts": (Hook("trl.scripts.grpo.GRPOScriptArguments"),),
    # We also use parts of Lightning that are documented, but easy to overlook: a loader with `state_dict` and
    # `load_state_dict` is resumed in the middle of an epoch; a `val_dataloader` that is None counts as not defined;
    # callbacks of `configure_callbacks` of a module replace those of the same class in the Trainer.
    "rl_plugins.lightning": (
        # `_trainer` is None where `trainer` raises an error: our modules can be used without a Trainer.
        Hook("lightning.pytorch.LightningModule._trainer"),
        Hook("lightning.pytorch.core.optimizer.LightningOptimizer"),
        # rl_plugins/lightning/accumulation.py looks ahead in the items of the loop: `(batch, index, loader)`.
        Hook("lightning.pytorch.LightningModule._on_before_batch_transfer", "batch, dataloader_idx"),
        Hook("lightning.pytorch.loops.fit_loop._FitLoop._data_fetcher"),
        Hook("lightning.pytorch.loops.fit_loop._FitLoop._should_accumulate", ""),
        Hook("lightning.pytorch.loops.fit_loop._FitLoop.epoch_loop"),
        Hook("lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop.batch_progress"),
        Hook("lightning.pytorch.trainer.states.TrainerFn"),
        Hook("lightning.pytorch.utilities.model_helpers.is_overridden", "method_name, instance"),
        Hook("transformers.trainer_pt_utils.get_parameter_names", "model, forbidden_layer_types"),
    ),
    DEEPSPEED_ON_CPU: (
        Hook("lightning.pytorch.strategies.DeepSpeedStrategy._init_deepspeed_distributed", ""),
        Hook("lightning.pytorch.strategies.DeepSpeedStrategy.setup_environment", ""),
        Hook("lightning.pytorch.strategies.Strategy.setup_environment", ""),
        Hook("lightning.fabric.utilities.seed.reset_seed", ""),
    ),
    # This method overwrites settings of the command line by those of the checkpoint; the recipe replaces it.
    "recipes/lightning_classic.py": (Hook("lightning.pytorch.cli.LightningCLI._parse_ckpt_path", ""),),
}
"""Hooks of each package, which its import checks, and hooks of each feature, which its first use checks."""


@cache
def require_hooks(user: str) -> None:
    """Check that the installed libraries have the hooks that a package or a feature of ours needs.

    Args:
        user: A key of `HOOKS`.

    Raises:
        ImportError: If a hook has changed. The message names each of them, the installed release, and what to do.
    """
    changes = list(changed_hooks(HOOKS[user]))
    if not changes:
        return
    libraries = dict.fromkeys(hook.target.partition(".")[0] for hook, _ in changes)
    for name in libraries:
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            raise ImportError(f"{user} needs {name}, which is not installed. Run: pip install {name}=={TESTED[name]}")
    details = "; ".join(f"{hook.target} {change}" for hook, change in changes)
    installed = ", ".join(f"{name} {_version(name)}" for name in libraries)
    tested = " ".join(f'"{name}=={TESTED[name]}"' for name in libraries)
    alone = f", or {TURN_OFF[user]}: everything else works" if user in TURN_OFF else ""
    raise ImportError(
        f"{user} cannot run with {installed}: {details}. Install what was tested (pip install {tested}) or a newer "
        f"rl_plugins{alone}."
    )


def changed_hooks(hooks: tuple[Hook, ...]) -> Iterator[tuple[Hook, str]]:
    """Yield the hooks that are not as we need them, each with a description of the change."""
    for hook in hooks:
        change = _change(hook)
        if change is not None:
            yield hook, change


def _change(hook: Hook) -> str | None:
    owner_path, _, name = hook.target.rpartition(".")
    try:
        owner = _resolve(owner_path)
    except (ImportError, AttributeError) as error:
        return _absence(hook.target, error)
    try:
        found = _resolve(hook.target)
    except (ImportError, AttributeError) as error:
        is_known = hook.parameters == PRESENT and isinstance(owner, type) and _belongs_to_objects(owner, name)
        return None if is_known else _absence(hook.target, error)
    if hook.parameters == PRESENT:
        return None
    if not callable(found):
        return "is no function any more"
    takes = list(inspect.signature(found).parameters.values())
    if isinstance(owner, type) and inspect.isfunction(found):
        is_static = isinstance(inspect.getattr_static(owner, name), staticmethod)
        takes = takes if is_static else takes[1:]  # without `self`
    change = _parameter_change(hook.parameters, takes)
    return change and f"{change}: it takes ({', '.join(map(str, takes))})"


def _absence(target: str, error: Exception) -> str:
    """Say why a name was not found: it is gone, or its module cannot be imported."""
    if isinstance(error, ImportError) and not f"{target}.".startswith(f"{error.name}."):
        return f"cannot be imported ({error})"
    return "is gone"


def _resolve(path: str) -> Any:
    """Return the object that a dotted path names."""
    names = path.split(".")
    found: Any = importlib.import_module(names[0])
    for i, name in enumerate(names[1:], start=2):
        # A package may hide a module behind a function of its name.
        hidden = i < len(names) and inspect.isroutine(getattr(found, name, None))
        if inspect.ismodule(found) and (hidden or not hasattr(found, name)):
            module = importlib.import_module(".".join(names[:i]))
        found = module if hidden else getattr(found, name)
    return found


def _belongs_to_objects(owner: type, name: str) -> bool:
    """Return whether the code of a class, or of its base classes, mentions an attribute."""
    for base in owner.__mro__:
        functions = (inspect.unwrap(member) for member in vars(base).values() if inspect.isfunction(member))
        if any(name in code for function in functions for code in _names(function.__code__)):
            return True
    return False


def _names(code: CodeType) -> Iterator[tuple[str, ...]]:
    """Yield the names in a function's code, and in the code of the functions inside it."""
    yield code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _parameter_change(expected: str, takes: list[inspect.Parameter]) -> str | None:
    """Say why we cannot call or override a function with these parameters as expected; `None` if we can."""
    wanted = [name for name in expected.split(", ") if name]
    passes_on = "..." in wanted
    first = [name for name in wanted if name != "..."]
    by_keyword: list[str] = []
    if "*" in first:
        first, by_keyword = first[: first.index("*")], first[first.index("*") + 1 :]
    for i, name in enumerate(first):
        in_place = i < len(takes) and takes[i].name in name.split("|") and takes[i].kind is not takes[i].KEYWORD_ONLY
        if not in_place:
            return f"has no parameter `{name}` in place {i + 1}"
    known = {either for name in (*first, *by_keyword) for either in name.split("|")}
    open_ended = any(param.kind is param.VAR_KEYWORD for param in takes)
    for name in by_keyword:
        if not open_ended and not set(name.split("|")) & {param.name for param in takes}:
            return f"has no parameter `{name}`"
    for param in takes:
        must_be_given = param.default is param.empty and param.kind not in (param.VAR_POSITIONAL, param.VAR_KEYWORD)
        if must_be_given and param.name not in known and not passes_on:
            return f"has a new parameter `{param.name}`, which must be given"
    return None


def _version(library: str) -> str:
    return getattr(sys.modules.get(library), "__version__", "(not installed)")
