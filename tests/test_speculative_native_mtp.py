"""Native MTP layers draft for speculative decoding, in batches, as they would without a cache."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rl_plugins.nn import attach_native_mtp
from rl_plugins.rollouts import SpeculativeDecoder
from rl_plugins.rollouts.speculative.decoding import Decoding
from rl_plugins.rollouts.speculative.drafters import SequentialDrafter

from .helpers.moe_models import make_moe_model

PROMPTS = [[7, 3, 9, 12, 5], [21], [4, 4, 30], [11, 2, 8, 6]]


def make(family: str, num_layers: int) -> Any:
    """A random model whose greedy choices vary, in float64, with native layers that often agree with it."""
    model = make_moe_model(family)
    model.set_experts_implementation("eager")
    model.set_attn_implementation("sdpa")
    for param in model.parameters():
        if param.ndim > 1:
            param.data.mul_(3.0)
    model = model.double().eval()
    native = attach_native_mtp(model, num_layers)
    for layer in native.layers:
        # Little but the embedding of the token ahead: with tied scales it often leads where the trunk goes.
        layer.eh_proj.weight.data.normal_(std=0.3, generator=torch.Generator().manual_seed(3))
    return model


def batch(prompts: list[list[int]]) -> dict[str, Tensor]:
    width = max(map(len, prompts))
    ids = [[0] * (width - len(row)) + row for row in prompts]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=["ragged", "single"])
def test_greedy_is_stock_greedy(family: str, num_layers: int, prompts: list[list[int]]) -> None:
    model = make(family, num_layers)
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**batch(prompts), **options)
    decoder = SpeculativeDecoder(draft_cost=0.0)
    assert torch.equal(model.generate(**batch(prompts), **options, custom_generate=decoder), expected)
    assert decoder.last is not None and decoder.last.statistics is not None
    assert len(decoder.last.statistics.acceptance) == num_layers


@pytest.mark.slow
def test_drafts_are_those_of_a_pass_without_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first draft of every row and step: rejected tokens, padding and rows that left must not show in it."""
    model = make("glm4_moe", 2)
    native = model.native_mtp
    states: list[Tensor] = []
    compared = 0

    def checked(self: SequentialDrafter, num_drafts: int, choose: Any) -> None:
        seen: list[Tensor] = []
        self._advance(num_drafts, lambda logits: seen.append(logits) or choose(logits))
        states.append(seen[0][:, 0])

    monkeypatch.setattr(SequentialDrafter, "propose", checked)
    settled: list[tuple[Tensor, Tensor]] = []
    decoder = SpeculativeDecoder(draft_cost=0.0)
    step = Decoding._step

    def watched(self: Decoding, num_drafts: int) -> None:
        if num_drafts:
            settled.append((self.active.clone(), self.lengths.clone()))
        step(self, num_drafts)

    monkeypatch.setattr(Decoding, "_step", watched)
    torch.manual_seed(0)
    inputs = batch(PROMPTS)
    output = model.generate(
        **inputs,
        do_sample=True,
        max_new_tokens=14,
        pad_token_id=0,
        custom_generate=decoder,
        return_dict_in_generate=True,
    )
    width = inputs["input_ids"].shape[1]
    for logits, (rows, lengths) in zip(states, settled, strict=True):
        for i, row in enumerate(rows.tolist()):
            start = int((inputs["attention_mask"][row] == 0).sum())
            tokens = output.sequences[row : row + 1, start : int(lengths[row])]
            with torch.no_grad():
                hidden = model.model(tokens[:, :-1]).last_hidden_state
                positions = torch.arange(1, tokens.shape[1])[None]
                deep = native.run(1, hidden, tokens[:, 1:], positions, None)
            torch.testing.assert_close(logits[i], native.logits(deep[0, -1]), rtol=1e-9, atol=1e-9)
            compared += 1
    assert compared > 20 and width == 5
    assert output.statistics.tokens_per_step >= 1.0
