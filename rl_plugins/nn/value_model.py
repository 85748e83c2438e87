"""A separate critic: a second transformer with a scalar head, run inside the policy's forward."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoModel, PreTrainedModel
from transformers.utils import cached_file

from rl_plugins.nn.attach import add_submodule, base_model_of, has_soft_prompt, remove_submodule, trunk_of
from rl_plugins.nn.gradient import tie
from rl_plugins.nn.mtp_heads import ValueHead
from rl_plugins.nn.sharding import whole_parameters
from rl_plugins.nn.sources import check_source
from rl_plugins.nn.trunk_tap import is_registered

CRITIC_ATTRIBUTE = "value_model"
"""Name of the submodule in the policy, and of the folder that it is saved in."""
HEAD_NAME = "value_head.safetensors"

OWN_CACHE = ("past_key_values", "cache", "cache_params", "use_cache", "inputs_embeds", "mm_encoder_outputs")
"""Arguments of the policy's forward that are about its own states, of no use to another model."""

SHARED_OPTIONS = ("dtype", "attn_implementation", "trust_remote_code")
"""Options of loading the policy that hold for a value model from elsewhere, too."""

ValueTap = Callable[[Tensor], Any]
"""Receives the values (B, S) of every forward pass of the policy while it is active."""


class ValueModel(nn.Module):
    """`V(s) = w . RMSNorm(f(s)) + b` for every position of a sequence, `f` the trunk of a transformer.

    Actor and critic are separate networks, so that neither's gradient washes out the other's. The
    head starts at zero, so the first values are 0 whatever the trunk was trained for. A trunk that reads images, as
    that of a vision-language model does, gets those that the policy gets.

    Args:
        trunk: Transformer without a head, such as `AutoModel` loads; its forward takes `input_ids` and
            `attention_mask` and returns a `last_hidden_state`.
    """

    def __init__(self, trunk: PreTrainedModel) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = ValueHead(trunk.config.get_text_config().hidden_size, 1e-6).to(trunk.dtype)
        self.head.to(trunk.device)
        named = inspect.signature(trunk.forward).parameters
        self.accepted = {"input_ids", "attention_mask", *named} - set(OWN_CACHE)
        self.tap: ValueTap | None = None
        self.policy_hooks: tuple[RemovableHandle, ...] = ()
        self._newest: Tensor | None = None

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        """Values (B, S), float32, of the states that token ids (B, S) lead to; `inputs` are images and the like."""
        output = self.trunk(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **inputs)
        return self.head(output.last_hidden_state)

    @contextmanager
    def tapped(self, tap: ValueTap) -> Iterator[None]:
        """Run on the input of every forward pass of the policy inside the block, and give `tap` the values.

        Inside the policy's forward DDP and DeepSpeed see the parameters, so one engine trains both networks.
        """
        outer, self.tap = self.tap, tap
        try:
            yield
        finally:
            self.tap = outer

    def on_policy_forward(self, policy: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the policy, registered by `attach_value_model`."""
        if self.tap is None:
            return
        given = {"input_ids": args[0], **kwargs} if args else kwargs
        values = self(**{name: x for name, x in given.items() if name in self.accepted})
        self._newest = values
        self.tap(values)

    def on_policy_output(self, policy: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook of the policy: ties the values to its output."""
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

    def save_pretrained(self, directory: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the trunk as transformers does (`AutoModel.from_pretrained` reads it) and the head beside it.

        Args:
            directory: Made if missing.
            state_dict: Whole weights, where this module's own are shards.
        """
        weights = self.state_dict() if state_dict is None else state_dict
        trunk = {key.removeprefix("trunk."): w for key, w in weights.items() if key.startswith("trunk.")}
        head = {
            key.removeprefix("head."): w.contiguous().cpu() for key, w in weights.items() if key.startswith("head.")
        }
        self.trunk.save_pretrained(directory, state_dict=trunk)
        save_file(head, Path(directory) / HEAD_NAME)

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs: Any) -> "ValueModel":
        """Load a saved value model, or start one from the trunk of any transformers checkpoint.

        Args:
            path: Folder that `save_pretrained` wrote, or a folder or hub id of any model that `AutoModel` loads: a
                language model, a reward model, a smaller one.
            kwargs: For `AutoModel.from_pretrained`.
        """
        model = cls(AutoModel.from_pretrained(path, **kwargs))
        head = find_head(path, **kwargs)
        if head is not None:
            model.head.load_state_dict(load_file(head))
        return model

    def load_pretrained(self, path: str | Path) -> None:
        """Load weights that `save_pretrained` wrote into this model.

        Raises:
            FileNotFoundError: If `path` holds none.
        """
        if not is_value_model_folder(path):
            raise FileNotFoundError(
                f"{path} has no {HEAD_NAME}: it was not written by PPOTrainer, but by another trainer. Start from it "
                "with model=<path> instead of resume_from_checkpoint."
            )
        saved = type(self).from_pretrained(path, dtype=self.trunk.dtype)
        self.load_state_dict(saved.state_dict())


def find_head(path: str | Path, **kwargs: Any) -> str | None:
    """The file of a saved head in a folder or on the hub; `None` where there is none.

    Args:
        path: Folder or hub id.
        kwargs: For `AutoModel.from_pretrained`, of which those that say where a file is are used.
    """
    accepted = ("subfolder", "revision", "cache_dir", "token", "local_files_only")
    where = {key: kwargs[key] for key in accepted if key in kwargs}
    return cached_file(
        path,
        HEAD_NAME,
        **where,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def is_value_model_folder(path: str | Path) -> bool:
    """Whether `ValueModel.save_pretrained` wrote this folder."""
    return (Path(path) / HEAD_NAME).is_file()


def get_value_model(policy: nn.Module) -> ValueModel | None:
    """The value model attached to `policy`, or `None`."""
    found = base_model_of(policy)._modules.get(CRITIC_ATTRIBUTE)
    return found if isinstance(found, ValueModel) else None


def attach_value_model(policy: nn.Module, value_model: ValueModel) -> None:
    """Make the value model a submodule of the policy, run by its forward whenever it is tapped.

    Optimizers, DDP and DeepSpeed then see it. Logits, generation and `save_pretrained` of the policy stay as they
    were.

    Args:
        policy: Causal language model, or a PEFT model around one.
        value_model: Reads the same token ids.

    Raises:
        ValueError: If the policy has a value model already, or the token ids of the policy do not fit the value
            model's vocabulary.
    """
    base = base_model_of(policy)
    if get_value_model(policy) is not None:
        raise ValueError(
            f"{type(base).__name__} has a value model already. Use get_value_model(policy) to reach it, or "
            "detach_value_model(policy) first."
        )
    ours, theirs = value_model.trunk.config.get_text_config().vocab_size, base.config.get_text_config().vocab_size
    if ours < theirs:
        raise ValueError(
            f"The value model knows {ours} tokens and the policy {theirs}: both read the same token ids. Choose a "
            "value model with the policy's tokenizer."
        )
    value_model.requires_grad_(True)
    value_model.to(base.device)
    add_submodule(base, CRITIC_ATTRIBUTE, value_model)
    hook_value_model(policy)


def hook_value_model(policy: nn.Module) -> None:
    """Have an attached value model run in the policy's forward, if it does not already."""
    # A PEFT wrapper, where there is one: soft prompts become embeddings in it, which the value model cannot read.
    value_model = get_value_model(policy)
    if value_model is None:
        return
    live = {**policy._forward_pre_hooks, **policy._forward_hooks}
    if value_model.policy_hooks and all(is_registered(hook, live) for hook in value_model.policy_hooks):
        return
    value_model.policy_hooks = (
        policy.register_forward_pre_hook(value_model.on_policy_forward, with_kwargs=True),
        policy.register_forward_hook(value_model.on_policy_output),
    )


def detach_value_model(policy: nn.Module) -> ValueModel:
    """Take the value model off; the policy is as it was before [`attach_value_model`].

    Raises:
        ValueError: If there is none.
    """
    base = base_model_of(policy)
    value_model = get_value_model(policy)
    if value_model is None:
        raise ValueError(f"{type(base).__name__} has no value model to detach.")
    for hook in value_model.policy_hooks:
        hook.remove()
    value_model.policy_hooks = ()
    remove_submodule(base, CRITIC_ATTRIBUTE)
    return value_model


def make_value_model(
    source: Any,
    policy: Any,
    *,
    policy_init_kwargs: Mapping[str, Any] | None = None,
    init_kwargs: Mapping[str, Any] | None = None,
) -> ValueModel:
    """The value model that a run starts from.

    Args:
        source: A `ValueModel`, a transformers model, a path or hub id, or `None` for the policy's trunk.
        policy: The policy as the user gave it.
        policy_init_kwargs: Keyword arguments that the policy is loaded with, of which another model shares `dtype` and
            `attn_implementation` and `trust_remote_code`.
        init_kwargs: Keyword arguments for loading the value model, on top of those.

    Raises:
        TypeError: If the source is none of these, or there is none and the policy has no trunk to copy.
    """
    if isinstance(source, ValueModel):
        return source
    if source is None and isinstance(policy, nn.Module) and get_value_model(policy) is not None:
        return detach_value_model(policy)  # of an earlier trainer; it goes on
    shared = dict(policy_init_kwargs or {})
    if source is not None:  # where a file is says nothing about another model
        shared = {key: shared[key] for key in SHARED_OPTIONS if key in shared}
    kwargs: dict[str, Any] = {"dtype": "float32", **shared, **(init_kwargs or {})}
    if source is None and isinstance(policy, str):
        source = policy
        if find_head(policy, **{**kwargs, "subfolder": CRITIC_ATTRIBUTE}) is not None:
            kwargs["subfolder"] = CRITIC_ATTRIBUTE
    if isinstance(source, str):
        check_source("value_model", source)
        return ValueModel.from_pretrained(source, **kwargs)
    model = policy if source is None else source
    if isinstance(model, nn.Module) and has_soft_prompt(model):
        model = base_model_of(model)  # which PEFT leaves as it was
    if isinstance(model, PreTrainedModel):
        # A copy: the same object may also be the policy, or a reward function that must stay as it is.
        trunk = trunk_of(model)
        with whole_parameters(list(trunk.parameters())):
            return ValueModel(copy.deepcopy(trunk))
    raise TypeError(
        f"Cannot make a value model from {type(source).__name__} for a policy of {type(policy).__name__}. Give "
        "value_model a path, a transformers model or a ValueModel."
    )


def save_value_model(
    model: nn.Module, directory: str | Path, *, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Write the value model of a policy into a folder of its own in `directory`.

    Args:
        model: Policy with a value model attached.
        directory: Of the policy's checkpoint.
        state_dict: Whole weights of the policy, as an engine gathers them under ZeRO-3; its own by default.
    """
    critic, weights = get_value_model(model), None
    assert critic is not None
    if state_dict is not None:
        prefix = f"{CRITIC_ATTRIBUTE}."
        weights = {key.rpartition(prefix)[2]: w for key, w in state_dict.items() if prefix in key}
    critic.save_pretrained(Path(directory) / CRITIC_ATTRIBUTE, weights)


def load_value_model(model: nn.Module, directory: str | Path) -> None:
    """Read what [`save_value_model`] wrote into a policy's value model.

    Raises:
        FileNotFoundError: If `directory` holds none.
    """
    critic = get_value_model(model)
    assert critic is not None
    critic.load_pretrained(Path(directory) / CRITIC_ATTRIBUTE)
