"""Values of the states of completions: saved while they are generated, or from one pass afterwards."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, StoppingCriteria, StoppingCriteriaList

from rl_plugins.functional.alignment import completion_states, value_after
from rl_plugins.nn.attachment import Attachment, TrunkInputs, base_model_of
from rl_plugins.nn.mtp_heads import MTPHeads
from rl_plugins.nn.sequential_heads import SequentialHeads
from rl_plugins.nn.sharding import whole_module
from rl_plugins.rollouts.kept_states import KeptStates

ToValues = Callable[[Tensor], Tensor]
"""Values (B, S, K), float32, of states (B, S, ...)."""


class ValueRecord:
    """Records values of the states of completions, as the states come.

    Call [`add`] with hidden states, or let [`EachStep`] or [`WholeRows`] do so. States wait until
    `flush_every` calls share one run of the module, which keeps the cost per token low without keeping all hidden
    states.

    Args:
        module: Makes values of states: MTP heads, any other [`~rl_plugins.nn.Attachment`] that does, or a function.
            The states are what [`~rl_plugins.nn.Attachment.states`] says: hidden states, or features of sequential
            heads.
        target: Slow copy of the module, run on the same states; `None` records the online values twice.
        flush_every: Calls of `add` per run of the module.
        kept: Takes the states as well, for later use.
        online: Whether the module judges the states, too, and not the slow copy alone.

    Attributes:
        complete: Whether no state was missed, as far as the caller of [`add`] knows.
    """

    def __init__(
        self,
        module: ToValues,
        target: ToValues | None = None,
        *,
        flush_every: int = 64,
        kept: KeptStates | None = None,
        online: bool = True,
    ) -> None:
        self.module, self.target, self.flush_every, self.kept = module, target, flush_every, kept
        self.online = online
        self.reset()

    def reset(self) -> None:
        """Forget what was recorded, and begin with other completions."""
        self._states: list[Tensor] = []
        self._steps: list[Tensor] = []
        self._rows: Tensor | None = None
        self._chunks: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self.complete = True
        if self.kept is not None:
            self.kept.reset()

    def add(self, hidden: Tensor, steps: Tensor, rows: Tensor) -> None:
        """Add states. The module runs here, in [`flush`] and in [`finish`], without gradient.

        Args:
            hidden: States (A, S, ...).
            steps: Index t for which each state is the `h_t` of its completion (A, S); below 0 for none.
            rows: Rows of the batch that they belong to (A,). Give the tensor of the last call again if the rows are
                unchanged.
        """
        if rows is not self._rows:
            self.flush()
            self._rows = rows
        self._states.append(hidden.detach())
        self._steps.append(steps)
        if len(self._states) == self.flush_every:
            self.flush()

    @torch.no_grad()
    def flush(self) -> None:
        """Run the module on the states that wait."""
        if not self._states:
            return
        assert self._rows is not None
        states, steps = torch.cat(self._states, dim=1), torch.cat(self._steps, dim=1)
        self._states, self._steps = [], []
        target = run_alone(self.module, states) if self.target is None else self.target(states)
        both = self.online and self.target is not None
        online = run_alone(self.module, states) if both else target
        self._chunks.append((online, target, steps, self._rows))
        if self.kept is not None:
            self.kept.add(states, steps, self._rows)

    def finish(self, num_tokens: int) -> tuple[Tensor, Tensor] | None:
        """Return online and target values (B, num_tokens, K), zero where no state was recorded; `None` if states
        were missed, or none came.

        Args:
            num_tokens: T, length of the padded completions. They may be padded further than what was generated, or
                cut shorter than the steps that idle ranks ran.
        """
        self.flush()
        if not self.complete or not any(bool((steps >= 0).any()) for _, _, steps, _ in self._chunks):
            return None
        first, num_rows = self._chunks[0][0], 1 + int(torch.cat([rows for *_, rows in self._chunks]).max())
        both = first.new_zeros(2, num_rows, num_tokens + 1, first.shape[-1])
        for online, target, steps, rows in self._chunks:
            # States for no token of the completion go into a column of their own.
            column = torch.where((steps >= 0) & (steps < num_tokens), steps, num_tokens)
            both[0, rows[:, None], column] = online
            both[1, rows[:, None], column] = target
        return both[0, :, :num_tokens], both[1, :, :num_tokens]


def run_alone(module: ToValues, states: Tensor) -> Tensor:
    """Make values of states, also outside of the forward of the model that shards the module."""
    path = module.value_path if isinstance(module, MTPHeads) else module
    with whole_module(path, states.dtype) if isinstance(path, nn.Module) else nullcontext():
        return path(states)


class EachStep:
    """Feeds a record from the forward passes of the model's own `generate`, so the critic needs no forward of its own.

    The state `h_t` that predicts `y_t` is available when `y_t` is chosen. Inside [`following`] the observer checks
    this: each time a token is chosen, all tokens before it must have gone through the model exactly once, and all rows
    must still be there. Decoding methods that work otherwise (beam search, drafts that are verified several at a time)
    make the record unusable. Our speculative decoding, which settles several tokens in one pass, feeds a record by
    itself.

    Sequential heads read whole rows. Passes of the model wait until `record.flush_every` of them share one run of the
    heads, whose keys and values stay in a cache of their own.

    Args:
        record: Takes the states.
    """

    def __init__(self, record: ValueRecord) -> None:
        self.record = record
        self._rows_in_pieces = _RowsInPieces(record.module) if isinstance(record.module, SequentialHeads) else None
        # The newest state waits for the next pass, since only then it is known whether a token was chosen from it.
        self._newest: tuple[Tensor, int] | None = None
        self._rows: Tensor | None = None
        self._num_rows = 0
        self._passes: list[tuple[int, int]] = []  # rows and width of those since a token was last chosen
        self._prompt_length = self._length = self._cached = 0
        self._sequences: Tensor | None = None

    @property
    def usable(self) -> bool:
        """Whether the record has the state of every token so far."""
        return self.record.complete

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Record the states of the model's `generate` inside the block, if this method is that of transformers.

        Args:
            model: Causal LM with the record's module attached, or a PEFT model around one.

        Raises:
            TypeError: If the record's module is no attachment, so that it cannot watch forward passes.
        """
        module = self.record.module
        if not isinstance(module, Attachment):
            raise TypeError(f"Steps of generate are seen through an Attachment, got {type(module).__name__}.")
        base: Any = base_model_of(model)
        if type(base).generate is not GenerationMixin.generate or "generate" in vars(base):
            # Another `generate` may run any passes. FSDP2 puts a wrapper there, too. Values then come from a pass that
            # follows.
            yield
            return
        base.generate = partial(self._generate, base.generate)
        try:
            with module.watching(self):
                yield
        finally:
            del base.generate

    def _generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        nested = self._length > 0  # the model's own first layers draft
        if nested or ids is None or len(args) > 3 or kwargs.get("custom_generate") is not None:
            self.record.complete = False
            return generate(*args, **kwargs)
        self._num_rows, self._prompt_length = ids.shape
        self._length = self._prompt_length
        criteria = [*(kwargs.pop("stopping_criteria", None) or []), _TokenChosen(self)]
        output = generate(*args, **kwargs, stopping_criteria=StoppingCriteriaList(criteria))
        self._hand_over()
        if self._rows_in_pieces is not None:
            self._read_on()
        self._passes = []
        self._sequences = output if isinstance(output, Tensor) else output.sequences
        return output

    def __call__(self, hidden: Tensor) -> None:
        """Take the hidden states (B, S, D) of one forward pass.

        Every pass leaves a state, also one after which no token is chosen: under ZeRO-3 all ranks run the heads at
        once, and ranks that have ended go on with idle passes. The state is handed over by the next pass, so that
        every rank has something left for the last run of the heads.
        """
        rows, width = hidden.shape[:2]
        self._passes.append((rows, width))
        if rows != self._num_rows:
            return
        self._hand_over()
        self._newest = hidden[:, -1:].detach(), -1
        if self._rows_in_pieces is not None:
            assert isinstance(self.record.module, SequentialHeads)
            # Before the pass is stored, so that something is left for the last run.
            if len(self._rows_in_pieces) >= self.record.flush_every:
                self._read_on()
            self.record.complete &= self._rows_in_pieces.add(hidden.detach(), self.record.module.inputs)

    def _hand_over(self) -> None:
        if self._newest is None:
            return
        (state, step), self._newest = self._newest, None
        if self._rows is None:
            self._rows = torch.arange(len(state), device=state.device)
        if self._rows_in_pieces is not None:
            self._rows_in_pieces.steps.append(step)
            return
        self.record.add(state, self._rows.new_full((len(state), 1), step), self._rows)

    def _read_on(self) -> None:
        """Run sequential heads on the passes that wait, and hand over the states that tokens were chosen in."""
        if not self.record.complete or self._rows is None:
            return
        assert self._rows_in_pieces is not None
        features, steps = self._rows_in_pieces.read()
        self.record.add(features, torch.tensor(steps, device=features.device).expand(len(features), -1), self._rows)
        self.record.flush()

    def _choose(self, rows: int, length: int) -> None:
        """Keep the state that the newest token was chosen from, and check that none was missed.

        Args:
            rows: Number of sequences.
            length: Tokens of each, the newest one included.
        """
        passes, self._passes = self._passes, []
        widths = [width for _, width in passes]
        before = length - 1
        right = rows == self._num_rows and all(found == rows for found, _ in passes) and before == self._length
        # With a cache all new tokens, in one pass or in chunks; without a cache all tokens.
        right &= bool(widths) and (sum(widths) == before - self._cached or widths == [before])
        self.record.complete &= right
        self._length, self._cached = length, before
        if self.usable:
            assert self._newest is not None
            self._newest = self._newest[0], before - self._prompt_length

    def made(self, completion_ids: Tensor, mask: Tensor) -> bool:
        """Tell whether the record holds the values of exactly these completions, and of all their tokens.

        Args:
            completion_ids: Completions (B, T).
            mask: 1 for their real tokens (B, T).
        """
        if self._sequences is None or not self.usable:
            return False
        ours = self._sequences[:, self._prompt_length :].to(completion_ids.device)
        width = min(ours.shape[1], completion_ids.shape[1])
        if len(ours) != len(completion_ids) or mask[:, width:].any():
            return False
        return bool(((ours[:, :width] == completion_ids[:, :width]) | (mask[:, :width] == 0)).all())


class _RowsInPieces:
    """Passes of `generate` over rows that grow, until sequential heads read them.

    Args:
        heads: The heads of the model.
    """

    def __init__(self, heads: SequentialHeads) -> None:
        self._stream = heads.stream()
        self.steps: list[int] = []  # step of the last state of each pass
        self._passes: list[tuple[Tensor, TrunkInputs]] = []
        self._width = 0  # of the rows so far

    def __len__(self) -> int:
        return len(self._passes)

    def add(self, hidden: Tensor, inputs: TrunkInputs | None) -> bool:
        """Add a pass, and return whether its rows can be read."""
        ids, mask, positions = inputs or TrunkInputs(None, None, None)
        if ids is None or ids.shape != hidden.shape[:2]:
            return False
        if self._width and ids.shape[1] > self._width:  # without a cache every pass brings whole rows
            new = slice(self._width, None)
            hidden, ids, positions = hidden[:, new], ids[:, new], None if positions is None else positions[..., new]
        self._width += ids.shape[1]
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != (len(ids), self._width)):
            return False
        self._passes.append((hidden, TrunkInputs(ids, mask, positions)))
        return True

    def read(self) -> tuple[Tensor, list[int]]:
        """Compute features (B, N, K, D) of the last state of each of the N passes that waited, and their steps."""
        passes, steps = self._passes[: len(self.steps)], self.steps
        self._passes, self.steps = self._passes[len(steps) :], []
        hidden = torch.cat([states for states, _ in passes], dim=1)
        ids = torch.cat([cast(Tensor, given.input_ids) for _, given in passes], dim=1)
        positions = [given.position_ids for _, given in passes if given.position_ids is not None]
        features = self._stream(
            hidden,
            ids,
            passes[-1][1].attention_mask,
            torch.cat([x.expand(*x.shape[:-2], len(ids), -1) for x in positions], dim=-1) if positions else None,
        )
        last = torch.tensor([states.shape[1] for states, _ in passes], device=hidden.device).cumsum(0) - 1
        return features[:, last], steps


class _TokenChosen(StoppingCriteria):
    """Stops nothing, but tells an observer that a token has been chosen."""

    def __init__(self, observer: EachStep) -> None:
        self.observer = observer

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.observer._choose(*input_ids.shape)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class WholeRows:
    """Feeds a record from forward passes over whole sequences, chunk by chunk of their rows.

    Each chunk's values are computed inside its forward pass. Rows are counted in the order in which they come, so
    the first rows of the record are those of the first pass.

    Args:
        record: Takes the states. A value model gives its observers values in place of states. Then let the module of
            the record add the last dimension to them: `ValueRecord(lambda values: values.unsqueeze(-1))`.
        num_tokens: T, completion length; the sequences hold prompt + completion.
    """

    def __init__(self, record: ValueRecord, num_tokens: int) -> None:
        self.record, self.num_tokens, self._num_rows = record, num_tokens, 0
        self._ends: list[Tensor] = []  # states after the last column, from which a cut episode would go on

    def __call__(self, hidden: Tensor) -> None:
        """Take the completion's states from the hidden states (B, P+T, D) of one chunk of rows."""
        module = self.record.module
        if isinstance(module, Attachment):
            hidden = module.states(hidden)
        states = completion_states(hidden, self.num_tokens)
        rows = torch.arange(self._num_rows, self._num_rows + len(states), device=states.device)
        self._num_rows += len(states)
        self.record.add(states, torch.arange(self.num_tokens, device=states.device).expand(len(states), -1), rows)
        self.record.flush()
        self._ends.append(hidden[:, -1:].detach())

    def finish(self) -> tuple[Tensor, Tensor] | None:
        """Return online and target values (B, T, K); `None` if no pass was seen."""
        return self.record.finish(self.num_tokens)

    @torch.no_grad()
    def after(self, target_values: Tensor, completion_mask: Tensor) -> Tensor:
        """Return target values (B,) of the state after each completion's last token, the state of the next column.

        Args:
            target_values: Target values of `record.finish` (B, T, K).
            completion_mask: 1 for the tokens of a completion, an environment's included (B, T).
        """
        states = torch.cat(self._ends)
        module = self.record.module if self.record.target is None else self.record.target
        beyond = run_alone(module, states)[..., 0].to(target_values.dtype)  # (B, 1)
        return value_after(torch.cat([target_values[..., 0], beyond], dim=1), completion_mask)


@torch.no_grad()
def completion_values(
    model: nn.Module, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Compute the values of every state of given completions, for reports and notebooks.

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
        raise ValueError(
            "The model has no MTP heads. Call attach_mtp_heads(model) or load_mtp_heads(model, path) first."
        )
    values = []
    for prompt, completion in zip(prompt_ids, completion_ids, strict=True):
        record = ValueRecord(heads)
        ids = torch.tensor([[*prompt, *completion]], device=base_model_of(model).device)
        with heads.watching(WholeRows(record, len(completion))):
            model(input_ids=ids, use_cache=False)
        recorded = record.finish(len(completion))
        values.append(torch.zeros(0, heads.config.num_heads) if recorded is None else recorded[0][0].cpu())
    return values
