"""Drafters, which propose the next tokens with heads that are attached to the model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rl_plugins.functional.alignment import shift_real
from rl_plugins.nn.attachment import Attachment, base_model_of
from rl_plugins.nn.mtp_heads import MTPHeads
from rl_plugins.nn.parallel_heads import ParallelHeads
from rl_plugins.nn.sequential_heads import SequentialHeads
from rl_plugins.nn.token_loss import logit_cap, logit_divisor
from rl_plugins.rollouts.speculative.cache import TURN_OFF, RollbackCache, RollbackLayer
from rl_plugins.rollouts.values import ValueRecord

Choose = Callable[[Tensor], Tensor]
"""Draws tokens (A, S) from the logits (A, S, V) of consecutive drafts."""


@dataclass
class Verified:
    """The slots of the newest forward pass that are kept, after its drafts were verified.

    Attributes:
        hidden: Trunk states of the tokens in these slots (A, S, D).
        tokens: The tokens (A, S).
        position_ids: Positions of the tokens (A, S).
        valid: Whether each token is part of its row, and not a rejected draft or padding (A, S), bool.
        mask: Slots of the cache in use, the last S of which are these (A, L).
        pending: Token chosen after the last valid one (A,).
        steps: Index t of the state `s_t` to which each slot's next token leads (A, S); below 0 for none.
        rows: Indices of these rows in the batch (A,).
    """

    hidden: Tensor
    tokens: Tensor
    position_ids: Tensor | None
    valid: Tensor
    mask: Tensor
    pending: Tensor
    steps: Tensor
    rows: Tensor


class Drafter(Protocol):
    """Proposes the tokens that follow the newest one."""

    max_drafts: int
    """K, the most tokens that it drafts."""

    @property
    def attachment(self) -> Attachment:
        """Module of the model that drafts, through which the trunk's hidden states can be watched."""

    def follow(self, recorder: ValueRecord | None) -> ValueRecord | None:
        """Feed a record with the states of all tokens, and return `None`; or return the record, so that the loop of
        decoding feeds it with the model's own states."""

    def finish(self) -> None:
        """Take in what was observed, although no draft needs it any more."""

    def observe(self, verified: Verified) -> None:
        """Take in the kept slots of a forward pass of the model."""

    def propose(self, num_drafts: int, choose: Choose) -> None:
        """Draft tokens, in order, by one or more calls of `choose`."""

    def select(self, rows: Tensor, slots: Tensor) -> None:
        """Keep some rows (A,) and, in each, some slots (A, L) of all that was observed, in that order."""


def at_last(x: Tensor, valid: Tensor) -> Tensor:
    """Pick the entries of `x` (A, S, ...) at the last valid slot of each row (A, ...)."""
    last = last_valid(valid)
    return x[torch.arange(len(last), device=last.device), last]


def last_valid(valid: Tensor) -> Tensor:
    """Find the last valid slot of each row (A,) of a mask (A, S)."""
    # Of equal entries argmax takes the first, so look from the right.
    return valid.shape[1] - 1 - valid.flip(1).int().argmax(dim=1)


class DraftLogits:
    """The model's own logits of features (..., D), made as in its forward.

    Args:
        base: The model.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self.lm_head: Any = base.get_output_embeddings()
        self.cap, self.divisor = logit_cap(base.config), logit_divisor(base.config)

    def __call__(self, features: Tensor) -> Tensor:
        logits = self.lm_head(features) / self.divisor
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


class ParallelDrafter:
    """Drafts with parallel heads: head k reads the state that the newest token was chosen in, and predicts the k-th
    token after it (Gloeckle et al., 2404.19737, section 2).

    Args:
        model: Model with heads attached.
    """

    def __init__(self, model: nn.Module) -> None:
        heads = MTPHeads.of(model)
        assert isinstance(heads, ParallelHeads)
        self.attachment, self.max_drafts = heads, heads.config.num_heads
        self._logits = DraftLogits(base_model_of(model))
        self._newest: tuple[Tensor, Tensor] | None = None

    def follow(self, recorder: ValueRecord | None) -> ValueRecord | None:
        """Return the record, since these heads judge the states of the model's own passes."""
        return recorder

    def finish(self) -> None:
        """Do nothing: no state waits."""

    def observe(self, verified: Verified) -> None:
        """Keep the states (A, S, D) of which the last valid one will be read."""
        self._newest = verified.hidden, verified.valid

    def propose(self, num_drafts: int, choose: Choose) -> None:
        """Draft all tokens at once, since no head reads what another one drafted."""
        assert self._newest is not None
        state = at_last(*self._newest)
        features = [head(state) for _, head in zip(range(num_drafts), self.attachment, strict=False)]
        choose(self._logits(torch.stack(features, dim=1)))

    def select(self, rows: Tensor, slots: Tensor) -> None:
        """Keep the states of some rows."""
        assert self._newest is not None
        hidden, valid = self._newest
        self._newest = hidden[rows], valid[rows]


class SequentialDrafter:
    """Drafts with sequential heads: depth k reads the state that depth k - 1 made, and the token that it drafted
    (DeepSeek-V3, 2412.19437, section 2.2).

    The heads attend to the whole row, so they have a cache of their own, with the same slots as the model's. In a
    slot, every depth reads the token **after** the slot's own. This token is settled; it may be the pending one. Depth
    k also reads there the state that depth k - 1 made one token before. Two depths on the row `a b c`, with `d`
    pending:

        slot      a          b                  c
        depth 1   reads b    reads c            reads d: drafts e
        depth 2              reads c, from a    reads d, from b
        for the draft only                                        reads e, from c: drafts f

    The last line is removed again, whether or not `e` is accepted. So caches and values are made of settled tokens
    alone.

    Args:
        model: Model with sequential heads attached.
    """

    def __init__(self, model: nn.Module) -> None:
        base, heads = base_model_of(model), MTPHeads.of(model)
        assert isinstance(heads, SequentialHeads)
        self.attachment, self.max_drafts = heads, heads.config.num_heads
        self._heads, self._logits = heads, DraftLogits(base)
        self._recorder: ValueRecord | None = None
        self._layers = [RollbackLayer() for _ in range(self.max_drafts)]
        self._cache = RollbackCache(self._layers)
        self._waiting: list[Verified] = []
        self._last: list[Tensor] = []  # newest state of each depth in every row (A, 1, D)
        self._mask = torch.empty(0)  # slots in use (A, L)
        self._position = torch.empty(0)  # of the pending tokens (A, 1)

    def follow(self, recorder: ValueRecord | None) -> ValueRecord | None:
        """Give the record the features of every state, which the drafter makes anyway."""
        self._recorder = recorder
        return None

    def observe(self, verified: Verified) -> None:
        """Keep a forward pass for the next drafts."""
        self._waiting.append(verified)

    def propose(self, num_drafts: int, choose: Choose) -> None:
        """Draft one token after the other."""
        self.finish()
        drafts = choose(self._logits(self._last[0]))
        below = self._last[0]  # states of the depth before, at the pending token and at the drafts
        for depth in range(2, num_drafts + 1):
            width = depth - 1
            ahead = self._position + torch.arange(1, depth, device=drafts.device)
            mask = _deep_enough(torch.cat([self._mask, self._mask.new_ones(len(drafts), width)], dim=1), depth)
            states = self._heads.run(depth, below, drafts, ahead, mask, self._cache)
            self._layers[depth - 1].trim(width)
            drafts = torch.cat([drafts, choose(self._logits(states[:, -1:]))], dim=1)
            below = torch.cat([self._last[depth - 1], states], dim=1)

    def finish(self) -> None:
        """Read the settled tokens of the passes observed since the last call."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        newest, first = waiting[-1], not self._last
        hidden = torch.cat([v.hidden for v in waiting], dim=1)
        valid = torch.cat([v.valid for v in waiting], dim=1)
        self._mask = newest.mask
        if newest.position_ids is None:
            positions = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -valid.shape[1] :]
        else:
            positions = torch.cat([cast(Tensor, v.position_ids) for v in waiting], dim=-1)
        # Every slot reads the settled token after its own; the last one of these is pending.
        tokens = torch.cat([*(v.tokens for v in waiting), newest.pending.unsqueeze(1)], dim=1)
        behind = shift_real(tokens, torch.cat([valid, torch.ones_like(valid[:, :1])], dim=1), 1)[0][:, :-1]
        rank = self._mask.cumsum(1)[:, -valid.shape[1] :] - 1  # settled tokens of its row before each slot
        features: list[Tensor] = []
        for depth in range(1, self.max_drafts + 1):
            below = hidden if depth == 1 else self._one_back(features[-1], valid, depth - 1)
            state = self._heads.run(depth, below, behind, positions + 1, _deep_enough(self._mask, depth), self._cache)
            features.append(torch.where((valid & (rank >= depth - 1))[..., None], state, 0.0))
        rows = torch.arange(len(valid), device=valid.device)
        self._position = positions[..., rows, last_valid(valid)][..., None] + 1
        if self._recorder is not None:
            made, steps = torch.stack(features, dim=2), torch.cat([v.steps for v in waiting], dim=1)
            if first:  # for prompts of one token, after which no head has read two
                self._recorder.add(torch.zeros_like(made[:, :1]), torch.zeros_like(steps[:, :1]), newest.rows)
            self._recorder.add(made, steps, newest.rows)
        self._last = [self._newest(state, valid, k) for k, state in enumerate(features)]

    def _with_last(self, states: Tensor, valid: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """States of a depth (A, S, D) after the newest one of the passes before, and which of them are valid."""
        last = self._last[index] if self._last else torch.zeros_like(states[:, :1])
        return torch.cat([last, states], dim=1), torch.cat([torch.ones_like(valid[:, :1]), valid], dim=1)

    def _one_back(self, states: Tensor, valid: Tensor, depth: int) -> Tensor:
        """States that a depth made one settled token before each slot (A, S, D)."""
        return shift_real(*self._with_last(states, valid, depth - 1), -1)[0][:, 1:]

    def _newest(self, states: Tensor, valid: Tensor, index: int) -> Tensor:
        """State of each row's last settled token (A, 1, D)."""
        return at_last(*self._with_last(states, valid, index)).unsqueeze(1)

    def select(self, rows: Tensor, slots: Tensor) -> None:
        """Keep some rows and slots of the cache, which first takes in the passes observed so far."""
        self.finish()
        self._cache.select(rows, slots)
        self._mask = self._mask[rows[:, None], slots]
        self._position = self._position[..., rows, :]
        self._last = [last[rows] for last in self._last]


def _deep_enough(mask: Tensor, depth: int) -> Tensor:
    """Slots of a mask (A, L) where a depth has read enough tokens: all but the first `depth - 1` of every row."""
    real = mask.bool()
    return real & (real.cumsum(1) >= depth)


def make_drafter(model: nn.Module) -> Drafter:
    """Make the drafter for the heads of a model.

    Raises:
        ValueError: If it has none.
    """
    heads = MTPHeads.of(model)
    if isinstance(heads, SequentialHeads):
        return SequentialDrafter(model)
    if heads is None:
        raise ValueError(
            f"{type(base_model_of(model)).__name__} has no MTP heads to draft with. Load trained ones with "
            f"load_mtp_heads(model, path). {TURN_OFF}"
        )
    return ParallelDrafter(model)
