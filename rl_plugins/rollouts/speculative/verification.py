"""Collects the drafts of one step, and decides which of them the model accepts."""

from typing import NamedTuple

import torch
from torch import Tensor

from rl_plugins.functional.acceptance import acceptance_probs, count_accepted, inverse_cdf, residual_probs
from rl_plugins.rollouts.speculative.score_processing import ScoreProcessor


def draw(probs: Tensor) -> Tensor:
    """Draw tokens (...) from distributions (..., V)."""
    return inverse_cdf(probs, torch.rand(probs.shape[:-1], dtype=torch.float64, device=probs.device))


class Drafts:
    """Collects the tokens drafted in one step, and the probabilities that they were drawn from.

    Args:
        processor: The logits processors.
        ids: Tokens of the rows (A, W).
        lengths: Number of settled tokens of each row (A,).
        rows: Indices of these rows in the whole batch (A,).
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
        """Drafted tokens (A, k)."""
        return torch.cat(self._tokens, dim=1)

    @property
    def probs(self) -> Tensor:
        """Probabilities that the drafted tokens were sampled from (A, k, V)."""
        return torch.cat(self._probs, dim=1)


class Verdict(NamedTuple):
    """The drafts that each row accepts, and the token that the model chooses after them.

    Attributes:
        num_accepted: Number of accepted drafts (A,).
        tokens: Accepted drafts, then the model's choice (A, k + 1); entries after it mean nothing.
        log_probs: Log-probabilities of `tokens` under the softmax of the processed scores (A, k + 1).
        acceptance_probs: Probability of each draft to be accepted once it is reached (A, k).
    """

    num_accepted: Tensor
    tokens: Tensor
    log_probs: Tensor
    acceptance_probs: Tensor


def verify(scores: Tensor, drafts: Drafts) -> Verdict:
    """Accept drafts, and choose the token that follows them.

    Greedy decoding accepts drafts that are the most probable token, and then chooses the most probable token. Sampling
    accepts draft d with probability `min(1, p(d) / q(d))`, and draws the next token from what is left of p
    ([`~rl_plugins.functional.acceptance`]), which makes the tokens those of plain sampling in distribution.

    Args:
        scores: The model's processed scores at each draft and after the last (A, k + 1, V).
        drafts: The drafts.
    """
    drafted = drafts.tokens
    rows, k = torch.arange(len(scores), device=scores.device), drafted.shape[1]
    log_probs = scores.log_softmax(dim=-1)
    if not drafts.do_sample:
        best = scores.argmax(dim=-1)
        is_best = drafted == best[:, :k]
        chances, count = is_best.float(), count_accepted(is_best)
        choice = best[rows, count]
    elif k == 0:
        chances, count = scores[:, :0, 0], rows.new_zeros(len(rows))
        choice = draw(log_probs[:, 0].exp())
    else:
        proposal = drafts.probs  # q
        p = log_probs[:, :k].gather(2, drafted.unsqueeze(2)).squeeze(2).exp()
        q = proposal.gather(2, drafted.unsqueeze(2)).squeeze(2)
        chances = acceptance_probs(p, q)
        count = count_accepted(torch.rand_like(chances) < chances)
        # Only the place of the first rejection needs whole distributions. Where all drafts are accepted there is none,
        # and zeros for q leave p at the place after the last draft.
        rejected = proposal[rows, count.clamp(max=k - 1)].masked_fill((count == k).unsqueeze(1), 0.0)
        choice = draw(residual_probs(log_probs[rows, count].exp(), rejected))
    tokens = torch.cat([drafted, drafted.new_zeros(len(rows), 1)], dim=1)
    tokens[rows, count] = choice
    return Verdict(count, tokens, log_probs.gather(2, tokens.unsqueeze(2)).squeeze(2), chances)
