"""Save heads beside a model, and load them again."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from rl_plugins.nn.attach import HEADS_ATTRIBUTE, attach_mtp_heads, base_model_of, get_mtp_heads
from rl_plugins.nn.mtp_heads import MTPHeads, MTPHeadsConfig
from rl_plugins.nn.native_mtp import get_native_mtp

logger = logging.getLogger(__name__)

# Written by `rl_plugins.moe`, which is above this layer, beside models with added selection biases.
SELECTION_BIAS_NAME = "selection_bias.safetensors"

HEADS_WEIGHTS_NAME = "mtp_heads.safetensors"
HEADS_CONFIG_NAME = "mtp_heads_config.json"


def has_mtp_heads_file(directory: str | Path) -> bool:
    """Whether `directory` holds heads saved by [`save_mtp_heads`]."""
    return (Path(directory) / HEADS_WEIGHTS_NAME).is_file()


def find_mtp_heads(path: str, *, revision: str | None = None) -> str | None:
    """Folder of the heads that were saved with a model; `None` where there are none.

    Args:
        path: Folder or hub id of the model.
        revision: Of the hub's repository.
    """
    if Path(path).is_dir():
        return path if has_mtp_heads_file(path) else None
    found = [
        cached_file(
            path,
            name,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        for name in (HEADS_CONFIG_NAME, HEADS_WEIGHTS_NAME)
    ]
    return None if None in found else str(Path(str(found[1])).parent)


def save_mtp_heads(model: nn.Module, directory: str | Path, *, state_dict: Mapping[str, Tensor] | None = None) -> Path:
    """Write the heads' weights and config into `directory`, beside `model.safetensors`.

    Save the model first: inference engines such as vLLM take every safetensors file of a folder for a part of the
    model, unless an index names the model's own. This function writes one where the model is a single file.

    Args:
        model: Model with heads attached.
        directory: Created if missing.
        state_dict: Full weights of the model (as an engine gathers them under ZeRO-3); the model's own by default.

    Returns:
        Path of the weights file.

    Raises:
        ValueError: If the model has no heads, or `state_dict` lacks them.
    """
    heads = get_mtp_heads(model)
    if heads is None:
        raise ValueError(f"{type(model).__name__} has no MTP heads to save; attach_mtp_heads(model) first.")
    tensors = dict(heads.state_dict()) if state_dict is None else _heads_entries(state_dict)
    if set(tensors) != set(heads.state_dict()):
        raise ValueError("state_dict does not hold all weights of the MTP heads; gather the whole model.")
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path / HEADS_WEIGHTS_NAME)
    (path / HEADS_CONFIG_NAME).write_text(json.dumps(heads.config.to_dict(), indent=2) + "\n")
    _index_single_file(path)
    return path / HEADS_WEIGHTS_NAME


def _index_single_file(directory: Path) -> None:
    """Name the tensors of `model.safetensors` in an index. transformers, which reads the file itself where there is
    one, does not look at it."""
    model_file = directory / SAFE_WEIGHTS_NAME
    # Without an index vLLM refuses a folder with added selection biases, without which it would route otherwise.
    if model_file.is_file() and not (directory / SELECTION_BIAS_NAME).is_file():
        with safe_open(model_file, framework="pt") as file:
            weight_map = dict.fromkeys(sorted(file.keys()), SAFE_WEIGHTS_NAME)
        index = {"metadata": {"total_size": model_file.stat().st_size}, "weight_map": weight_map}
        (directory / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def _heads_entries(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # PEFT prefixes the base model's keys, so match the attribute anywhere at a dot.
    marker = f"{HEADS_ATTRIBUTE}."
    return {
        key.split(marker, 1)[1]: value
        for key, value in state_dict.items()
        if key.startswith(marker) or f".{marker}" in key
    }


def check_heads_folder(directory: str | Path) -> None:
    """Refuse a folder without heads.

    Raises:
        FileNotFoundError: If it is not there, or holds none.
    """
    if not Path(directory).is_dir():
        raise FileNotFoundError(f"No {HEADS_WEIGHTS_NAME} in {directory}: there is no such folder. Check the path.")
    if not has_mtp_heads_file(directory):
        raise FileNotFoundError(
            f"No {HEADS_WEIGHTS_NAME} in {directory}: it was written by another trainer, or is a plain model. Start "
            "from it with model=<path>, which gets new heads as attach_mtp_heads(model) does, or give one in which "
            "MTPSFTTrainer or MTPCriticTrainer saved theirs."
        )


def read_mtp_heads(directory: str | Path) -> tuple[MTPHeadsConfig, dict[str, Tensor]]:
    """Read config and weights of the heads in `directory`.

    Raises:
        FileNotFoundError: If they are not there.
    """
    path = Path(directory)
    check_heads_folder(path)
    config = MTPHeadsConfig(**json.loads((path / HEADS_CONFIG_NAME).read_text()))
    return config, load_file(path / HEADS_WEIGHTS_NAME)


def load_mtp_heads(model: nn.Module, directory: str | Path) -> MTPHeads:
    """Load heads saved by [`save_mtp_heads`] into `model`, attaching them if the model has none.

    Args:
        model: Causal LM, with or without heads.
        directory: Where the heads were saved.

    Returns:
        The heads of `model`.

    Raises:
        FileNotFoundError: If `directory` holds no heads.
        ValueError: If the file's hidden size does not fit the model, or its K or width those of the attached heads.
    """
    config, tensors = read_mtp_heads(directory)
    hidden_size = base_model_of(model).config.get_text_config().hidden_size
    if config.hidden_size != hidden_size:
        raise ValueError(
            f"The heads in {directory} were trained for hidden size {config.hidden_size}, but this model has "
            f"{hidden_size}. Load the model they belong to, or train new heads for this one."
        )
    heads = get_mtp_heads(model)
    if heads is None:
        heads = attach_mtp_heads(model, heads=MTPHeads(config))
    elif heads.config != config:
        raise ValueError(
            f"The heads in {directory} are {config}, but the attached ones are {heads.config}. Set num_mtp_heads="
            f"{config.num_heads} and mtp_inner_size={config.inner_size}, or detach_mtp_heads(model) before loading."
        )
    heads.load_state_dict(tensors)
    return heads


def prepare_mtp_heads(
    model: nn.Module, num_heads: int, *, inner_size: int | None = None, path: str | Path | None = None, seed: int = 0
) -> MTPHeads:
    """The MTP heads that a training starts from: those attached, those saved in `path`, or new ones.

    Args:
        model: Causal LM, or a PEFT model around one.
        num_heads: K.
        inner_size: Width of each new head's residual block; the trunk's hidden size by default.
        path: Folder of saved heads.
        seed: Of new heads.

    Raises:
        ValueError: If the model comes with another number of heads, or with native MTP layers, or the saved heads do
            not fit.
    """
    if get_native_mtp(model) is not None:
        raise ValueError(
            "The model has native MTP layers, which would not be trained beside MTP heads, but would draft. "
            "detach_native_mtp(model) first, or train them (MTPSFTConfig(native_mtp=True))."
        )
    heads = get_mtp_heads(model)
    if heads is None:
        heads = attach_mtp_heads(model, num_heads, inner_size=inner_size, seed=seed)
        if path is not None:
            load_mtp_heads(model, path)
            logger.info("Loaded MTP heads from %s.", path)
    elif heads.config.num_heads != num_heads:
        raise ValueError(
            f"The model comes with {heads.config.num_heads} MTP heads, but num_mtp_heads is {num_heads}. Set "
            f"num_mtp_heads={heads.config.num_heads}, or detach_mtp_heads(model) to start with new ones."
        )
    return heads.requires_grad_(True)
