"""Modules that run inside a model's forward, on the hidden states of its trunk."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rl_plugins.nn.gradient import tie

HiddenTap = Callable[[Tensor], Iterable[Tensor | None] | None]
"""Receives the trunk's last hidden state (B, S, D) of every forward pass while it is active, and gives back what it
made of it with gradient."""


def is_registered(handle: RemovableHandle | None, hooks: Mapping[int, Any]) -> bool:
    """Whether a hook is among those of a module."""
    return handle is not None and handle.id in hooks


class TrunkTap(nn.Module):
    """Gives a tap the trunk's hidden states of every forward pass, by a hook on the trunk.

    The tap runs inside the model's forward, which is what lets DDP and DeepSpeed see the modules that it calls. What
    it makes is tied to the hidden states that the model goes on with, and so to the model's output.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tap: HiddenTap | None = None
        self.trunk_hook: RemovableHandle | None = None

    @contextmanager
    def tapped(self, tap: HiddenTap) -> Iterator[None]:
        """Give `tap` the trunk's hidden states of every forward pass of the model inside the block."""
        outer, self.tap = self.tap, tap
        try:
            yield
        finally:
            self.tap = outer

    def hook(self, trunk: nn.Module) -> None:
        """Listen to `trunk`, unless that is so: Lightning's DeepSpeed strategy takes off all hooks before it
        evaluates."""
        if not is_registered(self.trunk_hook, trunk._forward_hooks):
            self.trunk_hook = trunk.register_forward_hook(self._on_trunk_forward)

    def unhook(self) -> None:
        """Stop listening."""
        if self.trunk_hook is not None:
            self.trunk_hook.remove()
            self.trunk_hook = None

    def _on_trunk_forward(self, trunk: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.tap is None:
            return output
        plain = isinstance(output, tuple)
        hidden: Tensor = output[0] if plain else output.last_hidden_state
        tied = tie(hidden, self.tap(hidden) or ())
        if plain:
            return (tied, *output[1:])
        output.last_hidden_state = tied
        return output
