"""The heads' run inside the forward: token loss against full logits, and where gradients go."""

from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig

from rl_plugins.functional.alignment import completion_states, mtp_labels
from rl_plugins.nn import (
    HeadRun,
    MTPHeads,
    MTPHeadsConfig,
    attach_mtp_heads,
    head_token_loss,
    logit_divisor,
    token_loss,
)

VOCABULARY, HIDDEN = 11, 6


def random_heads(num_heads: int = 3, hidden_size: int = HIDDEN) -> MTPHeads:
    heads = MTPHeads(MTPHeadsConfig(num_heads, hidden_size, 5))
    randomise(heads)
    return heads


def randomise(heads: MTPHeads) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in heads.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5)


def naive_token_loss(
    heads: MTPHeads, hidden: Tensor, labels: Tensor, lm_head: nn.Linear, temperature: float
) -> list[Tensor]:
    losses = []
    for k, head in enumerate(heads):
        logits = F.linear(head(hidden), lm_head.weight.detach(), None if lm_head.bias is None else lm_head.bias)
        rows = logits.flatten(0, 1) / temperature
        losses.append(F.cross_entropy(rows, labels[..., k].flatten(), ignore_index=-100, reduction="sum"))
    return losses


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [2**23, 2 * VOCABULARY])
def test_token_loss_is_cross_entropy_of_full_logits(
    bias: bool, temperature: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_loss, "CHUNK_LOGITS", chunk)
    torch.manual_seed(0)
    heads, lm_head = random_heads(), nn.Linear(HIDDEN, VOCABULARY, bias=bias)
    hidden = torch.randn(2, 5, HIDDEN, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (2, 5, 3))
    labels[0, 3:] = -100  # ragged, with a hole
    labels[1, 2, 0] = -100
    labels[..., 2] = -100  # head 3 has no label at all
    losses, counts = head_token_loss(heads, hidden, labels, lm_head, temperature=temperature)
    assert counts.tolist() == [7.0, 8.0, 0.0]
    assert losses[2].item() == 0.0
    naive = torch.stack(naive_token_loss(heads, hidden, labels, lm_head, temperature))
    torch.testing.assert_close(losses, naive, atol=1e-5, rtol=1e-5)
    weights = torch.tensor([1.0, -2.0, 3.0])
    inputs = [hidden, *(p for name, p in heads.named_parameters() if "value" not in name)]
    got = torch.autograd.grad((losses * weights).sum(), inputs)
    expected = torch.autograd.grad((naive * weights).sum(), inputs)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, atol=1e-5, rtol=1e-4)


def test_the_lm_head_gets_no_gradient_and_is_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, lm_head, gathered = random_heads(1), nn.Linear(HIDDEN, VOCABULARY), []

    @contextmanager
    def gather(params: Any) -> Any:
        gathered.extend(params)
        yield params

    monkeypatch.setattr(token_loss, "whole_parameters", gather)
    losses, _ = head_token_loss(heads, torch.randn(1, 2, HIDDEN), torch.zeros(1, 2, 1, dtype=torch.long), lm_head)
    losses.sum().backward()
    assert lm_head.weight.grad is None and lm_head.bias.grad is None
    assert gathered == [lm_head.weight, lm_head.bias]
    assert all(p.grad is not None for name, p in heads.named_parameters() if "value" not in name)


def test_autocast_computes_in_bf16_and_sums_in_float32() -> None:
    torch.manual_seed(0)
    heads, lm_head = random_heads(2), nn.Linear(HIDDEN, VOCABULARY, bias=False)
    hidden, labels = torch.randn(2, 5, HIDDEN), torch.randint(0, VOCABULARY, (2, 5, 2))
    exact, _ = head_token_loss(heads, hidden, labels, lm_head)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough, _ = head_token_loss(heads, hidden, labels, lm_head)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.02, atol=0)
    assert not torch.equal(rough, exact)


# Scale of the logits


@pytest.mark.parametrize(
    ("config", "temperature", "divisor"),
    [
        ({}, 1.0, 1.0),
        ({}, 0.5, 0.5),
        ({"logits_scaling": 8.0}, 1.0, 8.0),  # Granite: logits / 8
        ({"logits_scaling": 8.0}, 0.5, 4.0),
        ({"logit_scale": 0.0625}, 1.0, 16.0),  # Cohere: logits * 1/16
        ({"lm_head_multiplier": 0.25}, 2.0, 8.0),  # Falcon-H1
        ({"final_logit_softcapping": None}, 1.0, 1.0),
    ],
)
def test_logit_divisor(config: dict[str, Any], temperature: float, divisor: float) -> None:
    assert logit_divisor(PretrainedConfig(**config), temperature) == divisor


def test_logit_divisor_reads_the_text_config_and_refuses_caps() -> None:
    inner = PretrainedConfig(logits_scaling=2.0)
    assert logit_divisor(SimpleNamespace(get_text_config=lambda: inner)) == 2.0  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="caps its logits .*Leave the token loss out"):
        logit_divisor(PretrainedConfig(final_logit_softcapping=30.0))


# The run inside a model

IDS = torch.tensor([[3, 12, 3, 14, 7, 8, 9], [4, 12, 4, 14, 1, 0, 0]])
NUM_TOKENS = 3


def run_pass(
    model: Any, loss: Callable[[HeadRun], Tensor], **options: Any
) -> tuple[HeadRun, dict[str, Tensor], dict[str, Tensor]]:
    """Run the model with its heads, back-propagate `loss`; gradients of the trunk and of the heads."""
    heads = model.mtp_heads
    real = IDS.masked_fill(IDS == 0, -100)
    labels = completion_states(mtp_labels(real, heads.config.num_heads), NUM_TOKENS)
    model.zero_grad()
    with heads.running(
        lambda hidden: completion_states(hidden, NUM_TOKENS),
        lm_head=model.get_output_embeddings(),
        labels=labels,
        **options,
    ) as record:
        model(input_ids=IDS)
    loss(record).backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    return (
        record,
        {n: g for n, g in grads.items() if "mtp_heads" not in n},
        {n: g for n, g in grads.items() if "mtp_heads" in n},
    )


def total(grads: dict[str, Tensor]) -> float:
    return sum(g.abs().sum().item() for g in grads.values())


@pytest.fixture
def model(tiny_model: Callable[..., Any]) -> Any:
    """Tiny model, untied, with two random heads."""
    model = tiny_model(tie_word_embeddings=False)
    randomise(attach_mtp_heads(model, 2))
    return model


def value_sum(record: HeadRun) -> Tensor:
    assert record.values is not None
    return record.values.sum()


def token_sum(record: HeadRun) -> Tensor:
    assert record.token_losses is not None
    return record.token_losses.sum()


def test_values_and_losses_are_those_of_the_selected_states(model: Any) -> None:
    record, _, _ = run_pass(model, value_sum)
    hidden = model.base_model(input_ids=IDS).last_hidden_state[:, -4:-1]
    assert record.values is not None and record.token_counts is not None and record.token_losses is not None
    torch.testing.assert_close(record.values, model.mtp_heads(hidden))
    # Completions 7 8 9 and <eos>: head 1 forecasts 8, 9; head 2 forecasts 9.
    assert record.token_counts.tolist() == [2.0, 1.0]
    logits = [model.lm_head(head(hidden)).log_softmax(-1) for head in model.mtp_heads]
    expected = [-(logits[0][0, 0, 8] + logits[0][0, 1, 9]), -logits[1][0, 0, 9]]
    torch.testing.assert_close(record.token_losses, torch.stack(expected))


def test_detached_token_loss_leaves_the_trunk_alone(model: Any) -> None:
    _, trunk, heads = run_pass(model, token_sum, detach_tokens=True)
    assert total(trunk) == 0.0
    assert total({n: g for n, g in heads.items() if "value" not in n}) > 0
    _, trunk, _ = run_pass(model, token_sum, detach_tokens=False)
    assert total({n: g for n, g in trunk.items() if n.startswith("model.")}) > 0
    assert trunk["lm_head.weight"].abs().sum() == 0


def test_value_gradient_scale(model: Any) -> None:
    _, trunk_full, heads_full = run_pass(model, value_sum)
    _, trunk_half, heads_half = run_pass(model, value_sum, value_grad_scale=0.5)
    _, trunk_none, heads_none = run_pass(model, value_sum, value_grad_scale=0.0)
    assert total(trunk_full) > 0 and total(trunk_none) == 0.0 and total(heads_none) > 0
    for name in trunk_full:
        torch.testing.assert_close(trunk_half[name], trunk_full[name] / 2)
    for name in heads_full:
        assert torch.equal(heads_none[name], heads_full[name]) and torch.equal(heads_half[name], heads_full[name])


def test_value_gradient_clamp_is_per_token_and_counted(model: Any) -> None:
    record, _, _ = run_pass(model, value_sum)
    norms, clamped, tokens = record.stats.totals(torch.device("cpu")).tolist()
    assert clamped == 0 and tokens == 6
    record, trunk, _ = run_pass(model, value_sum, value_grad_norm=torch.tensor(norms / 6))
    clamped_norms, clamped, tokens = record.stats.totals(torch.device("cpu")).tolist()
    assert clamped_norms == pytest.approx(6.0, rel=1e-5)  # in units of the limit, which is the mean norm
    assert 0 < clamped < 6 and tokens == 6 and total(trunk) > 0


def test_only_the_first_forward_counts(model: Any) -> None:
    with model.mtp_heads.running(lambda hidden: hidden) as record:
        assert not record.is_filled
        model(input_ids=IDS)
        first = record.values
        model(input_ids=IDS.flip(1))
    assert record.values is first and record.token_losses is None
