"""Values of the states of a completion: saved while it is generated, or from one pass afterwards."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rl_plugins.functional.mtp import completion_states
from rl_plugins.modules.attach import base_model_of, get_mtp_heads
from rl_plugins.modules.heads import MTPHeads
from rl_plugins.modules.polyak import PolyakTarget


class ValueRecorder:
    """Tap that saves the values of all heads while `generate` runs, so the critic needs no forward of its own.

    Decoding step t runs the trunk on `h_t`, the state that predicts `y_t` (the seed's 10.1.3 A: "we save these
    internal value estimates into a buffer"). States wait until `flush_every` of them share one run of the heads, which
    keeps the cost per token low without keeping all hidden states.

    Args:
        heads: Online heads.
        target: Slow heads, recorded beside the online ones; `None` records the online values twice.
        flush_every: States per run of the heads.
    """

    def __init__(self, heads: MTPHeads, target: PolyakTarget | None = None, *, flush_every: int = 64) -> None:
        self.heads, self.target, self.flush_every = heads, target, flush_every
        self._states: list[Tensor] = []
        self._chunks: list[tuple[Tensor, Tensor]] = []
        self._last_length = 0
        self.usable = True

    def __call__(self, hidden: Tensor) -> None:
        """Take the newest state from the hidden states (B, S, D) of one decoding step."""
        # With a cache every step after the first has length 1, without one it grows by 1. Anything else (chunked
        # prefill, assisted decoding) does not map steps to tokens.
        if self._last_length and hidden.shape[1] not in (1, self._last_length + 1):
            self.usable = False
        self._last_length = hidden.shape[1]
        self._states.append(hidden[:, -1].detach())
        if len(self._states) == self.flush_every:
            self._flush()

    @torch.no_grad()
    def _flush(self) -> None:
        if not self._states:
            return
        hidden = torch.stack(self._states, dim=1)  # (B, flush_every, D)
        self._states = []
        values = self.heads(hidden)
        self._chunks.append((values, values if self.target is None else self.target(hidden)))

    def finish(self, num_tokens: int) -> tuple[Tensor, Tensor] | None:
        """Online and target values (B, num_tokens, K), zero beyond the recorded steps; `None` if steps are missing.

        Args:
            num_tokens: T, length of the padded completions.
        """
        self._flush()
        if not self.usable or not self._chunks:
            return None
        online, target = (torch.cat(part, dim=1) for part in zip(*self._chunks, strict=True))
        return _fit(online, num_tokens), _fit(target, num_tokens)


def _fit(values: Tensor, num_tokens: int) -> Tensor:
    # Completions may be padded further (pad_to_multiple_of), or cut shorter than the steps that idle ranks ran.
    missing = num_tokens - values.shape[1]
    return values[:, :num_tokens] if missing <= 0 else nn.functional.pad(values, (0, 0, 0, missing))


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
