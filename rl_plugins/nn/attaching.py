"""MTP heads for a model: those it has, those that were saved, those it was released with, or new ones."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from rl_plugins.nn.attachment import base_model_of
from rl_plugins.nn.mtp_heads import MTPHeads, MTPHeadsConfig
from rl_plugins.nn.parallel_heads import ParallelHeads
from rl_plugins.nn.released_layers import count_released_layers
from rl_plugins.nn.sequential_heads import SequentialHeads

logger = logging.getLogger(__name__)


def attach_mtp_heads(
    model: nn.Module,
    num_heads: int = 1,
    *,
    head_type: str = "parallel",
    inner_size: int | None = None,
    seed: int = 0,
    heads: MTPHeads | None = None,
) -> MTPHeads:
    """Attach MTP value heads to a causal language model; see [`Attachment`] for what that means.

    Args:
        model: Causal LM, or a PEFT model around one.
        num_heads: K, at least 1.
        head_type: `parallel`, small blocks on one hidden state ([`ParallelHeads`]), or `sequential`, decoder layers
            that also read the tokens ([`SequentialHeads`]).
        inner_size: Width of each parallel head's residual block; the trunk's hidden size by default.
        seed: Seed of the initial weights; equal on all ranks.
        heads: Attach these instead of new ones (they must fit the trunk).

    Returns:
        The attached heads, in the model's dtype and on its device.

    Raises:
        TypeError: If `model` is not a transformers model.
        ValueError: If K < 1, the model has no LM head or no decoder layers for sequential heads, it has heads already,
            or `heads` do not fit the trunk.
    """
    if heads is None:
        base = base_model_of(model)
        hidden_size = base.config.get_text_config().hidden_size
        heads = _new_heads(model, MTPHeadsConfig(num_heads, hidden_size, inner_size, head_type=head_type), seed)
    return heads.attach(model)


def load_mtp_heads(model: nn.Module, directory: str | Path) -> MTPHeads:
    """Load saved heads into a model, attaching them if the model has none.

    A folder without saved heads may be the checkpoint of a model that was released with sequential heads
    (DeepSeek-V3, GLM-4.5). These heads are loaded then. They have no value weights, so new heads return 0 at first.

    Args:
        model: Causal LM, with or without heads.
        directory: Folder of saved heads, or of a released model.

    Returns:
        The heads of `model`.

    Raises:
        FileNotFoundError: If `directory` holds no heads.
        ValueError: If the saved hidden size does not fit the model, or the saved type, K or width differs from that of
            the attached heads.
    """
    heads = MTPHeads.of(model)
    released = count_released_layers(model, directory) if MTPHeads.find(directory) is None else 0
    if heads is not None:
        _read(heads, directory, released)
        return heads
    hidden_size = base_model_of(model).config.get_text_config().hidden_size
    config = MTPHeadsConfig(released, hidden_size, head_type="sequential") if released else None
    heads = _new_heads(model, config or MTPHeads.saved_config(directory)).attach(model)
    with _detached_on_failure(model):
        _read(heads, directory, released)
    return heads


def _read(heads: MTPHeads, directory: str | Path, released: int) -> None:
    if released and isinstance(heads, SequentialHeads):
        heads.read_released(directory)
    else:
        heads.load(directory)


@contextmanager
def _detached_on_failure(model: nn.Module) -> Iterator[None]:
    """Take new heads off a model again if they cannot be read."""
    try:
        yield
    except Exception:
        MTPHeads.detach(model)
        raise


def prepare_mtp_heads(
    model: nn.Module,
    num_heads: int,
    *,
    head_type: str = "parallel",
    inner_size: int | None = None,
    path: str | Path | None = None,
    seed: int = 0,
) -> MTPHeads:
    """Give a model the MTP heads that a training starts from: those attached, those saved in `path`, those of the
    model's own checkpoint (sequential ones), or new ones.

    Args:
        model: Causal LM, or a PEFT model around one.
        num_heads: K.
        head_type: `parallel` or `sequential`.
        inner_size: Width of each new parallel head's residual block; the trunk's hidden size by default.
        path: Folder of saved heads, or a model that was released with sequential ones.
        seed: Seed of new heads.

    Raises:
        FileNotFoundError: If there are no heads in `path`.
        ValueError: If the model comes with heads of another number or type, the saved heads do not fit, or the
            architecture has no decoder layers for sequential heads.
    """
    heads = MTPHeads.of(model)
    if heads is not None:
        _check_same(heads.config, num_heads, head_type)
        _take_out_adapters(heads)
        return heads.requires_grad_(True)
    heads = attach_mtp_heads(model, num_heads, head_type=head_type, inner_size=inner_size, seed=seed)
    with _detached_on_failure(model):
        if path is not None:
            load_mtp_heads(model, path)
            logger.info("Loaded %s MTP heads from %s.", head_type, path)
        elif isinstance(heads, SequentialHeads) and count_released_layers(model):
            source = base_model_of(model).config.name_or_path
            heads.read_released(source)
            logger.info("Loaded the MTP layers that %s was released with.", source)
    return heads.requires_grad_(True)


def _take_out_adapters(heads: MTPHeads) -> None:
    """Take out what PEFT has put into heads that were attached before PEFT: all weights of the heads learn, and are
    saved under their own names."""
    for parent in list(heads.modules()):
        child: Any
        for name, child in list(parent.named_children()):
            if hasattr(child, "get_base_layer"):
                parent.register_module(name, child.get_base_layer())


def _new_heads(model: nn.Module, config: MTPHeadsConfig, seed: int = 0) -> MTPHeads:
    if config.head_type == "sequential":
        return SequentialHeads(base_model_of(model), config.num_heads, seed=seed)
    return ParallelHeads(config, seed=seed)


def _check_same(config: MTPHeadsConfig, num_heads: int, head_type: str) -> None:
    if config.head_type != head_type:
        raise ValueError(
            f"The model comes with {config.head_type} MTP heads, but {head_type} heads are asked for. Set "
            f"mtp_head_type={config.head_type!r}, or call MTPHeads.detach(model) to start with new heads."
        )
    if config.num_heads != num_heads:
        raise ValueError(
            f"The model comes with {config.num_heads} MTP heads, but {num_heads} are asked for. Set "
            f"num_mtp_heads={config.num_heads}, or call MTPHeads.detach(model) to start with new heads."
        )
