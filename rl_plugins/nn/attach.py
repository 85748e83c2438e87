"""Attach MTP heads to a Hugging Face causal language model, and take them off again."""

from torch import nn
from transformers import PreTrainedModel

from rl_plugins.nn.mtp_heads import MTPHeads, MTPHeadsConfig

HEADS_ATTRIBUTE = "mtp_heads"
"""Name of the submodule, and so the prefix of the heads' keys in the model's state dict."""


def base_model_of(model: nn.Module) -> PreTrainedModel:
    """The `PreTrainedModel` that owns the LM head: the model itself, or the one inside a PEFT wrapper."""
    if isinstance(model, PreTrainedModel):
        return model
    get_base_model = getattr(model, "get_base_model", None)
    if get_base_model is None:
        raise TypeError(
            f"Expected a transformers PreTrainedModel or a PEFT model around one, got {type(model).__name__}. "
            "Unwrap the model (accelerator.unwrap_model) before attaching heads."
        )
    return get_base_model()


def has_soft_prompt(model: nn.Module) -> bool:
    """Whether PEFT puts trained embeddings or cache entries before every prompt of the model."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def trunk_of(base: PreTrainedModel) -> PreTrainedModel:
    """The part of a causal LM before its LM head: what every forward goes through, whoever starts it."""
    if base.base_model is not base:
        return base.base_model
    # Llama 4's text model names a prefix that it does not have, and is its own `base_model`.
    return next((child for child in base.children() if isinstance(child, PreTrainedModel)), base)


def add_submodule(base: PreTrainedModel, name: str, module: nn.Module) -> None:
    """Make `module` a submodule of a model, so that optimizers and engines see it, without changing what
    `save_pretrained` writes: stock `AutoModelForCausalLM` then reloads the policy without surprises."""
    base.add_module(name, module)
    keys = {f"{name}.{key}" for key in module.state_dict()}
    base._keys_to_ignore_on_save = set(base._keys_to_ignore_on_save or ()) | keys


def remove_submodule(base: PreTrainedModel, name: str) -> None:
    """Undo [`add_submodule`]."""
    keys = {key for key in base._keys_to_ignore_on_save or () if key.startswith(f"{name}.")}
    base._keys_to_ignore_on_save = set(base._keys_to_ignore_on_save or ()) - keys
    delattr(base, name)


def get_mtp_heads(model: nn.Module) -> MTPHeads | None:
    """The heads attached to `model`, or `None`."""
    heads = base_model_of(model)._modules.get(HEADS_ATTRIBUTE)
    return heads if isinstance(heads, MTPHeads) else None


def attach_mtp_heads(
    model: nn.Module,
    num_heads: int = 2,
    *,
    inner_size: int | None = None,
    seed: int = 0,
    heads: MTPHeads | None = None,
) -> MTPHeads:
    """Attach MTP value heads to a causal language model.

    The heads become the submodule `mtp_heads`, so optimizers, DDP and DeepSpeed see them, and run **inside** the
    model's forward pass through a hook on its trunk, so that gathering and gradient hooks of any engine fire. Logits,
    generation and `save_pretrained` stay as they were: the heads' keys are left out of the stock checkpoint (write
    them with [`save_mtp_heads`]). Order relative to `add_fused_lm_head` or PEFT does not matter.

    Args:
        model: Causal LM, or a PEFT model around one.
        num_heads: K, at least 1.
        inner_size: Width of each head's residual block; the trunk's hidden size by default.
        seed: Seed of the initial weights; equal on all ranks.
        heads: Attach these instead of new ones (they must fit the trunk).

    Returns:
        The attached heads, in the model's dtype and on its device.

    Raises:
        TypeError: If `model` is not a transformers model.
        ValueError: If K < 1, the model has no LM head, it has heads already, or `heads` do not fit the trunk.
    """
    base = base_model_of(model)
    if get_mtp_heads(model) is not None:
        raise ValueError(
            f"{type(base).__name__} has MTP heads already. Use get_mtp_heads(model) to reach them, or "
            "detach_mtp_heads(model) first."
        )
    lm_head = base.get_output_embeddings()
    if lm_head is None:
        raise ValueError(
            f"{type(base).__name__} has no LM head. Load the model with AutoModelForCausalLM, not AutoModel."
        )
    hidden_size = base.config.get_text_config().hidden_size
    if heads is None:
        config = MTPHeadsConfig(num_heads, hidden_size, hidden_size if inner_size is None else inner_size)
        heads = MTPHeads(config, seed=seed)
    elif heads.config.hidden_size != hidden_size:
        raise ValueError(
            f"These heads were made for hidden size {heads.config.hidden_size}, but {type(base).__name__} has "
            f"{hidden_size}. Attach new heads, or load the model that the heads were trained with."
        )
    heads.to(device=lm_head.weight.device, dtype=base.dtype)
    add_submodule(base, HEADS_ATTRIBUTE, heads)
    hook_mtp_heads(model)
    return heads


def hook_mtp_heads(model: nn.Module) -> None:
    """Have attached heads run in the model's forward, if they do not already: Lightning's DeepSpeed strategy takes off
    all hooks before it evaluates."""
    heads = get_mtp_heads(model)
    if heads is not None:
        heads.hook(trunk_of(base_model_of(model)))


def detach_mtp_heads(model: nn.Module) -> MTPHeads:
    """Take the heads off; the model is as it was before [`attach_mtp_heads`].

    Raises:
        ValueError: If there are none.
    """
    base = base_model_of(model)
    heads = get_mtp_heads(model)
    if heads is None:
        raise ValueError(f"{type(base).__name__} has no MTP heads to detach.")
    heads.unhook()
    remove_submodule(base, HEADS_ATTRIBUTE)
    return heads
