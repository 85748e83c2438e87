"""Keeps an architecture's own selection bias in float32 for its router, whatever the model is cast to."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from rl_plugins.nn.sharding import is_sharded, whole_parameters

ATTRIBUTE = "float32_bias"


class Float32Bias:
    """The float32 tensor behind a bias that a cast or an engine has rounded.

    A bias of 5 in bfloat16 cannot take a step of 1e-3, and where engines own the parameter it cannot become float32.
    So the tensor in the module tree stays a rounded copy. While it is not float32, a plain float32 tensor in the
    owner's attribute hides it, and routers read this tensor. State dicts hold the float32 tensor.

    Args:
        owner: The module that holds the bias.
        name: Its attribute there.

    Attributes:
        value: The whole bias in float32, not sharded.
    """

    def __init__(self, owner: nn.Module, name: str) -> None:
        self.name = name
        self.handles: list[RemovableHandle] = []
        live = stored(owner, name)
        with whole_parameters([live]) as (whole,):
            self.value = whole.detach().float().clone()

    @classmethod
    def of(cls, owner: nn.Module, name: str) -> "Float32Bias":
        """Return the float32 tensor of a bias; make it where there is none."""
        present = get_float32_bias(owner)
        if present is not None:
            return present
        ours = cls(owner, name)
        setattr(owner, ATTRIBUTE, ours)
        ours.handles = [
            owner.register_forward_pre_hook(ours._before_forward),
            # torch sets an attribute on these functions, which methods do not allow.
            owner.register_state_dict_post_hook(partial(ours._save)),
            owner.register_load_state_dict_pre_hook(partial(ours._load)),
        ]
        return ours

    def release(self, owner: nn.Module) -> None:
        """Undo the changes to the owner, if the bias in the module tree is float32; a rounded one stays hidden."""
        if stored(owner, self.name).dtype == torch.float32 and self.name not in vars(owner):
            for handle in self.handles:
                handle.remove()
            delattr(owner, ATTRIBUTE)

    def _before_forward(self, owner: nn.Module, args: Any) -> None:
        self.show(owner)

    def show(self, owner: nn.Module) -> Tensor:
        """Make the owner's attribute the float32 bias, and return it."""
        # `nn.Module` finds parameters and buffers in `__getattr__`, which Python asks only where `vars(owner)` has no
        # such name: an entry there hides them.
        live, hidden = stored(owner, self.name), self.name in vars(owner)
        if live.dtype == torch.float32:
            if hidden:
                # The model has been cast back to float32, from numbers that the first cast had rounded.
                del vars(owner)[self.name]
                self._write(live)
            elif self._is_whole(live):
                self.value = live.detach().clone()  # kept, since a cast rounds without notice
            return live
        # Half precision, not hidden yet: where the value does not round to the live numbers, somebody has written
        # new numbers there, which replace the value.
        if not hidden and self._is_whole(live) and not torch.equal(self.value.to(live), live):
            self.value = live.detach().float()
        if self.value.device != live.device:
            self.value = self.value.to(live.device)
        vars(owner)[self.name] = self.value
        return self.value

    @torch.no_grad()
    def set(self, owner: nn.Module, bias: Tensor, live: Tensor) -> None:
        """Replace the entries of the bias.

        Args:
            owner: The module that holds the bias.
            bias: The new entries.
            live: Result of [`stored`]; where an engine shards it, the tensor of `whole_parameters(writing=True)`.
        """
        self.value = bias.detach().to(live.device, torch.float32).reshape(self.value.shape).clone()
        self._write(live)
        if self.name in vars(owner):
            vars(owner)[self.name] = self.value

    @torch.no_grad()
    def _write(self, live: Tensor) -> None:
        # Under ZeRO-3 only while the parameter is gathered; under FSDP2 only a whole copy, which is written back.
        if live.numel() == self.value.numel() and not isinstance(live, DTensor):
            live.copy_(self.value)

    def _is_whole(self, live: Tensor) -> bool:
        return not is_sharded(live) and live.shape == self.value.shape and not live.is_meta

    # Checkpoints: state dicts hold the float32 tensor in place of its rounded copy.

    def _save(self, owner: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        live = stored(owner, self.name)
        if f"{prefix}{self.name}" in state and live.dtype != torch.float32 and self._is_whole(live):
            state[f"{prefix}{self.name}"] = self.show(owner)

    def _load(self, owner: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
        # This runs before torch copies the numbers into the module tree, and rounds them there.
        given = state.get(f"{prefix}{self.name}")
        if isinstance(given, Tensor) and given.shape == self.value.shape:
            self.value = given.detach().to(self.value.device, torch.float32).clone()
            if self.name in vars(owner):
                vars(owner)[self.name] = self.value


def stored(owner: nn.Module, name: str) -> Tensor:
    """Look up the bias in the module tree, which casts and engines see. Engines replace it, so do not keep it."""
    tensor = owner._parameters.get(name, owner._buffers.get(name))
    assert tensor is not None
    return tensor


def get_float32_bias(owner: nn.Module) -> Float32Bias | None:
    """Return the float32 tensor behind the bias of a module, or `None`."""
    ours = vars(owner).get(ATTRIBUTE)
    return ours if isinstance(ours, Float32Bias) else None
