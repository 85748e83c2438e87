"""Sequential heads, or depth modules, in the form in which DeepSeek-V3 and GLM-4.5 are released: layers N, N+1, ... of
the model's own checkpoint, which transformers' `generate(use_mtp=True)` reads."""

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

from rl_plugins.hooks import RELEASED_HEADS, require_hooks
from rl_plugins.nn.attachment import base_model_of, find_file

RELEASED_ARCHITECTURES = ("deepseek_v3", "glm4_moe")
"""Model types whose checkpoints may hold such layers, as tested."""

TRUNK_SHARD_NAME = "model-00001-of-00001.safetensors"
"""New name of `model.safetensors`, since transformers reads no index beside a file of the old name."""

MTP_SHARD_NAME = "model-mtp_layers.safetensors"

PROJECTION = "eh_proj.weight"
"""A weight that every depth module has, and no other layer."""


def checkpoint_file(path: str, *, revision: str | None = None) -> str | None:
    """Find the file that names the tensors of a safetensors checkpoint; `None` where there is no such checkpoint."""
    names = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)  # in the order in which transformers looks
    found = (find_file(path, name, revision=revision) for name in names)
    return next((file for file in found if file is not None), None)


def checkpoint_keys(path: str, *, revision: str | None = None) -> set[str]:
    """Read the names of the tensors of a safetensors checkpoint; none where there is no such checkpoint."""
    found = checkpoint_file(path, revision=revision)
    if found is None:
        return set()
    if found.endswith(SAFE_WEIGHTS_NAME):
        with safe_open(found, framework="pt") as file:
            return set(file.keys())
    return set(json.loads(Path(found).read_text())["weight_map"])


def is_released_with_layers(base: PreTrainedModel) -> bool:
    """Tell whether the model's architecture has a place for depth modules in its checkpoints."""
    return base.config.model_type in RELEASED_ARCHITECTURES


def tell_number_of_layers(base: PreTrainedModel, num_layers: int) -> None:
    """Write the number of depth modules into a model's config, if its architecture has a place for it.

    Raises:
        ImportError: If this release of transformers reads or writes them in another way.
    """
    if is_released_with_layers(base):
        require_hooks(RELEASED_HEADS)
        base.config.num_mtp_layers = num_layers


def layer_prefix(base: PreTrainedModel, index: int) -> str:
    """Return the prefix of depth module `index` (from 0) on disk, where it is a layer after the model's last one."""
    return f"{base.base_model_prefix}.layers.{base.config.num_hidden_layers + index}."


def count_released_layers(model: nn.Module, path: str | Path | None = None) -> int:
    """Count the depth modules in a checkpoint of a model, by the names of its tensors.

    Args:
        model: Causal LM, which tells where its own layers end.
        path: Folder or hub id; by default that from which the model was loaded. For a model that was not loaded, the
            count is 0.
    """
    base, depth = base_model_of(model), 0
    keys = checkpoint_keys(str(path or base.config.name_or_path)) if is_released_with_layers(base) else set()
    while f"{layer_prefix(base, depth)}{PROJECTION}" in keys:
        depth += 1
    return depth


def expect_mtp_keys(model: nn.Module) -> None:
    """Tell a model under which names its depth modules are on disk.

    transformers knows these names for the released models only: its classes name layer 61 (DeepSeek-V3), 46 and 92
    (GLM-4.5), one depth module each. For models of other sizes, or with more depth modules, call this function before
    `generate(use_mtp=True)`.

    Args:
        model: Causal LM whose config has `num_mtp_layers`.
    """
    base = base_model_of(model)
    names = {re.escape(layer_prefix(base, k)) for k in range(base.config.num_mtp_layers)}
    base._keys_to_ignore_on_load_unexpected = [
        *names,
        *(pattern for pattern in base._keys_to_ignore_on_load_unexpected or () if pattern not in names),
    ]


def read_released_layers(base: PreTrainedModel, path: str, num_layers: int) -> dict[str, Tensor]:
    """Read the weights of a checkpoint's depth modules with transformers, under the keys of `SequentialHeads.layers`.

    Args:
        base: The model.
        path: Folder or hub id of the checkpoint.
        num_layers: Number of its depth modules.

    Raises:
        ImportError: If this release of transformers has them in another form.
    """
    tell_number_of_layers(base, num_layers)
    from transformers.modeling_layers import MtpModel  # the rest of the package runs without it

    expect_mtp_keys(base)
    with _as_checkpoint(base, path):
        return MtpModel.from_pretrained(base).layers.state_dict()


@contextmanager
def _as_checkpoint(base: PreTrainedModel, path: str) -> Iterator[None]:
    """Let transformers read `path` for a model, in the dtype that the model has now."""
    config: Any = base.config
    before = config.name_or_path, config.dtype
    config.name_or_path, config.dtype = path, base.dtype
    try:
        yield
    finally:
        config.name_or_path, config.dtype = before


def has_checkpoint(folder: Path) -> bool:
    """Tell whether a model's weights are in a folder."""
    return any((folder / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))


def add_to_checkpoint(base: PreTrainedModel, folder: Path, weights: Mapping[str, Tensor]) -> Path:
    """Add depth modules to the checkpoint that `save_pretrained` has written into a folder.

    They become layers N, N+1, ... after the model's own N layers, in a shard of their own. A single
    `model.safetensors` is renamed for that, and an index is written.

    Args:
        base: The model.
        folder: Where the model was saved.
        weights: Weights of the depth modules, under the keys of `SequentialHeads.layers`.

    Returns:
        Path of the shard that they are in.
    """
    from transformers.core_model_loading import revert_weight_conversion  # see tell_number_of_layers

    # The conversion of save_pretrained to the format of released checkpoints: one tensor for each expert.
    stored = revert_weight_conversion(base, {_stored_name(base, key): x.detach() for key, x in weights.items()})
    save_file({key: x.cpu().contiguous() for key, x in stored.items()}, folder / MTP_SHARD_NAME, {"format": "pt"})
    _add_to_index(base, folder, list(stored))
    return folder / MTP_SHARD_NAME


def _stored_name(base: PreTrainedModel, key: str) -> str:
    """Turn `<k>.<name>` into the name on disk, except for what transformers itself renames."""
    index, name = key.split(".", 1)
    name = re.sub(r"^post_norm\.", "shared_head.norm.", name.removeprefix("mtp_block."))
    return layer_prefix(base, int(index)) + name


def _add_to_index(base: PreTrainedModel, folder: Path, keys: list[str]) -> None:
    single, path = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if single.is_file():
        with safe_open(single, framework="pt") as file:
            index: dict[str, Any] = {"metadata": {}, "weight_map": dict.fromkeys(file.keys(), TRUNK_SHARD_NAME)}
    else:
        index = json.loads(path.read_text())
    trunk = {key: file for key, file in index["weight_map"].items() if not _is_of_depth_module(base, key)}
    index["weight_map"] = trunk | dict.fromkeys(keys, MTP_SHARD_NAME)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    os.replace(unfinished, path)
    if single.is_file():
        # Last, because a job may die at any point: as long as this file is there, transformers reads no index.
        os.replace(single, folder / TRUNK_SHARD_NAME)


def _is_of_depth_module(base: PreTrainedModel, key: str) -> bool:
    """Whether a tensor on disk belongs to a layer after the last one."""
    layer = re.match(rf"{re.escape(base.base_model_prefix)}\.layers\.(\d+)\.", key)
    return layer is not None and int(layer[1]) >= base.config.num_hidden_layers
