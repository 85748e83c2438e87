"""The loop of speculative decoding: draft, verify, keep what each row accepts.

Words:
    row: one prompt and its completion. Rows that are still in the batch are active; A counts them.
    settled: tokens of a row that are final: its prompt, and what was chosen since.
    pending: the newest settled token, the only one that has not gone through the model.
    draft: a token that heads propose after the pending one; k of them per row in one step.
    pass: one forward of the model over pending token and drafts, `S = k + 1` tokens per row.
    verdict: how many drafts a row accepts, and the token that the model chooses after them, the next pending one.
    slot: a place in the cache of keys and values. All rows append to the same slots; L counts them.
    hole: a slot of a row that holds padding or a rejected draft, and that the slot mask leaves out.
    trim: give up the newest slots, which are holes in all rows.
    compact: move the slots in use of every row together, over its holes, and drop rows that have ended.

One step of two rows with k = 3. Letters are tokens, `.` is padding, `#` a rejected draft:

            slots in use   pending   drafts       accepted      the model's choice
    row 0   a b c          d         e f g        e f           h
    row 1   . . c          x         y z w        none          u

    pass                   d e f g  and  x y z w  go into four new slots; their logits give the verdict
    row 0   a b c d e f g             mask  1 1 1 1 1 1 0     pending h
    row 1   . . c x # # #             mask  0 0 1 1 0 0 0     pending u
    trim                   the last slot, which no row keeps: four new slots, of which the most that a row keeps is 3
    row 0   a b c d e f               mask  1 1 1 1 1 1
    row 1   . . c x # #               mask  0 0 1 1 0 0
    compact                holes to the left; as soon as no row needs all slots, the leftmost are given up
    row 0   a b c d e f               mask  1 1 1 1 1 1
    row 1   . . # # c x               mask  0 0 0 0 1 1
"""

import inspect
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from transformers import GenerationConfig

from rl_plugins.nn.attachment import trunk_of
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
"""Share of the cache's slots that not even the longest row needs, above which the slots in use are moved together."""

ENDED_SHARE = 0.25
"""Share of the active rows that must have ended before they leave the batch."""

POSITIONS_FROM_MASK = ("bloom",)
"""Models that take no positions, and count the tokens that the attention mask leaves."""


def check_positions(model: Any) -> None:
    """Check that the model takes explicit positions, so that rejected tokens in the cache do not shift later ones.

    Raises:
        ValueError: If it counts the slots of its cache instead.
    """
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    if not takes_positions and model.config.model_type not in POSITIONS_FROM_MASK:
        raise ValueError(
            f"{type(model).__name__} takes no position_ids and counts the slots of its cache, among which are "
            f"rejected tokens. {TURN_OFF}"
        )


class StepCounts(NamedTuple):
    """Sums over the rows of one step that has drafts, on the CPU.

    Attributes:
        num_unfinished: Rows that have not ended.
        num_tokens: New tokens of all rows.
        most_kept: Largest number of new slots that a row keeps.
        least_kept: Smallest number of new slots that a row keeps.
        reached: Rows that reach draft j, with all drafts before it accepted and no end among these (k).
        accepted: Rows that accept draft j, too (k).
        acceptance: Sum of the acceptance probabilities of draft j over the rows that reach it (k).
    """

    num_unfinished: int
    num_tokens: int
    most_kept: int
    least_kept: int
    reached: list[float]
    accepted: list[float]
    acceptance: list[float]


def _to_host(*parts: Tensor) -> list[list[float]]:
    """Read several tensors in one transfer from the device, since each transfer waits for all work there."""
    packed = torch.cat([part.reshape(-1) for part in parts]).cpu()
    return [part.tolist() for part in packed.split([part.numel() for part in parts])]


class Decoding:
    """One call of `generate`: a batch of prompts on its way to completions. The module's docstring explains the words.

    Shapes: B rows, of which A are active; P tokens of a prompt; S tokens per row of one pass; L slots of the cache.

    Args:
        model: The model.
        drafter: Drafts tokens.
        draft_length: Says how many tokens to draft.
        input_ids: Prompts (B, P), padded on the left.
        processor: Logits processors.
        stopping: Says where a row ends.
        config: Options of `generate`.
        recorder: Receives the state of every new token; `None` for none.
        model_kwargs: Arguments that `generate` prepared for the model's forward: attention mask, positions, cache.

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
        self.processor, self.stopping, self.config = processor, stopping, config
        self.recorder = drafter.follow(recorder)  # `None` where the drafter feeds it
        self.kwargs = dict(model_kwargs)
        self.cache = rollback_cache(
            self.kwargs.pop(cache_name(), None), getattr(model.config.get_text_config(), "layer_types", None)
        )
        check_positions(model)
        # Where every forward gathers from all ranks (ZeRO-3, FSDP2), all of them take the same steps.
        self.synced = distributed.is_initialized() and gathers_in_forward(model)
        self._hidden: Tensor | None = None  # of the newest pass
        self.statistics = DraftStatistics(num_drafts=drafter.max_drafts)

        # All rows. Drafts are written behind the settled tokens before it is known which stay: hence spare columns.
        (batch, self.prompt_length), device = input_ids.shape, input_ids.device
        columns = max(stopping.max_length - self.prompt_length, 1) + drafter.max_drafts + 1
        self.ids = torch.cat([input_ids, input_ids.new_zeros(batch, columns)], dim=1)
        self.log_probs = torch.zeros(batch, columns, device=device)
        self.lengths = torch.full((batch,), self.prompt_length, device=device)  # settled tokens
        self.ended = torch.zeros(batch, dtype=torch.bool, device=device)
        self.num_unfinished = batch  # known on the CPU, so that asking does not wait for the device
        self.positions: Tensor | None = self.kwargs.pop("position_ids", None)
        if self.positions is not None:  # a caller may have passed one row for all
            self.positions = self.positions.expand(*self.positions.shape[:-2], batch, -1)

        # Active rows: their indices (A,), and which slots of the cache they use (A, L).
        self.active = torch.arange(batch, device=device)
        mask = self.kwargs.pop("attention_mask", None)
        self.mask = torch.ones_like(input_ids) if mask is None else mask.long()
        self.has_holes = mask is not None

    @torch.no_grad()
    def run(self, listener: Callable[[int], None] | None = None) -> SpeculativeOutput:
        """Complete all rows.

        Args:
            listener: Called with the number of tokens of the longest completion after each step.
        """
        with self.drafter.attachment.watching(self._take_hidden):
            self._prefill()
            while (num_drafts := self._plan(listener)) is not None:
                self._step(num_drafts)
        self.drafter.finish()
        return self._output()

    # The model

    def _take_hidden(self, hidden: Tensor) -> None:
        self._hidden = hidden

    def _forward(self, tokens: Tensor, positions: Tensor | None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Compute logits (A, S, V) and states (A, S, D) of tokens (A, S), which `mask` covers already."""
        inputs = self.model.prepare_inputs_for_generation(
            tokens,
            attention_mask=self.mask if self.has_holes else None,
            **{cache_name(): self.cache},
            **({} if positions is None else {"position_ids": positions}),
            **{**self.kwargs, **kwargs},
        )
        logits = self.model(**inputs, return_dict=True).logits
        if self._hidden is None:
            raise ValueError(
                f"{type(self.model).__name__} does not run its trunk ({type(trunk_of(self.model)).__name__}) as a "
                f"whole, so its heads do not see hidden states. {TURN_OFF}"
            )
        return logits, self._hidden

    def _prefill(self) -> None:
        """Run the prompts, and choose the first token of every row."""
        tokens = self.ids[:, : self.prompt_length]
        logits, hidden = self._forward(tokens, self.positions, is_first_iteration=True)
        self._settle(logits[:, -1:], hidden[:, -1:], self._new_drafts())
        self.num_unfinished = int((~self.ended).sum())
        columns = torch.arange(self.prompt_length, device=tokens.device).expand_as(tokens)
        self._inform_drafter(hidden, tokens, self.positions, self.mask.bool(), columns)

    def _step(self, num_drafts: int) -> None:
        """Draft, verify, and keep what each row accepts, as in the drawing at the top of this module."""
        started = time.perf_counter()
        slots = num_drafts + 1
        # Draft. Rows leave only now, when the drafter has taken in all slots of the pass before.
        drafts = self._new_drafts()
        if num_drafts:
            self.drafter.propose(num_drafts, drafts.choose)
        self._compact(drafts)

        # The tokens of the pass: pending ones, then drafts, which are written down for the logits processors.
        offset = torch.arange(slots, device=self.ids.device)
        unfinished, lengths = ~self._of_active_rows(self.ended), self._of_active_rows(self.lengths)
        tokens = self.ids[self.active, lengths - 1].unsqueeze(1)
        if num_drafts:
            tokens = torch.cat([tokens, drafts.tokens], dim=1)
            self.ids[self.active[:, None], lengths[:, None] + offset[:-1]] = drafts.tokens

        # Positions count settled tokens, not slots. Where a row ends before its drafts do, they stay within the
        # positions that the model has.
        positions = None
        if self.positions is not None:
            ahead = lengths[:, None] - self.prompt_length + offset
            limit = self.stopping.max_length - self.prompt_length - 1
            positions = self._of_active_rows(self.positions[..., -1:], dim=-2) + ahead.clamp(max=limit)

        # One pass scores all of them; the verdict settles tokens.
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), slots)], dim=1)
        keep = {"logits_to_keep": slots} if "logits_to_keep" in self.kwargs else {}
        logits, hidden = self._forward(tokens, positions, **keep)
        verdict, num_new = self._settle(logits[:, -slots:], hidden, drafts)
        most, least = self._count(verdict, num_new, unfinished, started)

        # Slots that no row keeps are trimmed; where rows keep different numbers, holes remain.
        kept = offset[:most] <= verdict.num_accepted[:, None]
        if most < slots:
            self.cache.trim(slots - most)
        if least < slots:
            self.mask = torch.cat([self.mask[:, :-slots], kept.long()], dim=1)
        self.has_holes |= least < most
        positions = positions if positions is None else positions[..., :most]
        columns = (lengths - 1)[:, None] + offset[:most]
        self._inform_drafter(hidden[:, :most], tokens[:, :most], positions, kept, columns)

    def _settle(self, logits: Tensor, hidden: Tensor, drafts: Drafts) -> tuple[Verdict, Tensor]:
        """Choose tokens by the logits (A, S, V), write them down, and return the verdict and their number (A,)."""
        active, lengths = self.active, self._of_active_rows(self.lengths)
        unfinished, slots = ~self._of_active_rows(self.ended), logits.shape[1]
        columns = lengths[:, None] + torch.arange(slots, device=active.device)  # of `ids`, for the new tokens

        # Judge the drafts, and write the verdict's tokens over them. Those after the model's choice mean nothing:
        # they are beyond the row's length, and the next step writes over them.
        scores = self.processor(logits.to(torch.float32, copy=True), self._of_active_rows(self.ids), lengths, active)
        verdict = verify(scores, drafts)
        self.ids[active[:, None], columns] = verdict.tokens
        self.log_probs[active[:, None], columns - self.prompt_length] = verdict.log_probs

        # An accepted end-of-text token, or the largest length, cuts a row short; rows that ended before get nothing.
        num_new, ended = self.stopping.cut(self._of_active_rows(self.ids), lengths, verdict.num_accepted + 1, slots)
        num_new = num_new * unfinished

        # State j of the pass is the one that new token j was chosen in.
        if self.recorder is not None:
            is_new = torch.arange(slots, device=active.device) < num_new[:, None]
            self.recorder.add(hidden, (columns - self.prompt_length).masked_fill(~is_new, -1), active)

        # New tensors, since `lengths` and the like are these very tensors while all rows are active.
        self.lengths = self.lengths.index_put((active,), lengths + num_new)
        self.ended = self.ended.index_put((active,), self._of_active_rows(self.ended) | ended)
        return verdict, num_new

    def _inform_drafter(
        self, hidden: Tensor, tokens: Tensor, positions: Tensor | None, valid: Tensor, columns: Tensor
    ) -> None:
        """Give the drafter the slots of a pass that were kept, and the tokens that are pending now.

        Args:
            hidden: States (A, S, D).
            tokens: Tokens of the pass (A, S).
            positions: Their positions (A, S).
            valid: Which of them stay (A, S).
            columns: Where they stand in `ids` (A, S).
        """
        lengths = self._of_active_rows(self.lengths)
        pending = self.ids[self.active, lengths - 1]
        # Token y_j leads to s_{j+1}, in which the next one is chosen, and the token after it to s_{j+2}. A row that
        # has ended needs no state after its last token.
        steps = columns - self.prompt_length + 2
        needed = steps < (lengths - self.prompt_length + (~self._of_active_rows(self.ended)).long())[:, None]
        steps = steps.masked_fill(~(valid & needed), -1)
        self.drafter.observe(Verified(hidden, tokens, positions, valid, self.mask, pending, steps, self.active))

    # How many drafts

    def _new_drafts(self) -> Drafts:
        ids, lengths = self._of_active_rows(self.ids), self._of_active_rows(self.lengths)
        return Drafts(self.processor, ids, lengths, self.active, bool(self.config.do_sample))

    def _of_active_rows(self, x: Tensor, dim: int = 0) -> Tensor:
        """Entries of a tensor of the whole batch for the active rows; the tensor itself where all rows are active."""
        return x if len(self.active) == x.shape[dim] else x.index_select(dim, self.active)

    def _plan(self, listener: Callable[[int], None] | None) -> int | None:
        """Choose the number of drafts of the next step; `None` when all rows of all ranks have ended."""
        if listener is not None:
            listener(int(self.lengths.max()) - self.prompt_length)
        num_drafts = self.draft_length.choose(len(self.active)) if self.num_unfinished else 0
        if num_drafts:
            # The model itself chooses the last token of a row, so the shortest row bounds the drafts of all.
            shortest = int(self.lengths.masked_fill(self.ended, self.stopping.max_length).min())
            num_drafts = min(num_drafts, self.stopping.max_length - shortest - 1)
        if not self.synced:
            return num_drafts if self.num_unfinished else None
        plan = torch.tensor([self.num_unfinished, num_drafts], device=self.ids.device)
        distributed.all_reduce(plan, op=distributed.ReduceOp.MAX)
        num_unfinished, num_drafts = plan.tolist()
        return num_drafts if num_unfinished else None

    def _count(self, verdict: Verdict, num_new: Tensor, unfinished: Tensor, started: float) -> tuple[int, int]:
        """Count what became of the drafts, and return the largest and smallest number of slots that a row keeps."""
        rows_before, num_drafts = self.num_unfinished, verdict.tokens.shape[1] - 1
        counts = self._step_counts(verdict, num_new, unfinished, num_drafts)
        # The transfer of the counts has waited for the step: only now is its time known.
        seconds, self.num_unfinished = time.perf_counter() - started, counts.num_unfinished
        self.statistics.add(rows_before, counts.num_tokens, counts.reached, counts.accepted)
        self.draft_length.record(len(self.active), counts.acceptance, counts.reached, seconds)
        return counts.most_kept, counts.least_kept

    def _step_counts(self, verdict: Verdict, num_new: Tensor, unfinished: Tensor, num_drafts: int) -> StepCounts:
        if not num_drafts:  # every row that has not ended gets one token, and every row keeps one slot
            return StepCounts(int((~self.ended).sum()), self.num_unfinished, 1, 1, [], [], [])
        # Draft j counts as reached where all before it stayed and none of them ended the row; as accepted where it
        # stayed, too. With two drafts accepted of three and no end, num_new = 3: drafts 0, 1 and 2 were reached.
        draft = torch.arange(num_drafts, device=num_new.device)
        reached = draft < num_new[:, None]
        accepted = (draft < verdict.num_accepted[:, None]) & reached
        # Rows that have ended need no slots, and so do not count in either bound. Where all have ended, on a rank that
        # goes on with the others, each row keeps the slot of its pending token.
        kept = verdict.num_accepted + 1
        most_kept = kept.masked_fill(~unfinished, 1).max()
        least_kept = kept.masked_fill(~unfinished, num_drafts + 1).min().minimum(most_kept)
        single, reached_by, accepted_by, acceptance = _to_host(
            torch.stack([(~self.ended).sum(), num_new.sum(), most_kept, least_kept]),
            reached.sum(0),
            accepted.sum(0),
            (verdict.acceptance_probs * reached).sum(0),
        )
        num_unfinished, num_tokens, most, least = (int(number) for number in single)
        return StepCounts(num_unfinished, num_tokens, most, least, reached_by, accepted_by, acceptance)

    # The batch

    def _compact(self, drafts: Drafts) -> None:
        """Drop rows that have ended, and move the slots in use together, where this saves time.

        Args:
            drafts: Drafts of this step, which lose the same rows.
        """
        # Ranks that take their steps together keep all rows: heads run when rows change, on all ranks or on none.
        num_ended = 0 if self.synced else len(self.active) - self.num_unfinished
        rows_leave = num_ended >= max(ENDED_SHARE * len(self.active), 1)
        if not (rows_leave or self.has_holes):
            return
        # In a step without drafts `drafter.select` would run the drafter's layers, on this rank alone. So
        # synchronised ranks wait for a step with drafts, unless layers attend to a window of slots, in which holes
        # would count.
        if self.synced and not drafts.tokens.shape[1] and not self.cache.is_windowed:
            return

        # Moving copies the cache. Unless rows leave or a window needs it, it has to free enough slots.
        ended, slots = self.ended[self.active], self.mask.shape[1]
        if not (rows_leave or self.cache.is_windowed):
            longest = int(self.mask.masked_fill(ended[:, None], 0).sum(1).max())
            if slots - longest <= SPARE_SHARE * slots:
                return
        rows = torch.nonzero(~ended).squeeze(1) if rows_leave else torch.arange(len(ended), device=ended.device)
        chosen, self.mask = kept_slots(self.mask[rows])
        self.has_holes = not bool(self.mask.all())
        if rows_leave:  # else the same tensor: a recorder runs the heads when it is given another one
            self.active = self.active[rows]
        self.cache.select(rows, chosen)
        self.drafter.select(rows, chosen)
        drafts.select(rows)

    def _output(self) -> SpeculativeOutput:
        """Return completions and log-probabilities, padded after the end of each row."""
        end = int(self.lengths.max())
        behind = torch.arange(end, device=self.ids.device) >= self.lengths[:, None]
        pad = self.config.pad_token_id
        if pad is None:  # as generate does it
            pad = 0 if self.stopping.eos is None else int(self.stopping.eos[0])
        log_probs = self.log_probs[:, : end - self.prompt_length].masked_fill(behind[:, self.prompt_length :], 0.0)
        if self.config.do_sample and not bool(log_probs.isfinite().all()):
            raise ValueError(
                "There was no token to sample: the model's logits were NaN, or the logits processors left none."
            )
        return SpeculativeOutput(
            sequences=self.ids[:, :end].masked_fill(behind, pad), log_probs=log_probs, statistics=self.statistics
        )
