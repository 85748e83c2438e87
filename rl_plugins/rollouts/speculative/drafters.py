"""Drafters: what is attached to the model proposes its next tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rl_plugins.functional.alignment import shift_real
from rl_plugins.nn.attachment import Attachment, base_model_of
from rl_plugins.nn.mtp_heads import MTPHeads
from rl_plugins.nn.native_mtp import NativeMTP
from rl_plugins.nn.token_loss import logit_divisor
from rl_plugins.rollouts.speculative.cache import TURN_OFF, RollbackCache, RollbackLayer

Choose = Callable[[Tensor], Tensor]
"""Draws tokens (A, S) from the logits (A, S, V) of consecutive drafts."""


@dataclass
class Verified:
    """The slots of the newest forward pass that are kept, after its drafts were verified.

    Attributes:
        hidden: Trunk states of the tokens in these slots (A, S, D).
        tokens: The tokens (A, S).
        position_ids: Positions of the tokens (A, S).
        valid: Whether each token is part of its row, or else a rejected draft or padding (A, S), bool.
        mask: Slots of the cache in use, the last S of which are these (A, L).
        pending: Token chosen after the last valid one (A,).
    """

    hidden: Tensor
    tokens: Tensor
    position_ids: Tensor | None
    valid: Tensor
    mask: Tensor
    pending: Tensor


class Drafter(Protocol):
    """Proposes the tokens that follow the newest one."""

    max_drafts: int
    """K, the most tokens that it drafts."""

    @property
    def attachment(self) -> Attachment:
        """Module of the model that drafts, through which the trunk's hidden states can be watched."""

    def observe(self, verified: Verified) -> None:
        """Take in the kept slots of a forward pass of the model."""

    def propose(self, num_drafts: int, choose: Choose) -> None:
        """Draft tokens, in order, by one or more calls of `choose`."""

    def select(self, rows: Tensor, slots: Tensor) -> None:
        """Keep some rows (A,) and, in each, some slots (A, L) of all that was observed, in that order."""


def at_last(x: Tensor, valid: Tensor) -> Tensor:
    """Entries of `x` (A, S, ...) at the last valid slot of each row (A, ...)."""
    # Of equal entries argmax takes the first, so look from the right.
    last = valid.shape[1] - 1 - valid.flip(1).int().argmax(dim=1)
    return x[torch.arange(len(last), device=last.device), last]


class ParallelDrafter:
    """Drafts by MTP heads: head k reads the state that the newest token was chosen in, and predicts the k-th token
    after it (Gloeckle et al., 2404.19737, section 2).

    Args:
        model: Model with heads attached.
    """

    def __init__(self, model: nn.Module) -> None:
        base, heads = base_model_of(model), MTPHeads.of(model)
        assert heads is not None
        self.attachment, self.max_drafts = heads, heads.config.num_heads
        self.lm_head: Any = base.get_output_embeddings()
        self.cap: float | None = getattr(base.config.get_text_config(), "final_logit_softcapping", None)
        self.divisor = 1.0 if self.cap else logit_divisor(base.config)
        self._newest: tuple[Tensor, Tensor] | None = None

    def observe(self, verified: Verified) -> None:
        """Keep the states (A, S, D) of which the last valid one will be read."""
        self._newest = verified.hidden, verified.valid

    def propose(self, num_drafts: int, choose: Choose) -> None:
        """Draft all tokens at once, since no head reads what another one drafted."""
        assert self._newest is not None
        state = at_last(*self._newest)
        features = [head(state) for _, head in zip(range(num_drafts), self.attachment, strict=False)]
        logits = self.lm_head(torch.stack(features, dim=1)) / self.divisor
        choose(logits if not self.cap else torch.tanh(logits / self.cap) * self.cap)

    def select(self, rows: Tensor, slots: Tensor) -> None:
        """Keep the states of some rows."""
        assert self._newest is not None
        hidden, valid = self._newest
        self._newest = hidden[rows], valid[rows]


class SequentialDrafter:
    """Drafts by native MTP layers: depth k reads what depth k - 1 made of the row, and the token that it drafted
    (DeepSeek-V3, 2412.19437, section 2.2).

    The layers attend to the whole row, so they have a cache of their own, with the same slots as the model's. Deeper
    layers made their keys and values of a row's last tokens from drafts, some of which were rejected later. That costs
    acceptance, not exactness.

    Args:
        model: Model with native MTP layers attached.
    """

    def __init__(self, model: nn.Module) -> None:
        native = NativeMTP.of(model)
        assert native is not None
        self.attachment, self.max_drafts = native, native.num_layers
        self._cache = RollbackCache([RollbackLayer() for _ in range(native.num_layers)])
        self._waiting: list[Verified] = []

    def observe(self, verified: Verified) -> None:
        """Keep a forward pass for the next drafts."""
        self._waiting.append(verified)

    def propose(self, num_drafts: int, choose: Choose) -> None:
        """Draft one token after the other."""
        self._advance(num_drafts, choose)

    def _advance(self, num_drafts: int, choose: Choose) -> None:
        """Run all depths on the passes observed since the last call, and draft by the first `num_drafts` of them; the
        others run to keep their caches complete."""
        waiting, self._waiting = self._waiting, []
        hidden = torch.cat([v.hidden for v in waiting], dim=1)
        valid = torch.cat([v.valid for v in waiting], dim=1)
        positions = torch.cat([v.position_ids for v in waiting if v.position_ids is not None], dim=-1)
        newest, slots = waiting[-1], hidden.shape[1]
        # Depth k reads the token k places ahead of each slot: one of the valid tokens, then the pending one, then the
        # drafts of the depths before it.
        tokens = torch.cat([*(v.tokens for v in waiting), newest.pending.unsqueeze(1)], dim=1)
        real = torch.cat([valid, torch.ones_like(valid[:, :1])], dim=1)
        for depth in range(1, self.max_drafts + 1):
            ahead = shift_real(tokens, real, depth)[0][:, :slots]
            hidden = self.attachment.run(depth, hidden, ahead, positions + depth, newest.mask, self._cache)
            logits = self.attachment.logits(at_last(hidden, valid)).unsqueeze(1)
            drafted = choose(logits) if depth <= num_drafts else logits.argmax(dim=-1)
            tokens, real = torch.cat([tokens, drafted], dim=1), torch.cat([real, real[:, -1:]], dim=1)

    def select(self, rows: Tensor, slots: Tensor) -> None:
        """Keep some rows and slots of the cache, which first takes in the passes observed so far."""
        if self._waiting:
            self._advance(0, lambda logits: logits.argmax(dim=-1))
        self._cache.select(rows, slots)


def make_drafter(model: nn.Module) -> Drafter:
    """Make the drafter for what is attached to a model: native MTP layers if there are any, else MTP heads.

    Raises:
        ValueError: If neither is attached.
    """
    if NativeMTP.of(model) is not None:
        return SequentialDrafter(model)
    if MTPHeads.of(model) is None:
        raise ValueError(
            f"{type(base_model_of(model)).__name__} has no MTP heads to draft with. Load trained ones with "
            f"load_mtp_heads(model, path). {TURN_OFF}"
        )
    return ParallelDrafter(model)
