"""Output of speculative decoding, and the share of its drafts that was accepted."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


class DraftStatistics:
    """Counts how many drafts were reached and accepted at each place, and how many tokens they brought.

    Args:
        num_drafts: K.

    Attributes:
        steps: Forward passes of the model after the prompt's, counted for each row until it ended.
        tokens: New tokens that these passes brought.
        reached: Number of drafts at each place before which all drafts were accepted (K), without those after the end
            of a row.
        accepted: Number of those that were accepted, too (K).
    """

    def __init__(self, num_drafts: int) -> None:
        self.steps = self.tokens = 0
        self.reached, self.accepted = [0] * num_drafts, [0] * num_drafts

    def add(self, steps: int, tokens: int, reached: Sequence[float], accepted: Sequence[float]) -> None:
        """Count a step, or another call's statistics."""
        self.steps += steps
        self.tokens += tokens
        for k, (all_, good) in enumerate(zip(reached, accepted, strict=True)):
            self.reached[k] += int(all_)
            self.accepted[k] += int(good)

    @property
    def counts(self) -> list[float]:
        """All counts as one list, so that ranks can sum them: steps, tokens, `reached`, `accepted` (2 + 2K)."""
        return [float(x) for x in (self.steps, self.tokens, *self.reached, *self.accepted)]

    @property
    def acceptance(self) -> list[float]:
        """Share of the reached drafts at each place that were accepted (K); NaN where none was reached."""
        pairs = zip(self.accepted, self.reached, strict=True)
        return [good / all_ if all_ else float("nan") for good, all_ in pairs]

    @property
    def tokens_per_step(self) -> float:
        """Tokens of a row per forward pass, from 1 without drafts to K + 1; NaN before the first pass."""
        return self.tokens / self.steps if self.steps else float("nan")


@dataclass
class SpeculativeOutput(ModelOutput):
    """Tokens, log-probabilities and statistics of one call of `generate`.

    Attributes:
        sequences: Prompts and completions (B, P + T), padded after the end of a row.
        log_probs: `ln p(y_t)` under the distribution that is sampled from, after all logits processors (B, T); with
            greedy decoding under the softmax of the processed scores. 0 after the end.
        statistics: Counts of drafts and tokens.
    """

    sequences: Tensor | None = None
    log_probs: Tensor | None = None
    statistics: DraftStatistics | None = None
