"""Drafts of one step, and the model's verdict on them."""

from typing import NamedTuple

import torch
from torch import Tensor

from rl_plugins.functional.acceptance import acceptance_probs, count_accepted, inverse_cdf, residual_probs
from rl_plugins.rollouts.speculative.score_processing import ScoreProcessor


def draw(probs: Tensor) -> Tensor:
    """Tokens (...) from distributions (..., V)."""
    return inverse_cdf(probs, torch.rand(probs.shape[:-1], dtype=torch.float64, device=probs.device))


class Drafts:
    """Collects the tokens drafted in one step, and what they were drawn from.

    Args:
        processor: The logits processors.
        ids: Tokens of the rows (A, W).
        lengths: How many of them are settled (A,).
        rows: Which rows of the whole batch these are (A,).
        do_sample: Whether to sample, or to take the most probable tokens.
    """

    def __init__(self, processor: ScoreProcessor, ids: Tensor, lengths: Tensor, rows: Tensor, do_sample: bool) -> None:
        self.processor, self.do_sample = processor, do_sample
        self.ids, self.lengths, self.rows = ids, lengths, rows
        self._tokens: list[Tensor] = [ids[:, :0]]
        self._probs: list[Tensor] = []

    def choose(self, logits: Tensor) -> Tensor:
        """Draw tokens (A, S) from the logits (A, S, V) of consecutive drafts."""
        scores = self.processor.drafts(logits.float(), self.ids, self.lengths, self.rows)
        if self.do_sample:
            self._probs.append(scores.softmax(dim=-1))
            chosen = draw(self._probs[-1])
        else:
            chosen = scores.argmax(dim=-1)
        self._tokens.append(chosen)
        return chosen

    def select(self, rows: Tensor) -> None:
        """Keep some rows (A,)."""
        self.ids, self.lengths, self.rows = self.ids[rows], self.lengths[rows], self.rows[rows]
        self._tokens = [tokens[rows] for tokens in self._tokens]
        self._probs = [probs[rows] for probs in self._probs]

    @property
    def tokens(self) -> Tensor:
        """(A, k)."""
        return torch.cat(self._tokens, dim=1)

    @property
    def probs(self) -> Tensor:
        """What they were drawn from (A, k, V)."""
        return torch.cat(self._probs, dim=1)


class Verdict(NamedTuple):
    """What stays of the drafts.

    Attributes:
        num_accepted: Drafts that stay (A,).
        tokens: These, then the token that follows them (A, k + 1); what is behind it means nothing.
        log_probs: Of `tokens`, under the softmax of the processed scores (A, k + 1).
        passing: Probability of each draft to stay once it is reached (A, k).
    """

    num_accepted: Tensor
    tokens: Tensor
    log_probs: Tensor
    passing: Tensor


def verify(scores: Tensor, drafts: Drafts) -> Verdict:
    """Accept drafts, and choose the token that follows them.

    Args:
        scores: The model's processed scores at each draft and behind the last (A, k + 1, V).
        drafts: The drafts.
    """
    drafted = drafts.tokens
    rows, k = torch.arange(len(scores), device=scores.device), drafted.shape[1]
    log_probs = scores.log_softmax(dim=-1)
    if not drafts.do_sample:
        best = scores.argmax(dim=-1)
        passing = (drafted == best[:, :k]).float()
        count = count_accepted(drafted == best[:, :k])
        follower = best[rows, count]
    elif k == 0:
        passing, count = scores[:, :0, 0], rows.new_zeros(len(rows))
        follower = draw(log_probs[:, 0].exp())
    else:
        proposal = drafts.probs
        own = log_probs[:, :k].gather(2, drafted.unsqueeze(2)).squeeze(2)
        passing = acceptance_probs(own.exp(), proposal.gather(2, drafted.unsqueeze(2)).squeeze(2))
        count = count_accepted(torch.rand_like(passing) < passing)
        # Only the place of the first rejection needs whole distributions.
        rejected = proposal[rows, count.clamp(max=k - 1)].masked_fill((count == k).unsqueeze(1), 0.0)
        follower = draw(residual_probs(log_probs[rows, count].exp(), rejected))
    tokens = torch.cat([drafted, drafted.new_zeros(len(rows), 1)], dim=1)
    tokens[rows, count] = follower
    return Verdict(count, tokens, log_probs.gather(2, tokens.unsqueeze(2)).squeeze(2), passing)
