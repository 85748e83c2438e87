"""Checks of the models, tokenizers and folders that a run starts from, before anything is loaded or trained."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig
from transformers.models.auto import modeling_auto
from transformers.utils import CONFIG_NAME
from transformers.utils.peft_utils import find_adapter_config_file

from rl_plugins.nn.attachment import base_model_of

WITH_LM_HEAD = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")
OTHER_HEADS = ("MASKED_LM", "QUESTION_ANSWERING", "SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION")
# Options that say where files are and how to reach them; other options of loading say nothing about the config.
CONFIG_KWARGS = ("cache_dir", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")


def check_source(option: str, source: str | os.PathLike[str]) -> None:
    """Refuse a path where nothing exists; a name that may be a hub id passes.

    Args:
        option: Name of the setting that the path was given to.
        source: Path or hub id.

    Raises:
        FileNotFoundError: If it can only be a path, and nothing is there.
    """
    text, path = os.fspath(source), Path(source)
    local = path.is_absolute() or text.startswith((".", "~")) or text.count("/") != 1 and "/" in text
    beside = "/" in text and path.parent.is_dir()
    if (local or beside) and not path.exists():
        raise FileNotFoundError(f"{option}={text!r}: there is no such file or folder. Check the path.")


def _architectures(kinds: tuple[str, ...]) -> set[str]:
    """Names of the classes that transformers has for some kinds of model."""
    names: set[str] = set()
    for kind in kinds:
        for value in getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES", {}).values():
            names.update([value] if isinstance(value, str) else value)
    return names


def _without_lm_head(architecture: str) -> bool:
    """Whether transformers knows a class as a trunk, or as a model with another head."""
    trunks = {name for value in modeling_auto.MODEL_MAPPING_NAMES.values() for name in _as_tuple(value)}
    return architecture in (trunks | _architectures(OTHER_HEADS)) - _architectures(WITH_LM_HEAD)


def _as_tuple(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _read_config(option: str, source: str, init_kwargs: Mapping[str, Any]) -> Any:
    """Read the config of a model by its path or hub id; `None` for the adapters of a PEFT model."""
    check_source(option, source)
    where = {key: init_kwargs[key] for key in CONFIG_KWARGS if key in init_kwargs}
    try:
        return AutoConfig.from_pretrained(source, **where)
    except OSError as error:
        if find_adapter_config_file(source) is not None:
            return None
        if Path(source, CONFIG_NAME).is_file():
            raise ValueError(f"{option}={source!r}: its {CONFIG_NAME} cannot be read: {error}") from error
        raise FileNotFoundError(
            f"{option}={source!r} is neither a model's folder on this machine nor a model of the hub that can be "
            "reached. Check the name, or the connection."
        ) from error


def check_language_model(model: Any, init_kwargs: Mapping[str, Any] | None = None) -> None:
    """Refuse a model that is no causal language model, before it is loaded.

    Args:
        model: A model, a PEFT model around one, or a folder or hub id.
        init_kwargs: Keyword arguments that a folder or hub id is loaded with.

    Raises:
        TypeError: If it is no transformers model.
        FileNotFoundError: If the folder does not exist, or the hub does not have the model.
        ValueError: If the model is an encoder-decoder, or has no LM head.
    """
    if isinstance(model, str | os.PathLike):
        config = _read_config("model", os.fspath(model), init_kwargs or {})
        names = list(getattr(config, "architectures", None) or [])
        has_head = not any(map(_without_lm_head, names))
    else:
        base = base_model_of(model)
        config, names = base.config, [type(base).__name__]
        has_head = base.get_output_embeddings() is not None and not _without_lm_head(names[0])
    name = names[0] if names else f"model={model!r}"
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name} is an encoder-decoder model, whose completions do not continue the prompt. Use a causal "
            "(decoder-only) language model."
        )
    if not has_head:
        raise ValueError(
            f"{name} has no LM head, so it cannot generate. Load the model with AutoModelForCausalLM, and not with "
            "AutoModel or a class with another head."
        )


def check_trainable_dtype(model: nn.Module) -> None:
    """Refuse parameters in float16 that are to be trained without a float32 copy.

    Raises:
        ValueError: If there is one; the message names the first.
    """
    for name, param in model.named_parameters():
        if param.requires_grad and param.dtype == torch.float16:
            raise ValueError(
                f"The parameter {name} is in float16. Such weights cannot be trained: AdamW's second moments become "
                "0, and torch refuses loss scaling. Load the model in float32 or bfloat16. For mixed precision, load "
                "it in float32 and use the trainer's setting."
            )


def learned_positions(model: nn.Module) -> int | None:
    """Return the number of positions of a model with an embedding for each position, such as GPT-2; else `None`."""
    base = base_model_of(model)
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    tables = [m for m in base.modules() if isinstance(m, nn.Embedding) and m is not base.get_input_embeddings()]
    sizes = {m.num_embeddings - getattr(m, "offset", 0) for m in tables}
    return limit if limit in sizes else None


def check_lengths(prompts: Sequence[Sequence[int]], max_completion_length: int, positions: int | None) -> None:
    """Refuse prompts that are too long for a model with learned positions, before it fails in the middle of a run.

    Args:
        prompts: Token ids.
        max_completion_length: Most tokens of a completion.
        positions: Number of positions of the model; `None` for no limit.

    Raises:
        ValueError: If a prompt and its longest completion have more tokens than the model has positions.
    """
    longest = max(map(len, prompts), default=0)
    if positions is not None and longest + max_completion_length > positions:
        raise ValueError(
            f"A prompt of {longest} tokens and max_completion_length={max_completion_length} need "
            f"{longest + max_completion_length} positions, but the model has {positions}. Shorten the completions, or "
            "filter the prompts."
        )


def check_tokenizer(tokenizer: Any, prompt: Any = None) -> None:
    """Refuse a tokenizer that cannot make batches, or render the prompts of the data.

    Args:
        tokenizer: A tokenizer.
        prompt: One of the prompts, text or messages.

    Raises:
        TypeError: If it is no tokenizer.
        ValueError: If it has neither a pad token nor an end-of-text token, or no chat template for messages.
    """
    if not hasattr(tokenizer, "pad_token_id"):
        inner = " Give its `tokenizer` attribute." if hasattr(tokenizer, "tokenizer") else ""
        raise TypeError(f"A tokenizer is needed, got {type(tokenizer).__name__}.{inner}")
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has neither a pad token nor an end-of-text token: set its eos_token.")
    if isinstance(prompt, list) and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "The prompts are conversations, but the tokenizer has no chat template. Set tokenizer.chat_template, use "
            "the tokenizer of a chat model, or give the prompts as text."
        )
