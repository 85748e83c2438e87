"""Completions of prompts by a model's own `generate`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from rl_plugins.nn.attachment import base_model_of
from rl_plugins.nn.sharding import gathers_in_forward

if TYPE_CHECKING:
    from rl_plugins.rollouts.speculative.decoder import SpeculativeDecoder


class Completions(NamedTuple):
    """Prompts, padded on the left, and completions, padded on the right.

    Attributes:
        prompt_ids: (B, P).
        prompt_mask: (B, P), 1 for real tokens.
        completion_ids: (B, T), the end-of-text token included.
        completion_mask: (B, T), 1 up to and including the first end-of-text token.
        ended: (B,), whether the completion ended by itself instead of at the longest length.
        tool_mask: (B, T), 0 for tokens of an environment; `None` where all are the policy's.
        rewards: (B, T), rewards after each token besides those of reward functions; NaN where nothing is paid.
        truncated: (B,), whether an environment cut an episode that would go on.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    ended: Tensor
    tool_mask: Tensor | None = None
    rewards: Tensor | None = None
    truncated: Tensor | None = None

    def policy_lists(self) -> list[list[int]] | None:
        """Tell for the real tokens of every completion whether the policy chose them; `None` where it chose all."""
        if self.tool_mask is None:
            return None
        rows = zip(self.tool_mask, self.completion_mask, strict=True)
        return [own[mask.bool()].tolist() for own, mask in rows]

    def token_lists(self) -> list[list[int]]:
        """List the real tokens of every completion."""
        return [ids[mask.bool()].tolist() for ids, mask in zip(self.completion_ids, self.completion_mask, strict=True)]


def pad_left(rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Pad token lists on the left, and return token ids and mask (B, P)."""
    width = max(len(row) for row in rows)
    ids = [[pad_token_id] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def eos_token_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    """List the tokens that end a completion: those of the model's generation config, and the tokenizer's.

    Raises:
        ValueError: If there are none.
    """
    config = base_model_of(model).generation_config
    found = None if config is None else config.eos_token_id
    ids = found if isinstance(found, list) else [found]
    known = [token for token in [*ids, tokenizer.eos_token_id] if token is not None]
    if not known:
        raise ValueError("Neither the model's generation config nor the tokenizer has an eos_token_id; set one.")
    return sorted(set(known))


def until_eos(completion_ids: Tensor, eos: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mask the tokens up to and including the first end-of-text token (B, T), and tell whether there is one (B,)."""
    is_eos = torch.isin(completion_ids, torch.tensor(list(eos), device=completion_ids.device)).long()
    return (is_eos.cumsum(1) - is_eos == 0).long(), is_eos.any(1)


class _Steps(StoppingCriteria):
    """Stops nothing, but tells a listener how far decoding is."""

    def __init__(self, prompt_length: int, listener: Any) -> None:
        self.prompt_length, self.listener = prompt_length, listener

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.listener(input_ids.shape[1] - self.prompt_length)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def generate_completions(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    eos: Sequence[int],
    max_completion_length: int,
    sampling: Mapping[str, Any],
    listener: Any = None,
    decoder: "SpeculativeDecoder | None" = None,
) -> Completions:
    """Sample one completion of every prompt, in evaluation mode.

    Args:
        model: Causal LM, or a PEFT model around one; observers of its heads see every decoding step.
        prompts: B token lists, each at least one token long.
        pad_token_id: Token of the padding.
        eos: Tokens that end a completion.
        max_completion_length: T at most, in tokens.
        sampling: `temperature`, `top_p`, `top_k`, `min_p`, `repetition_penalty`, or any other field of transformers'
            `GenerationConfig`.
        listener: Called with the number of tokens after each decoding step.
        decoder: Decodes speculatively; by default the model's own loop decodes.

    Raises:
        ValueError: If a prompt is empty.
    """
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("A prompt has no tokens: check the tokenizer and the `prompt` column of the data.")
    base: Any = base_model_of(model)
    ids, mask = pad_left(prompts, pad_token_id, base.device)
    config = GenerationConfig(
        # Not compiled, as in TRL: observers of the heads keep hidden states, whose memory a captured graph would use
        # again.
        **{"do_sample": True, "top_k": 0, "top_p": 1.0, "disable_compile": True, **sampling},
        max_new_tokens=max_completion_length,
        pad_token_id=pad_token_id,
        eos_token_id=list(eos),
        bos_token_id=None,
    )
    steps: list[StoppingCriteria] = []
    if decoder is not None:
        decoder.listener = listener
    elif listener is not None:
        steps = [_Steps(ids.shape[1], listener)]
    was_training = model.training
    model.eval()
    try:
        generate: Any = model.generate
        output = generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList(steps),
            custom_generate=decoder,
            # Where every forward gathers from all ranks, all ranks must go on until the last one ends.
            synced_gpus=gathers_in_forward(model),
        )
    finally:
        model.train(was_training)
    completion_ids = output[:, ids.shape[1] :]
    completion_mask, ended = until_eos(completion_ids, eos)
    return Completions(
        ids, mask, completion_ids.masked_fill(completion_mask == 0, pad_token_id), completion_mask, ended
    )
