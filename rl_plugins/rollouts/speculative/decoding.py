"""The loop of speculative decoding: draft, verify, keep what each row accepts."""

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from transformers import GenerationConfig

from rl_plugins.nn.attachment import base_model_of, trunk_of
from rl_plugins.nn.cache_name import cache_name
from rl_plugins.nn.sharding import gathers_in_forward
from rl_plugins.rollouts.speculative.cache import TURN_OFF, kept_slots, rollback_cache
from rl_plugins.rollouts.speculative.draft_length import DraftLength
from rl_plugins.rollouts.speculative.draft_statistics import DraftStatistics, SpeculativeOutput
from rl_plugins.rollouts.speculative.drafters import Drafter, Verified
from rl_plugins.rollouts.speculative.score_processing import ScoreProcessor
from rl_plugins.rollouts.speculative.stopping import Stopping
from rl_plugins.rollouts.speculative.verification import Drafts, Verdict, verify
from rl_plugins.rollouts.values import ValueRecord

SPARE_SHARE = 0.25
"""Share of the cache's slots that not even the longest row needs, above which they are given up."""

ENDED_SHARE = 0.25
"""Share of the rows that have ended, from which on they leave the batch."""


POSITIONS_FROM_MASK = ("bloom",)
"""Models that take no positions, and count the tokens that the attention mask leaves."""


def check_positions(model: Any) -> None:
    """See that rejected tokens in a model's cache do not move those behind them.

    Raises:
        ValueError: If they do.
    """
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    if not takes_positions and model.config.model_type not in POSITIONS_FROM_MASK:
        raise ValueError(
            f"{type(model).__name__} takes no position_ids and counts the slots of its cache, among which are "
            f"rejected tokens. {TURN_OFF}"
        )


@contextmanager
def trunk_states(model: nn.Module) -> Iterator[list[Tensor]]:
    """The trunk's last hidden states (B, S, D) of the newest forward pass, as the only entry of a list."""
    newest: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        newest[:] = [output[0] if isinstance(output, tuple) else output.last_hidden_state]

    handle = trunk_of(base_model_of(model)).register_forward_hook(hook)
    try:
        yield newest
    finally:
        handle.remove()


class Decoding:
    """One call of `generate`: a batch of prompts on its way to completions.

    A is the number of rows that are still in the batch, S the tokens per row of a forward pass, L the slots of the
    cache.

    Args:
        model: The model.
        drafter: Drafts.
        draft_length: Says how many.
        input_ids: Prompts (B, P), padded on the left.
        processor: Logits processors.
        stopping: When a row ends.
        config: Options of `generate`.
        recorder: Takes the state of every token.
        model_kwargs: What `generate` prepared for the model's forward: attention mask, positions, cache.

    Raises:
        ValueError: If the cache cannot take tokens back row by row, or the model does not take positions; while
            running, if the heads do not see hidden states, or there is no token to sample.
    """

    def __init__(
        self,
        model: Any,
        drafter: Drafter,
        draft_length: DraftLength,
        input_ids: Tensor,
        processor: ScoreProcessor,
        stopping: Stopping,
        config: GenerationConfig,
        recorder: ValueRecord | None,
        model_kwargs: dict[str, Any],
    ) -> None:
        self.model, self.drafter, self.draft_length = model, drafter, draft_length
        self.processor, self.stopping, self.config, self.recorder = processor, stopping, config, recorder
        self.kwargs = dict(model_kwargs)
        self.cache = rollback_cache(
            self.kwargs.pop(cache_name(), None), getattr(model.config.get_text_config(), "layer_types", None)
        )
        # Where every forward gathers from all ranks (ZeRO-3, FSDP2), all of them take the same steps.
        self.synced = distributed.is_initialized() and gathers_in_forward(model)
        (batch, self.prompt_length), device = input_ids.shape, input_ids.device
        spare = drafter.max_drafts + 1  # what is behind a rejected draft is written, too
        new_tokens = max(stopping.max_length - self.prompt_length, 1)
        self.ids = torch.cat([input_ids, input_ids.new_zeros(batch, new_tokens + spare)], dim=1)
        self.log_probs = torch.zeros(batch, new_tokens + spare, device=device)
        self.lengths = torch.full((batch,), self.prompt_length, device=device)
        self.ended = torch.zeros(batch, dtype=torch.bool, device=device)
        self.going = batch  # rows that have not ended: known here, so that asking does not wait for the device
        mask = self.kwargs.pop("attention_mask", None)
        self.has_holes = mask is not None
        # Of the rows that are still in the batch: which they are (A,), and the slots of the cache in use (A, L).
        self.index = torch.arange(batch, device=device)
        self.mask = torch.ones_like(input_ids) if mask is None else mask.long()
        check_positions(model)
        self.positions: Tensor | None = self.kwargs.pop("position_ids", None)
        if self.positions is not None:  # a caller may have passed one row for all
            self.positions = self.positions.expand(*self.positions.shape[:-2], batch, -1)
        self.statistics = DraftStatistics(num_drafts=drafter.max_drafts)
        if recorder is not None:
            recorder.reset()

    @torch.no_grad()
    def run(self, listener: Callable[[int], None] | None = None) -> SpeculativeOutput:
        """Complete all rows.

        Args:
            listener: Called with the number of tokens of the longest completion after each step.
        """
        with trunk_states(self.model) as states:
            self._prefill(states)
            while (num_drafts := self._plan(listener)) is not None:
                self._step(num_drafts, states)
        return self._output()

    # The model

    def _forward(self, tokens: Tensor, positions: Tensor | None, **kwargs: Any) -> Tensor:
        """Logits (A, S, V) of tokens (A, S) that follow what is in the cache; `mask` covers them already."""
        inputs = self.model.prepare_inputs_for_generation(
            tokens,
            attention_mask=self.mask if self.has_holes else None,
            **{cache_name(): self.cache},
            **({} if positions is None else {"position_ids": positions}),
            **{**self.kwargs, **kwargs},
        )
        return self.model(**inputs, return_dict=True).logits

    def _prefill(self, states: list[Tensor]) -> None:
        tokens = self.ids[:, : self.prompt_length]
        logits = self._forward(tokens, self.positions, is_first_iteration=True)
        if not states:
            raise ValueError(
                f"{type(self.model).__name__} does not run its trunk ({type(trunk_of(self.model)).__name__}) as a "
                f"whole, so its heads do not see hidden states. {TURN_OFF}"
            )
        hidden = states[0]
        self._settle(logits[:, -1:], hidden[:, -1:], self._drafts())
        self.going = int((~self.ended).sum())
        self._show(hidden, tokens, self.positions, self.mask.bool())

    def _step(self, num_drafts: int, states: list[Tensor]) -> None:
        """Draft, verify, and keep what each row accepts."""
        started = time.perf_counter()
        drafts = self._drafts()
        if num_drafts:
            self.drafter.propose(num_drafts, drafts.choose)
        self._tidy(drafts)
        alive, lengths, slots = ~self._own(self.ended), self._own(self.lengths), num_drafts + 1
        tokens, offset = self.ids[self.index, lengths - 1].unsqueeze(1), torch.arange(slots, device=self.ids.device)
        if num_drafts:
            tokens = torch.cat([tokens, drafts.tokens], dim=1)
            self.ids[self.index[:, None], lengths[:, None] + offset[:-1]] = drafts.tokens
        positions = None
        if self.positions is not None:
            # Where a row ends before its drafts do, they stay within the positions that the model has.
            ahead = lengths[:, None] - self.prompt_length + offset
            limit = self.stopping.max_length - self.prompt_length - 1
            positions = self._own(self.positions[..., -1:], dim=-2) + ahead.clamp(max=limit)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), slots)], dim=1)
        keep = {"logits_to_keep": slots} if "logits_to_keep" in self.kwargs else {}
        logits = self._forward(tokens, positions, **keep)
        verdict, new = self._settle(logits[:, -slots:], states[0], drafts)
        # What of the pass goes on, in the rows that do.
        most, least = self._record(verdict, new, alive, started)
        valid = offset[:most] <= verdict.num_accepted[:, None]
        if most < slots:
            self.cache.trim(slots - most)
        if least < slots:
            self.mask = torch.cat([self.mask[:, :-slots], valid.long()], dim=1)
        self.has_holes |= least < most
        positions = positions if positions is None else positions[..., :most]
        self._show(states[0][:, :most], tokens[:, :most], positions, valid)

    def _settle(self, logits: Tensor, hidden: Tensor, drafts: Drafts) -> tuple[Verdict, Tensor]:
        """Write down the tokens that the logits (A, S, V) lead to; returns the verdict and how many are new (A,)."""
        index, lengths = self.index, self._own(self.lengths)
        alive, slots = ~self._own(self.ended), logits.shape[1]
        columns = lengths[:, None] + torch.arange(slots, device=index.device)
        scores = self.processor(logits.to(torch.float32, copy=True), self._own(self.ids), lengths, index)
        verdict = verify(scores, drafts)
        self.ids[index[:, None], columns] = verdict.tokens
        self.log_probs[index[:, None], columns - self.prompt_length] = verdict.log_probs
        new, ended = self.stopping.cut(self._own(self.ids), lengths, verdict.num_accepted + 1, slots)
        new = new * alive
        if self.recorder is not None:
            real = torch.arange(slots, device=index.device) < new[:, None]
            self.recorder.add(hidden, (columns - self.prompt_length).masked_fill(~real, -1), index)
        # New tensors, since those of the step before may be these very ones.
        self.lengths = self.lengths.index_put((index,), lengths + new)
        self.ended = self.ended.index_put((index,), self._own(self.ended) | ended)
        return verdict, new

    def _show(self, hidden: Tensor, tokens: Tensor, positions: Tensor | None, valid: Tensor) -> None:
        pending = self.ids[self.index, self._own(self.lengths) - 1]
        self.drafter.observe(Verified(hidden, tokens, positions, valid, self.mask, pending))

    # How many drafts

    def _drafts(self) -> Drafts:
        ids, lengths = self._own(self.ids), self._own(self.lengths)
        return Drafts(self.processor, ids, lengths, self.index, bool(self.config.do_sample))

    def _own(self, x: Tensor, dim: int = 0) -> Tensor:
        """Entries of a tensor of the whole batch for the rows that are still in it; itself where all are."""
        return x if len(self.index) == x.shape[dim] else x.index_select(dim, self.index)

    def _plan(self, listener: Callable[[int], None] | None) -> int | None:
        """How many drafts the next step makes; `None` when all rows of all ranks have ended."""
        if listener is not None:
            listener(int(self.lengths.max()) - self.prompt_length)
        num_drafts = self.draft_length.choose(len(self.index)) if self.going else 0
        if num_drafts:
            # The last token of a row is never a draft's.
            shortest = int(self.lengths.masked_fill(self.ended, self.stopping.max_length).min())
            num_drafts = min(num_drafts, self.stopping.max_length - shortest - 1)
        if not self.synced:
            return num_drafts if self.going else None
        plan = torch.tensor([self.going, num_drafts], device=self.ids.device)
        distributed.all_reduce(plan, op=distributed.ReduceOp.MAX)
        going, num_drafts = plan.tolist()
        return num_drafts if going else None

    def _record(self, verdict: Verdict, new: Tensor, alive: Tensor, started: float) -> tuple[int, int]:
        """Count what became of the drafts; returns the largest and the smallest number of slots that a row keeps."""
        before, kept, slots = self.going, verdict.num_accepted + 1, verdict.tokens.shape[1]
        sums = [(~self.ended).sum()]
        if slots > 1:  # without drafts every row gets one token and keeps one slot
            place = torch.arange(slots - 1, device=new.device)
            reached = place < new[:, None]  # not those behind the end of a row
            accepted = (place < verdict.num_accepted[:, None]) & reached
            ends = (kept.masked_fill(~alive, 1).max(), kept.masked_fill(~alive, slots).min())
            sums += [new.sum(), *ends, *reached.sum(0), *accepted.sum(0), *(verdict.passing * reached).sum(0)]
        # One transfer from the device, which waits for the step: only now is its time known.
        going, *numbers = torch.stack(sums).tolist()
        seconds, self.going = time.perf_counter() - started, int(going)
        tokens, most, least, *places = numbers or [before, 1, 1]
        reached_sums, accepted_sums, passed_sums = (places[i * (slots - 1) : (i + 1) * (slots - 1)] for i in range(3))
        self.statistics.add(before, int(tokens), reached_sums, accepted_sums)
        self.draft_length.record(len(alive), passed_sums, reached_sums, seconds)
        return int(most), int(least)

    # The batch

    def _tidy(self, drafts: Drafts) -> None:
        """Let rows go that have ended, and move the slots in use together, where either pays.

        After the drafts of a step, since a drafter has then taken in all slots.
        """
        num_ended = 0 if self.synced else len(self.index) - self.going
        leaving = num_ended >= max(ENDED_SHARE * len(self.index), 1)
        # Without drafts the drafter would run now, on this rank alone.
        waiting = self.synced and not drafts.tokens.shape[1] and not self.cache.is_windowed
        if waiting or not (leaving or self.has_holes):
            return
        ended = self.ended[self.index]
        slots = self.mask.shape[1]
        spare = slots - int(self.mask.masked_fill(ended[:, None], 0).sum(1).max())
        if leaving or spare > SPARE_SHARE * slots or self.cache.is_windowed:
            rows = torch.nonzero(~ended).squeeze(1) if leaving else torch.arange(len(ended), device=ended.device)
            chosen, self.mask = kept_slots(self.mask[rows])
            self.has_holes = not bool(self.mask.all())
            if leaving:  # else the same tensor: a recorder runs the heads when rows change, on all ranks or on none
                self.index = self.index[rows]
            self.cache.select(rows, chosen)
            self.drafter.select(rows, chosen)
            drafts.select(rows)

    def _output(self) -> SpeculativeOutput:
        end = int(self.lengths.max())
        column = torch.arange(end, device=self.ids.device)
        behind = column >= self.lengths[:, None]
        pad = self.config.pad_token_id
        if pad is None:  # as generate does it
            pad = 0 if self.stopping.eos is None else int(self.stopping.eos[0])
        num_tokens = end - self.prompt_length
        log_probs = self.log_probs[:, :num_tokens].masked_fill(behind[:, self.prompt_length :], 0.0)
        if self.config.do_sample and not bool(log_probs.isfinite().all()):
            raise ValueError(
                "There was no token to sample: the model's logits were NaN, or the logits processors left none."
            )
        saved = None if self.recorder is None else self.recorder.finish(num_tokens)
        return SpeculativeOutput(
            sequences=self.ids[:, :end].masked_fill(behind, pad),
            log_probs=log_probs,
            values=None if saved is None else saved[0],
            target_values=None if saved is None else saved[1],
            statistics=self.statistics,
        )
