"""Sequential heads: equal to transformers' own layers, blind to padding, their loss by hand, gradients, and files."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from rl_plugins.functional.alignment import mtp_labels
from rl_plugins.nn import (
    HeadRun,
    MTPHeads,
    MTPHeadsConfig,
    ParallelHeads,
    PolyakTarget,
    SequentialHeads,
    attach_mtp_heads,
    load_mtp_heads,
    token_loss,
)
from rl_plugins.nn.attaching import prepare_mtp_heads

from .helpers.moe_models import make_moe_model
from .helpers.sequential_heads import (
    RELEASED,
    doubled,
    features_of,
    slow_features,
    slow_losses,
    transformers_layers,
    trunk_states,
)

K, LENGTH = 2, 9
IDS = torch.randint(2, 40, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def attach(model: Any, num_heads: int = K, **options: Any) -> SequentialHeads:
    heads = attach_mtp_heads(model, num_heads, head_type="sequential", **options)
    assert isinstance(heads, SequentialHeads)
    return heads


def make(family: str = "glm4_moe", num_heads: int = K, **overrides: Any) -> tuple[Any, SequentialHeads]:
    """A model in float64 with heads, in evaluation mode."""
    model = doubled(make_moe_model(family, **overrides))
    return model, attach(model, num_heads)


def make_attending(family: str, attention: str) -> tuple[Any, SequentialHeads]:
    """A model in float32 with an implementation of attention, in evaluation mode."""
    model = make_moe_model(family).eval()
    model.set_attn_implementation(attention)
    return model, attach(model)


def run_all(heads: SequentialHeads, hidden: Tensor, ids: Tensor) -> list[Tensor]:
    """Every depth at the positions at which it has read enough: depth k from token k on."""
    found = []
    for depth in range(1, heads.config.num_heads + 1):
        positions = torch.arange(depth, ids.shape[1]).expand(len(ids), -1)
        hidden = heads.run(depth, hidden[:, :-1], ids[:, depth:], positions, None)
        found.append(hidden)
    return found


def randomise_values(heads: SequentialHeads) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in heads.value_heads.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))


def run_losses(
    model: Any,
    ids: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    **options: Any,
) -> HeadRun:
    """One forward of a model with its heads, which learn the labels (B, S) of the row's tokens."""
    heads = model.mtp_heads
    labels = mtp_labels(labels, heads.config.num_heads, position_ids, ahead=heads.ahead)
    with heads.running(lambda x: x, lm_head=model.lm_head, labels=labels, **options) as run:
        model(input_ids=ids, attention_mask=mask, position_ids=position_ids, use_cache=False)
    return run


def padded(x: Tensor, side: str, pad: int, value: int) -> Tensor:
    return nn.functional.pad(x, (pad, 0) if side == "left" else (0, pad), value=value)


# Depth modules


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", RELEASED)
def test_run_equals_transformers(family: str, attention: str) -> None:
    model, heads = make_attending(family, attention)
    mtp = transformers_layers(model, heads)
    hidden = expected = trunk_states(model, IDS)
    for depth in range(1, K + 1):
        positions, tokens = torch.arange(depth, LENGTH).expand(2, -1), IDS[:, depth:]
        hidden = heads.run(depth, hidden[:, :-1], tokens, positions, torch.ones(2, LENGTH - depth))
        expected = mtp.forward_layer(depth - 1, expected[:, :-1], positions, None, input_ids=tokens)
        torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(model.lm_head(hidden), mtp._project_to_logits(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", RELEASED)
def test_states_stand_where_the_last_token_that_was_read_stands(family: str) -> None:
    """Zero before a depth has read enough, and then what `run` makes there."""
    model, heads = make(family, 3)
    features = features_of(model, heads, IDS)
    assert features.shape == (2, LENGTH, 3, 32)
    for k, states in enumerate(run_all(heads, trunk_states(model, IDS), IDS), 1):
        assert not features[:, :k, k - 1].any()
        torch.testing.assert_close(features[:, k:, k - 1], states, rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", RELEASED)
def test_padding_changes_nothing(family: str, attention: str, side: str) -> None:
    model, heads = make_attending(family, attention)
    alone = features_of(model, heads, IDS)
    mask = padded(torch.ones_like(IDS), side, 3, 0)
    for garbage in (5, 33):
        ids = padded(IDS, side, 3, garbage)
        hidden = trunk_states(model, ids, mask)
        hidden = torch.where(mask.bool()[..., None], hidden, float(garbage))
        found = heads.deepen(hidden, ids, mask, None)
        assert not found[mask == 0].any()
        # Rotated elsewhere, in float32.
        torch.testing.assert_close(found[mask == 1].view_as(alone), alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gradients_of_padded_rows_are_those_of_the_rows(attention: str, side: str) -> None:
    """Slots that attend to nothing, at the beginning of a row, send none back."""
    model, heads = make_attending("glm4_moe", attention)
    mask = padded(torch.ones_like(IDS), side, 3, 0)
    found = []
    for ids, seen in ((IDS, None), (padded(IDS, side, 3, 7), mask)):
        model.zero_grad()
        features_of(model, heads, ids, seen).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", RELEASED)
def test_cache_with_holes(family: str, attention: str) -> None:
    """Slots that were drafted and thrown away stay in the cache, masked out."""
    model, heads = make_attending(family, attention)
    states = [trunk_states(model, IDS), *run_all(heads, trunk_states(model, IDS), IDS)]
    cache = DynamicCache()
    for depth in range(1, K + 1):
        length = LENGTH - depth
        hidden, tokens = states[depth - 1][:, :length], IDS[:, depth:]
        positions = torch.arange(depth, LENGTH).expand(2, -1)
        noise = torch.full_like(hidden[:, :2], 7.0)
        first = heads.run(depth, hidden[:, :4], tokens[:, :4], positions[:, :4], torch.ones(2, 4), cache)
        mask = torch.ones(2, 6)
        heads.run(depth, noise, tokens[:, :2], positions[:, :2], mask, cache)
        mask = torch.cat([mask, torch.ones(2, length - 4)], dim=1)
        mask[:, 4:6] = 0  # the hole
        rest = heads.run(depth, hidden[:, 4:], tokens[:, 4:], positions[:, 4:], mask, cache)
        torch.testing.assert_close(torch.cat([first, rest], dim=1), states[depth], rtol=0, atol=2e-5)
        assert cache.get_seq_length(depth - 1) == length + 2


def test_run_refuses_other_depths_and_masks() -> None:
    model, heads = make()
    hidden, positions = trunk_states(model, IDS), torch.arange(LENGTH).expand(2, -1)
    with pytest.raises(ValueError, match="depth=3: the model has sequential heads of depth 1 to 2"):
        heads.run(3, hidden, IDS, positions, None)
    cache = DynamicCache()
    heads.run(1, hidden, IDS, positions, torch.ones(2, LENGTH), cache)
    with pytest.raises(ValueError, match="covers 9 slots, but cache and input have 18"):
        heads.run(1, hidden, IDS, positions, torch.ones(2, LENGTH), cache)


def test_rows_without_token_ids_or_with_a_prepared_mask_are_refused(tiny_model: Any) -> None:
    model = tiny_model()
    heads = attach(model)
    with heads.watching(heads.states), pytest.raises(ValueError, match="called without input_ids. Call it with token"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    with heads.watching(heads.states), pytest.raises(ValueError, match="prepared one. Give it the mask of the tokens"):
        model(input_ids=IDS[:1, :3] % 16, attention_mask=torch.zeros(1, 1, 3, 3))


def test_rows_that_are_too_short_for_a_depth(tiny_model: Any) -> None:
    """The value is the bias there, and nothing reads the features."""
    model = tiny_model()
    heads = attach(model, 3)
    randomise_values(heads)
    ids = torch.tensor([[3, 4]])
    with heads.running(lambda x: x) as run:
        model(input_ids=ids)
    assert run.values is not None and run.values.shape == (1, 2, 3)
    biases = [head.bias.item() for head in heads.value_heads]
    assert run.values[0, 0].tolist() == biases and run.values[0, 1, 1:].tolist() == biases[1:]
    assert run.values[0, 1, 0].item() != biases[0]


def test_values_are_a_norm_and_a_projection_of_the_features(tiny_model: Any) -> None:
    model = tiny_model().double()
    heads = attach(model, 2)
    assert torch.equal(heads(features_of(model, heads, IDS % 16)), torch.zeros(2, LENGTH, 2)), "before any training"
    randomise_values(heads)
    expected = slow_features(model, heads, IDS % 16).float()
    expected = expected * torch.rsqrt(expected.square().mean(-1, keepdim=True) + 1e-6)
    with heads.running(lambda x: x[:, 2:5]) as run:
        model(input_ids=IDS % 16)
    assert run.values is not None and run.values.dtype == torch.float32 and run.token_losses is None
    for k, head in enumerate(heads.value_heads):
        by_hand = (expected[:, 2:5, k] * head.rmsnorm_weight) @ head.weight + head.bias
        torch.testing.assert_close(run.values[..., k], by_hand.float(), rtol=0, atol=1e-5)
    target = PolyakTarget(heads)
    assert sum(p.numel() for p in target.parameters()) == 2 * (32 + 32 + 1), "the value heads alone"
    torch.testing.assert_close(target(features_of(model, heads, IDS % 16))[:, 2:5], run.values)


# Attaching


@pytest.mark.parametrize("family", RELEASED)
def test_own_weights_alone_are_registered(family: str) -> None:
    model = make_moe_model(family)
    before, keys = dict(model.named_parameters()), set(model.state_dict())
    heads = attach(model)
    added = {name: p for name, p in model.named_parameters() if name not in before}
    assert all(name.startswith(("mtp_heads.layers.", "mtp_heads.value_heads.")) for name in added)
    assert {id(p) for p in added.values()}.isdisjoint(map(id, before.values()))
    assert sum(p.numel() for p in added.values()) == sum(p.numel() for p in heads.parameters())
    assert model.config.num_mtp_layers == K
    assert MTPHeads.detach(model) is heads and MTPHeads.of(model) is None
    assert set(model.state_dict()) == keys and not model._keys_to_ignore_on_save


@pytest.mark.parametrize("family", RELEASED)
def test_new_layers_are_seeded_and_initialised_as_the_models_own(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [make_moe_model(family, num_hidden_layers=2) for _ in range(3)]
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    first, same, other = (
        attach_mtp_heads(m, heads=SequentialHeads(m, 2, seed=seed)) for m, seed in zip(models, (1, 1, 2), strict=True)
    )
    assert torch.equal(torch.rand(1), expected) and not seeds, "generators of GPUs included"
    for name, p in first.named_parameters():
        assert torch.equal(p, same.state_dict()[name])
        constant = bool((p == p.flatten()[0]).all())  # norms and the weights of values
        assert torch.equal(p, other.state_dict()[name]) == constant
        if p.ndim > 1:
            assert 0.15 < p.std() < 0.25, name  # initializer_range is 0.2, the routers' too
    assert not torch.equal(first.layers[0].eh_proj.weight, first.layers[1].eh_proj.weight)
    assert not first.layers[0].mtp_block.mlp.gate.e_score_correction_bias.any()


def test_a_copy_of_the_model_uses_its_own_embedding() -> None:
    model, heads = make()
    hidden = trunk_states(model, IDS)
    expected = run_all(heads, hidden, IDS)[-1]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    found = MTPHeads.of(twin)
    assert isinstance(found, SequentialHeads) and found is not heads
    assert torch.equal(run_all(found, hidden, IDS)[-1], expected)
    assert not torch.equal(run_all(heads, hidden, IDS)[-1], expected)


def test_attach_refuses_what_does_not_fit(tiny_model: Any) -> None:
    model = make_moe_model("glm4_moe")
    with pytest.raises(ValueError, match="num_heads must be at least 1, got 0"):
        attach(model, 0)
    with pytest.raises(ValueError, match="inner_size=8 is the width of a parallel head.*leave it out"):
        attach(model, 1, inner_size=8)
    with pytest.raises(ValueError, match="Unknown head_type 'serial'; choose one of parallel, sequential"):
        attach_mtp_heads(model, head_type="serial")
    assert MTPHeads.of(model) is None
    assert attach_mtp_heads(model, 2, head_type="sequential").config == MTPHeadsConfig(2, 32, head_type="sequential")
    with pytest.raises(ValueError, match=r"has `mtp_heads` already. Call MTPHeads.of\(model\)"):
        attach(model)
    with pytest.raises(ValueError, match="comes with 2 MTP heads, but 3 are asked for. Set num_mtp_heads=2"):
        prepare_mtp_heads(model, 3, head_type="sequential")
    with pytest.raises(ValueError, match="comes with sequential MTP heads, but parallel.*mtp_head_type='sequential'"):
        prepare_mtp_heads(model, 2)
    heads = MTPHeads.detach(model)
    with pytest.raises(ValueError, match="made for hidden size 32, but Qwen3ForCausalLM has 16"):
        heads.attach(tiny_model(hidden_size=16))


# Token loss


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", RELEASED)
def test_token_loss_by_hand(family: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_loss, "CHUNK_LOGITS", 40 * 3)  # three positions at once
    model, heads = make(family)
    labels = IDS.clone()
    labels[0, :4], labels[1, 6] = -100, -100
    expected = slow_losses(model, heads, IDS, labels, temperature=1.5)
    ids, labels, mask = (
        padded(x, side, 2, value) for x, value in ((IDS, 3), (labels, -100), (torch.ones_like(IDS), 0))
    )
    run = run_losses(model, ids, labels, mask, divisor=1.5)
    torch.testing.assert_close(run.token_losses, torch.tensor(expected), rtol=1e-6, atol=0)
    # Depth k predicts the tokens 1 + k to 8, of which the first row has 4 to 8 and the second one not 6.
    assert run.token_counts is not None and run.token_counts.tolist() == [5 + 6, 5 + 5]


def test_packed_documents_are_those_alone() -> None:
    model, heads = make()
    randomise_values(heads)
    rows = [IDS[0:1, :5], IDS[1:2, :4]]
    alone = [run_losses(model, row, row) for row in rows]
    packed = torch.cat(rows, dim=1)
    run = run_losses(model, packed, packed, position_ids=torch.cat([torch.arange(5), torch.arange(4)])[None])
    assert run.token_losses is not None and run.token_counts is not None and run.values is not None
    torch.testing.assert_close(run.token_losses, sum(one.token_losses for one in alone), rtol=1e-6, atol=0)
    torch.testing.assert_close(run.values, torch.cat([one.values for one in alone], dim=1), rtol=0, atol=1e-5)
    assert run.token_counts.tolist() == [3 + 2, 2 + 1]


@pytest.mark.parametrize("detach", [True, False])
def test_gradient_of_the_token_loss(detach: bool) -> None:
    """Embedding and LM head are constants, and the trunk learns where it is asked to."""
    model, heads = make()
    model.train()
    run = run_losses(model, IDS, IDS, detach_tokens=detach, with_values=False)
    assert run.token_losses is not None and run.values is None
    run.token_losses.sum().backward()
    learned = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    of_layers = {f"mtp_heads.layers.{name}" for name, _ in heads.layers.named_parameters()}
    of_trunk = {name for name, _ in model.named_parameters() if name.startswith("model.")}
    assert learned == of_layers | (set() if detach else of_trunk)
    if detach:
        return
    # The embedding learns through the trunk alone: as if the depth modules read another table.
    found = model.get_input_embeddings().weight.grad.clone()
    model.zero_grad()
    hidden, trunk_table = trunk_states(model, IDS), model.get_input_embeddings()
    table = copy.deepcopy(trunk_table)
    model.set_input_embeddings(table)
    features = heads.deepen(hidden, IDS, None, None)
    for k in range(1, K + 1):
        logits = model.lm_head(features[:, k:-1, k - 1])
        nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, k + 1 :].flatten(), reduction="sum").backward(
            retain_graph=True
        )
    torch.testing.assert_close(trunk_table.weight.grad, found, rtol=1e-5, atol=1e-5)  # the loss is in float32
    assert table.weight.grad is None


def test_no_labels_cost_nothing_and_reach_every_parameter() -> None:
    """DDP waits for every parameter, also where a row is too short for any depth."""
    model, heads = make()
    for ids, labels in ((IDS, torch.full_like(IDS, -100)), (IDS[:, :1], IDS[:, :1])):
        model.zero_grad()
        run = run_losses(model, ids, labels, with_values=False)
        assert run.token_losses is not None and run.token_counts is not None
        assert run.token_losses.tolist() == [0.0, 0.0] and run.token_counts.tolist() == [0.0, 0.0]
        run.token_losses.sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in heads.layers.parameters())


# Values in training


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def test_every_parameter_learns_values() -> None:
    model, heads = make()
    randomise_values(heads)
    run = run_losses(model, IDS, IDS)
    assert run.values is not None
    found = gradients(model, run.values.square().sum())
    assert found.keys() == {name for name, _ in model.named_parameters() if name != "lm_head.weight"}
    heads.draft_only()
    run = run_losses(model, IDS, IDS, with_values=False)
    assert run.token_losses is not None and run.values is None
    found = gradients(model, run.token_losses.sum())
    assert found.keys() == {f"mtp_heads.layers.{name}" for name, _ in heads.layers.named_parameters()}


@pytest.mark.parametrize("detach", [True, False])
def test_the_layers_run_once_where_neither_loss_reaches_the_trunk(detach: bool) -> None:
    """Numbers and gradients are those of two runs."""
    model, heads = make()
    randomise_values(heads)
    calls: list[int] = []
    heads.layers[0].register_forward_pre_hook(lambda *args: calls.append(1))
    both = run_losses(model, IDS, IDS, value_grad_scale=0.0, detach_tokens=detach)
    assert len(calls) == (1 if detach else 2)
    assert both.values is not None and both.token_losses is not None
    found = gradients(model, both.values.square().sum() + both.token_losses.sum())
    alone = run_losses(model, IDS, torch.full_like(IDS, -100), value_grad_scale=0.0)
    tokens = run_losses(model, IDS, IDS, with_values=False, detach_tokens=detach)
    assert torch.equal(alone.values, both.values) and torch.equal(tokens.token_losses, both.token_losses)
    first, second = gradients(model, alone.values.square().sum()), gradients(model, tokens.token_losses.sum())
    assert found.keys() == first.keys() | second.keys()
    assert any(name.startswith("model.") for name in found) != detach
    for name, grad in found.items():
        expected = sum(part[name] for part in (first, second) if name in part)
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)  # values are in float32


def test_value_gradient_into_the_trunk_is_scaled_and_clamped() -> None:
    """The clamp is one of every state that the layers read, the prompt's included."""
    model, heads = make()
    randomise_values(heads)

    def backward(**options: Any) -> tuple[dict[str, Tensor], list[float]]:
        with heads.running(lambda x: x[:, 4:7], **options) as run:
            model(input_ids=IDS)
        assert run.values is not None
        found = gradients(model, run.values.square().sum())
        return found, run.stats.totals(torch.device("cpu")).tolist()

    full, (norms, clamped, tokens) = backward()
    # Depth 1 at positions up to 6 reads states up to 5, and attends to those of all positions before.
    assert (clamped, tokens) == (0.0, 2 * 6)
    half, _ = backward(value_grad_scale=0.5)
    none, _ = backward(value_grad_scale=0.0)
    for name, grad in full.items():
        if name.startswith("model."):
            torch.testing.assert_close(half[name], grad / 2)
            assert name not in none
        else:
            torch.testing.assert_close(half[name], grad)
            torch.testing.assert_close(none[name], grad)
    _, (norms, clamped, tokens) = backward(value_grad_norm=torch.tensor(norms / 12))
    assert norms == pytest.approx(12.0, rel=1e-5) and 0 < clamped < 12 and tokens == 12


def test_targets_judge_the_features_of_the_online_layers() -> None:
    model, heads = make()
    randomise_values(heads)
    target = PolyakTarget(heads, tau=0.5)
    with torch.no_grad():
        for p in heads.value_heads.parameters():
            p.add_(2.0)
    target.update(heads.value_path.parameters(), step=1)
    with heads.running(lambda x: x[:, 3:], target=target) as run:
        model(input_ids=IDS)
    assert run.target_values is not None and not run.target_values.requires_grad
    features = features_of(model, heads, IDS)[:, 3:].float()
    features = features * torch.rsqrt(features.square().mean(-1, keepdim=True) + 1e-6)
    for k, head in enumerate(heads.value_heads):
        norm, weight, bias = ((p - 1.0).float() for p in (head.rmsnorm_weight, head.weight, head.bias))
        by_hand = (features[:, :, k] * norm) @ weight + bias
        torch.testing.assert_close(run.target_values[..., k], by_hand, rtol=1e-5, atol=1e-5)


def test_the_heads_do_not_show_in_the_models_outputs() -> None:
    model, heads = make()
    call = partial(model, input_ids=IDS, labels=IDS, output_hidden_states=True, output_router_logits=True)
    plain = call()
    labels = mtp_labels(IDS, K, ahead=0)
    with heads.running(lambda x: x, lm_head=model.lm_head, labels=labels) as run:
        assert run.token_losses is None and not run.is_filled
        watched = call()
        first = run.token_losses
        model(input_ids=IDS)
    assert run.token_losses is first  # the first forward counts
    assert torch.equal(plain.logits, watched.logits) and torch.equal(plain.loss, watched.loss)
    assert len(plain.hidden_states) == len(watched.hidden_states) == 4
    assert len(plain.router_logits) == len(watched.router_logits)
    assert heads.observer is None and heads.inputs is None


@pytest.mark.parametrize("attach_first", [True, False])
def test_gradient_checkpointing(attach_first: bool) -> None:
    """The layers recompute as the trunk does, whichever came first."""
    grads = []
    for checkpointing in (False, True):
        model = doubled(make_moe_model("glm4_moe")).train()
        if checkpointing and not attach_first:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        heads = attach(model)
        if checkpointing and attach_first:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        calls: list[int] = []
        heads.layers[0].mtp_block.mlp.register_forward_pre_hook(lambda *args, calls=calls: calls.append(1))
        run = run_losses(model, IDS, IDS, detach_tokens=False, with_values=False)
        assert run.token_losses is not None
        run.token_losses.sum().backward()
        assert len(calls) == 1 + checkpointing
        grads.append([p.grad for p in (*heads.layers.parameters(), model.model.layers[0].mlp.up_proj.weight)])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed)


# Files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_hold_the_same_weights(tiny_model: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    heads = attach(model)
    with torch.no_grad():
        for p in heads.parameters():
            p.add_(0.25)
    assert heads.save(tmp_path) == tmp_path / "mtp_heads.safetensors"
    assert {path.name for path in tmp_path.iterdir()} == {"mtp_heads.safetensors", "mtp_heads_config.json"}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    loaded = load_mtp_heads(tiny_model().to(dtype), tmp_path)
    prepared = prepare_mtp_heads(tiny_model().to(dtype), K, head_type="sequential", path=tmp_path)
    assert torch.equal(torch.rand(1), expected)
    into = tiny_model().to(dtype)
    attached = attach(into, seed=9)
    params = list(attached.parameters())
    assert load_mtp_heads(into, tmp_path) is attached
    assert all(a is b for a, b in zip(params, attached.parameters(), strict=True)), "an optimizer knows them by now"
    for name, x in heads.state_dict().items():
        for found in (loaded, prepared, attached):
            assert torch.equal(found.state_dict()[name], x) and x.dtype == dtype, name


def test_files_of_other_heads_are_refused(tiny_model: Any, tmp_path: Path) -> None:
    attach(tiny_model(), 2).save(tmp_path)
    ParallelHeads(MTPHeadsConfig(2, 32)).attach(tiny_model()).save(tmp_path / "parallel")
    with pytest.raises(ValueError, match="are sequential, but parallel ones.*Set mtp_head_type='sequential'"):
        prepare_mtp_heads(tiny_model(), 2, path=tmp_path)
    with pytest.raises(ValueError, match="are parallel, but sequential ones.*Set mtp_head_type='parallel'"):
        prepare_mtp_heads(other := tiny_model(), 2, head_type="sequential", path=tmp_path / "parallel")
    assert MTPHeads.of(other) is None, "heads of a failed start are gone"
    with pytest.raises(ValueError, match="Ask for 2 heads, or call MTPHeads.detach"):
        prepare_mtp_heads(tiny_model(), 1, head_type="sequential", path=tmp_path)
    with pytest.raises(ValueError, match="hidden size 32, but this model has 16"):
        prepare_mtp_heads(tiny_model(hidden_size=16), 2, head_type="sequential", path=tmp_path)
    with pytest.raises(ValueError, match=r"mtp_block.mlp.down_proj.weight, which is \(32, 64\) instead of \(32, 48\)"):
        load_mtp_heads(other := tiny_model(intermediate_size=48), tmp_path)
    assert MTPHeads.of(other) is None


def test_an_engines_state_dict_and_its_gaps(tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model()
    heads = attach(model, 1)
    whole = {f"module.{name}": tensor + 1 for name, tensor in model.state_dict().items()}
    heads.save(tmp_path, whole)
    loaded = load_mtp_heads(tiny_model(), tmp_path)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, heads.state_dict()[name] + 1)
    with pytest.raises(ValueError, match="does not hold all weights of MTPHeads; gather the whole model"):
        heads.save(tmp_path, {k: v for k, v in whole.items() if "eh_proj" not in k})
