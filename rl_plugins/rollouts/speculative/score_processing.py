"""Applies transformers' logits processors, which expect one position per row, to several positions per row."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation.logits_process import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    TopHLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

POINTWISE = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
"""Processors that read the scores alone, and none of the tokens before."""

ROW_BOUND = (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
"""Processors that need one call per token with the whole batch."""


class ScoreProcessor:
    """Applies the processors of a `generate` call to scores (A, S, V) of S consecutive positions, each with the tokens
    that `generate` would have given them there, prompt and padding included.

    Args:
        processors: Processors that `generate` prepared.

    Raises:
        ValueError: If one needs to be called once per token with the whole batch.
    """

    def __init__(self, processors: LogitsProcessorList) -> None:
        for processor in processors:
            if isinstance(processor, ROW_BOUND):
                raise ValueError(
                    f"{type(processor).__name__} counts on being called once per token for the whole batch, which "
                    "speculative decoding does not do. Leave out its option, or generate without speculation."
                )
        self.processors = list(processors)

    def __call__(self, scores: Tensor, ids: Tensor, lengths: Tensor, rows: Tensor) -> Tensor:
        """Process scores.

        Args:
            scores: Logits (A, S, V), float32.
            ids: Tokens (A, W): prompt, completion, drafts.
            lengths: Number of tokens before the first position (A,); position j has j more.
            rows: Indices of these rows in the whole batch (A,).
        """
        ends = lengths[:, None] + torch.arange(scores.shape[1], device=ids.device)
        for processor in self.processors:
            if type(processor) in POINTWISE:
                scores = _flat(processor, None, scores)
            elif type(processor) is RepetitionPenaltyLogitsProcessor:
                scores = _penalise(processor, ids, ends, rows, scores)
            else:
                scores = _by_length(processor, ids, ends, scores)
        return scores

    def drafts(self, scores: Tensor, ids: Tensor, lengths: Tensor, rows: Tensor) -> Tensor:
        """Process scores (A, S, V) of drafts as if each followed the same `lengths` settled tokens.

        Drafts may have any distribution, so processors that depend on where exactly a token stands are left out.
        """
        for processor in self.processors:
            if type(processor) in POINTWISE:
                scores = _flat(processor, None, scores)
            elif type(processor) is RepetitionPenaltyLogitsProcessor:
                scores = _penalise(processor, ids, lengths[:, None].expand(scores.shape[:2]), rows, scores)
        return scores


def _flat(processor: Any, prefixes: Any, scores: Tensor) -> Tensor:
    return processor(prefixes, scores.flatten(0, 1)).view(scores.shape)


def _penalise(
    processor: RepetitionPenaltyLogitsProcessor, ids: Tensor, ends: Tensor, rows: Tensor, scores: Tensor
) -> Tensor:
    """Apply the repetition penalty to all positions at once, each for the first `ends` (A, S) tokens of its row."""
    column = torch.arange(ids.shape[1], device=ids.device)
    outside = column >= ends[..., None]  # (A, S, W)
    ignored = processor.prompt_ignore_length
    if isinstance(ignored, Tensor):
        outside |= column < ignored.to(ids.device)[rows, None, None]
    elif ignored is not None:
        outside |= column < ignored
    # The processor drops tokens beyond the vocabulary.
    prefixes = ids[:, None].masked_fill(outside, scores.shape[-1]).flatten(0, 1)
    return _flat(RepetitionPenaltyLogitsProcessor(processor.penalty), prefixes, scores)


def _by_length(processor: Any, ids: Tensor, ends: Tensor, scores: Tensor) -> Tensor:
    """Call a processor once for all positions that have equally many tokens before them."""
    scores = scores.clone()
    for end in ends.unique().tolist():
        rows, positions = torch.nonzero(ends == end, as_tuple=True)
        scores[rows, positions] = processor(ids[rows, :end], scores[rows, positions])
    return scores
