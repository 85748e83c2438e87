"""A separate critic: a second transformer with a scalar head, run inside the policy's forward."""

import copy
import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from rl_plugins.nn.attachment import Attachment, base_model_of, find_file, has_soft_prompt, trunk_of
from rl_plugins.nn.gradient import tie
from rl_plugins.nn.sharding import whole_parameters
from rl_plugins.nn.sources import check_source
from rl_plugins.nn.value_head import ValueHead

HEAD_NAME = "value_head.safetensors"
"""File of the head, in the folder of the trunk."""

OWN_CACHE = ("past_key_values", "cache", "cache_params", "use_cache", "inputs_embeds", "mm_encoder_outputs")
"""Arguments of the policy's forward that hold its own states, which another model cannot use."""

SHARED_OPTIONS = ("dtype", "attn_implementation", "trust_remote_code")
"""Options of loading the policy that also hold for a value model from another checkpoint."""

WHERE = ("subfolder", "revision", "cache_dir", "token", "local_files_only")
"""Options of loading a model that say where a file is."""


class ValueModel(Attachment):
    """`V(s) = w . RMSNorm(f(s)) + b` for every position of a sequence, where `f` is the trunk of a transformer.

    Policy and critic are separate networks, so their gradients do not disturb each other. The head starts at zero, so
    the first values are 0 whatever the trunk was trained for. A trunk that reads images, such as that of a
    vision-language model, gets the images that the policy gets.

    Attached to a policy, it runs on the input of the policy's forward whenever it is watched; an observer receives
    its values (B, S). Inside the policy's forward DDP and DeepSpeed see its parameters, so one engine trains both
    networks. It keeps its own dtype.

    Args:
        trunk: Transformer without a head, such as `AutoModel` loads; its forward takes `input_ids` and
            `attention_mask` and returns a `last_hidden_state`.
    """

    name = "value_model"
    mark = f"value_model/{HEAD_NAME}"

    def __init__(self, trunk: PreTrainedModel) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = ValueHead(trunk.config.get_text_config().hidden_size, 1e-6).to(trunk.dtype)
        self.head.to(trunk.device)
        named = inspect.signature(trunk.forward).parameters
        self.accepted = {"input_ids", "attention_mask", *named} - set(OWN_CACHE)
        self._newest: Tensor | None = None

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        """Compute values (B, S), float32, of the states that token ids (B, S) lead to; `inputs` may be images."""
        output = self.trunk(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **inputs)
        return self.head(output.last_hidden_state)

    # In the policy's forward

    def _fit(self, base: PreTrainedModel) -> None:
        ours, theirs = self.trunk.config.get_text_config().vocab_size, base.config.get_text_config().vocab_size
        if ours < theirs:
            raise ValueError(
                f"The value model knows {ours} tokens and the policy {theirs}: both read the same token ids. Choose a "
                "value model with the policy's tokenizer."
            )
        self.requires_grad_(True).to(base.device)

    def hook(self, model: nn.Module) -> None:
        """Run in the forward pass of a policy from now on: the value model reads what the policy reads.

        Args:
            model: The policy, in its PEFT wrapper where it has one. The wrapper turns soft prompts into embeddings,
                which the value model could not read.
        """
        if not self._is_hooked(model):
            self.unhook()
            self._handles = (
                model.register_forward_pre_hook(self._on_policy_forward, with_kwargs=True),
                model.register_forward_hook(self._on_policy_output),
            )

    def _on_policy_forward(self, policy: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compute values before the policy's own forward, and give them to the observer."""
        if self.observer is None:
            return
        given = {"input_ids": args[0], **kwargs} if args else kwargs
        values = self(**{name: x for name, x in given.items() if name in self.accepted})
        self._newest = values
        self.observer(values)

    def _on_policy_output(self, policy: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Tie the values to the policy's output."""
        newest, self._newest = self._newest, None
        if newest is None or not newest.requires_grad:
            return output
        parts = dict(enumerate(output)) if isinstance(output, tuple) else dict(output)
        for key, part in parts.items():
            if isinstance(part, Tensor) and part.requires_grad:
                parts[key] = tie(part, [newest])
                if isinstance(output, tuple):
                    return tuple(parts.values())
                output[key] = parts[key]
                return output
        return output

    # Files

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the trunk as transformers does (`AutoModel.from_pretrained` reads it) and the head beside it.

        Args:
            directory: Created if missing.
        """
        self._write(Path(directory), self.state_dict())

    def _write(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        trunk = {key.removeprefix("trunk."): x for key, x in weights.items() if key.startswith("trunk.")}
        head = {
            key.removeprefix("head."): x.contiguous().cpu() for key, x in weights.items() if key.startswith("head.")
        }
        self.trunk.save_pretrained(folder, state_dict=trunk)
        save_file(head, folder / HEAD_NAME)

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs: Any) -> "ValueModel":
        """Load a saved value model, or start one from the trunk of any transformers checkpoint.

        Args:
            path: Folder that `save_pretrained` wrote, or a folder or hub id of any model that `AutoModel` loads: a
                language model, a reward model, a smaller one.
            kwargs: Keyword arguments of `AutoModel.from_pretrained`.
        """
        model = cls(AutoModel.from_pretrained(path, **kwargs))
        head = find_head(path, **kwargs)
        if head is not None:
            model.head.load_state_dict(load_file(head))
        return model

    def save(self, directory: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> Path:
        """Write trunk and head into the folder `value_model` in `directory`, which [`from_pretrained`] reads; see
        [`Attachment.save`]."""
        weights = self._whole_weights(state_dict)
        path = Path(directory) / self._mark()
        self._write(path.parent, weights)
        return path

    def load(self, directory: str | Path) -> None:
        """Load into this value model the weights that [`save`] wrote.

        Raises:
            FileNotFoundError: If `directory` holds none.
            RuntimeError: If the saved weights have other shapes.
        """
        self.check_saved(directory)
        saved = type(self).from_pretrained(Path(directory) / self.name, dtype=self.trunk.dtype)
        self.load_state_dict(saved.state_dict())

    @classmethod
    def prepare(
        cls,
        source: Any,
        policy: Any,
        *,
        policy_init_kwargs: Mapping[str, Any] | None = None,
        init_kwargs: Mapping[str, Any] | None = None,
        option: str = "value_model",
    ) -> "ValueModel":
        """Load or make the value model that a training starts from, not attached yet.

        Args:
            source: A `ValueModel`, a transformers model, a path or hub id, or `None` for the policy's own: the one
                attached to it or saved with it, else a copy of its trunk.
            policy: The policy as the user gave it.
            policy_init_kwargs: Keyword arguments that the policy is loaded with. Another model gets only `dtype`,
                `attn_implementation` and `trust_remote_code` of these.
            init_kwargs: Keyword arguments for loading the value model, on top of those.
            option: Name of the option that gave the source, for messages.

        Raises:
            TypeError: If the source is none of these, or there is none and the policy has no trunk to copy.
            FileNotFoundError: If there is no such model.
        """
        if isinstance(source, ValueModel):
            return source
        if source is None and isinstance(policy, nn.Module) and cls.of(policy) is not None:
            return cls.detach(policy)  # left by an earlier trainer, and used again
        shared = dict(policy_init_kwargs or {})
        if source is not None:  # the place of the policy's files is not that of another model
            shared = {key: shared[key] for key in SHARED_OPTIONS if key in shared}
        kwargs: dict[str, Any] = {"dtype": "float32", **shared, **(init_kwargs or {})}
        if source is None and isinstance(policy, str):
            source = policy
            if find_head(policy, **{**kwargs, "subfolder": cls.name}) is not None:
                kwargs["subfolder"] = cls.name
        if isinstance(source, str):
            check_source(option, source)
            try:
                return cls.from_pretrained(source, **kwargs)
            except OSError as error:
                raise FileNotFoundError(f"{option}={source!r} cannot be loaded: {error}") from error
        model = policy if source is None else source
        if isinstance(model, nn.Module) and has_soft_prompt(model):
            model = base_model_of(model)  # which PEFT leaves as it was
        if isinstance(model, PreTrainedModel):
            # A copy: the same object may also be the policy, or a reward function that must stay as it is.
            trunk = trunk_of(model)
            with whole_parameters(list(trunk.parameters())):
                return cls(copy.deepcopy(trunk))
        raise TypeError(
            f"Cannot make a value model from {type(source).__name__} for a policy of {type(policy).__name__}. Give "
            "value_model a path, a transformers model or a ValueModel."
        )


def find_head(path: str | os.PathLike[str], **kwargs: Any) -> str | None:
    """Find the file of a saved head in a value model's folder; `None` where there is none.

    Args:
        path: Folder or hub id.
        kwargs: Keyword arguments of `AutoModel.from_pretrained`; only those that say where a file is are used.
    """
    return find_file(path, HEAD_NAME, **{key: kwargs[key] for key in WHERE if key in kwargs})
