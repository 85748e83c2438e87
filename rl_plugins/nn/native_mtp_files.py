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
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from rl_plugins.nn.attachment import find_file

TRUNK_SHARD_NAME = "model-00001-of-00001.safetensors"
"""New name of `model.safetensors`, since transformers reads no index beside a file of that name."""

NATIVE_SHARD_NAME = "model-native_mtp.safetensors"

PROJECTION = "eh_proj.weight"
"""A weight that every depth module has, and no other layer."""


def checkpoint_file(path: str, *, revision: str | None = None) -> str | None:
    """The file of a checkpoint in safetensors that names its tensors; `None` where there is no such checkpoint."""
    names = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)  # in the order in which transformers looks
    found = (find_file(path, name, revision=revision) for name in names)
    return next((file for file in found if file is not None), None)


def checkpoint_keys(path: str, *, revision: str | None = None) -> set[str]:
    """Names of the tensors of a checkpoint in safetensors; none where there is no such checkpoint."""
    found = checkpoint_file(path, revision=revision)
    if found is None:
        return set()
    if found.endswith(SAFE_WEIGHTS_NAME):
        with safe_open(found, framework="pt") as file:
            return set(file.keys())
    return set(json.loads(Path(found).read_text())["weight_map"])


def layer_prefix(base: PreTrainedModel, index: int) -> str:
    """Name of depth module `index` (from 0) on disk: the layer after the last one."""
    return f"{base.base_model_prefix}.layers.{base.config.num_hidden_layers + index}."


def count_layers(base: PreTrainedModel, path: str) -> int:
    """Number of native MTP layers in a checkpoint of a model, judged by its names of tensors."""
    keys, depth = checkpoint_keys(path), 0
    while f"{layer_prefix(base, depth)}{PROJECTION}" in keys:
        depth += 1
    return depth


def read_layers(base: PreTrainedModel, path: str) -> nn.ModuleList:
    """transformers' depth modules with the weights of a checkpoint, in the dtype that a model has now."""
    from transformers.modeling_layers import MtpModel  # see attach_native_mtp

    with _as_checkpoint(base, path):
        return MtpModel.from_pretrained(base).layers


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


def add_to_checkpoint(base: PreTrainedModel, folder: Path, weights: Mapping[str, Tensor]) -> Path:
    """Add native MTP layers to the checkpoint that `save_pretrained` has written into a folder.

    Args:
        base: The model.
        folder: Where it was saved.
        weights: Of the layers, by the keys of `NativeMTP`.

    Returns:
        Path of the shard that they are in.

    Raises:
        FileNotFoundError: If the model was not saved there.
    """
    if not any((folder / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        raise FileNotFoundError(f"{folder} has no checkpoint that the layers could be part of: save the model first.")
    from transformers.core_model_loading import revert_weight_conversion  # see attach_native_mtp

    # save_pretrained's own way back to the format of the released checkpoints, in which every expert is a tensor.
    stored = revert_weight_conversion(base, {_stored_name(base, key): x.detach() for key, x in weights.items()})
    save_file({key: x.cpu().contiguous() for key, x in stored.items()}, folder / NATIVE_SHARD_NAME, {"format": "pt"})
    _add_to_index(folder, list(stored))
    return folder / NATIVE_SHARD_NAME


def _stored_name(base: PreTrainedModel, key: str) -> str:
    """From `layers.<k>.<name>` to the name on disk, but for what transformers itself renames."""
    _, index, name = key.split(".", 2)
    name = re.sub(r"^post_norm\.", "shared_head.norm.", name.removeprefix("mtp_block."))
    return layer_prefix(base, int(index)) + name


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
