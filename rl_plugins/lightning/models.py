"""Language models inside LightningModules: find them, load them, tell whether two are built alike."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rl_plugins.checkpoints import check_same_shapes as check_same_shapes
from rl_plugins.nn.attachment import base_model_of
from rl_plugins.nn.sources import check_language_model, check_source, check_tokenizer


def find_language_model(module: nn.Module) -> nn.Module | None:
    """The outermost Hugging Face (or PEFT) model in a module."""
    found = (
        x for x in module.modules() if isinstance(x, PreTrainedModel) or callable(getattr(x, "get_base_model", None))
    )
    return next(found, None)


def load_language_model(model: str | nn.Module, init_kwargs: Mapping[str, Any] | None = None) -> nn.Module:
    """A causal language model, ready for training.

    Args:
        model: A model, a PEFT model around one, or a folder or hub id.
        init_kwargs: For `AutoModelForCausalLM.from_pretrained`; float32 unless they say otherwise.

    Raises:
        TypeError: If it is no transformers model.
        FileNotFoundError: If there is no model of that name.
        ValueError: If it has no LM head, or is an encoder-decoder.
    """
    check_language_model(model, init_kwargs)
    loaded: Any = model
    if isinstance(model, str):
        loaded = AutoModelForCausalLM.from_pretrained(model, **{"dtype": "float32", **(init_kwargs or {})})
    return loaded.train()  # from_pretrained leaves it in evaluation mode, and Lightning keeps it there


def load_tokenizer(tokenizer: Any, model: str | nn.Module) -> Any:
    """A tokenizer that pads: the one given, or that of the model's own folder or hub id.

    Raises:
        ValueError: If none is given and the model does not say where it came from, or it has no token to pad with.
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
    """Whether something is a model's folder or file, such as other trainers write, and no checkpoint of Lightning."""
    folder = Path(path)
    return folder.suffix == ".safetensors" or any(
        (folder / name).is_file() for name in ("config.json", "adapter_config.json")
    )


def parameter_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter, whole where ZeRO-3 has partitioned it."""
    return {name: tuple(vars(p).get("ds_shape", p.shape)) for name, p in module.named_parameters()}
