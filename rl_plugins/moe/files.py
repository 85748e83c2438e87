"""Save added selection biases beside a model, and load them again."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rl_plugins.moe.routers import Router, find_routers, is_attached
from rl_plugins.nn.attachment import SELECTION_BIAS_NAME, base_model_of


def save_selection_bias(model: nn.Module, directory: str | Path) -> Path | None:
    """Write selection biases in float32 into `directory`, beside `model.safetensors`: those that were added to a
    model, and an architecture's own ones where the model holds only rounded copies.

    Args:
        model: Causal LM, or a PEFT model around one.
        directory: Created if missing.

    Returns:
        The file; `None` where no bias was added or rounded, since an architecture's own bias is in the stock
        checkpoint.
    """
    routers = [router for router in find_routers(model) if router.has_bias]
    # One added or rounded bias makes all go into the file: `load_selection_bias` wants those of every router.
    if not any(router.injected is not None or router.is_rounded for router in routers):
        return None
    biases = {router.name: router.bias.detach().float().reshape(-1) for router in routers}
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    save_file({name: bias.cpu().contiguous() for name, bias in biases.items()}, path / SELECTION_BIAS_NAME)
    return path / SELECTION_BIAS_NAME


def load_selection_bias(model: nn.Module, directory: str | Path) -> None:
    """Route with the selection biases that were saved beside a model; call this after `from_pretrained`.

    Args:
        model: The model, freshly loaded.
        directory: Folder that the model was saved in; `selection_bias.safetensors` is read.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the biases belong to other routers or another number of experts; nothing is changed then.
    """
    path = Path(directory) / SELECTION_BIAS_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"No {SELECTION_BIAS_NAME} in {directory}. save_pretrained writes this file for a model that was balanced "
            "with a selection bias. Check the path. A model whose architecture has a bias, and which was trained in "
            "float32, has the bias in its checkpoint: do not call load_selection_bias for it."
        )
    routers = {router.name: router for router in find_routers(model)}
    # Sequential heads have routers, too. The policy may be loaded without these heads, or get new ones.
    biases = {name: bias for name, bias in load_file(path).items() if name in routers or not is_attached(name)}
    routers = {name: router for name, router in routers.items() if name in biases or not is_attached(name)}
    check_biases_fit(biases, list(routers.values()), whose=str(path))
    for name, bias in biases.items():
        routers[name].add_bias()  # adds nothing where the architecture has its own
        routers[name].set_bias(bias)
    save_beside(model)


def check_biases_fit(biases: Mapping[str, Tensor], routers: list[Router], *, whose: str) -> None:
    """Check that biases belong to these routers, by names and numbers of experts.

    Raises:
        ValueError: If they do not; the message names what differs.
    """
    wanted = {router.name: router.num_experts for router in routers}
    given = {name: bias.numel() for name, bias in biases.items()}
    if wanted != given:
        only_given, only_wanted = sorted(set(given) - set(wanted)), sorted(set(wanted) - set(given))
        other = [
            f"{n}: {given[n]} instead of {wanted[n]}"
            for n in sorted(set(given) & set(wanted))
            if given[n] != wanted[n]
        ]
        raise ValueError(
            f"The selection biases of {whose} do not fit this model. Experts that differ: {other or 'none'}; routers "
            f"that the model lacks: {only_given or 'none'}; routers without a bias: {only_wanted or 'none'}. Load the "
            "model that they were trained with."
        )


class _SaveBeside:
    """Wraps `save_pretrained` of one model so that it writes the added biases, too.

    It is a class and not a closure, so that a copy of the model carries a copy of the wrapper, which saves this copy.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.stock: Callable[..., Any] = model.save_pretrained

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, **kwargs: Any) -> Any:
        # The model first, so that a failure leaves no biases without a model.
        result = self.stock(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process and save_selection_bias(self.model, save_directory) is not None:
            added = any(router.injected is not None for router in find_routers(self.model))
            why = "that its architecture does not have" if added else "that its dtype cannot hold"
            warnings.warn(
                f"{type(base_model_of(self.model)).__name__} was saved with selection biases {why}. They are in "
                f"{SELECTION_BIAS_NAME}; without them tokens go to other experts. After from_pretrained call "
                "rl_plugins.moe.load_selection_bias(model, directory).",
                stacklevel=2,
            )
        return result


def save_beside(model: nn.Module) -> None:
    """Make `save_pretrained` write added biases too, whoever calls it; a second call does nothing."""
    # Trainers save the PEFT model, users often the base model. By id, since both are one object without PEFT.
    modules: dict[int, Any] = {id(module): module for module in (model, base_model_of(model))}
    for module in modules.values():
        if "save_pretrained" not in vars(module):
            module.save_pretrained = _SaveBeside(module).save_pretrained
