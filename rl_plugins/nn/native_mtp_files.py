"""Native MTP layers in a model's checkpoint, where transformers' `generate(use_mtp=True)` reads them."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from rl_plugins.nn.attach import base_model_of
from rl_plugins.nn.native_mtp import (
    NATIVE_ATTRIBUTE,
    NativeMTP,
    add_native_layers,
    check_can_attach,
    get_native_mtp,
)

TRUNK_SHARD_NAME = "model-00001-of-00001.safetensors"
"""What `model.safetensors` is renamed to, since transformers reads no index beside a file of that name."""

NATIVE_SHARD_NAME = "model-native_mtp.safetensors"


def native_layers_in(model: nn.Module, path: str | Path | None = None) -> int:
    """Number of native MTP layers in a checkpoint of `model`, judged by its names of tensors.

    Args:
        model: Causal LM, which tells where its own layers end.
        path: Folder or hub id; where the model came from by default. A model that came from nowhere has none.
    """
    base = base_model_of(model)
    keys = _checkpoint_keys(str(path or base.config.name_or_path))
    depth = 0
    while f"{_layer_prefix(base, depth)}eh_proj.weight" in keys:
        depth += 1
    return depth


def _layer_prefix(base: PreTrainedModel, index: int) -> str:
    """Name of depth module `index` (from 0) on disk: the layer after the last one."""
    return f"{base.base_model_prefix}.layers.{base.config.num_hidden_layers + index}."


def _checkpoint_keys(path: str) -> set[str]:
    """Names of the tensors of a checkpoint in safetensors; none where there is no such checkpoint."""
    if not path:
        return set()
    found = [
        cached_file(
            path,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    ]
    if found[0] is not None:  # first, as transformers has it
        with safe_open(found[0], framework="pt") as file:
            return set(file.keys())
    return set() if found[1] is None else set(json.loads(Path(str(found[1])).read_text())["weight_map"])


def load_native_mtp(model: nn.Module, path: str | Path | None = None) -> NativeMTP:
    """Load native MTP layers from a checkpoint, by transformers' own `MtpModel.from_pretrained`.

    They are attached, or loaded into those that are. `generate(use_mtp=True)` of this model finds them, too, if it
    reads the same checkpoint, however many layers the model has (see [`expect_native_keys`]).

    Args:
        model: Causal LM.
        path: Folder or hub id of the checkpoint; where the model came from by default.

    Returns:
        The layers of `model`, in its dtype and on its device.

    Raises:
        ValueError: If the architecture has no native layers, there are none in the checkpoint, or other numbers of
            layers are attached.
    """
    base, native = base_model_of(model), get_native_mtp(model)
    if native is None:
        check_can_attach(base)
    from transformers.modeling_layers import MtpModel  # see attach_native_mtp

    path = str(path or base.config.name_or_path)
    found = native_layers_in(base, path)
    if found == 0:
        raise ValueError(
            f"{path or 'This model came from no checkpoint, which'} has no native MTP layers after layer "
            f"{base.config.num_hidden_layers - 1}. Give new ones to the model with attach_native_mtp(model)."
        )
    if native is not None and native.num_layers != found:
        raise ValueError(
            f"{path} has {found} native MTP layers, but {native.num_layers} are attached. detach_native_mtp(model) "
            "first."
        )
    base.config.num_mtp_layers = found
    expect_native_keys(base)
    with _as_checkpoint(base, path):
        layers = MtpModel.from_pretrained(base).layers
    if native is None:
        return add_native_layers(base, layers)
    native.layers.load_state_dict(layers.state_dict())
    return native


def expect_native_keys(model: nn.Module) -> None:
    """Tell this model under which names its native MTP layers are on disk.

    transformers takes them for those of the released models only: the classes name layer 61 (DeepSeek-V3), 46 and 92
    (GLM-4.5), one depth each. Models of other sizes, and with more depths, need this before `generate(use_mtp=True)`.
    """
    base = base_model_of(model)
    names = {re.escape(_layer_prefix(base, k)) for k in range(base.config.num_mtp_layers)}
    base._keys_to_ignore_on_load_unexpected = [
        *names,
        *(pattern for pattern in base._keys_to_ignore_on_load_unexpected or () if pattern not in names),
    ]


@contextmanager
def _as_checkpoint(base: PreTrainedModel, path: str) -> Iterator[None]:
    """Have transformers read `path` for a model, in the dtype that the model has now."""
    config: Any = base.config
    before = config.name_or_path, config.dtype
    config.name_or_path, config.dtype = path, base.dtype
    try:
        yield
    finally:
        config.name_or_path, config.dtype = before


def save_native_mtp(model: nn.Module, directory: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> Path:
    """Add the native MTP layers to the checkpoint that `save_pretrained` has written into `directory`.

    They become layers N, N+1, ... after the N of the model, in a shard of their own and under the names of the
    released checkpoints. A single `model.safetensors` is renamed for that, and an index is written.

    Args:
        model: Model with native MTP layers attached.
        directory: Where the model was saved.
        state_dict: Full weights of the model (as an engine gathers them under ZeRO-3); the model's own by default.

    Returns:
        Path of the new shard.

    Raises:
        FileNotFoundError: If the model was not saved there.
        ValueError: If the model has no native layers, or `state_dict` lacks them.
    """
    base, native = base_model_of(model), get_native_mtp(model)
    if native is None:
        raise ValueError(f"{type(base).__name__} has no native MTP layers to save; attach_native_mtp(model) first.")
    own = native.state_dict()
    tensors = dict(own) if state_dict is None else _native_entries(state_dict)
    if set(tensors) != set(own):
        raise ValueError("state_dict does not hold all weights of the native MTP layers; gather the whole model.")
    folder = Path(directory)
    if not any((folder / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        raise FileNotFoundError(f"{folder} has no checkpoint that the layers could be part of: save the model first.")
    from transformers.core_model_loading import revert_weight_conversion  # see attach_native_mtp

    # save_pretrained's own way back to the format of the released checkpoints, in which every expert is a tensor.
    stored = revert_weight_conversion(base, {_stored_name(base, key): x.detach() for key, x in tensors.items()})
    save_file({key: x.cpu().contiguous() for key, x in stored.items()}, folder / NATIVE_SHARD_NAME, {"format": "pt"})
    _add_to_index(folder, list(stored))
    return folder / NATIVE_SHARD_NAME


def _native_entries(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    marker = f"{NATIVE_ATTRIBUTE}."
    return {key.removeprefix(marker): x for key, x in state_dict.items() if key.startswith(marker)}


def _stored_name(base: PreTrainedModel, key: str) -> str:
    """From `layers.<k>.<name>` to the name on disk, but for what transformers itself renames."""
    _, index, name = key.split(".", 2)
    name = re.sub(r"^post_norm\.", "shared_head.norm.", name.removeprefix("mtp_block."))
    return _layer_prefix(base, int(index)) + name


def _add_to_index(folder: Path, keys: list[str]) -> None:
    single, path = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if single.is_file():
        with safe_open(single, framework="pt") as file:
            index: dict[str, Any] = {"metadata": {}, "weight_map": dict.fromkeys(file.keys(), TRUNK_SHARD_NAME)}
    else:
        index = json.loads(path.read_text())
    trunk = {key: file for key, file in index["weight_map"].items() if file != NATIVE_SHARD_NAME}
    index["weight_map"] = trunk | dict.fromkeys(keys, NATIVE_SHARD_NAME)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    os.replace(unfinished, path)
    if single.is_file():
        # Last, because a job may die at any point: as long as it is there, transformers reads it and no index.
        os.replace(single, folder / TRUNK_SHARD_NAME)
