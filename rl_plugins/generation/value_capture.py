"""Values of the states of a completion: saved while it is generated, or from one pass afterwards."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rl_plugins.functional.mtp import completion_states
from rl_plugins.modules.attach import base_model_of, get_mtp_heads
from rl_plugins.modules.heads import MTPHeads
from rl_plugins.modules.polyak import PolyakTarget
from rl_plugins.modules.sharding import whole_module


class ValueRecorder:
    """Saves the values of all heads while a model generates, so the critic needs no forward of its own.

    The state `h_t` that predicts `y_t` is in reach when `y_t` is chosen (the seed's 10.1.3 A: "we save these internal
    value estimates into a buffer"). States wait until `flush_every` forward passes share one run of the heads, which
    keeps the cost per token low without keeping all hidden states.

    As a tap of the heads it follows the model's own `generate`, one token per forward pass; speculative decoding,
    which settles several, calls `record`.

    Args:
        heads: Online heads.
        target: Slow heads, recorded beside the online ones; `None` records the online values twice.
        flush_every: Forward passes per run of the heads.
    """

    def __init__(self, heads: MTPHeads, target: PolyakTarget | None = None, *, flush_every: int = 64) -> None:
        self.heads, self.target, self.flush_every = heads, target, flush_every
        self.reset()

    def reset(self) -> None:
        """Forget what was recorded, for the next call of `generate`."""
        self._states: list[Tensor] = []
        self._steps: list[Tensor] = []
        self._rows: Tensor | None = None
        self._num_rows = 0
        self._chunks: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._taps = 0
        self._last_length = 0
        self.usable = True

    def __call__(self, hidden: Tensor) -> None:
        """Take the newest state from the hidden states (B, S, D) of one decoding step."""
        # With a cache every step after the first has length 1, without one it grows by 1. Anything else (chunked
        # prefill, assisted decoding) does not map steps to tokens.
        if self._last_length and hidden.shape[1] not in (1, self._last_length + 1):
            self.usable = False
        self._last_length = hidden.shape[1]
        if self._rows is None:
            self._rows = torch.arange(len(hidden), device=hidden.device)
        self.record(hidden[:, -1:], self._rows.new_full((len(hidden), 1), self._taps), self._rows)
        self._taps += 1

    def record(self, hidden: Tensor, steps: Tensor, rows: Tensor) -> None:
        """Take states from one forward pass.

        Args:
            hidden: States (A, S, D).
            steps: For which token t of its completion each is the state `h_t` (A, S); below 0 for none.
            rows: Which rows of the batch they belong to (A,); the first call has all rows.
        """
        if rows is not self._rows:
            self._flush()
            self._rows = rows
        self._num_rows = max(self._num_rows, len(rows))
        self._states.append(hidden.detach())
        self._steps.append(steps)
        if len(self._states) == self.flush_every:
            self._flush()

    @torch.no_grad()
    def _flush(self) -> None:
        if not self._states:
            return
        assert self._rows is not None
        hidden, steps = torch.cat(self._states, dim=1), torch.cat(self._steps, dim=1)
        self._states, self._steps = [], []
        with whole_module(self.heads, hidden.dtype):  # the last flush is outside the model's forward
            values = self.heads(hidden)
        self._chunks.append((values, values if self.target is None else self.target(hidden), steps, self._rows))

    def finish(self, num_tokens: int) -> tuple[Tensor, Tensor] | None:
        """Online and target values (B, num_tokens, K), zero where no state was recorded; `None` if steps are missing.

        Args:
            num_tokens: T, length of the padded completions. They may be padded further than what was generated, or
                cut shorter than the steps that idle ranks ran.
        """
        self._flush()
        if not self.usable or not self._chunks:
            return None
        first = self._chunks[0][0]
        both = first.new_zeros(2, self._num_rows, num_tokens + 1, first.shape[-1])
        for online, target, steps, rows in self._chunks:
            # What is no token of the completion goes into a column of its own.
            column = torch.where((steps >= 0) & (steps < num_tokens), steps, num_tokens)
            both[0, rows[:, None], column] = online
            both[1, rows[:, None], column] = target
        return both[0, :, :num_tokens], both[1, :, :num_tokens]


class ValuePass:
    """Tap that saves the values of whole sequences, chunk by chunk, from no-grad forwards of the model.

    Args:
        heads: Online heads.
        target: Slow heads; `None` records the online values twice.
        num_tokens: T, completion length; the sequences hold prompt + completion.
    """

    def __init__(self, heads: MTPHeads, target: PolyakTarget | None, num_tokens: int) -> None:
        self.heads, self.target, self.num_tokens = heads, target, num_tokens
        self._chunks: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def __call__(self, hidden: Tensor) -> None:
        """Take the completion's states from the hidden states (B, P+T, D) of one chunk of rows."""
        states = completion_states(hidden, self.num_tokens)
        values = self.heads(states)
        self._chunks.append((values, values if self.target is None else self.target(states)))

    def finish(self, num_rows: int) -> tuple[Tensor, Tensor]:
        """Online and target values (num_rows, T, K) of the first `num_rows` rows seen."""
        online, target = (torch.cat(part)[:num_rows] for part in zip(*self._chunks, strict=True))
        return online, target


@torch.no_grad()
def completion_values(
    model: nn.Module, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Values of every state of given completions, for reports and notebooks.

    Args:
        model: Model with heads attached.
        prompt_ids: Token ids of B prompts, each at least one token long.
        completion_ids: Token ids of their completions.

    Returns:
        B tensors (T_b, K), float32.

    Raises:
        ValueError: If the model has no heads or a prompt is empty.
    """
    heads = get_mtp_heads(model)
    if heads is None:
        raise ValueError("The model has no MTP heads; attach_mtp_heads(model) or load_mtp_heads(model, path) first.")
    values = []
    for prompt, completion in zip(prompt_ids, completion_ids, strict=True):
        record = ValuePass(heads, None, len(completion))
        ids = torch.tensor([[*prompt, *completion]], device=base_model_of(model).device)
        with heads.tapped(record):
            model(input_ids=ids, use_cache=False)
        values.append(record.finish(1)[0][0].cpu())
    return values
