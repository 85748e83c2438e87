"""The base class of all modules that live inside a Hugging Face model: attached, watched, saved, loaded, found."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from rl_plugins.nn.gradient import tie

SELECTION_BIAS_NAME = "selection_bias.safetensors"
"""File of selection biases (mixture of experts) beside a model whose own checkpoint cannot hold them."""

Observer = Callable[[Tensor], Iterable[Tensor | None] | None]
"""Receives the trunk's last hidden states (B, S, D) of a forward pass, and returns the differentiable tensors that
it computed from them."""


class TrunkInputs(NamedTuple):
    """Inputs of a forward pass of the trunk.

    Attributes:
        input_ids: Tokens (B, S); `None` where the caller passed embeddings.
        attention_mask: Real tokens (B, L), those of the cache included; `None` for all.
        position_ids: Positions (B, S) of the tokens; `None` where the model counts them itself.
    """

    input_ids: Tensor | None
    attention_mask: Any
    position_ids: Tensor | None


def base_model_of(model: nn.Module) -> PreTrainedModel:
    """Return the `PreTrainedModel` that owns the LM head: the model itself, or the one inside a PEFT wrapper."""
    if isinstance(model, PreTrainedModel):
        return model
    get_base_model = getattr(model, "get_base_model", None)
    if get_base_model is None:
        raise TypeError(
            f"Expected a transformers PreTrainedModel or a PEFT model around one, got {type(model).__name__}. "
            "Unwrap the model (accelerator.unwrap_model) before attaching modules."
        )
    return get_base_model()


def has_soft_prompt(model: nn.Module) -> bool:
    """Tell whether PEFT puts trained embeddings or cache entries before every prompt of the model."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def trunk_of(base: PreTrainedModel) -> PreTrainedModel:
    """Return the part of a causal LM before its LM head, which runs in every forward pass."""
    if base.base_model is not base:
        return base.base_model
    # Llama 4's text model names a prefix that it does not have, so `base_model` is the model itself.
    return next((child for child in base.children() if isinstance(child, PreTrainedModel)), base)


def find_file(path: str | os.PathLike[str], name: str, **where: Any) -> str | None:
    """Find one file of a model, in its folder or in the hub's cache, and download it where that is possible.

    Args:
        path: Folder or hub id; an empty string has no files.
        name: Name of the file, relative to the folder.
        where: Keyword arguments of transformers' `cached_file`, such as `revision`.

    Returns:
        Path of the file; `None` where there is no such file.
    """
    if not os.fspath(path):
        return None
    return cached_file(
        path,
        name,
        **where,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


class Attachment(nn.Module):
    """A module inside a Hugging Face model, trained by the model's engine and saved beside the model.

    An attached module is a submodule of the causal LM, so that optimizers, DDP, DeepSpeed and FSDP2 see it. It runs
    **inside** the model's forward pass, by a hook on the model's trunk. So these engines gather its parameters and
    reduce its gradients like those of the model. Logits, generation and `save_pretrained` of the model stay as they
    were. It may be attached before or after PEFT and `add_fused_lm_head`.

    A subclass defines its name and the file that it is saved in; the rest is inherited:

    ```python
    class Probe(Attachment):
        name = "probe"
        mark = "probe.safetensors"

        def __init__(self, hidden_size: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(hidden_size))

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden.float() @ self.weight.float()


    probe = Probe(model.config.hidden_size).attach(model)


    def observe(hidden: Tensor) -> list[Tensor]:
        values.append(probe(hidden))
        return values[-1:]  # which DDP then finds in the graph of the model's output


    with probe.watching(observe):
        model(input_ids)
    probe.save("checkpoint")
    ```

    Attributes:
        name: Name of the submodule in the model, and prefix of its keys in the model's state dict.
        mark: File, relative to a checkpoint's folder, by which saved weights are recognised; `None` where the weights
            are part of the model's own files; such a subclass needs its own `save`, `load` and `find`.
        observer: Function that receives the hidden states; `None` outside [`watching`].
        inputs: Inputs of the watched forward pass that runs now; `None` where none runs.
    """

    name: ClassVar[str]
    mark: ClassVar[str | None] = None
    _names: ClassVar[set[str]] = set()
    _marks: ClassVar[set[str]] = set()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "name"):
            Attachment._names.add(cls.name)
        if cls.mark is not None:
            Attachment._marks.add(cls.mark)

    def __init__(self) -> None:
        super().__init__()
        self.observer: Observer | None = None
        self.inputs: TrunkInputs | None = None
        self._handles: tuple[RemovableHandle, ...] = ()

    @staticmethod
    def names() -> frozenset[str]:
        """List the names of all subclasses, also a user's own: submodules that do not belong to the model itself."""
        return frozenset(Attachment._names)

    @staticmethod
    def marks() -> frozenset[str]:
        """List the files by which saved weights of any subclass are recognised."""
        return frozenset(Attachment._marks)

    @classmethod
    def _family(cls) -> str:
        """Name of the class that defines the submodule's name, for messages."""
        return next(kind.__name__ for kind in cls.__mro__ if "name" in vars(kind))

    # In a model

    @classmethod
    def of(cls, model: nn.Module) -> Self | None:
        """Return the attached module of this class; `None` where the model has none.

        Args:
            model: Causal LM, or a PEFT model around one.

        Raises:
            TypeError: If `model` is not a transformers model.
        """
        found = base_model_of(model)._modules.get(cls.name)
        return found if isinstance(found, cls) else None

    def attach(self, model: nn.Module) -> Self:
        """Add this module to a model, in the model's dtype and on its device, and run it in the model's forward pass.

        `save_pretrained` of the model leaves the module out, so that the stock `AutoModelForCausalLM` can load the
        saved policy.

        Args:
            model: Causal LM, or a PEFT model around one.

        Raises:
            TypeError: If `model` is not a transformers model.
            ValueError: If the model has such a module already, or this one does not fit the model.
        """
        base = base_model_of(model)
        if hasattr(base, self.name):
            raise ValueError(
                f"{type(base).__name__} has `{self.name}` already. Call {self._family()}.of(model) to reach it, or "
                f"{self._family()}.detach(model) to take it out first."
            )
        self._fit(base)
        base.add_module(self.name, self)
        base._keys_to_ignore_on_save = set(base._keys_to_ignore_on_save or ()) | self._keys_in_model()
        self.hook(model)
        return self

    def _fit(self, base: PreTrainedModel) -> None:
        """Check that this module fits a model, and take over the model's device, dtype and mode.

        Raises:
            ValueError: If it does not fit.
        """
        self.to(device=base.device, dtype=base.dtype).train(base.training)

    def _keys_in_model(self) -> set[str]:
        return {f"{self.name}.{key}" for key in self.state_dict()}

    @classmethod
    def detach(cls, model: nn.Module) -> Self:
        """Take the module off; the model is as it was before [`attach`].

        Args:
            model: Causal LM, or a PEFT model around one.

        Raises:
            ValueError: If the model has no such module.
        """
        base, found = base_model_of(model), cls.of(model)
        if found is None:
            raise ValueError(f"{type(base).__name__} has no `{cls.name}` to detach.")
        found.unhook()
        keys = {key for key in base._keys_to_ignore_on_save or () if key.startswith(f"{cls.name}.")}
        base._keys_to_ignore_on_save = set(base._keys_to_ignore_on_save or ()) - keys
        delattr(base, cls.name)
        return found

    # In the model's forward

    def hook(self, model: nn.Module) -> None:
        """Run in the forward pass of a model from now on; do nothing if the hook is there already.

        [`attach`] calls this method. Call it again where hooks may have been taken off: Lightning's DeepSpeed strategy
        takes all hooks off before it evaluates.

        Args:
            model: The model that this module is attached to.
        """
        trunk = trunk_of(base_model_of(model))
        if not self._is_hooked(trunk):
            self.unhook()
            self._handles = (
                trunk.register_forward_pre_hook(self._on_trunk_inputs, with_kwargs=True),
                # Before other hooks of the trunk, so that decoder layers of heads count as a part of its forward.
                trunk.register_forward_hook(self._on_trunk_forward, prepend=True),
            )

    def _is_hooked(self, module: nn.Module) -> bool:
        live = {*module._forward_pre_hooks, *module._forward_hooks}
        return bool(self._handles) and all(handle.id in live for handle in self._handles)

    def unhook(self) -> None:
        """Stop running in the model's forward."""
        for handle in self._handles:
            handle.remove()
        self._handles = ()

    @contextmanager
    def watching(self, observer: Observer) -> Iterator[None]:
        """Give an observer the trunk's last hidden states (B, S, D) of every forward pass of the model in the block.

        The observer runs inside the model's forward, so that DDP and DeepSpeed see the modules that it calls. The
        tensors that it returns become part of the graph of the model's output, from which they get no gradient. In
        nested blocks only the innermost observer is called.
        """
        outer, self.observer = self.observer, observer
        try:
            yield
        finally:
            self.observer = outer

    def states(self, hidden: Tensor) -> Tensor:
        """Turn the trunk's hidden states (B, S, D) into the states that the module judges, one for each position.

        These are the hidden states themselves, unless a subclass reads more than one of them.
        """
        return hidden

    def _on_trunk_inputs(self, trunk: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.observer is not None:
            given = {"input_ids": args[0], **kwargs} if args else kwargs
            self.inputs = TrunkInputs(*(given.get(name) for name in TrunkInputs._fields))

    def _on_trunk_forward(self, trunk: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.observer is None:
            return output
        plain = isinstance(output, tuple)
        hidden: Tensor = output[0] if plain else output.last_hidden_state
        tied = tie(hidden, self.observer(hidden) or ())
        self.inputs = None
        if plain:
            return (tied, *output[1:])
        output.last_hidden_state = tied
        return output

    # Files

    @classmethod
    def _mark(cls) -> str:
        if cls.mark is None:
            raise TypeError(f"{cls.__name__} has no `mark`: name the file that it is saved in.")
        return cls.mark

    def save(self, directory: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> Path:
        """Write the weights into `directory`, beside `model.safetensors`.

        Save the model first: inference engines such as vLLM read every safetensors file of a folder as a part of the
        model, unless an index names the model's own files. This method writes such an index where the model is a
        single file.

        Args:
            directory: Created if missing.
            state_dict: Weights of the whole model, as an engine gathers them under ZeRO-3; by default this module's
                own weights.

        Returns:
            Path of the file.

        Raises:
            ValueError: If `state_dict` lacks some of this module's weights.
        """
        path, weights = Path(directory) / self._mark(), self._whole_weights(state_dict)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: x.detach().cpu().contiguous() for key, x in weights.items()}, path)
        _index_single_file(path.parent)
        return path

    def _whole_weights(self, state_dict: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Take this module's weights out of a model's state dict, and give them this module's own keys."""
        own = self.state_dict()
        if state_dict is None:
            return dict(own)
        weights = {}
        for key, x in state_dict.items():
            # PEFT and engines put prefixes before the model's keys. A value model may hold a copy of another
            # attachment, whose name then comes second.
            prefix, found, rest = f".{key}".partition(f".{self.name}.")
            if found and self.names().isdisjoint(prefix.split(".")):
                weights[rest] = x
        if weights.keys() != own.keys():
            raise ValueError(
                f"state_dict does not hold all weights of {self._family()}; gather the whole model. Missing are "
                f"{len(own.keys() - weights.keys())} of {len(own)}."
            )
        return weights

    @classmethod
    def check_saved(cls, directory: str | Path) -> None:
        """Refuse a folder without weights that [`save`] wrote.

        Raises:
            FileNotFoundError: If there is no such folder, or no weights in it.
        """
        mark = cls._mark()
        if not Path(directory).is_dir():
            raise FileNotFoundError(f"No {mark} in {directory}: there is no such folder. Check the path.")
        if not (Path(directory) / mark).is_file():
            raise FileNotFoundError(
                f"No {mark} in {directory}: nothing there was saved with {cls.__name__}. Give a folder that "
                f"{cls.__name__}.save wrote. A model without this file is loaded like any other and gets a new "
                f"{cls.name}."
            )

    def load(self, directory: str | Path) -> None:
        """Load into this module the weights that [`save`] wrote.

        Raises:
            FileNotFoundError: If `directory` holds none.
            ValueError: If they are of other shapes.
        """
        self.check_saved(directory)
        weights, own = load_file(Path(directory) / self._mark()), self.state_dict()
        shapes, wanted = ({key: tuple(x.shape) for key, x in part.items()} for part in (weights, own))
        if shapes != wanted:
            differing = {key for key in shapes.keys() | wanted.keys() if shapes.get(key) != wanted.get(key)}
            first = min(differing)
            raise ValueError(
                f"{self._mark()} in {directory} does not fit this {type(self).__name__}: {len(differing)} weights "
                f"differ, such as {first}, which is {shapes.get(first, 'missing')} instead of "
                f"{wanted.get(first, 'nothing')}. Load it into a module of the shape that was saved."
            )
        self.load_state_dict(weights)

    @classmethod
    def find(cls, path: str | os.PathLike[str], *, revision: str | None = None) -> str | None:
        """Find the folder of weights that were saved with a model, in the model's folder or in the hub's cache.

        Args:
            path: Folder or hub id of the model.
            revision: Revision of the hub's repository.

        Returns:
            A folder that [`load`] takes; `None` where there are no weights.
        """
        mark = cls._mark()
        found = find_file(path, mark, revision=revision)
        return None if found is None else str(Path(found).parents[mark.count("/")])


def attachments_of(model: nn.Module) -> list[Attachment]:
    """List all modules that are attached to a model."""
    return [module for module in base_model_of(model).children() if isinstance(module, Attachment)]


def _index_single_file(directory: Path) -> None:
    """Write an index that names the tensors of `model.safetensors`. transformers ignores the index as long as this
    file is there."""
    model_file = directory / SAFE_WEIGHTS_NAME
    # No index beside added selection biases: vLLM then refuses the folder. It would route wrongly without the biases.
    if model_file.is_file() and not (directory / SELECTION_BIAS_NAME).is_file():
        with safe_open(model_file, framework="pt") as file:
            weight_map = dict.fromkeys(sorted(file.keys()), SAFE_WEIGHTS_NAME)
        index = {"metadata": {"total_size": model_file.stat().st_size}, "weight_map": weight_map}
        (directory / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
