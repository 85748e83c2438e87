"""The heads' run inside the forward: token loss against full logits, and where gradients go."""

from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
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
    MTPHeadsConfig,
    ParallelHeads,
    attach_mtp_heads,
    head_token_loss,
    logit_cap,
    logit_divisor,
    token_loss,
)

VOCABULARY, HIDDEN = 11, 6


def random_heads(num_heads: int = 3, hidden_size: int = HIDDEN) -> ParallelHeads:
    heads = ParallelHeads(MTPHeadsConfig(num_heads, hidden_size, 5))
    randomise(heads)
    return heads


def randomise(heads: ParallelHeads) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in heads.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5)


def naive_token_loss(
    heads: ParallelHeads, hidden: Tensor, labels: Tensor, lm_head: nn.Linear, temperature: float
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
    losses, counts = head_token_loss(partial(heads.token_features, hidden), labels, lm_head, temperature=temperature)
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
    states = torch.randn(1, 2, HIDDEN)
    labels = torch.zeros(1, 2, 1, dtype=torch.long)
    losses, _ = head_token_loss(partial(heads.token_features, states), labels, lm_head)
    losses.sum().backward()
    assert lm_head.weight.grad is None and lm_head.bias.grad is None
    assert gathered == [lm_head.weight, lm_head.bias]
    assert all(p.grad is not None for name, p in heads.named_parameters() if "value" not in name)


def test_autocast_computes_in_bf16_and_sums_in_float32() -> None:
    torch.manual_seed(0)
    heads, lm_head = random_heads(2), nn.Linear(HIDDEN, VOCABULARY, bias=False)
    hidden, labels = torch.randn(2, 5, HIDDEN), torch.randint(0, VOCABULARY, (2, 5, 2))
    exact, _ = head_token_loss(partial(heads.token_features, hidden), labels, lm_head)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough, _ = head_token_loss(partial(heads.token_features, hidden), labels, lm_head)
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


def test_logit_divisor_and_cap_read_the_text_config() -> None:
    inner = PretrainedConfig(logits_scaling=2.0, final_logit_softcapping=30.0)
    outer: Any = SimpleNamespace(get_text_config=lambda: inner)
    assert logit_divisor(outer) == 2.0 and logit_cap(outer) == 30.0
    assert logit_cap(PretrainedConfig(logits_soft_cap=20.0)) == logit_cap(PretrainedConfig(output_logit_soft_cap=20))
    assert logit_cap(PretrainedConfig()) is None and logit_cap(PretrainedConfig(final_logit_softcapping=None)) is None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [2**23, 2 * VOCABULARY])
def test_token_loss_of_capped_logits(bias: bool, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 2: the model's cap stands before the temperature."""
    monkeypatch.setattr(token_loss, "CHUNK_LOGITS", chunk)
    torch.manual_seed(0)
    heads, lm_head = random_heads(2), nn.Linear(HIDDEN, VOCABULARY, bias=bias)
    hidden = torch.randn(2, 5, HIDDEN, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (2, 5, 2))
    labels[0, 3:] = -100
    found, counts = head_token_loss(partial(heads.token_features, hidden), labels, lm_head, temperature=0.7, cap=1.5)
    expected = []
    for k, head in enumerate(heads):
        logits = 1.5 * torch.tanh(F.linear(head(hidden), lm_head.weight.detach(), lm_head.bias) / 1.5) / 0.7
        expected.append(F.cross_entropy(logits.flatten(0, 1), labels[..., k].flatten(), reduction="sum"))
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-5)
    assert counts.tolist() == [8.0, 8.0]
    inputs = [hidden, heads.heads[0].down.weight, heads.heads[1].up.weight]
    for g, e in zip(
        torch.autograd.grad(found.sum(), inputs),
        torch.autograd.grad(torch.stack(expected).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(g, e, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("ahead", [0, 1])
def test_heads_learn_the_distribution_of_the_model(cap: float | None, ahead: int) -> None:
    """Of the token that a head is to predict, as the model has it in the state where that token was chosen."""
    torch.manual_seed(0)
    heads, lm_head = random_heads(2), nn.Linear(HIDDEN, VOCABULARY)
    hidden, labels = torch.randn(2, 6, HIDDEN, requires_grad=True), torch.randint(0, VOCABULARY, (2, 6, 2))
    labels[:, 6 - ahead :, 0], labels[:, 6 - 2 * ahead :, 1], labels[0, 1] = -100, -100, -100
    losses, counts = head_token_loss(
        partial(heads.token_features, hidden),
        labels,
        lm_head,
        temperature=0.7,
        cap=cap,
        teacher=hidden.detach(),
        ahead=ahead,
    )

    def log_probs(x: Tensor) -> Tensor:
        logits = F.linear(x, lm_head.weight.detach(), lm_head.bias.detach())
        return ((logits if cap is None else cap * torch.tanh(logits / cap)) / 0.7).log_softmax(-1)

    expected = torch.zeros(2)
    for k, head in enumerate(heads, start=1):
        for row, column in torch.nonzero(labels[..., k - 1] != -100).tolist():
            teacher = log_probs(hidden[row, column + k * ahead].detach()).exp()
            one = F.one_hot(torch.tensor(k - 1), 2)
            expected = expected - one * (teacher * log_probs(head(hidden[row, column]))).sum()
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    assert counts.tolist() == [11.0 - 2 * ahead, 11.0 - 4 * ahead]
    inputs = [hidden, heads.heads[0].down.weight]
    found = torch.autograd.grad(losses.sum(), inputs)
    for g, e in zip(found, torch.autograd.grad(expected.sum(), inputs), strict=True):
        torch.testing.assert_close(g, e, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_share_of_the_labels_is_unbiased() -> None:
    """Of 7 and 3 labels a quarter is 2 and 1: the mean over draws is the whole sum, and its gradient the whole one."""
    torch.manual_seed(0)
    heads, lm_head = random_heads(2), nn.Linear(HIDDEN, VOCABULARY, bias=False)
    hidden, labels = torch.randn(1, 7, HIDDEN), torch.randint(0, VOCABULARY, (1, 7, 2))
    labels[0, 3:, 1] = -100
    asked: list[int] = []

    def features(head: int, chosen: tuple[Tensor, Tensor]) -> Tensor:
        asked.append(len(chosen[0]))
        return heads.token_features(hidden, head, chosen)

    whole, counts = head_token_loss(features, labels, lm_head)
    (gradient,) = torch.autograd.grad(whole.sum(), [heads.heads[0].down.weight])
    draws, gradients = [], []
    for _ in range(300):
        torch.rand(1)  # another state of the global generator, which the draws read and leave alone
        state = torch.get_rng_state()
        losses, drawn = head_token_loss(features, labels, lm_head, share=0.25)
        assert torch.equal(drawn, counts) and torch.equal(torch.get_rng_state(), state)
        draws.append(losses.detach())
        gradients.append(torch.autograd.grad(losses.sum(), [heads.heads[0].down.weight])[0])
    assert asked[:4] == [7, 3, 2, 1]
    spread = torch.stack(draws).std(0) / 300**0.5
    assert ((torch.stack(draws).mean(0) - whole).abs() < 4 * spread).all() and (spread > 0).all()
    errors, spreads = torch.stack(gradients).mean(0) - gradient, torch.stack(gradients).std(0) / 300**0.5
    assert (errors.abs() < 5 * spreads + 1e-7).all()


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
