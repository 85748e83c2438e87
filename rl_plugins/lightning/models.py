"""Language models inside LightningModules: find them, load them, tell whether two are built alike."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rl_plugins.modules.attach import base_model_of


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
        ValueError: If it has no LM head.
    """
    loaded: Any = model
    if isinstance(model, str):
        loaded = AutoModelForCausalLM.from_pretrained(model, **{"dtype": "float32", **(init_kwargs or {})})
    base = base_model_of(loaded)
    if base.get_output_embeddings() is None:
        raise ValueError(
            f"{type(base).__name__} has no LM head, so it cannot generate. Load the model with AutoModelForCausalLM, "
            "not AutoModel."
        )
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
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError("The tokenizer has neither a pad token nor an end-of-text token: set its pad_token.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def parameter_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter, whole where ZeRO-3 has partitioned it."""
    return {name: tuple(vars(p).get("ds_shape", p.shape)) for name, p in module.named_parameters()}


def check_same_shapes(saved: Mapping[str, tuple[int, ...]], current: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Compare what a checkpoint holds with what it is loaded into.

    Raises:
        ValueError: With the first differences.
    """
    if dict(saved) == dict(current):
        return
    names = [name for name in {**saved, **current} if saved.get(name) != current.get(name)]
    shown = "; ".join(f"{name}: {saved.get(name)} in the checkpoint, {current.get(name)} here" for name in names[:3])
    raise ValueError(
        f"The checkpoint was written by another architecture than this {what}: {len(names)} parameters differ "
        f"({shown}). Build the module with the model and settings of the run that is resumed, or start a new run."
    )
