"""A cache of keys and values from which each row of a batch takes back its own rejected tokens."""

from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from rl_plugins.nn.cache_name import cache_name

SPARE_SLOTS = 64
"""Slots that a buffer grows by at least, since growing copies it."""

TURN_OFF = (
    "To generate without speculation, leave out custom_generate (in generate) or speculative=True (in a trainer)."
)
"""Advice at the end of every message about a model or an option that cannot be decoded speculatively."""


class RollbackLayer(DynamicLayer):
    """Keys and values of one attention layer, in a buffer with spare room: a forward pass appends without copying.

    The buffer keeps all tokens, also where the layer attends to a window of them; there the mask leaves out the rest.
    """

    def __init__(self, is_sliding: bool = False) -> None:
        super().__init__()
        self.is_sliding = is_sliding
        self.length = 0
        self.key_buffer: Tensor | None = None
        self.value_buffer: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, H, S, d) of the newest tokens, and return those of all tokens."""
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
        """Count the slots in use."""
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
    """Write `states` into the buffer from slot `start` on, and let it grow where it is full."""
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
    """The cache of a model's layers, for rows that accept different numbers of tokens.

    All rows append to the same slots. Where a row rejects a token, its attention mask leaves out the slot.
    `trim` frees slots that no row uses, `select` moves the slots in use together.
    """

    @property
    def is_windowed(self) -> bool:
        """Whether some layers attend to a window of slots, in which slots that a row does not use would count."""
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
    """Make an empty cache that takes tokens back row by row, in place of the one that `generate` prepared.

    Args:
        cache: Cache that `generate` prepared for the model.
        layer_types: `layer_types` of the model's config, where it has them.

    Raises:
        ValueError: If that cache or one of its layers is of a kind that cannot take tokens back row by row, or if it
            holds tokens already, since the caller of `generate` passed it.
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
    """Find the order in which the slots in use of every row stand together on the right.

    A row `1 0 1 1 0` beside one with three slots in use gives the slots `0 2 3` and the mask `1 1 1`; a row
    `0 1 1 0 0` gives `4 1 2` and `0 1 1`.

    Args:
        mask: Slots in use (A, L).

    Returns:
        Slots (A, L') and the mask after the move (A, L'); L' is the largest number in use in any row.
    """
    width = int(mask.sum(1).max())
    # A stable sort by "in use" moves the free slots to the left and keeps the order of the others.
    slots = mask.sort(dim=1, stable=True).indices[:, -width:]
    return slots, torch.gather(mask, 1, slots)
