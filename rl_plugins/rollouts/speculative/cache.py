"""A key-value cache whose tokens are taken back row by row."""

from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from rl_plugins.nn.cache_name import cache_name

SPARE_SLOTS = 64
"""Slots that a buffer grows by at least: growing copies it."""

TURN_OFF = "Generate without speculation: leave out custom_generate, or set speculative=False in the trainer."


class RollbackLayer(DynamicLayer):
    """Keys and values of one attention layer, in a buffer with spare room: a forward pass appends without copying.

    It keeps all tokens, also where the layer attends to a window of them; the mask is what limits those.
    """

    def __init__(self, is_sliding: bool = False) -> None:
        super().__init__()
        self.is_sliding = is_sliding
        self.length = 0
        self.key_buffer: Tensor | None = None
        self.value_buffer: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append states (B, H, S, d); return all of them."""
        start, self.length = self.length, self.length + key_states.shape[-2]
        self.key_buffer = _append(self.key_buffer, key_states, start)
        self.value_buffer = _append(self.value_buffer, value_states, start)
        self.is_initialized = True
        return self._view()

    def _view(self) -> tuple[Tensor, Tensor]:
        assert self.key_buffer is not None and self.value_buffer is not None
        self.keys, self.values = self.key_buffer[:, :, : self.length], self.value_buffer[:, :, : self.length]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Slots in use."""
        return self.length

    def trim(self, slots: int) -> None:
        """Forget the newest slots of all rows."""
        self.length -= slots
        if self.is_initialized:
            self._view()

    def select(self, rows: Tensor, slots: Tensor) -> None:
        """Keep some rows (A,) and, in each, the slots (A, L), in that order."""
        if not self.is_initialized:
            return
        keys, values = self._view()
        index = (rows[:, None], slots)
        # Advanced indices around a slice put their dimensions first: (A, L, H, d).
        self.key_buffer = keys.transpose(1, 2)[index].transpose(1, 2)
        self.value_buffer = values.transpose(1, 2)[index].transpose(1, 2)
        self.length = slots.shape[1]
        self._view()


def _append(buffer: Tensor | None, states: Tensor, start: int) -> Tensor:
    """The buffer with `states` in the slots from `start` on, grown where it is full."""
    end = start + states.shape[-2]
    if buffer is None or end > buffer.shape[-2]:
        room = end + max(SPARE_SLOTS, end // 4)
        grown = states.new_empty(*states.shape[:2], room, states.shape[-1])
        if buffer is not None:
            grown[:, :, :start] = buffer[:, :, :start]
        buffer = grown
    buffer[:, :, start:end] = states
    return buffer


class RollbackCache(Cache):
    """The cache of a model's layers, with which rows accept different numbers of tokens.

    All rows append to the same slots; those that hold a rejected token are masked in that row. `trim` frees slots
    that no row uses, `select` moves the rest together.
    """

    @property
    def is_windowed(self) -> bool:
        """Whether some layers attend to a window of slots, in which masked ones would count."""
        return any(self.is_sliding)

    def _attention_layers(self) -> list[RollbackLayer]:
        return [cast(RollbackLayer, layer) for layer in self.layers if not isinstance(layer, DummyLayer)]

    def trim(self, slots: int) -> None:
        """Forget the newest slots of all rows."""
        for layer in self._attention_layers():
            layer.trim(slots)

    def select(self, rows: Tensor, slots: Tensor) -> None:
        """Keep some rows (A,) and, in each, the slots (A, L)."""
        for layer in self._attention_layers():
            layer.select(rows, slots)


def rollback_cache(cache: Any, layer_types: list[str] | None) -> RollbackCache:
    """An empty cache that takes tokens back row by row, in place of the one that `generate` prepared.

    Args:
        cache: What `generate` prepared for the model.
        layer_types: Of the model's config, where it has them.

    Raises:
        ValueError: If it is of a kind, or has layers of a kind, that cannot take tokens back row by row, or the caller
            of `generate` passed it.
    """
    if not isinstance(cache, Cache):
        raise ValueError(
            f"Speculative decoding needs a key-value cache, but this model generates with {type(cache).__name__} "
            f"(use_cache=False, or a model with a state of its own). {TURN_OFF}"
        )
    if cache.offloading:
        raise ValueError(f"Speculative decoding does not move its cache off the device. {TURN_OFF}")
    if "chunked_attention" in (layer_types or ()):
        raise ValueError(
            "This model attends within chunks of fixed slots (layer type 'chunked_attention'), from which a rejected "
            f"token cannot be taken back in one row alone. {TURN_OFF}"
        )
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer):
            raise ValueError(
                f"This model's cache has layers of type {type(layer).__name__}, which cannot take a rejected token "
                f"back in one row alone. {TURN_OFF}"
            )
    if not cache.layers or cache.get_seq_length() > 0:
        raise ValueError(f"Speculative decoding makes its own cache: do not pass {cache_name()}. {TURN_OFF}")
    kept = [layer if isinstance(layer, DummyLayer) else RollbackLayer(layer.is_sliding) for layer in cache.layers]
    return RollbackCache(layers=kept)


def kept_slots(mask: Tensor) -> tuple[Tensor, Tensor]:
    """How to move the slots in use together, on the right, in order.

    Args:
        mask: Slots in use (A, S).

    Returns:
        Slots (A, L) and the mask after the move (A, L); L is the largest number in use in any row.
    """
    width = int(mask.sum(1).max())
    # A stable sort by "in use" moves the free slots to the left and keeps the order of the others.
    slots = mask.sort(dim=1, stable=True).indices[:, -width:]
    return slots, torch.gather(mask, 1, slots)
