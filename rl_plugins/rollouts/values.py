"""Values of the states of a completion: saved while it is generated, or from one pass afterwards."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, StoppingCriteria, StoppingCriteriaList

from rl_plugins.functional.alignment import completion_states
from rl_plugins.nn.attachment import base_model_of
from rl_plugins.nn.mtp_heads import MTPHeads
from rl_plugins.nn.sharding import whole_module
from rl_plugins.nn.target_heads import PolyakTarget


class ValueRecorder:
    """Saves the values of all heads while a model generates, so the critic needs no forward of its own.

    The state `h_t` that predicts `y_t` is in reach when `y_t` is chosen. States wait until `flush_every` forward
    passes share one run of the heads, which keeps the cost per token low without keeping all hidden states.

    Inside [`following`] it listens to the model's own `generate`, and keeps account: each time a token is chosen, all
    tokens before it must have gone through the model, each once, and all rows must still be there. Decoding methods
    of which that is not true (beams, drafts that are verified several at a time) make the record unusable.
    Speculative decoding, which settles several tokens in one pass, calls `record`.

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
        self._passes: list[tuple[int, int]] = []  # rows and width of those since a token was last chosen
        self._prompt_length = self._length = self._cached = 0
        self._sequences: Tensor | None = None
        self.usable = True

    # The model's own `generate`

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Record what the model's `generate` does inside the block, if it is that of transformers.

        Args:
            model: Causal LM with the heads attached, or a PEFT model around one.
        """
        base: Any = base_model_of(model)
        if type(base).generate is not GenerationMixin.generate or "generate" in vars(base):
            # Passes of another `generate` may be anything. FSDP2 puts a wrapper there, too, and values then come from
            # a pass.
            yield
            return
        base.generate = partial(self._generate, base.generate)
        try:
            with self.heads.watching(self):
                yield
        finally:
            del base.generate

    def _generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        nested = self._length > 0  # drafts of the model's own first layers
        if nested or ids is None or len(args) > 3 or kwargs.get("custom_generate") is not None:
            self.usable = False
            return generate(*args, **kwargs)
        self._num_rows, self._prompt_length = ids.shape
        self._length = self._prompt_length
        criteria = [*(kwargs.pop("stopping_criteria", None) or []), _TokenChosen(self)]
        output = generate(*args, **kwargs, stopping_criteria=StoppingCriteriaList(criteria))
        self._passes = []
        self._sequences = output if isinstance(output, Tensor) else output.sequences
        return output

    def __call__(self, hidden: Tensor) -> None:
        """Take the hidden states (B, S, D) of one forward pass.

        Every pass leaves a state, also one after which no token is chosen: under ZeRO-3 all ranks run the heads at
        once, and ranks that have ended go on with idle passes. A full store is emptied by the next pass, so that
        something is left for the last run on every rank.
        """
        rows, width = hidden.shape[:2]
        self._passes.append((rows, width))
        if rows != self._num_rows:
            return
        if self._rows is None:
            self._rows = torch.arange(rows, device=hidden.device)
        if len(self._states) == self.flush_every:
            self._flush()
        self._states.append(hidden[:, -1:].detach())
        self._steps.append(self._rows.new_full((rows, 1), -1))

    def _choose(self, rows: int, length: int) -> None:
        """Keep the state that the newest token was chosen from, if the account is right.

        Args:
            rows: Sequences that there are.
            length: Tokens of each, the newest one included.
        """
        passes, self._passes = self._passes, []
        widths = [width for _, width in passes]
        before = length - 1
        self.usable &= rows == self._num_rows and all(found == rows for found, _ in passes)
        self.usable &= before == self._length
        # With a cache all that is new, in one pass or in chunks; without one everything.
        self.usable &= bool(widths) and (sum(widths) == before - self._cached or widths == [before])
        self._length, self._cached = length, before
        if self.usable:
            self._steps[-1] = torch.full_like(self._steps[-1], before - self._prompt_length)

    def made(self, completion_ids: Tensor, mask: Tensor) -> bool:
        """Whether these are the completions that the followed `generate` returned.

        Args:
            completion_ids: Completions (B, T).
            mask: 1 for their real tokens (B, T).
        """
        if self._sequences is None:
            return False
        ours = self._sequences[:, self._prompt_length :].to(completion_ids.device)
        width = min(ours.shape[1], completion_ids.shape[1])
        if len(ours) != len(completion_ids) or mask[:, width:].any():
            return False
        return bool(((ours[:, :width] == completion_ids[:, :width]) | (mask[:, :width] == 0)).all())

    # States from anywhere

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
        if not self.usable or not any(bool((steps >= 0).any()) for _, _, steps, _ in self._chunks):
            return None
        first = self._chunks[0][0]
        both = first.new_zeros(2, self._num_rows, num_tokens + 1, first.shape[-1])
        for online, target, steps, rows in self._chunks:
            # What is no token of the completion goes into a column of its own.
            column = torch.where((steps >= 0) & (steps < num_tokens), steps, num_tokens)
            both[0, rows[:, None], column] = online
            both[1, rows[:, None], column] = target
        return both[0, :, :num_tokens], both[1, :, :num_tokens]


class _TokenChosen(StoppingCriteria):
    """Stops nothing, and tells a recorder that a token has been chosen."""

    def __init__(self, recorder: ValueRecorder) -> None:
        self.recorder = recorder

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.recorder._choose(*input_ids.shape)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


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
    heads = MTPHeads.of(model)
    if heads is None:
        raise ValueError("The model has no MTP heads; attach_mtp_heads(model) or load_mtp_heads(model, path) first.")
    values = []
    for prompt, completion in zip(prompt_ids, completion_ids, strict=True):
        record = ValuePass(heads, None, len(completion))
        ids = torch.tensor([[*prompt, *completion]], device=base_model_of(model).device)
        with heads.watching(record):
            model(input_ids=ids, use_cache=False)
        values.append(record.finish(1)[0][0].cpu())
    return values
