"""Language models inside LightningModules: find them, load them, compare the shapes of their parameters."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rl_plugins.checkpoints import check_same_shapes as check_same_shapes
from rl_plugins.nn.attachment import base_model_of
from rl_plugins.nn.sources import check_language_model, check_source, check_tokenizer


def find_language_model(module: nn.Module) -> nn.Module | None:
    """Return the outermost Hugging Face (or PEFT) model in a module; `None` if there is none."""
    found = (
        x for x in module.modules() if isinstance(x, PreTrainedModel) or callable(getattr(x, "get_base_model", None))
    )
    return next(found, None)


def load_language_model(model: str | nn.Module, init_kwargs: Mapping[str, Any] | None = None) -> nn.Module:
    """Return a causal language model, ready for training.

    Args:
        model: A model, a PEFT model around one, or a folder or hub id.
        init_kwargs: For `AutoModelForCausalLM.from_pretrained`; the dtype is float32 unless they set another.

    Raises:
        TypeError: If it is not a transformers model.
        FileNotFoundError: If there is no model of that name.
        ValueError: If the model has no LM head, or is an encoder-decoder.
    """
    check_language_model(model, init_kwargs)
    loaded: Any = model
    if isinstance(model, str):
        loaded = AutoModelForCausalLM.from_pretrained(model, **{"dtype": "float32", **(init_kwargs or {})})
    return loaded.train()  # from_pretrained leaves it in evaluation mode, and Lightning keeps it there


def load_tokenizer(tokenizer: Any, model: str | nn.Module) -> Any:
    """Return a tokenizer that can pad: the given one, or that of the model's own folder or hub id.

    Raises:
        ValueError: If no tokenizer is given and the model does not say where it came from, or if the tokenizer has no
            token to pad with.
    """
    if tokenizer is None:
        tokenizer = model if isinstance(model, str) else base_model_of(model).config._name_or_path
        if not tokenizer:
            raise ValueError("Give a tokenizer: this model was not loaded from a folder or the hub.")
    if isinstance(tokenizer, str):
        check_source("tokenizer", tokenizer)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    check_tokenizer(tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def is_model_folder(path: Any) -> bool:
    """Return whether a path is a model's folder or file, as other trainers write it, and no Lightning checkpoint."""
    folder = Path(path)
    return folder.suffix == ".safetensors" or any(
        (folder / name).is_file() for name in ("config.json", "adapter_config.json")
    )


def parameter_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter; that of the whole parameter where ZeRO-3 has partitioned it."""
    return {name: tuple(vars(p).get("ds_shape", p.shape)) for name, p in module.named_parameters()}
