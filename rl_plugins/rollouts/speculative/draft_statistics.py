"""What speculative decoding returns, and how well its drafts were received."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


class DraftStatistics:
    """What became of drafts.

    Args:
        num_drafts: K.

    Attributes:
        steps: Forward passes of the model after the prompt's, counted for each row until it ended.
        tokens: Tokens that they brought.
        reached: How many drafts at each place had all before them accepted (K), without those behind the end of a row.
        accepted: How many of those were accepted, too (K).
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
        """All of it as numbers to sum: steps, tokens, `reached`, `accepted` (2 + 2K)."""
        return [float(x) for x in (self.steps, self.tokens, *self.reached, *self.accepted)]

    @property
    def acceptance(self) -> list[float]:
        """Share of the drafts at each place that were accepted, of those that were reached; NaN without any."""
        pairs = zip(self.accepted, self.reached, strict=True)
        return [good / all_ if all_ else float("nan") for good, all_ in pairs]

    @property
    def tokens_per_step(self) -> float:
        """Tokens of a row per forward pass, from 1 without drafts to K + 1; NaN without any."""
        return self.tokens / self.steps if self.steps else float("nan")


@dataclass
class SpeculativeOutput(ModelOutput):
    """What speculative decoding returns.

    Attributes:
        sequences: Prompts and completions (B, P + T), padded behind the end of a row.
        log_probs: `ln p(y_t)` under the distribution that is sampled from, after all logits processors (B, T); with
            greedy decoding under the softmax of the processed scores. 0 behind the end.
        values: Values of all heads in the state of every token (B, T, K), float32; `None` without MTP heads.
        target_values: The same of slow copies of the heads.
        statistics: Acceptance.
    """

    sequences: Tensor | None = None
    log_probs: Tensor | None = None
    values: Tensor | None = None
    target_values: Tensor | None = None
    statistics: DraftStatistics | None = None
